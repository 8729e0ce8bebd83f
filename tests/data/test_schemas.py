"""Contracts of the tables: good ones pass, and each way to break one is told with row, id, column and value."""

import pyarrow as pa
import pytest

from molmo_model.data.example import Conversation, Example, Image, Message
from molmo_model.data.schemas import SCHEMAS, check_table
from molmo_model.data.shards import write_shards
from molmo_model.errors import ConfigError, DataError


def example(number):
    answer = (Message("user", "?"), Message("assistant", "!"))
    talks = tuple(Conversation(style, answer) for style in ("qa", "caption")[: 1 + number % 2])
    images = tuple(Image(bytes([number, k]), 3, 4, "PNG") for k in range(number % 3))
    return Example(f"e-{number}", images, talks)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    rows = [("eval" if number % 5 == 0 else "train", example(number)) for number in range(20)]
    return write_shards(rows, tmp_path_factory.mktemp("shards"), 4000)


PROBLEM = {"file": "a.jsonl", "line": 3, "id": None, "field": "id", "reason": "is missing", "known": False}
PREDICTION = {
    "id": "e#1",
    "example_id": "e",
    "conversation": 1,
    "style": "qa",
    "prompt": "?",
    "prediction": "",
    "references": {"answer": "!"},
    "finish_reason": "stop",
    "tokens": 0,
    "prompt_tokens": 7,
    "image": {"dataset": "d", "row": 0, "sha256": []},
}
SCORE = {"id": "e#1", "scores": {"exact_match": 1.0, "other": 0}, "parsed": True}
COST = {
    "entry": 0,
    "id": "e",
    "row": 4,
    "key": 2**63 + 5,
    "tokens": 10,
    "crops": 0,
    "conversations": [0, 2],
    "conversation_tokens": [3, 4],
}
DOWNLOAD = {
    "url": "https://example.org/a.jpg",
    "status": "ok",
    "reason": "",
    "http_status": 200,
    "sha256": "0" * 64,
    "bytes": 7,
    "format": "JPEG",
    "width": 3,
    "height": 4,
}
HASH = {"image_sha256": "a" * 64, "kind": "film", "width": 3, "height": 4, "phash": 2**64 - 1, "small": bytes(1024)}
METRIC = {"metric": "vqa", "mean": 0.5, "stderr": 0.0, "low": 0.5, "high": 0.5, "n": 1}
MORE = {"downloads": DOWNLOAD, "image_hashes": HASH, "metrics": METRIC, "schedule": {"entry": 0}, "packs": {"packs": 1}}
GOOD = {**MORE, "problems": PROBLEM, "predictions": PREDICTION, "scores": SCORE, "costs": COST}


def test_good_tables_pass(index):
    check_table(index, "index")
    check_table(index.to_pandas(), "index")
    check_table(index.slice(5, 9), "index")  # rows that no longer begin at 0
    for name, row in GOOD.items():
        check_table([row], name)
        check_table([], name)
    check_table([PROBLEM, {**PROBLEM, "id": "x"}], "problems")
    check_table(pa.Table.from_pylist([COST], pa.schema(_cost_types())), "costs")
    assert set(GOOD) | {"index"} == set(SCHEMAS)


def _cost_types():
    types = {"entry": pa.int16(), "id": pa.string(), "key": pa.uint64(), "tokens": pa.int32(), "crops": pa.int32()}
    lists = {"conversations": pa.list_(pa.int64()), "conversation_tokens": pa.list_(pa.int64())}
    return [(name, {"row": pa.int64(), **types, **lists}[name]) for name in COST]


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("id", "e-2", "unique"),
        ("id", None, "not null"),
        ("id", "", "not empty"),
        ("split", "test", "train"),
        ("shard", "../x.tar", "shards-"),
        ("offset", -512, "0"),
        ("offset", 100, "whole tar blocks"),
        ("size", 1, "text_size <= size"),
        ("size", 10**9, "do not overlap"),
        ("sha256", "xyz", "0-9a-f"),
        ("n_images", 2, "one width, height and hash per image"),
        ("widths", [0], "at least 1 pixel"),
        ("widths", None, "not null"),
        ("image_sha256", ["g" * 64], "hexadecimal"),
        ("styles", [], "at least one style"),
        ("styles", ["qa", "qa"], "one style per conversation"),
        ("n_conversations", 0, "1"),
        ("chars", 1.5, "whole numbers"),
    ],
)
def test_a_broken_index_is_told(index, column, value, words):
    frame = index.to_pandas()
    frame[column] = frame[column].astype(object)
    row = 4
    frame.at[row, column] = value
    if column not in ("chars",):
        frame = frame.infer_objects()
    with pytest.raises(DataError) as error:
        check_table(frame, "index", "artifacts/shards/x/index.parquet")
    message = str(error.value)
    assert message.startswith("artifacts/shards/x/index.parquet: ")
    assert words in message
    if column not in ("chars", "offset") and (column, value) != ("size", 10**9):
        assert f"row {row} id " in message  # the overlap is the fault of two rows


def test_missing_and_unknown_columns_are_told(index):
    with pytest.raises(DataError, match=r"column 'sha256' is missing"):
        check_table(index.drop(["sha256"]), "index")
    with pytest.raises(DataError, match=r"column 'extra' is unknown"):
        check_table(index.append_column("extra", pa.array(range(len(index)))), "index")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("problems", {"line": 0}, "line is 0"),
        ("problems", {"id": 3}, "id is 3; must be: text or null"),
        ("problems", {"reason": ""}, "reason is ''"),
        ("predictions", {"id": "e#2"}, "<example_id>#<conversation>"),
        ("predictions", {"finish_reason": "error"}, "finish_reason is 'error'"),
        ("predictions", {"prediction": None}, "prediction"),
        ("predictions", {"tokens": -1}, "tokens is -1"),
        ("predictions", {"references": "x"}, "references is 'x'; must be: an object"),
        ("scores", {"scores": {"x": -0.1}}, "finite numbers by name"),
        ("scores", {"weight": -1.0}, "weight is -1.0"),
        ("scores", {"scores": {"x": float("nan")}}, "finite numbers by name"),
        ("scores", {"scores": {"x": "1"}}, "finite numbers by name"),
        ("scores", {"parsed": 1}, "true or false"),
        ("costs", {"tokens": -1}, "tokens is -1"),
        ("image_hashes", {"image_sha256": "a"}, "0-9a-f"),
        ("image_hashes", {"kind": "sound"}, "kind is 'sound'"),
        ("image_hashes", {"width": 0}, "width is 0"),
        ("image_hashes", {"small": bytes(1023)}, "1024 bytes"),
        ("metrics", {"mean": float("nan")}, "mean is"),
        ("metrics", {"mean": "0.5"}, "numbers"),
        ("metrics", {"high": float("inf")}, "high is inf"),
        ("metrics", {"stderr": -0.1}, "stderr is -0.1"),
        ("metrics", {"low": 0.6}, "low <= mean <= high"),
        ("metrics", {"n": 0}, "n is 0"),
        ("schedule", {"entry": -1}, "entry is -1"),
        ("packs", {"packs": -1}, "packs is -1"),
        ("downloads", {"sha256": ""}, "hash, size, format and sides"),
        ("costs", {"conversations": []}, "at least one conversation"),
        ("costs", {"conversation_tokens": [3]}, "one cost per conversation"),
        ("costs", {"conversation_tokens": [3, 0]}, "at least 1 token"),
    ],
)
def test_other_broken_tables_are_told(name, change, words):
    with pytest.raises(DataError, match=rf"contract '{name}'") as error:
        check_table([{**GOOD[name], **change}], name)
    assert words in str(error.value)


def test_repeated_rows_are_told():
    with pytest.raises(DataError, match=r"row 1 id 'e#1': id is 'e#1'; must be: unique"):
        check_table([SCORE, SCORE], "scores")
    with pytest.raises(DataError, match=r"row 1 id 'e': must be: an example once per entry"):
        check_table([COST, COST], "costs")
    check_table([COST, {**COST, "entry": 1}], "costs")


def test_many_violations_are_counted_and_the_first_are_shown(index):
    frame = index.to_pandas()
    frame["split"] = "no"
    with pytest.raises(DataError, match=r"index: 20 violations of the contract 'index'") as error:
        check_table(frame, "index")
    assert "row 0 id 'e-0': split is 'no'" in str(error.value)
    assert str(error.value).count("\n") == 6
    assert "and 15 more" in str(error.value)


def test_an_unknown_contract_lists_the_known():
    with pytest.raises(ConfigError, match=r"costs, .*index, .*predictions, problems, .*scores"):
        check_table([], "indices")


def test_the_tables_that_the_stages_write_pass(tmp_path):
    """The costs of a real mixture over real shards."""
    from molmo_model.data.mixture import map_table
    from molmo_model.data.shard_reader import ShardReader
    from tests.data.builders import make_mixture, rows

    readers = {}
    for name in ("d0", "d1"):
        write_shards(rows(range(30), name), tmp_path / name, 20_000)
        readers[name] = ShardReader(tmp_path / name)
        check_table(readers[name].index, "index")
    ids = {name: reader.index["id"].to_pylist() for name, reader in readers.items()}
    make_mixture(readers).save(tmp_path, ids)
    check_table(map_table(tmp_path / "costs.arrow"), "costs")
