"""Which conversations a task asks, and what they are compared with."""

import json

import pytest

from molmo_model.config import TaskConfig
from molmo_model.data.shard_reader import ShardReader
from molmo_model.errors import EvaluationError
from molmo_model.eval import tasks


@pytest.fixture(scope="module")
def reader(evaluated):
    return ShardReader(evaluated / "artifacts" / "shards" / "digit_scenes")


def task(**changes):
    return TaskConfig(dataset="digit_scenes", metric="exact_match", **changes)


def test_items_are_the_conversations_of_the_styles_in_index_order(reader):
    asked = tasks.items(task(styles=["scene_qa", "scene_point"]), "t", reader)
    expected = [
        f"{example.id}#{number}"
        for example in map(reader.read, reader.rows("eval"))
        for number, conversation in enumerate(example.conversations)
        if conversation.style in {"scene_qa", "scene_point"}
    ]
    assert [item.id for item in asked] == expected
    assert len(set(expected)) == len(expected) > 0
    for item in asked:
        assert item.images == tuple(image.sha256 for image in reader.read(item.row).images)
        assert {len(image.data) for image in item.example.images} == {1}


def test_no_styles_ask_all_and_max_examples_limits(reader):
    everything = tasks.items(task(), "t", reader)
    assert len(everything) == sum(reader.index["n_conversations"][row].as_py() for row in reader.rows("eval"))
    first = tasks.items(task(max_examples=3), "t", reader)
    assert [item.id for item in first] == [item.id for item in everything[:3]]


def test_the_split_is_that_of_the_task(reader):
    assert all("train" in item.id for item in tasks.items(task(split="train"), "t", reader))
    assert all("eval" in item.id for item in tasks.items(task(), "t", reader))


def test_a_task_without_items_is_refused_with_the_styles_there_are(reader):
    with pytest.raises(EvaluationError, match=r"tasks\.mine.*scene_qua.*scene_caption, scene_count"):
        tasks.items(task(styles=["scene_qua"]), "mine", reader)


def test_references_keep_points_size_and_all_metadata(reader):
    item = tasks.items(task(styles=["scene_point"]), "t", reader)[0]
    references = tasks.references(item)
    answer = item.asked.messages[-1]
    assert references["points"] == [list(point) for point in answer.points]
    assert references["answer"].startswith("<point")
    assert references["metadata"] == item.asked.metadata
    assert references["example_metadata"] == item.example.metadata
    assert (references["width"], references["height"]) == (96, 96)
    assert json.loads(json.dumps(references)) == references


def test_training_references_are_a_spread_sample_of_the_training_split(reader, monkeypatch):
    wanted = task(styles=["scene_count"])
    everything = tasks.training_references(wanted, reader)
    assert len(everything) == 2 * len(reader.rows("train"))
    monkeypatch.setattr(tasks, "TRAINING_SAMPLE", 4)
    sample = tasks.training_references(wanted, reader)
    assert len(sample) == 4
    assert all(item in everything for item in sample)
    assert sample[-1] != everything[3]
