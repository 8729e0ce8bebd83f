"""Crops and frames of a task in place of the checkpoint's, and questions about several pictures and films."""

from dataclasses import replace

import pytest

from molmo_model.artifacts import write_manifest
from molmo_model.config import DatasetConfig, TaskConfig
from molmo_model.data.datasets import FAMILIES
from molmo_model.data.example import Conversation, Example, Image, Message
from molmo_model.data.shard_reader import ShardReader
from molmo_model.data.shards import write_shards
from molmo_model.errors import ConfigError
from molmo_model.eval import tasks
from molmo_model.eval.answering import Asking, Question
from molmo_model.eval.inference import Predictor
from molmo_model.eval.limits import limited
from molmo_model.model_config import CropMode
from molmo_model.preprocessing.preprocessor import Preprocessor
from tests.data.snapshots import png
from tests.eval import published_sets

CHECKPOINT = "base/step-000000"
TALK = Conversation("eval_short_answer", (Message("user", "What?"), Message("assistant", "a cup")))


@pytest.fixture(scope="module")
def predictor(assembled):
    return Predictor.load(assembled / "artifacts/checkpoints" / CHECKPOINT)


def pictures(*sizes):
    return tuple(Image(png(i, *size), *size, "PNG") for i, size in enumerate(sizes))


def question(*sizes):
    return Question(Example("e" + str(sizes), pictures(*sizes), (TALK,)))


def answers(predictor, questions, **asking):
    found = dict(predictor.answers(questions, questions.__getitem__, Asking(4, **asking)))
    return [found[index] for index in range(len(questions))]


def test_fewer_crops_are_what_a_checkpoint_with_fewer_would_show(predictor):
    """And the same model goes on with its own number after that, though it remembers image tokens."""
    asked = [question((300, 100)), question((90, 90)), question((64, 64))]
    own = answers(predictor, asked)
    fewer = answers(predictor, asked, max_crops=1)
    config = replace(predictor.preprocessor.config, max_crops=1)
    other = Predictor(predictor.model, Preprocessor(config, predictor.preprocessor.tokenizer))
    assert fewer == answers(other, asked)
    assert fewer[0].prompt_tokens < own[0].prompt_tokens
    assert answers(predictor, asked) == own
    assert predictor.limited(asked, Asking(4)) is predictor
    measured = [one.prompt_tokens for one in answers(predictor, asked, max_crops=1, measure=True)]
    assert measured == [one.prompt_tokens for one in fewer]


def test_a_checkpoint_of_one_crop_refuses_crops(predictor):
    config = replace(predictor.preprocessor.config, crop_mode=CropMode.resize)
    single = Preprocessor(config, predictor.preprocessor.tokenizer)
    with pytest.raises(ConfigError, match=r"max_crops is 12.*crop_mode resize.*max_crops: null"):
        limited(single, Asking(4, max_crops=12))
    assert limited(single, Asking(4)) is single


def test_a_question_may_have_more_pictures_than_training_allowed(predictor):
    """As benchmarks of many pictures do; each picture counts, in its order."""
    most = predictor.preprocessor.config.max_images
    many = question(*[(64, 64)] * (most + 2))
    few = question(*[(64, 64)] * 2)
    first, second = answers(predictor, [many, few])
    assert first.prompt_tokens > second.prompt_tokens * (most + 1) / 2
    assert predictor.preprocessor.config.max_images == most


def film_example(tmp_path, monkeypatch):
    published_sets.write("egoschema", tmp_path, monkeypatch)
    ((_, example),) = FAMILIES["egoschema"].make(DatasetConfig(family="egoschema", path=str(tmp_path)), 0)
    return example


def test_fewer_frames_of_a_film(predictor, tmp_path, monkeypatch):
    asked = [Question(film_example(tmp_path, monkeypatch))]
    own, one, two = (answers(predictor, asked, max_frames=most)[0] for most in (None, 1, 2))
    assert one.prompt_tokens < two.prompt_tokens < own.prompt_tokens
    config = predictor.preprocessor.config
    config = replace(config, video=replace(config.video, max_frames=2))
    other = Predictor(predictor.model, Preprocessor(config, predictor.preprocessor.tokenizer))
    assert [two] == answers(other, asked)


def test_items_of_several_pictures_and_films_keep_their_order_and_sizes(tmp_path, monkeypatch):
    """Through shards: digests of the files in their order, and all sizes in the references."""
    several = Example("several", pictures((20, 10), (8, 6), (30, 40)), (TALK, TALK))
    film = film_example(tmp_path / "set", monkeypatch)
    clips = tuple(replace(film.videos[0], clip=clip) for clip in (None, (0.0, 0.5)))
    films = Example("films", (), (TALK,), videos=clips)
    folder = tmp_path / "shards"
    write_shards([("eval", one) for one in (several, films, Example("text", (), (TALK,)))], folder, 10**7)
    write_manifest(folder, schema="molmo/shards", version=1, summary={}, params={}, inputs={}, code="c")
    found = {item.id: item for item in tasks.items(TaskConfig(dataset="d", metric="m"), "t", ShardReader(folder))}
    assert list(found) == ["several#0", "several#1", "films#0", "text#0"]
    assert found["several#1"].images == tuple(image.sha256 for image in several.images)
    assert found["films#0"].images == tuple(clip.identity for clip in clips) and len(set(found["films#0"].images)) == 2
    references = {name: tasks.references(item) for name, item in found.items()}
    assert references["several#0"]["sizes"] == [[20, 10], [8, 6], [30, 40]]
    assert (references["several#0"]["width"], references["several#0"]["height"]) == (20, 10)
    assert references["films#0"]["sizes"] == [[64, 48]] * 2 and references["films#0"]["width"] == 64
    assert references["text#0"]["width"] is None and "sizes" not in references["text#0"]
