"""The engine `openai`: what it sends, what it makes of servers that fail, and that it answers as the local one."""

import base64
import dataclasses
import itertools
import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from molmo_model.artifacts import read_manifest
from molmo_model.config import DecodingConfig, Engine, EvalConfig, EvalPrecision, Quantization, TaskConfig, TaskKind
from molmo_model.data.example import Conversation, Example, Message
from molmo_model.data.shard_reader import ShardReader
from molmo_model.errors import ConfigError, EvaluationError
from molmo_model.eval import chat_messages, journal, predictions, served
from molmo_model.eval.answering import Asking, Question
from molmo_model.eval.chat_messages import chat_request, fingerprint
from molmo_model.eval.chat_requests import Rules, read_request
from molmo_model.eval.engines import resolved
from molmo_model.eval.served import Patience, Served, checked_url, key_from
from molmo_model.model_config import MessageFormat, PromptTemplates, SystemPrompt
from molmo_model.preprocessing.preprocessor import Preprocessor
from molmo_model.preprocessing.preprocessor_config import PreprocessorConfig
from molmo_model.preprocessing.prompts import PromptFormat, asked
from molmo_model.preprocessing.tokenizer import load_tokenizer
from molmo_model.processing import IMAGE, chat_template
from pipelines import predict
from pipelines.stage import run
from tests.data.builders import picture
from tests.eval.serving import CHECKPOINT, FalseServer, ServerProcess, completion
from tests.eval.synthetic import tiny_params
from tests.preprocessing.test_texts import EVERY

QUICK = Patience(attempts=4, connect_s=2, answer_s=0.5, backoff_s=0.01, most_backoff_s=0.05)
FORM = PromptFormat()
SYSTEMS = (SystemPrompt.none, SystemPrompt.style, SystemPrompt.demo_or_style_v2, SystemPrompt.style_and_length)
TURNS = Conversation(
    "vqa2",
    (
        Message("user", "Which?", options=("a", "b")),
        Message("assistant", "B"),
        Message("user", "How many cats are there?"),
        Message("assistant", points=((1.0, 2.0),), label="cats"),
        Message("user", "Colour?"),
        Message("assistant", "red"),
    ),
)
SILENT = Conversation("long_caption", (Message("user"), Message("assistant", "A cat.")))


def forms():
    for system, frame, words in itertools.product(SYSTEMS, MessageFormat, PromptTemplates):
        yield PromptFormat(system, frame, templates=words, length=4)


def question(talk, images=1, length=None):
    return Question(Example("e", tuple(picture(k) for k in range(images)), (talk,)), length=length)


def questions(count, images=1):
    talks = [Conversation("qa", (Message("user", f"What {k}?"), Message("assistant", "x"))) for k in range(count)]
    return [Question(Example(f"e{k}", (picture(k),) * images, (talk,))) for k, talk in enumerate(talks)]


def engine(server, **more):
    return Served(server.url, "m", FORM, **{"requests": 3, "patience": QUICK, **more})


def ask(one, asked_, asking=None):
    return dict(one.answers(asked_, lambda index: asked_[index], asking or Asking(5)))


# ---- what is sent


@pytest.mark.parametrize("talk", [*EVERY, TURNS, SILENT], ids=lambda talk: talk.style)
def test_our_server_reads_exactly_the_prompt_of_evaluation(talk):
    """For every style, tag, frame and wording: what the server tokenizes is what the local engine would."""
    for form in forms():
        one = question(talk, length=7 if talk.style == "transcript" else None)
        try:
            wanted = asked(talk, form if one.length is None else dataclasses.replace(form, length=one.length))
        except Exception:  # a style without words under these settings: no engine can ask it
            continue
        body = json.loads(json.dumps(chat_request(one, form, "m", Asking(9))))
        read = read_request({**body, "chat_template_kwargs": body.get("chat_template_kwargs", {})}, Rules("m", "other"))
        assert read.verbatim
        assert [image.data for image in read.question.example.images] == [image.data for image in one.example.images]
        assert (read.asking, read.question.length) == (Asking(9), one.length if tagged(form) else None)
        plain = dataclasses.replace(form, templates=PromptTemplates.none)
        plain = plain if read.question.length is None else dataclasses.replace(plain, length=read.question.length)
        assert asked(read.question.example.conversations[0], plain) == wanted


def tagged(form):
    return form.system_prompt not in chat_messages.WITHOUT_TAG


@pytest.mark.parametrize("system", list(SystemPrompt))
def test_the_exported_chat_template_writes_exactly_that_prompt_too(system):
    """As vLLM renders it: pictures as parts of type image, `chat_template_kwargs` as variables."""
    tokenizer = load_tokenizer("molmo_model/preprocessing/tokenizers/bytes512")
    sizes = {"image_size": 64, "patch_size": 16, "pooling_size": (2, 2), "resize": "siglip", "vocab_size": 520}
    for frame in (MessageFormat.none, MessageFormat.role):
        config = PreprocessorConfig(**sizes, overlap_margins=(1, 1), system_prompt=system, message_format=frame)
        template, begin = chat_template(Preprocessor(config, tokenizer)), tokenizer.bos_token or tokenizer.eos_token
        for talk, images in itertools.product([*EVERY, TURNS], (1, 2)):
            one = question(talk, images)
            body = chat_request(one, config.prompts, "m", Asking(9))
            for message in body["messages"]:
                if not isinstance(message["content"], str):
                    message["content"] = [
                        {"type": "image"} if part["type"] == "image_url" else part for part in message["content"]
                    ]
            (text,), _ = render_jinja_template(
                [body["messages"]],
                chat_template=template,
                add_generation_prompt=True,
                **body.get("chat_template_kwargs", {}),
            )
            marks = [f"Image {k + 1}{IMAGE}" for k in range(images)] if images > 1 else [IMAGE] * images
            # answers in between end with a token that the preprocessor adds when it makes tokens of the texts
            ends = itertools.cycle(["", tokenizer.eos_token])
            said = [part + end for part, end in zip(asked(talk, config.prompts), ends, strict=False)]
            assert text == begin + "".join([*marks, *said])


def test_sampling_goes_along_and_greedy_says_so():
    drawn = DecodingConfig(do_sample=True, temperature=0.7, top_p=0.9, top_k=5, seed=3, min_new_tokens=2)
    for decoding in (DecodingConfig(), drawn, DecodingConfig(repetition_penalty=1.3)):
        body = chat_request(question(EVERY[6]), FORM, "m", Asking(9, decoding))
        assert read_request(body, Rules("m", "qa")).asking == Asking(9, decoding)
    assert chat_request(question(EVERY[6]), FORM, "m", Asking(9))["temperature"] == 0
    assert body["messages"][0]["content"][0]["image_url"]["url"] == "data:image/png;base64," + base64.b64encode(
        picture(0).data
    ).decode("ascii")


def test_what_a_server_cannot_do_is_refused_by_name():
    task, ours = TaskConfig(dataset="d", metric="m"), EvalConfig(engine=Engine.openai, served_model="m")
    assert resolved(ours, task, Path("no such folder")) is Engine.openai
    for name, changes in {
        r"keep_image_tokens 0\.5": {"keep_image_tokens": 0.5},
        "max_crops 36": {"max_crops": 36},
        "max_frames 8": {"max_frames": 8},
        "kind loss": {"kind": TaskKind.loss},
        "num_beams 3": {"decoding": DecodingConfig(num_beams=3)},
        "no_repeat_ngram_size 2": {"decoding": DecodingConfig(no_repeat_ngram_size=2)},
    }.items():
        with pytest.raises(ConfigError, match=name):
            resolved(ours, dataclasses.replace(task, **changes), Path())
    for name, changes in {"int4": {"quantization": Quantization.int4}, "served_model": {"served_model": None}}.items():
        with pytest.raises(ConfigError, match=name):
            resolved(dataclasses.replace(ours, **changes), task, Path())
    with pytest.raises(ConfigError, match="num_beams 3"):
        next(Served("http://a/v1", "m", FORM).answers([], lambda index: None, Asking(5, DecodingConfig(num_beams=3))))
    for url in ("127.0.0.1:8000/v1", "ftp://a/v1", "", "http://me:geheim@a/v1", "http://a/v1?key=geheim"):
        with pytest.raises(ConfigError, match="engine_url") as found:
            checked_url(url)
        assert "geheim" not in str(found.value)


# ---- servers that fail


def test_answers_come_as_they_are_ready_and_so_many_at_once():
    def reply(body, count):
        name = body["messages"][0]["content"][-1]["text"]
        time.sleep(0.3 if "What 0?" in name else 0)
        return 200, completion(f" {name} ")

    with FalseServer(reply) as server:
        one = engine(server)
        order = list(one.answers(several := questions(9), lambda index: several[index], Asking(5)))
        assert order[0][0] != 0  # the slow one holds nobody up
        assert {index: answer.text for index, answer in order} == {k: f"What {k}?" for k in range(9)}
        assert 2 <= server.most <= 3
        assert one.made == {"requests": 3}


def test_what_passes_is_tried_again():
    bad = iter([(429, {}), (500, {"error": {"message": "oh"}}), (200, b'{"choices": [{"mess'), (200, completion("7"))])

    def reply(body, count):
        if "What 0?" in str(body):
            return next(bad)
        if "What 1?" in str(body):
            return (0, None) if count == 1 else (-1, None) if count == 2 else (200, completion("8"))
        return 200, completion()

    with FalseServer(reply) as server:
        found = ask(engine(server), questions(3))
    assert [found[k].text for k in range(3)] == ["7", "8", "7"]
    assert len(server.asked) == 4 + 3 + 1


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((503, {"error": {"message": "busy \x1b[31m geheim"}}), r"status 503: busy  \[31m \*\*\* \(4 attempts\)"),
        ((0, None), r"no answer within 0.5 s \(4 attempts\)"),
        ((-1, None), r"no connection: .*\(4 attempts\)"),
        ((200, []), "status 200, but no answer that can be read"),
        ((200, {"choices": [], "usage": {}}), "status 200, but no answer that can be read: IndexError"),
        ((200, completion(usage=None)), "status 200, but no answer that can be read: TypeError"),
        ((200, b"<html>geheim"), "status 200, but no answer that can be read"),
        ((401, {"error": {"message": "wrong key geheim"}}), r"status 401: wrong key \*\*\*"),
        ((307, b""), "status 307"),
    ],
)
def test_what_stays_ends_the_run_with_url_reason_and_item(reply, message):
    def replies(body, count):
        return (200, completion("ok")) if "What 0?" in str(body) else reply

    with FalseServer(replies) as server:
        one, several, got = engine(server, key="geheim", requests=1), questions(40), []
        with pytest.raises(EvaluationError, match=message) as found:
            for answer in one.answers(several, lambda index: several[index], Asking(5)):
                got.append(answer)
    assert [answer.text for _, answer in got] == ["ok"]  # what was answered was handed on
    assert server.url in str(found.value)
    assert "item e1#0" in str(found.value)
    assert "geheim" not in str(found.value)
    assert len(server.asked) <= 1 + 4  # the other 38 are not even tried
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer geheim"}


def test_questions_that_the_server_will_not_have_do_not_keep_it_from_the_others():
    filtered = completion("")
    filtered["choices"][0]["finish_reason"] = "content_filter"

    def reply(body, count):
        name = body["messages"][0]["content"][-1]["text"]
        return {"What 2?": (400, {"error": {"message": "too long"}}), "What 5?": (200, filtered)}.get(
            name, (200, completion())
        )

    with FalseServer(reply) as server:
        one, several, got = engine(server), questions(20), []
        with pytest.raises(EvaluationError, match="2 of 20 questions failed") as found:
            for answer in one.answers(several, lambda index: several[index], Asking(5)):
                got.append(answer)
        assert len(got) == 18
        assert "item e2#0: status 400: too long" in str(found.value)
        assert "item e5#0: the answer ended with finish_reason 'content_filter'" in str(found.value)
        with pytest.raises(EvaluationError, match="8 of 50"):  # but a server that will have none is left alone
            ask(Served(server.url, "m", FORM, requests=1, patience=QUICK), [several[2]] * 50)


def test_a_server_with_another_model_is_refused_before_anything_is_asked():
    def models(**facts):
        return 200, {"data": [{"id": "m", "molmo": facts}]}

    for listed, more, message in (
        ((200, {"data": [{"id": "other"}]}), {}, "served_model is 'm', but .* has 'other'"),
        (models(fingerprint="molmo-2"), {"fingerprint": "molmo-1"}, "its fingerprint is molmo-2.* molmo-1"),
        (models(precision="bf16"), {"precision": "fp32"}, "precision bf16, eval.precision is fp32"),
    ):
        with FalseServer(lambda body, count: (200, completion()), listed) as server:
            with pytest.raises(ConfigError, match=message):
                ask(engine(server, **more), questions(2))
            assert server.asked == []
    for listed in ((404, {}), models(fingerprint="molmo-1", precision="fp32"), (200, {"data": [{"id": "m"}]})):
        with FalseServer(lambda body, count: (200, completion(system_fingerprint="fp_x")), listed) as server:
            assert len(ask(engine(server, fingerprint="molmo-1", precision="fp32"), questions(2))) == 2
    exchanged = FalseServer(lambda body, count: (200, completion(system_fingerprint="molmo-2")))  # meanwhile
    with exchanged as server, pytest.raises(ConfigError, match="answers with another checkpoint"):
        ask(engine(server, fingerprint="molmo-1"), questions(2))


def test_who_loses_interest_leaves_nothing_behind():
    with FalseServer(lambda body, count: (200, completion()) if "What 0?" in str(body) else (0, None)) as server:
        several = questions(9)
        answers = engine(server, patience=Patience()).answers(several, lambda index: several[index], Asking(5))
        assert next(answers)[0] == 0
        started = time.monotonic()
        answers.close()
        assert time.monotonic() - started < 20  # not the 300 s that the others would be waited for


def test_keys_come_from_the_environment_and_films_nowhere(monkeypatch):
    monkeypatch.setenv("SERVED_KEY", " geheim\n")
    assert key_from("SERVED_KEY") == "geheim"
    assert key_from("NO_SUCH_VARIABLE") == ""
    monkeypatch.setenv("SERVED_KEY", "gehéim")
    with pytest.raises(ConfigError, match="SERVED_KEY") as found:
        key_from("SERVED_KEY")
    assert "geh" not in str(found.value)


# ---- as a part of the stage


@pytest.fixture
def project(assembled, tmp_path, monkeypatch):
    folder = tmp_path / "project"
    shutil.copytree(assembled, folder)
    monkeypatch.chdir(folder)
    return folder


def params(url=None, **changes):
    settings = tiny_params()
    settings.eval.engine, settings.eval.served_model = Engine.openai, CHECKPOINT
    settings.runtime.engine_url, settings.runtime.engine_requests = url, 4
    for name, value in changes.items():
        setattr(settings.eval, name, value)
    return settings


def cell(task):
    return {"checkpoint": CHECKPOINT, "task": task}


def keys(settings, task="scene_count"):
    reader = ShardReader(f"artifacts/shards/{settings.tasks[task].dataset}")
    return predict.plan(settings, cell(task), Path("artifacts/checkpoints") / CHECKPOINT, reader).keys


def test_the_key_knows_the_model_s_name_and_not_where_it_is(project):
    plain = keys(params("http://a/v1"))
    moved = params("http://b:9/v1")
    moved.runtime.engine_key, moved.runtime.engine_requests = "OTHER", 99
    assert keys(moved) == plain
    assert not set(keys(params("http://a/v1", served_model="other"))) & set(plain)
    assert not set(keys(params("http://a/v1", engine=Engine.generate))) & set(plain)
    assert not set(keys(params("http://a/v1", precision=EvalPrecision.bf16))) & set(plain)
    assert chat_messages.NOT_ANSWERING == journal.OTHER_FILES


def test_without_a_server_the_stage_says_what_is_missing(project):
    with pytest.raises(ConfigError, match=r"runtime\.engine_url"):
        run(predict.STAGE, params(), **cell("scene_count"))
    settings = params("http://127.0.0.1:9/v1")
    settings.tasks["scene_count"].decoding.num_beams = 2
    with pytest.raises(ConfigError, match="num_beams 2"):
        run(predict.STAGE, settings, **cell("scene_count"))


@pytest.mark.slow
def test_a_served_model_answers_as_the_local_one_and_a_killed_server_costs_nothing(
    project, assembled, serving, monkeypatch
):
    monkeypatch.setattr(served, "PATIENCE", dataclasses.replace(QUICK, answer_s=60))

    def rows(settings, task):
        run(predict.STAGE, settings, **cell(task))
        return predictions.read_predictions(predict.STAGE.target(cell(task)) / predictions.FILE)

    tasks = list(tiny_params().tasks)
    local = {task: rows(params(engine=Engine.auto), task) for task in tasks}
    assert {task: rows(params(serving.url), task) for task in tasks} == local
    assert fingerprint(read_manifest(assembled / "artifacts/checkpoints" / CHECKPOINT)).startswith("molmo-")

    # one more token is another question to the journal: all is asked again, of a server that stops in the middle
    def longer(settings):
        settings.tasks["scene_count"].max_new_tokens = 6
        return settings

    local = rows(longer(params(engine=Engine.auto)), "scene_count")
    asked_, append = [], journal.Journal.append
    with ServerProcess(assembled, "batch=1") as other:

        def spy(self, answers, *more):
            asked_.extend(answers := list(answers))
            append(self, answers, *more)
            if len(asked_) == 3:
                code, errors = other.stop(signal.SIGTERM)
                assert (code, "Traceback" in errors) == (0, False)

        monkeypatch.setattr(journal.Journal, "append", spy)
        with pytest.raises(EvaluationError, match=f"{other.url}.*questions failed.*run it again to ask only the rest"):
            rows(longer(params(other.url)), "scene_count")
    assert 3 <= len(asked_) < len(local)
    assert rows(longer(params(serving.url)), "scene_count") == local  # where the model is served does not matter
    assert len(asked_) == len({key for key, _ in asked_}) == len(local)
