"""Scoring, scorecards and the report as stages: lineage, refusals, and nothing rewritten or random."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from molmo_model.artifacts import read_manifest, verify, write_manifest
from molmo_model.config import TaskKind
from molmo_model.data.schemas import check_table
from molmo_model.errors import ConfigError, EvaluationError
from molmo_model.eval import predictions
from molmo_model.eval.metrics import METRICS
from pipelines import report, score, scorecard
from pipelines.stage import differences, run
from tests.eval import synthetic

CELL = {"checkpoint": "sft/step-000300", "task": "scene_point"}


def load(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def test_metrics_agree_with_the_scores_and_name_their_predictions(evaluated):
    for checkpoint in synthetic.QUALITY:
        for task, config in synthetic.TASKS.items():
            folder = evaluated / "artifacts" / "metrics" / checkpoint / task
            document = load(folder / "metrics.json")
            source = evaluated / "artifacts" / "predictions" / checkpoint / task
            rows = predictions.read_predictions(source / predictions.FILE)
            scores = predictions.read_jsonl(folder / "scores.jsonl")
            assert document["predictions"] == read_manifest(source).digest
            assert document["primary"] == METRICS[config["metric"]].primary
            assert [row["id"] for row in rows] == [row["id"] for row in scores]
            assert document["outputs"].keys() == document["metrics"].keys()
            for name, value in document["metrics"].items():
                assert (
                    0 <= value["low"] <= value["mean"] <= value["high"] <= (document["outputs"][name]["upper"] or 1e9)
                )
                if name in METRICS[config["metric"]].macro:
                    continue
                have = [row["scores"][name] for row in scores if name in row["scores"]]
                assert value["n"] == len(have)
                assert value["mean"] == pytest.approx(sum(have) / len(have), abs=1e-5)
            for one in document["slices"]:
                assert 0 < one["metrics"][document["primary"]]["n"] <= one["n"] < len(rows)


def test_better_answers_score_higher_and_beat_the_majority(evaluated):
    for task in synthetic.TASKS:
        documents = [load(evaluated / "artifacts/metrics" / name / task / "metrics.json") for name in synthetic.QUALITY]
        means = [document["metrics"][document["primary"]]["mean"] for document in documents]
        assert means == sorted(means)
        assert means[-1] > documents[-1]["baseline"]["metrics"][documents[-1]["primary"]]["mean"]


def test_running_again_changes_nothing(workspace, settings):
    folder = workspace()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("artifacts/*/**/*") if path.is_file()}
    for stage, key in ((score.STAGE, CELL), (scorecard.STAGE, {"checkpoint": "sft/step-000300"}), (report.STAGE, {})):
        assert differences(stage, settings, key) == []
        run(stage, settings, **key)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("artifacts/*/**/*") if path.is_file()}


def test_a_clean_build_has_the_same_digests(workspace, settings):
    folder = workspace()
    digests = {}
    for stage, key in ((score.STAGE, CELL), (scorecard.STAGE, {"checkpoint": "sft/step-000300"}), (report.STAGE, {})):
        digests[stage.name] = verify(stage.target(key)).digest
    for name in ("metrics", "scorecards", "report"):
        shutil.rmtree(folder / "artifacts" / name)
    shutil.rmtree(folder / ".state")
    for checkpoint in synthetic.QUALITY:
        for task in synthetic.TASKS:
            run(score.STAGE, settings, checkpoint=checkpoint, task=task)
        run(scorecard.STAGE, settings, checkpoint=checkpoint)
    assert run(report.STAGE, settings).digest == digests["report"]
    assert verify(score.STAGE.target(CELL)).digest == digests["score"]


def test_changed_predictions_are_scored_again(workspace, settings):
    folder = workspace() / "artifacts" / "predictions" / CELL["checkpoint"] / CELL["task"]
    rows = predictions.read_jsonl(folder / predictions.FILE)
    (folder / predictions.FILE).unlink()  # the file is a hard link
    predictions.write_jsonl(folder / predictions.FILE, [{**row, "prediction": "no idea"} for row in rows])
    made_from = {"params": {}, "inputs": read_manifest(folder).inputs, "code": "c"}
    write_manifest(folder, schema=predictions.SCHEMA, version=1, summary={}, **made_from)
    assert any("predictions" in line for line in differences(score.STAGE, settings, CELL))
    assert run(score.STAGE, settings, **CELL).summary["mean"] == 0.0
    assert run(score.STAGE, settings, **CELL).summary["unparsed"] == len(rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [*rows, rows[0]], r"id .*stands on line 1 too"),
        (lambda rows: [{**rows[0], "prediction": None}], r":1: prediction is None"),
        (lambda rows: [{**rows[0], "conversation": True}], r":1: conversation is True"),
        (lambda rows: [{**rows[0], "finish_reason": "tired"}], r"finish_reason is 'tired'"),
        (
            lambda rows: [{key: value for key, value in rows[0].items() if key != "tokens"}],
            r"missing fields \['tokens'\]",
        ),
        (lambda rows: [], "no predictions"),
    ],
)
def test_broken_predictions_are_refused_by_line_and_field(workspace, settings, change, message):
    folder = workspace() / "artifacts" / "predictions" / CELL["checkpoint"] / CELL["task"]
    rows = predictions.read_jsonl(folder / predictions.FILE)
    (folder / predictions.FILE).unlink()
    predictions.write_jsonl(folder / predictions.FILE, change(rows))
    made_from = {"params": {}, "inputs": {}, "code": "c"}
    write_manifest(folder, schema=predictions.SCHEMA, version=1, summary={}, **made_from)
    with pytest.raises(EvaluationError, match=message):
        run(score.STAGE, settings, **CELL)


def test_the_judge_counts_only_where_a_metric_asks_one():
    settings = synthetic.params()
    assert score.STAGE.more_params(settings, CELL) == ()
    settings.tasks[CELL["task"]].also = ["judged_answer"]
    assert score.STAGE.more_params(settings, CELL) == ("eval.judge", "eval.judge_model")


def test_a_task_that_nobody_judged_has_no_number_and_says_so(workspace):
    workspace()
    settings = synthetic.params()
    settings.tasks["scene_qa"].metric, settings.tasks["scene_qa"].also = "judged_answer", ["exact_match"]
    cell = {"checkpoint": "sft/step-000300", "task": "scene_qa"}
    summary = run(score.STAGE, settings, **cell).summary
    assert (summary["mean"], summary["baseline"]) == (None, None)
    assert summary["judgements missing"] == summary["judgements asked"] > 0
    folder = score.STAGE.target(cell)
    document = load(folder / "metrics.json")
    assert document["judged"]["judge"] == "offline"
    assert list(document["metrics"]) == ["exact_match.exact_match"]
    assert document["baseline"] is None
    _keeps_contracts(folder)
    assert run(scorecard.STAGE, settings, checkpoint="sft/step-000300").summary["scene_qa"] is None
    settings.tasks["scene_qa"].also = ["judged_answer"]
    with pytest.raises(ConfigError, match="judged_answer stands twice in metric and also"):
        run(score.STAGE, settings, **cell)


def test_a_measured_loss_is_scored_sliced_and_keeps_the_contracts(workspace):
    folder = workspace() / "artifacts" / "predictions" / CELL["checkpoint"] / CELL["task"]
    rows = predictions.read_jsonl(folder / predictions.FILE)
    measured = [{"nll": 2.0 * (number + 1), "tokens": number + 2, "right": 1} for number in range(len(rows))]
    (folder / predictions.FILE).unlink()
    both = zip(rows, measured, strict=True)
    predictions.write_jsonl(
        folder / predictions.FILE, [{**row, "prediction": "", "measured": one, "tokens": 0} for row, one in both]
    )
    made_from = {"params": {}, "inputs": read_manifest(folder).inputs, "code": "c"}
    write_manifest(folder, schema=predictions.SCHEMA, version=1, summary={}, **made_from)
    settings = synthetic.params()
    settings.tasks[CELL["task"]].metric, settings.tasks[CELL["task"]].kind = "loss", TaskKind.loss
    assert run(score.STAGE, settings, **CELL).summary["baseline"] is None
    document = load(score.STAGE.target(CELL) / "metrics.json")
    tokens = sum(one["tokens"] for one in measured)
    loss = document["metrics"]["loss"]
    assert loss["mean"] == pytest.approx(sum(one["nll"] for one in measured) / tokens, abs=1e-6)
    assert document["outputs"]["perplexity"]["upper"] is None
    assert loss["high"] > 1.0
    _keeps_contracts(score.STAGE.target(CELL))
    scores = predictions.read_jsonl(score.STAGE.target(CELL) / predictions.SCORES_FILE)
    assert [row["weight"] for row in scores] == [float(one["tokens"]) for one in measured]


def _keeps_contracts(folder):
    """Those that Dagster's checks hold scores and metrics to."""
    scores, document = predictions.read_jsonl(folder / "scores.jsonl"), load(folder / "metrics.json")
    check_table(scores, "scores")
    check_table([{"metric": name, **value} for name, value in document["metrics"].items()], "metrics")


def test_a_line_that_is_no_json_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"id": 1}\n{"id": \n')
    with pytest.raises(EvaluationError, match=r"x\.jsonl:2: not JSON"):
        predictions.read_jsonl(tmp_path / "x.jsonl")


def test_an_unknown_metric_lists_the_known_ones(workspace):
    workspace()
    settings = synthetic.params()
    settings.tasks["scene_point"].metric = "pointling"
    with pytest.raises(ConfigError, match="did you mean 'pointing'"):
        run(score.STAGE, settings, **CELL)


def test_the_report_holds_one_row_per_number_with_its_lineage(evaluated):
    with open(evaluated / "artifacts/report/report.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {k: str(v) for k, v in row.items()} for row in load(evaluated / "artifacts/report/report.json")["rows"]
    ]
    for row in rows:
        source = read_manifest(evaluated / "artifacts/predictions" / row["checkpoint"] / row["task"])
        metrics = load(evaluated / "artifacts/metrics" / row["checkpoint"] / row["task"] / "metrics.json")
        assert row["predictions"] == source.digest
        assert row["checkpoint_digest"] == source.inputs["checkpoint"]
        assert row["metrics"] == read_manifest(evaluated / "artifacts/metrics" / row["checkpoint"] / row["task"]).digest
        assert float(row["mean"]) == metrics["metrics"][row["metric"]]["mean"]
    assert {(row["checkpoint"], row["task"]) for row in rows} == {
        (checkpoint, task) for checkpoint in synthetic.QUALITY for task in synthetic.TASKS
    }


def test_the_second_half_of_evaluation_runs_without_torch(workspace):
    """The stages themselves, not only their imports at the top."""
    folder = workspace()
    for name in ("metrics", "scorecards", "report"):
        shutil.rmtree(folder / "artifacts" / name)
    shutil.rmtree(folder / ".state")
    code = (
        "import sys; from pipelines import report, score, scorecard; from pipelines.stage import run, run_all\n"
        "from tests.eval.synthetic import params\n"
        "settings = params()\n"
        "run_all(score.STAGE, settings, {}); run_all(scorecard.STAGE, settings, {}); run(report.STAGE, settings)\n"
        "heavy = {'torch', 'transformers', 'dagster', 'dvc'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / "artifacts" / "report" / "index.html").is_file()
