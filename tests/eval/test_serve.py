"""Our model behind OpenAI's chat API: what it takes, what it refuses, and what stands in one batch."""

import base64
import json
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from starlette.testclient import TestClient

from molmo_model.errors import ConfigError, DataError
from molmo_model.eval import chat_requests, server
from molmo_model.eval.answering import Answer
from molmo_model.eval.chat_requests import Rules, cut, read_request
from molmo_model.eval.server import Desk, application, fetcher
from pipelines import serve
from tests.data.builders import picture
from tests.data.web import Site, answer, redirect
from tests.eval.serving import CHECKPOINT

PNG = picture(1).data
URIS = ["data:image/png;base64," + base64.b64encode(picture(k).data).decode() for k in (1, 2)]
URI = URIS[0]
ASKED = {"role": "user", "content": "What?"}


def body(*messages, **parameters):
    return {"model": "m", "messages": list(messages) or [ASKED], **parameters}


def about(url, text="What?"):
    """A question about a picture."""
    return {
        "role": "user",
        "content": [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}],
    }


class Echo:
    """Says what it was asked; words in the question do other things."""

    def __init__(self):
        self.batches, self.go, self.began = [], threading.Event(), threading.Event()
        self.go.set()

    @property
    def made(self):
        return {}

    def answers(self, questions, read, asking):
        asked = [read(index) for index in range(len(questions))]
        texts = [one.example.conversations[0].messages[-2].text or "" for one in asked]
        self.batches.append(texts)
        self.began.set()
        assert self.go.wait(20)
        for index, text in enumerate(texts):
            if "crash" in text:
                raise RuntimeError("of the model, with its secrets")
            if "bad" in text:
                raise DataError("the question cannot be written")
            said = f"{text}|{len(asked[index].example.images)}|{asked[index].example.conversations[0].style}"
            yield index, Answer(said, "stop", 3, 7)


@contextmanager
def serving_echo(rules=None, key="", **desk):
    engine = Echo()
    letter = Echo()
    desk = Desk({False: engine, True: letter}, **desk)
    app = application(desk, rules or Rules("m", "qa"), key=key, fingerprint="molmo-1")
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        client.engine, client.letter, client.desk = engine, letter, desk
        yield client
        engine.go.set()


@pytest.fixture
def client():
    with serving_echo() as client:
        yield client


def say(client, *messages, **parameters):
    """A request's answer, or its error's message, parameter and status."""
    response = client.post("/v1/chat/completions", json=body(*messages, **parameters))
    raw = response.json()
    if response.status_code == 200:
        return raw["choices"][0]["message"]["content"]
    return raw["error"]["message"], raw["error"]["param"], response.status_code


# ---- what is taken


def test_a_question_is_answered_in_openais_form(client):
    raw = client.post("/v1/chat/completions", json=body(about(URI), max_tokens=5, n=1, user="me", tools=None)).json()
    assert raw["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "What?|1|qa", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert raw["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    assert (raw["object"], raw["model"], raw["system_fingerprint"]) == ("chat.completion", "m", "molmo-1")
    assert client.get("/health").json() == {"status": "ok"}
    assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["m"]
    assert client.get("/v1/models/m").json()["molmo"] == {"fingerprint": "molmo-1"}
    assert client.get("/v1/models/other").status_code == 404


def test_turns_and_pictures_are_those_of_the_messages():
    talk = [about(URI, "a"), {"role": "assistant", "content": [{"type": "text", "text": "b"}]}, about(URI, "c")]
    talk[2]["content"].insert(0, {"type": "image_url", "image_url": URI})  # some clients leave the object out
    read = read_request(body(*talk, style="vqa2", options=["x", "y"], length=4), Rules("m", "qa"))
    (conversation,) = read.question.example.conversations
    assert [(turn.role, turn.text) for turn in conversation.messages[:3]] == [
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
    ]
    assert conversation.messages[2].options == ("x", "y")
    assert (conversation.style, read.question.length, read.verbatim) == ("vqa2", 4, False)
    assert [image.data for image in read.question.example.images] == [PNG] * 3
    assert {(image.width, image.height) for image in read.question.example.images} == {(9, 7)}


def test_questions_are_of_one_example_exactly_if_they_are_about_the_same_pictures():
    """Engines read the pictures of an example once."""

    def name(*urls):
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        message = {"role": "user", "content": [{"type": "text", "text": "What?"}, *parts]}
        return read_request(body(message), Rules("m", "qa")).question.example.id

    same = [URI], [URIS[1]], URIS, URIS[::-1], []
    assert len({name(*urls) for urls in same}) == len(same)
    assert name(URI) == read_request(body(about(URI, "Other?")), Rules("m", "qa")).question.example.id


def test_decoding_follows_the_parameters():
    def asking(**parameters):
        return read_request(body(**parameters), Rules("m", "qa", max_new_tokens=33)).asking

    assert asking() == asking(temperature=0, top_p=0.5, seed=3) == asking(max_tokens=33)
    assert asking(max_completion_tokens=4, max_tokens=4).max_new_tokens == 4
    drawn = asking(temperature=0.5, top_p=0.9, top_k=-1, seed=-1, repetition_penalty=1.5, min_tokens=2).decoding
    assert (drawn.do_sample, drawn.temperature, drawn.top_p, drawn.top_k) == (True, 0.5, 0.9, 0)
    assert (drawn.seed, drawn.repetition_penalty, drawn.min_new_tokens) == (10**18 - 1, 1.5, 2)


def test_a_stream_says_the_same(client):
    asked = body(stream=True, stream_options={"include_usage": True}, stop=["|"])
    with client.stream("POST", "/v1/chat/completions", json=asked) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines.pop() == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert events.pop()["usage"]["total_tokens"] == 10
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == "What?"
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, "stop"]


def test_an_answer_ends_in_front_of_the_first_stop():
    assert cut("abcd", ["d", "bc"]) == ("a", True)
    assert cut("abcd", ["x"]) == cut("abcd", []) == ("abcd", False)


# ---- what is refused


def bomb(width, height):
    """A picture that says it is large; its pixels are missing."""

    def part(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + head + part(b"IDAT", zlib.compress(b"0"))
    return "data:image/png;base64," + base64.b64encode(data).decode()


NONSENSE = {
    "the model 'x' is not served here": {"model": "x"},
    "must be a list of 1 to": {"messages": []},
    "messages must be a list": {"messages": "What?"},
    "messages[0] must be a JSON object": {"messages": ["What?"]},
    "this model knows no system prompt": {"messages": [{"role": "system", "content": "Be kind."}, ASKED]},
    "messages[0] is of role 'tool'": {"messages": [{"role": "tool", "content": "x"}]},
    "messages[1] is of role 'user'; user and assistant take turns": {"messages": [ASKED, ASKED]},
    "end with a question": {"messages": [ASKED, {"role": "assistant", "content": "x"}]},
    "messages[0].content must be text": {"messages": [{"role": "user", "content": 7}]},
    "messages[0].content[0] is of type 'video_url'": {
        "messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:"}}]}]
    },
    "messages[1].content[0] is of type 'image_url'": {
        "messages": [ASKED, {"role": "assistant", "content": about(URI)["content"][1:]}, ASKED]
    },
    "must be text that is not empty": {"messages": [{"role": "user", "content": "  "}]},
    "images at most": {"messages": [{"role": "user", "content": about(URI)["content"][1:] * 65}]},
    "max_tokens must be a whole number": {"max_tokens": 2.5},
    "max_tokens is 0; it must be at least 1": {"max_tokens": 0},
    "give one of them": {"max_tokens": 2, "max_completion_tokens": 3},
    "temperature must be a number": {"temperature": "0"},
    "temperature must be a number ": {"temperature": True},
    "it must lie between": {"temperature": 1e8},
    "top_p is 7": {"temperature": 1, "top_p": 7},
    "min_new_tokens 9 is above": {"min_tokens": 9, "max_tokens": 2},
    "n must be 1": {"n": 2},
    "response_format must be": {"response_format": {"type": "json_object"}},
    "logit_bias must be {}": {"logit_bias": {"5": 1}},
    "the parameter 'best' is not known here": {"best": 1},
    "stop must be a text": {"stop": [""]},
    "stream must be true or false": {"stream": "yes"},
    "stream_options must be a JSON object": {"stream_options": 1},
    "options must be a list of texts": {"options": [1, 2]},
    "offers 2 to 26": {"options": ["one"]},
    "style must be the name": {"style": {"a": 1}},
    "length is -1": {"length": -1},
    "the chat template knows style and length, not 'x'": {"chat_template_kwargs": {"x": 1}},
    "takes to the letter": {"chat_template_kwargs": {"style": "qa"}, "style": "qa"},
    "is no data:image/...;base64": {"messages": [about("data:image/png,raw")]},
    "is no valid base64": {"messages": [about("data:image/png;base64,@@@")]},
    "cannot be decoded": {"messages": [about("data:image/png;base64,aGVsbG8=")]},
    "more than 50000000 pixels": {"messages": [about(bomb(100_000, 100_000))]},
    "this server opens no URLs": {"messages": [about("http://169.254.169.254/latest/meta-data")]},
    "this server opens no URLs ": {"messages": [about("file:///etc/passwd")]},
    ".url must be text": {"messages": [about(None)]},
}


def test_nonsense_is_refused_by_name_and_hurts_nobody(client):
    for message, changes in NONSENSE.items():
        response = client.post("/v1/chat/completions", json=body(**changes))
        error = response.json()["error"]
        assert message.strip() in error["message"], (message, error)
        assert 400 <= response.status_code < 500, message
        assert error["type"] == "invalid_request_error"
        assert len(error["message"]) < 600
    assert client.engine.batches == []
    assert say(client) == "What?|0|qa"


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"\xff\xfe", b'{"max_tokens": NaN}', b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}"]
)
def test_what_is_no_json_object_is_refused(client, raw):
    response = client.post("/v1/chat/completions", content=raw, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_requests_are_bounded(client, monkeypatch):
    monkeypatch.setattr(server, "MAX_BODY_BYTES", 2000)
    text = {"role": "user", "content": "a" * 2500}
    assert say(client, text)[2] == 413
    monkeypatch.setattr(chat_requests, "MAX_IMAGE_BYTES", 20)
    assert say(client, about(URI))[2] == 413
    monkeypatch.setattr(chat_requests, "MAX_LETTERS", 100)
    assert say(client, {"role": "user", "content": "a" * 101})[2] == 413
    plain = client.post("/v1/chat/completions", content=json.dumps(body()), headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415  # what a web page may send to this machine without asking
    assert client.get("/v1/chat/completions").status_code == 405
    assert client.post("/v1/nothing").json()["error"]["code"] == "not_found"


def test_a_key_is_wanted_where_there_is_one():
    with serving_echo(key="geheim") as client:
        for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": "geheim"}, {"Authorization": "Bearer é"}):
            found = client.get("/v1/models", headers={k: v.encode() for k, v in headers.items()})
            assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
        assert say(client)[2] == 401
        assert client.get("/v1/models", headers={"Authorization": "Bearer geheim"}).status_code == 200
        assert client.get("/health").status_code == 200


def test_urls_are_opened_only_where_they_are_public(tmp_path):
    with Site({"/a.png": answer(PNG), "/b": redirect("http://10.0.0.1/"), "/c": answer(b"text")}) as site:
        fetch = fetcher(tmp_path, loopback=True)
        assert fetch(site.url("/a.png")) == PNG
        for path in ("/b", "/c", "/d"):
            with pytest.raises(DataError):
                fetch(site.url(path))
        guarded = fetcher(tmp_path)
        for host in ("127.0.0.1", "localhost", "[::1]", "0x7f000001", "2130706433"):
            with pytest.raises(DataError, match="cannot be had"):
                guarded(site.url("/a.png", host))
        assert site.asked == {"/a.png": 1, "/b": 1, "/c": 1, "/d": 1}
        assert list(tmp_path.iterdir()) == []
        with serving_echo(Rules("m", "qa", fetch)) as client:
            assert say(client, about(site.url("/a.png"))) == "What?|1|qa"
            assert "this server opens no URLs" in say(client, about("ftp://example.org/a"))[0]


# ---- what stands in one batch


def at_once(client, *requests):
    """What is said to requests that all wait before an earlier one is answered."""
    client.engine.go.clear()
    with ThreadPoolExecutor(len(requests) + 1) as pool:
        first = pool.submit(say, client)
        assert client.engine.began.wait(20)
        said = [pool.submit(say, client, {"role": "user", "content": text}, **more) for text, more in requests]
        wait_for(lambda: client.desk._queue.qsize() == len(requests))
        client.engine.go.set()
        assert first.result() == "What?|0|qa"
        return [one.result() for one in said]


def wait_for(true):
    for _ in range(2000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it never came to that")


def test_requests_that_wait_are_answered_together(client):
    cool, warm = {}, {"temperature": 0.7}
    said = at_once(client, ("a", cool), ("b", warm), ("c", cool), ("d", {"chat_template_kwargs": {}}), ("e", cool))
    assert said == [f"{text}|0|qa" for text in "abcde"]
    assert sorted(map(sorted, client.engine.batches[1:])) == [["a", "c", "e"], ["b"]]
    assert client.letter.batches == [["d"]]


def test_one_bad_question_spoils_no_other(client, capfd):
    said = at_once(client, ("a", {}), ("crash", {}), ("bad", {}), ("b", {}))
    assert [said[0], said[3]] == ["a|0|qa", "b|0|qa"]
    assert said[1] == ("the model could not answer; the server's log says why", None, 500)
    assert said[2] == ("the question cannot be written", None, 400)
    assert say(client) == "What?|0|qa"


def test_batches_have_a_bound_and_so_has_the_queue():
    with serving_echo(most=2, waiting=4) as client:
        at_once(client, *((letter, {}) for letter in "abcd"))
        assert [len(batch) for batch in client.engine.batches] == [1, 2, 2]
    with serving_echo(waiting=1) as client:
        client.engine.go.clear()
        with ThreadPoolExecutor(3) as pool:
            first = pool.submit(say, client)
            assert client.engine.began.wait(20)
            second = pool.submit(say, client)
            wait_for(client.desk._queue.full)
            busy = client.post("/v1/chat/completions", json=body())
            assert (busy.status_code, busy.headers["retry-after"]) == (429, "1")
            client.engine.go.set()
            assert first.result() == second.result() == "What?|0|qa"


def test_who_waits_while_the_server_stops_is_told(client):
    client.engine.go.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(say, client)
        assert client.engine.began.wait(20)
        second = pool.submit(say, client)
        wait_for(lambda: client.desk._queue.qsize() == 1)
        client.desk.close()
        client.engine.go.set()
        assert first.result() == "What?|0|qa"
        assert second.result() == say(client) == ("the server is stopping", None, 503)
        assert client.get("/health").status_code == 503


# ---- the command


def test_the_command_line_is_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("SERVER_KEY", "geheim")
    for words, message in {
        "port=80": "checkpoint= is missing",
        "checkpoint=a hots=b": "is no option",
        "checkpoint=a port=99999": "from 0 to 65535",
        "checkpoint=a port=1 port=2": "given twice",
        "checkpoint=a precision=fp8": "fp8",
        "checkpoint=a engine=openai": "openai",
        "checkpoint=a urls=yes": "true or false",
        "checkpoint=a key=NO_SUCH_VARIABLE": "no such environment variable",
        "checkpoint=a host=0.0.0.0": "can be reached from other machines",
        "checkpoint=a host=example.org": "can be reached from other machines",
    }.items():
        with pytest.raises(ConfigError, match=message):
            serve.parse(words.split())
    assert serve.parse(["checkpoint=runs/sft/step-1", "host=0.0.0.0", "key=SERVER_KEY"]).key == "geheim"
    assert serve.parse(["checkpoint=runs/sft/step-1"]).name == "sft/step-1"


@pytest.mark.slow
def test_the_model_itself_answers_alike_alone_and_in_company(serving):
    from molmo_model.eval.inference import Predictor  # a checkpoint of its own, asked without any server

    predictor = Predictor.load(serving.folder / "artifacts/checkpoints" / CHECKPOINT)
    texts = ["How many?", "What is it? " * 9, "Point to the 7."]
    asked = [body(about(uri, text), model=CHECKPOINT, max_tokens=n) for uri in URIS for text in texts for n in (3, 6)]
    asked += [{**one, "temperature": 1.5, "seed": 5} for one in asked[:2]]
    wanted = []
    for one in asked:
        read = read_request(one, Rules(CHECKPOINT, "qa"))
        (said,) = predictor.answer([read.question], read.asking.max_new_tokens, read.asking.decoding)
        wanted.append((said.text, said.finish_reason, said.tokens, said.prompt_tokens))

    def post(one):
        raw = httpx.post(f"{serving.url}/chat/completions", json=one, timeout=60).json()
        (choice,), usage = raw["choices"], raw["usage"]
        text, reason = choice["message"]["content"], choice["finish_reason"]
        return text, reason, usage["completion_tokens"], usage["prompt_tokens"]

    assert [post(one) for one in asked] == wanted
    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(post, asked)) == wanted
    long = httpx.post(f"{serving.url}/chat/completions", json={**asked[0], "max_tokens": 10**6}).json()
    assert long["error"]["code"] == "context_length_exceeded"


def test_a_place_that_is_taken_is_named():
    with serve._listen("127.0.0.1", 0) as place:
        port = place.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port={port}: cannot listen there"):
            serve._listen("127.0.0.1", port)
