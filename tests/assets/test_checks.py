"""Each rule against artefacts that break it in one way."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from molmo_model.artifacts import write_manifest
from molmo_model.config import Params, load_params
from molmo_model.data.datasets import family_of
from molmo_model.data.example import Example
from molmo_model.data.shard_reader import ShardReader
from molmo_model.data.shards import write_shards
from molmo_model.eval.tasks import items
from tests.assets.project import ROOT, flow

# isort: split
from molmo_assets.checks import RULES, Rule, failures

TASK = "scene_qa"


def rule(asset: str, name: str) -> Rule:
    return next(rule for rule in RULES if (rule.asset, rule.name) == (asset, name))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few real digit scenes as shards."""
    params = load_params(
        ROOT / "params.yaml", ["datasets.digit_scenes.train_examples=4", "datasets.digit_scenes.eval_examples=3"]
    )
    config = params.datasets["digit_scenes"]
    out = tmp_path_factory.mktemp("shards")
    rows = [(split, example) for split, example in family_of(config).make(config, 3) if isinstance(example, Example)]
    write_shards(iter(rows), out, config.shard_bytes, scratch=tmp_path_factory.mktemp("scratch"))
    (out / "problems.jsonl").touch()
    seal(out, "molmo/shards")
    return out


def seal(folder: Path, schema: str) -> str:
    return write_manifest(folder, schema=schema, version=1, params={}, inputs={}, code="", summary={}).digest


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: Path) -> Params:
    """Shards, predictions and metrics of one cell, all of them well."""
    monkeypatch.chdir(tmp_path)
    params = load_params(ROOT / "params.yaml")
    shutil.copytree(shards, "artifacts/shards/digit_scenes")
    folder = cell("predictions", params).path
    folder.mkdir(parents=True)
    write_predictions(folder, predictions(params))
    write_scores(params)
    return params


def cell(asset: str, params: Params) -> flow.Artefact:
    return flow.artefact(asset, f"{params.eval.checkpoints[0]}|{TASK}", params)


def predictions(params: Params) -> list[dict[str, Any]]:
    """One answer to every question."""
    reader = ShardReader("artifacts/shards/digit_scenes")
    return [
        {
            "id": item.id,
            "example_id": item.example.id,
            "conversation": item.conversation,
            "style": item.asked.style,
            "prompt": "p",
            "prediction": "7",
            "references": {"text": "7"},
            "finish_reason": "stop",
            "tokens": 1,
            "prompt_tokens": 3,
            "image": {"dataset": "digit_scenes", "row": item.row, "sha256": ["0" * 64]},
        }
        for item in items(params.tasks[TASK], TASK, reader)
    ]


def write_predictions(folder: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    (folder / "predictions.jsonl").write_text(text, encoding="utf-8")
    seal(folder, "molmo/predictions")


def write_scores(params: Params, **changes: Any) -> None:
    folder = cell("metrics", params).path
    folder.mkdir(parents=True, exist_ok=True)
    rows = predictions(params)
    scores = [{"id": row["id"], "scores": {"exact_match": 1.0}, "parsed": True} for row in rows]
    (folder / "scores.jsonl").write_text("".join(json.dumps(score) + "\n" for score in scores[: changes.get("kept")]))
    value = {"mean": 1.0, "stderr": 0.0, "low": 0.9, "high": 1.0, "n": len(rows), **changes.get("value", {})}
    digest = cell("predictions", params).manifest().digest
    document = {"metrics": {"exact_match": value}, "predictions": changes.get("predictions", digest)}
    (folder / "metrics.json").write_text(json.dumps(document), encoding="utf-8")
    seal(folder, "molmo/metrics")


def found(asset: str, name: str, params: Params, partition: str | None = None) -> str:
    """What a rule says; empty when it passes."""
    item = flow.artefact(asset, partition, params) if partition else cell(asset, params)
    result = rule(asset, name).holds(item, params)
    assert result.passed == (not result.description)
    return result.description or ""


def test_good_artefacts_pass(workspace: Params) -> None:
    for asset, partition in (("shards", "digit_scenes"), ("predictions", None), ("metrics", None)):
        item = flow.artefact(asset, partition, workspace) if partition else cell(asset, workspace)
        assert failures(item, workspace) == []


def test_coverage_names_what_is_missing_double_or_besides(workspace: Params) -> None:
    rows, folder = predictions(workspace), cell("predictions", workspace).path
    write_predictions(folder, rows[1:])
    assert found("predictions", "coverage", workspace) == f"{rows[0]['id']} was not answered"
    write_predictions(folder, [*rows, rows[2]])
    assert found("predictions", "coverage", workspace) == f"{rows[2]['id']} was answered 2 times, asked 1"
    write_predictions(folder, [*rows, {**rows[0], "id": "stranger#0"}])
    assert found("predictions", "coverage", workspace) == "stranger#0 was answered 1 times, asked 0"


def test_schema_of_predictions(workspace: Params) -> None:
    rows = predictions(workspace)
    rows[0]["finish_reason"] = "tired"
    write_predictions(cell("predictions", workspace).path, rows)
    assert "finish_reason" in found("predictions", "schema", workspace)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kept": -1}, "has a prediction or a score, not both"),
        ({"value": {"n": 10_000}}, "counts 10000 of"),
        ({"value": {"n": 0}}, "counts 0 of"),
        ({"value": {"mean": float("nan")}}, "mean is nan"),
        ({"value": {"stderr": float("inf")}}, "stderr is inf"),
        ({"predictions": "0" * 64}, "have changed since they were scored"),
    ],
)
def test_coverage_of_metrics(workspace: Params, changes: dict[str, Any], words: str) -> None:
    write_scores(workspace, **changes)
    assert words in found("metrics", "coverage", workspace)


def test_shards_without_a_shard(workspace: Params) -> None:
    folder = Path("artifacts/shards/digit_scenes")
    shard = sorted(folder.glob("*.tar"))[0]
    shard.unlink()
    assert f"shard {shard.name} is missing" in found("shards", "coverage", workspace, "digit_scenes")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("step,loss\n1,2.0\n2,nan\n", "the loss of step 2 is nan"),
        ("step,loss\n1,inf\n2,1.0\n", "the loss of step 1 is inf"),
        ("step,loss\n2,1.0\n", "step 1 is not in loss.csv"),
        ("step,loss\n1,2.0\n2,1.0\n", ""),
    ],
)
def test_finite_loss(workspace: Params, text: str, words: str) -> None:
    workspace.runs["sft"].train.steps = 2
    folder = flow.artefact("training_run", "sft", workspace).path
    folder.mkdir(parents=True)
    (folder / "loss.csv").write_text(text, encoding="utf-8")
    assert found("training_run", "finite_loss", workspace, "sft") == words


def test_unmet_expectations_only_warn(workspace: Params) -> None:
    folder = flow.artefact("validation", "charts", workspace).path
    folder.mkdir(parents=True)
    good = {"success": True, "expectation": "rows", "column": None, "observed": 3, "why": "w"}
    (folder / "validation.json").write_text(json.dumps({"results": [good, {**good, "success": False}]}))
    item = flow.artefact("validation", "charts", workspace)
    result = rule("validation", "expectations").holds(item, workspace)
    assert (result.passed, result.severity.value) == (False, "WARN")
    assert failures(item, workspace) == []


def test_an_artefact_that_is_not_there_fails_its_checks(workspace: Params) -> None:
    item = flow.artefact("shards", "charts", workspace)
    assert [failure.split(": ")[0] for failure in failures(item, workspace)] == ["shards[charts]"] * 2
