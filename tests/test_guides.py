"""The guides, executed: the files that they show are written, the commands that they show are run, in their order."""

import importlib.util
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from molmo_model.data.datasets import FAMILIES
from molmo_model.data.shard_reader import ShardReader
from molmo_model.source_digest import ROOT

BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(guide):
    """(language, file name or none, text) of every fenced block."""
    text = (ROOT / "docs" / "guides" / guide).read_text(encoding="utf-8")
    return [(language, name or None, body) for language, name, body in BLOCK.findall(text)]


def run_commands(script, monkeypatch):
    """Runs every `python -m module arguments` line in this process, where the libraries are loaded already."""
    for line in script.splitlines():
        words = shlex.split(line, comments=True)
        assert words[:2] == ["python", "-m"], line
        monkeypatch.setattr(sys, "argv", words[2:])
        runpy.run_module(words[2], run_name="__main__")


@pytest.mark.slow
def test_train_on_your_own_data_in_ten_minutes(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "data" / "example", "data/example")
    for language, name, body in blocks("ten_minutes.md"):
        if name:
            Path(name).write_text(body, encoding="utf-8")
        elif language == "bash":
            run_commands(body, monkeypatch)
        elif language == "json":
            shown = json.loads(body)
            rows = [json.loads(row) for row in Path("data/example/photos.jsonl").read_text().splitlines()]
            assert shown["id"] in [row["id"] for row in rows]
    assert Path("artifacts/data_docs/photos/index.html").exists()
    assert '<article class="example"' in Path("artifacts/looks/photos-mine.html").read_text(encoding="utf-8")
    assert json.loads(Path("artifacts/checkpoints/mine/step-000020/config.json").read_text())["model_type"]
    report = Path("artifacts/report/index.html").read_text(encoding="utf-8")
    assert "photos_qa" in report and "mine" in report
    assert re.search(r"^  examples: (train|eval) \d+, (train|eval) \d+$", capfd.readouterr().out, re.MULTILINE)


def test_add_a_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {name: body for _, name, body in blocks("add_dataset.md") if name}
    for name, body in files.items():
        Path(name).write_text(body, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("plants", "plants.py")
    plants = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "plants", plants)
    spec.loader.exec_module(plants)
    lines = [body for language, name, body in blocks("add_dataset.md") if language == "python" and not name]
    monkeypatch.setitem(FAMILIES, "plants", None)  # so that the line below is undone
    exec(lines[0], {"FAMILIES": FAMILIES, "PLANTS": plants.PLANTS})
    write_plants(Path("data/plants"))
    for language, _, body in blocks("add_dataset.md"):
        if language == "bash":
            run_commands(body, monkeypatch)
    reader = ShardReader("artifacts/shards/plants")
    first = reader.read(0)
    assert [talk.style for talk in first.conversations] == ["plants_mc", "pointing"]
    assert first.conversations[0].messages[0].options == ("oak", "rose")
    assert first.conversations[0].messages[1].text == "B"
    assert first.conversations[1].messages[1].points == ((25.0, 75.0),)
    problems = [json.loads(line) for line in Path("artifacts/shards/plants/problems.jsonl").read_text().splitlines()]
    assert [(row["field"], row["line"]) for row in problems] == [("species", 2)]
    manifest = json.loads(Path("artifacts/shards/plants/manifest.json").read_text())
    assert manifest["summary"]["licence"] == "CC-BY-4.0"


def write_plants(folder):
    """The set of the guide, two rows of training, of which one is wrong, and one of evaluation."""
    import datasets

    from tests.preprocessing.examples import png

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "photo_id": datasets.Value("int64"),
            "species": datasets.Value("string"),
            "choices": datasets.Sequence(datasets.Value("string")),
            "flowers": [{"x": datasets.Value("float64"), "y": datasets.Value("float64")}],
        }
    )

    def row(number, species):
        pixels = np.full((40, 80, 3), number, np.uint8)
        image = {"bytes": png(pixels), "path": None}
        places = [{"x": 20.0, "y": 30.0}]
        return {"image": image, "photo_id": number, "species": species, "choices": ["oak", "rose"], "flowers": places}

    for split, rows in {"train": [row(1, "rose"), row(2, "fern")], "validation": [row(3, "oak")]}.items():
        path = folder / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows, features=features).to_parquet(path)
