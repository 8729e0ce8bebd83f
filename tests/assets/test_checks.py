"""Each rule against artefacts that break it in one way."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from pyarrow import parquet

from molmo_model.artifacts import write_manifest
from molmo_model.config import Params, load_params
from molmo_model.data.datasets import family_of
from molmo_model.data.example import Example
from molmo_model.data.image_hashes import HASHES
from molmo_model.data.shard_reader import ShardReader
from molmo_model.data.shards import write_shards
from molmo_model.eval.tasks import items
from pipelines.stage import Build
from tests.assets.project import ROOT, Project, flow

# isort: split
from molmo_assets.checks import RULES, Rule, failures
from molmo_assets.definitions import defs

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


def validation(params: Params, **changes: Any) -> None:
    """What the validate stage writes about a dataset of ten examples."""
    write_validation(flow.artefact("validation", "charts", params).path, **changes)


def write_validation(folder: Path, **changes: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    empty = {"found": 0, "listed": []}
    document = {"results": [], "faults": [], "leaks": empty, "near_duplicates": empty, **changes}
    document["statistics"] = {"examples": {"train": 8, "eval": 2}}
    (folder / "validation.json").write_text(json.dumps(document), encoding="utf-8")
    parquet.write_table(HASHES.empty_table(), folder / "image_hashes.parquet")


def test_broken_pictures_block_and_near_duplicates_warn(workspace: Params) -> None:
    item = flow.artefact("validation", "charts", workspace)
    validation(workspace)
    assert found("validation", "files", workspace, "charts") == ""
    assert found("validation", "near_duplicates", workspace, "charts") == ""
    fault = {"id": "c7", "field": "images[0]", "reason": "is broken or cut short: it does not decode"}
    leak = {"train": "c1", "eval": "c9", "image_sha256": "0" * 64}
    pair = {"train": "c2", "eval": "c9", "distance": 4, "difference": 7}
    lists = {"leaks": {"found": 1, "listed": [leak]}, "near_duplicates": {"found": 1, "listed": [pair]}}
    validation(workspace, faults=[fault], **lists)
    assert failures(item, workspace) == [
        "validation[charts]: files: c7 images[0] is broken or cut short: it does not decode"
    ]
    result = rule("validation", "near_duplicates").holds(item, workspace)
    assert (result.passed, result.severity.value) == (False, "WARN")
    assert "train c1 shows the very picture of eval c9" in str(result.description)
    assert "train c2 looks like eval c9: 4 of 64 bits and 7 grey levels" in str(result.description)
    workspace.datasets["charts"].tolerance = 0.1
    assert found("validation", "files", workspace, "charts") == ""


def test_a_check_in_dagster_says_warn_or_error(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The definitions' own asset with its checks, run by an instance of Dagster's."""
    project.produce("shards")
    stage = flow.STAGES["validation"]

    def build(build: Build) -> dict[str, Any]:
        pairs = [{"train": "c2", "eval": "c9", "distance": 4, "difference": 7}]
        write_validation(
            build.out,
            faults=[{"id": "c7", "field": "images[0]", "reason": "does not decode"}],
            near_duplicates={"found": 1, "listed": pairs},
        )
        return {}

    monkeypatch.setitem(flow.STAGES, "validation", dataclasses.replace(stage, build=build))
    job = defs.resolve_implicit_global_asset_job_def()
    run = job.get_subset(asset_selection={dg.AssetKey("validation")}).execute_in_process(
        instance=project.instance, partition_key="charts", raise_on_error=False
    )
    evaluations = {one.check_name: one for one in run.get_asset_check_evaluations()}
    assert {name: (one.passed, one.severity.value) for name, one in evaluations.items()} == FOUND
    assert "c7 images[0] does not decode" in str(evaluations["files"].description)
    (event,) = run.asset_materializations_for_node("validation")
    assert "| c2 | c9 | 4 | 7 |" in str(event.metadata["near_duplicates"].value)


FOUND = {"files": (False, "ERROR"), "near_duplicates": (False, "WARN"), "expectations": (True, "WARN")}


def test_an_artefact_that_is_not_there_fails_its_checks(workspace: Params) -> None:
    item = flow.artefact("shards", "charts", workspace)
    assert [failure.split(": ")[0] for failure in failures(item, workspace)] == ["shards[charts]"] * 2
