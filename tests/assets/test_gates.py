"""Gates of tasks through Dagster and on the command line: what fails, what is stopped, what is left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from molmo_model.artifacts import read_manifest, write_manifest
from molmo_model.config import GateConfig, Params
from molmo_model.eval import predictions
from pipelines import score, scorecard
from pipelines.gate import findings
from pipelines.stage import run
from tests.assets.project import ROOT, Project, flow

# isort: split
from molmo_assets.checks import RULES, closed_gates
from molmo_assets.definitions import defs

TASK = "scene_qa"
RIGHT = (55, 20)
"""Right answers of the two checkpoints, of 60 questions."""


@pytest.fixture
def answered(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with one task and two checkpoints, the first better, answered but not scored; scoring is real."""
    project.edit(lambda raw: raw.update(tasks={TASK: raw["tasks"][TASK]}))
    project.edit(lambda raw: raw["eval"].update(checkpoints=raw["eval"]["checkpoints"][:2]))
    for asset, stage in (("metrics", score.STAGE), ("scorecard", scorecard.STAGE)):
        monkeypatch.setitem(flow.STAGES, asset, stage)
    for checkpoint, right in zip(project.params.eval.checkpoints, RIGHT, strict=True):
        write_predictions(Path("artifacts/predictions") / checkpoint / TASK, right)
    return project


def write_predictions(folder: Path, right: int) -> None:
    """Answers to 60 questions of which the first so many are right; two questions for a picture."""
    folder.mkdir(parents=True)
    rows = [
        {
            "id": f"e{number // 2}#{number % 2}",
            "example_id": f"e{number // 2}",
            "conversation": number % 2,
            "style": "scene_qa",
            "prompt": "Which?",
            "prediction": "7" if number < right else "8",
            "references": {"answer": "7"},
            "finish_reason": "stop",
            "tokens": 1,
            "prompt_tokens": 3,
            "image": {"dataset": "digit_scenes", "row": number // 2, "sha256": [f"{number // 2:064x}"]},
        }
        for number in range(60)
    ]
    predictions.write_jsonl(folder / predictions.FILE, rows)
    predictions.write_jsonl(folder / predictions.TRAINING_FILE, [])
    write_manifest(folder, schema=predictions.SCHEMA, version=1, params={}, inputs={}, code="", summary={})


def gated(params: Params, **gate: Any) -> Params:
    """The params with another gate."""
    params.tasks[TASK].gate = GateConfig(**gate)
    return params


def says(params: Params, name: str, checkpoint: str) -> tuple[bool, str, str]:
    """What a check says of a checkpoint's score: whether it passes, its severity and words."""
    rule = next(rule for rule in RULES if (rule.asset, rule.name) == ("metrics", name))
    result = rule.holds(flow.artefact("metrics", f"{checkpoint}|{TASK}", params), params)
    return result.passed, result.severity.value, result.description or ""


def materialized(project: Project, asset: str, partition: str) -> dg.ExecuteInProcessResult:
    job = defs.resolve_implicit_global_asset_job_def()
    return job.get_subset(asset_selection={dg.AssetKey(asset)}).execute_in_process(
        instance=project.instance, partition_key=partition, raise_on_error=False
    )


@pytest.mark.slow
def test_a_blocking_gate_stops_the_scorecard_and_destroys_nothing(answered: Project) -> None:
    """Materialised by Dagster, with every check of the scores."""
    _, worse = answered.params.eval.checkpoints
    answered.edit(lambda raw: raw["tasks"][TASK].update(gate={"minimum": 0.8}))
    result = materialized(answered, "metrics", f"{worse}|{TASK}")
    found = {one.check_name: one for one in result.get_asset_check_evaluations()}
    assert {name: one.passed for name, one in found.items()} == {
        "schema": True,
        "coverage": True,
        "gate": False,
        "gate_warning": True,
    }
    assert (found["gate"].severity.value, found["gate"].blocking) == ("ERROR", True)
    words = f"{TASK}: exact_match of {worse} is 0.333333, below tasks.{TASK}.gate.minimum 0.8"
    assert words in str(found["gate"].description)
    digest = read_manifest(Path("artifacts/metrics") / worse / TASK).digest
    stopped = materialized(answered, "scorecard", worse)
    assert not stopped.success
    (event,) = [event for event in stopped.all_events if event.is_step_failure]
    assert f"held back by a gate: metrics[{worse}|{TASK}]: {words}" in str(event.step_failure_data)
    assert not Path("artifacts/scorecards", worse).exists()
    assert read_manifest(Path("artifacts/metrics") / worse / TASK).digest == digest


def test_a_gate_against_another_checkpoint_uses_the_paired_test(answered: Project) -> None:
    params = answered.params
    better, worse = params.eval.checkpoints
    gated(params, against=better)
    run(score.STAGE, params, checkpoint=worse, task=TASK)
    passed, severity, words = says(params, "gate", worse)
    assert (passed, severity) == (False, "ERROR")
    assert f"{better} has no scores for the gate to look at; run python -m pipelines.score checkpoint={better}" in words
    run(score.STAGE, params, checkpoint=better, task=TASK)
    assert says(params, "gate", better)[0]  # against itself it holds
    passed, _, words = says(params, "gate", worse)
    assert not passed
    assert f"exact_match of {worse} is 0.333333, worse than 0.916667 of {better}, p = " in words
    assert "0 wins and 35 losses; see python -m pipelines.compare" in words
    gated(params, against=better, most_loss=0.6)
    assert says(params, "gate", worse)[0]
    gated(params, against=worse)
    assert says(params, "gate", better)[0]


def test_a_gate_against_a_score_without_the_number_says_so(answered: Project) -> None:
    params = answered.params
    better, worse = params.eval.checkpoints
    for checkpoint in (better, worse):
        run(score.STAGE, params, checkpoint=checkpoint, task=TASK)
    path = Path("artifacts/metrics") / better / TASK / "metrics.json"
    document = json.loads(path.read_text(encoding="utf-8")) | {"metrics": {}}
    path.unlink()
    path.write_text(json.dumps(document), encoding="utf-8")
    words = f"{TASK}: no item of {better} has the number exact_match, which is to be compared"
    assert findings(gated(params, against=better), worse, TASK) == [words]


def test_a_warning_gate_blocks_nothing(answered: Project) -> None:
    params = answered.params
    _, worse = params.eval.checkpoints
    run(score.STAGE, params, checkpoint=worse, task=TASK)
    item = flow.artefact("scorecard", worse, params)
    gated(params, minimum=0.99, blocking=False)
    assert says(params, "gate", worse) == (True, "ERROR", "")
    assert says(params, "gate_warning", worse)[:2] == (False, "WARN")
    assert closed_gates(item, params) == []
    gated(params, minimum=0.99)
    assert says(params, "gate_warning", worse) == (True, "WARN", "")
    assert len(closed_gates(item, params)) == 1


def test_the_command_says_whether_the_gate_holds_and_exits_well(answered: Project) -> None:
    better, worse = answered.params.eval.checkpoints
    answered.edit(lambda raw: raw["tasks"][TASK].update(gate={"minimum": 0.8, "against": better}))
    command, environment = [sys.executable, "-m", "pipelines.score"], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    of_better, of_worse = done.stdout.split(f"score {worse} {TASK}:")
    assert "gate (blocking): holds" in of_better
    assert of_worse.count("gate (blocking): FAILS") == 2
    assert "worse than 0.916667" in of_worse
