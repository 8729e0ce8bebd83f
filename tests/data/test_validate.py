"""The validate stage: the same result every time, warnings for what is unusual, pages that need no network."""

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from molmo_model.artifacts import read_manifest
from molmo_model.config import params_from_dict
from molmo_model.data.example import Conversation, Example, Image, Message
from molmo_model.data.shard_reader import ShardReader
from molmo_model.data.shards import write_shards
from molmo_model.errors import DataError
from pipelines import shards, stage, validate

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOLMO_STATE_DIR", raising=False)
    (tmp_path / "data").symlink_to(ROOT / "data")
    return tmp_path


def params(**datasets):
    return params_from_dict({"version": 2, "seed": 3, "datasets": datasets}, "test")


SCENES = {"family": "digit_scenes", "train_examples": 30, "eval_examples": 6}


def test_built_in_data_are_unremarkable_and_the_result_is_always_the_same(workspace):
    config = params(scenes=SCENES)
    stage.run(shards.STAGE, config, dataset="scenes")
    first = stage.run(validate.STAGE, config, dataset="scenes")
    text = Path("artifacts/validation/scenes/validation.json").read_text()
    document = json.loads(text)
    assert document["success"] is first.summary["success"] is True
    assert first.summary["failed"] == []
    assert document["statistics"]["examples"] == {"eval": 6, "train": 30}
    assert document["statistics"]["styles"]["eval"]["scene_caption"] == 6
    names = [path.name for path in sorted(Path("artifacts/validation/scenes").iterdir())]
    assert names == ["image_hashes.parquet", "manifest.json", "validation.json"]
    assert str(workspace) not in text
    assert stage.differences(validate.STAGE, config, {"dataset": "scenes"}) == []
    shutil.rmtree("artifacts/validation")
    shutil.rmtree(".state/validate")
    again = stage.run(validate.STAGE, config, dataset="scenes")
    assert again.digest == first.digest
    assert Path("artifacts/validation/scenes/validation.json").read_text() == text


def test_pages_need_no_network(workspace, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was asked for")

    config = params(photos={"family": "chat", "path": "data/example/photos.jsonl"})
    stage.run(shards.STAGE, config, dataset="photos")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    stage.run(validate.STAGE, config, dataset="photos")
    docs = Path("artifacts/data_docs/photos")
    pages = list(docs.rglob("*.html"))
    assert len(pages) == 3
    for page in [*pages, *docs.rglob("*.css")]:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"""(src\s*=|url\(|<link[^>]+href\s*=)\s*["']?(https?:)?//""", text), page
        assert "<script" not in text  # each would need one that is elsewhere
    start = (docs / "index.html").read_text(encoding="utf-8")
    links = re.findall(r'href="([^"]+)"', start)
    assert len(links) == 2
    assert all((docs / link).is_file() for link in links)
    stage.run(validate.STAGE, config, dataset="photos")
    shutil.rmtree("artifacts/validation")
    shutil.rmtree(".state/validate")
    stage.run(validate.STAGE, config, dataset="photos")
    assert len(list(docs.rglob("*.html"))) == 3  # those of the run before are gone


def test_the_guide_s_example_runs_through_the_stages(workspace, capsys):
    shutil.copy(ROOT / "data" / "example" / "params.yaml", "params.yaml")
    stage.main(shards.STAGE, ["dataset=photos"])
    stage.main(validate.STAGE, [])
    summary = read_manifest("artifacts/validation/photos").summary
    assert summary["conversations"] == 8
    assert summary["bad_rows"] == 0
    assert not summary["success"]  # eight rows are few
    assert "table: expect_table_row_count_to_be_between" in summary["failed"]
    assert "warning: photos: expect_table_row_count_to_be_between of the table: 8" in capsys.readouterr().out
    reader = ShardReader("artifacts/shards/photos")
    assert sorted(reader.index["id"].to_pylist())[:2] == ["cat-colour", "cat-eyes"]


def odd_example(number, **changes):
    settings = {"answer": f"answer {number}", "style": "qa", "width": 40, "height": 30, "image": number, **changes}
    image = Image(str(settings["image"]).encode(), settings["width"], settings["height"], "PNG")
    talk = (Message("user", "?"), Message("assistant", settings["answer"]))
    return Example(f"e{number}", (image,), (Conversation(settings["style"], talk),))


def results_of(folder, rows, bad_rows=0):
    from molmo_model.data import expectations

    shutil.rmtree(folder / "shards", ignore_errors=True)
    write_shards(rows, folder / "shards", 10**6)
    frame = expectations.conversations(ShardReader(folder / "shards"), bad_rows)
    results = expectations.validate(frame, "odd", folder / "docs")
    return {(one["column"], one["expectation"].removeprefix("expect_")): one for one in results}


def failed(results):
    return {column for (column, _), one in results.items() if not one["success"]}


def side(number):
    return "eval" if number % 5 == 0 else "train"


@pytest.mark.parametrize(
    ("change", "bad_rows", "expected"),
    [
        (lambda n: {}, 0, set()),
        (lambda n: {}, 1, set()),
        (lambda n: {}, 2, {"drop_rate"}),
        (lambda n: {"answer": "yes"}, 0, {"is_majority_answer"}),
        (lambda n: {"image": 0}, 0, {"is_repeated_image", "is_repeated_question"}),
        (lambda n: {"answer": "word " * 20 + str(n // 2)}, 0, {"is_repeated_text"}),
        (lambda n: {"answer": str(n) * 3000}, 0, {"answer_chars"}),
        (lambda n: {"width": 8}, 0, {"short_side"}),
        (lambda n: {"width": 400, "height": 20}, 0, {"aspect"}),
        (lambda n: {"style": "caption" if side(n) == "eval" else "qa"}, 0, {"eval_style"}),
    ],
)
def test_what_is_unusual_is_a_warning(tmp_path, change, bad_rows, expected):
    rows = [(side(number), odd_example(number, **change(number))) for number in range(120)]
    results = results_of(tmp_path, rows, bad_rows)
    assert failed(results) == expected
    assert all(one["why"] for one in results.values())
    assert all(one["observed"] != "could not be computed" for one in results.values())


def test_too_few_rows_and_nothing_held_out(tmp_path):
    few = results_of(tmp_path, [("train", odd_example(number)) for number in range(20)])
    assert failed(few) == {None, "is_eval"}
    assert ("eval_style", "column_kl_divergence_to_be_less_than") not in few


def test_text_without_images(tmp_path):
    rows = []
    for number in range(120):
        talk = (Message("user", "?"), Message("assistant", f"{number}"))
        rows.append((side(number), Example(f"e{number}", (), (Conversation("chat", talk),))))
    assert failed(results_of(tmp_path, rows)) == set()


def test_a_broken_index_stops_the_stage(workspace):
    """A table that breaks its contract is an error, not a warning."""
    import pyarrow.parquet as pq

    config = params(scenes=SCENES)
    stage.run(shards.STAGE, config, dataset="scenes")
    path = Path("artifacts/shards/scenes/index.parquet")
    table = pq.read_table(path)
    splits = table["split"].to_pylist()
    splits[3] = "test"
    path.unlink()  # it is a link to the stage's own copy
    pq.write_table(table.set_column(table.column_names.index("split"), "split", [splits]), path)
    with pytest.raises(
        DataError, match=r"index.parquet: 1 violation .*\n +row 3 id 'scene-train-000003': split is 'test'"
    ):
        stage.run(validate.STAGE, config, dataset="scenes")


def test_a_byte_that_changed_since_is_told_by_id_though_the_picture_s_hash_is_remembered(workspace):
    config = params(scenes={**SCENES, "train_examples": 6})
    stage.run(shards.STAGE, config, dataset="scenes")
    stage.run(validate.STAGE, config, dataset="scenes")
    reader = ShardReader("artifacts/shards/scenes")
    places = reader.index.take([1, 4]).to_pylist()
    for place in places:
        shard = reader.path / place["shard"]
        content = bytearray(shard.read_bytes())
        content[place["offset"] + place["size"] // 2] ^= 1
        shard.unlink()
        shard.write_bytes(content)
    shutil.rmtree("artifacts/validation")
    shutil.rmtree(".state/validate")
    with pytest.raises(DataError, match=r"2 of \d+ examples cannot be read") as told:
        stage.run(validate.STAGE, config, dataset="scenes")
    assert all(place["id"] in str(told.value) for place in places)


def test_nothing_heavy_is_imported_for_help():
    code = (
        "import sys; import pipelines.validate; "
        "print([m for m in ('great_expectations', 'pandera', 'pandas', 'numpy', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
