"""How a predictor answers: every setting is part of the journal's key, and a picture is encoded once."""

import dataclasses

import pytest

from molmo_model.config import DecodingConfig, EvalConfig, Quantization, TaskConfig, check_decoding, read_decoding
from molmo_model.data.shard_reader import ShardReader
from molmo_model.errors import ConfigError
from molmo_model.eval.answering import Question
from molmo_model.eval.inference import Predictor
from molmo_model.eval.journal import Identity
from pipelines.predict import decoding_identity

CHECKPOINT = "artifacts/checkpoints/base/step-000000"
CHANGED = {
    "num_beams": 2,
    "length_penalty": 2.0,
    "do_sample": True,
    "seed": 1,
    "temperature": 0.5,
    "top_k": 5,
    "top_p": 0.5,
    "repetition_penalty": 1.1,
    "no_repeat_ngram_size": 3,
    "min_new_tokens": 1,
}


@pytest.fixture
def predictor(assembled, monkeypatch):
    monkeypatch.chdir(assembled)
    return Predictor.load(CHECKPOINT)


@pytest.fixture
def questions(assembled):
    """Two pictures, two questions about each, and the pictures a second time."""
    reader = ShardReader(assembled / "artifacts/shards/digit_scenes")
    examples = [reader.read(row) for row in reader.rows("eval")[:2]]
    assert all(len(example.conversations) > 1 for example in examples)
    return [Question(example, number) for number in (0, 1) for example in examples]


def key(task: TaskConfig, quantization: Quantization = Quantization.none) -> str:
    decoding = decoding_identity(task, EvalConfig(quantization=quantization))
    return Identity("w", "c", "p", "t", "code", {"torch": "1"}, decoding, "fp32").key(["image"], ["prompt"])


@pytest.mark.parametrize("name", DecodingConfig.__dataclass_fields__)
def test_every_decoding_setting_changes_the_key(name):
    task = TaskConfig(dataset="d", metric="m")
    changed = dataclasses.replace(task, decoding=dataclasses.replace(DecodingConfig(), **{name: CHANGED[name]}))
    assert key(changed) != key(task) == key(TaskConfig(dataset="other", metric="n"))


def test_the_other_settings_of_an_answer_change_the_key():
    task = TaskConfig(dataset="d", metric="m")
    keys = [
        key(task),
        key(dataclasses.replace(task, max_new_tokens=31)),
        key(dataclasses.replace(task, keep_image_tokens=0.5)),
        key(task, Quantization.int8),
    ]
    assert len(set(keys)) == 4


def test_settings_that_contradict_each_other_are_refused():
    for wrong, message in [
        ({"do_sample": True, "num_beams": 2}, "one beam"),
        ({"temperature": 0.5}, "temperature is 0.5, but do_sample is off"),
        ({"seed": 3}, "seed is 3, but do_sample is off"),
        ({"length_penalty": 2.0}, "length_penalty is 2.0"),
        ({"min_new_tokens": 9}, "above max_new_tokens 8"),
    ]:
        with pytest.raises(ConfigError, match=f"^here: .*{message}"):
            check_decoding(DecodingConfig(**wrong), 8, "here")
    assert read_decoding(["num_beams=3", "length_penalty=2"], 8, "here") == DecodingConfig(3, 2.0)


def test_a_picture_is_encoded_once_for_all_its_questions(predictor, questions):
    seen = []
    hook = predictor.model.model.vision_backbone.register_forward_hook(
        lambda _, inputs, __: seen.append(len(inputs[0]))
    )
    together = predictor.answer(questions, 6)
    once = list(seen)
    again = [predictor.answer([question], 6)[0] for question in questions]
    beams = predictor.answer(questions, 6, DecodingConfig(num_beams=2))
    hook.remove()
    assert len(once) == 1 and seen == once  # one call for the first batch, none later
    assert (predictor.cache.encoded, predictor.cache.reused) == (2, 2 + 4 + 4)
    assert again == together
    fresh = Predictor.load(CHECKPOINT)
    fresh.cache.max_bytes = 0
    assert fresh.answer(questions, 6) == together
    assert fresh.answer(questions, 6, DecodingConfig(num_beams=2)) == beams


def test_sampled_answers_depend_on_the_question_alone(predictor, questions):
    sampled = DecodingConfig(do_sample=True, temperature=1.5)
    together = predictor.answer(questions, 8, sampled)
    assert [predictor.answer([question], 8, sampled)[0] for question in questions] == together
    assert predictor.answer(questions[::-1], 8, sampled)[::-1] == together
    assert predictor.answer(questions, 8, dataclasses.replace(sampled, seed=1)) != together
    assert predictor.answer([questions[0]] * 2, 8, sampled) == [together[0]] * 2


def test_fewer_image_tokens_are_answered_from_the_same_cache(predictor, questions):
    whole = predictor.answer(questions, 6)
    few = predictor.answer(questions, 6, None, 0.3)
    assert predictor.cache.encoded == 2
    assert [predictor.answer([question], 6, None, 0.3)[0] for question in questions] == few
    assert [answer.prompt_tokens for answer in few] == [answer.prompt_tokens for answer in whole]
