"""The guides, executed: the files that they show are written, the commands that they show are run, in their order."""

import importlib
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
from molmo_model.eval.metrics import METRICS
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
        try:
            runpy.run_module(words[2], run_name="__main__")
        except SystemExit as ended:
            assert not ended.code, f"{line}: exit code {ended.code}"


def follow(guide, monkeypatch):
    """Writes the files of a guide that have a name and runs its commands, in their order."""
    for language, name, body in blocks(guide):
        if name:
            Path(name).write_text(body, encoding="utf-8")
        elif language == "bash":
            run_commands(body, monkeypatch)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of somebody who has followed the first guide."""
    folder = tmp_path_factory.mktemp("ten_minutes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copytree(ROOT / "data" / "example", "data/example")
        follow("ten_minutes.md", patch)
    return folder


@pytest.fixture
def ten_minutes(trained, tmp_path, monkeypatch):
    """A copy of that folder, as the working directory."""
    shutil.copytree(trained, tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")


def metrics(checkpoint, task):
    return json.loads(Path(f"artifacts/metrics/{checkpoint}/{task}/metrics.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_train_on_your_own_data_in_ten_minutes(ten_minutes):
    (shown,) = [json.loads(body) for language, _, body in blocks("ten_minutes.md") if language == "json"]
    rows = [json.loads(row) for row in Path("data/example/photos.jsonl").read_text().splitlines()]
    assert shown["id"] in [row["id"] for row in rows]
    assert Path("artifacts/data_docs/photos/index.html").exists()
    assert '<article class="example"' in Path("artifacts/looks/photos-mine.html").read_text(encoding="utf-8")
    assert json.loads(Path("artifacts/checkpoints/mine/step-000020/config.json").read_text())["model_type"]
    report = Path("artifacts/report/index.html").read_text(encoding="utf-8")
    assert "photos_qa" in report and "mine" in report


@pytest.mark.slow
def test_evaluate_a_checkpoint_and_compare_two_runs(ten_minutes, monkeypatch, capfd):
    follow("evaluate_checkpoint.md", monkeypatch)
    assert Path("shared/report/index.html").read_bytes()
    capfd.readouterr()
    follow("compare_runs.md", monkeypatch)
    table = capfd.readouterr().out
    assert "photos_qa" in table
    (task,) = json.loads(Path("compare.json").read_text(encoding="utf-8"))["tasks"]
    first, second = metrics("mine/step-000010", "photos_qa"), metrics("mine/step-000020", "photos_qa")
    means = [one["metrics"]["exact_match"]["mean"] for one in (first, second)]
    assert task["difference"] == pytest.approx(means[1] - means[0], abs=1e-6)


@pytest.mark.slow
def test_add_a_task_and_a_metric(ten_minutes, tmp_path, monkeypatch, capfd):
    follow("add_task.md", monkeypatch)
    assert "chart_qa:" in Path("more_tasks.yaml").read_text(encoding="utf-8")
    loose = metrics("mine/step-000020", "photos_loose")
    assert {"anls", "exact_match.exact_match"} <= set(loose["metrics"])
    assert metrics("mine/step-000020", "photos_loss")["metrics"]["perplexity"]["mean"] > 1
    monkeypatch.syspath_prepend(Path.cwd())
    (source,) = [body for _, name, body in blocks("add_metric.md") if name == "word_recall.py"]
    Path("word_recall.py").write_text(source, encoding="utf-8")
    (line,) = [body for language, name, body in blocks("add_metric.md") if language == "python" and not name]
    monkeypatch.setitem(METRICS, "word_recall", None)  # so that the line below is undone
    exec(line, {"METRICS": METRICS, "word_recall": importlib.import_module("word_recall")})
    capfd.readouterr()
    follow("add_metric.md", monkeypatch)
    assert metrics("mine/step-000020", "photos_words")["primary"] == "word_recall"
    assert "answer/s" not in capfd.readouterr().err  # no progress: the answers were there


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
