"""`python -m pipelines.compare` over an evaluated project: table, files, and what it refuses."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from molmo_model.artifacts import read_manifest, write_manifest
from molmo_model.errors import ArtifactError, ConfigError, EvaluationError
from molmo_model.eval import predictions
from pipelines import compare
from tests.eval import synthetic

A, B = "pretrain/step-000300", "sft/step-000300"
ROOT = str(Path(__file__).parents[2])


def test_the_command_compares_all_tasks_without_torch(workspace):
    folder = workspace()
    code = (
        "import sys; from pipelines import compare\n"
        f"compare.main(['a={A}', 'b={B}', 'out=compare.json', 'examples=1'])\n"
        "sys.exit(bool({'torch', 'pandas', 'transformers', 'dagster'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    document = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    assert [row["task"] for row in document["tasks"]] == sorted(synthetic.TASKS)
    for row in document["tasks"]:
        scores = [
            [
                one["scores"][row["number"]]
                for one in predictions.read_jsonl(f"artifacts/scorecards/{name}/scores/{row['task']}.jsonl")
            ]
            for name in (A, B)
        ]
        differences = [second - first for first, second in zip(*scores, strict=True)]
        assert row["difference"] == pytest.approx(sum(differences) / len(differences))
        assert row["mean_b"] - row["mean_a"] == pytest.approx(row["difference"], abs=2e-6)
        assert row["wins"] == sum(one > 0 for one in differences) >= len(row["won"])
        assert row["low"] <= row["difference"] <= row["high"]
        assert row["p_value"] <= row["holm_p_value"] <= 1.0
        assert row["task"] in done.stdout
    assert f"a = {A}" in done.stdout
    won = next(row["won"][0] for row in document["tasks"] if row["won"])
    assert won["score_b"] > won["score_a"]
    assert f"  b ({won['score_b']:g}) " in done.stdout
    assert f"b is better on {won['id']}" in done.stdout
    assert json.dumps(won["b"], ensure_ascii=False)[:20] in done.stdout


def test_one_task_another_number_and_the_table_as_csv(workspace, capsys):
    workspace()
    compare.main([f"a={A}", f"b={B}", "tasks=scene_count", "number=within_one", "examples=0", "out=tables/x.csv"])
    (row,) = csv.DictReader(Path("tables/x.csv").read_text(encoding="utf-8").splitlines())
    assert (row["a"], row["task"], row["number"]) == (A, "scene_count", "within_one")
    assert "not compared: chart_qa" in capsys.readouterr().out


def test_groups_are_averaged_over_their_tasks(workspace):
    workspace()
    for name in (A, B):
        path = Path("artifacts/scorecards") / name / "scorecard.json"
        card = json.loads(path.read_text(encoding="utf-8"))
        for task in ("scene_qa", "chart_qa"):
            card["tasks"][task]["groups"] = ["small"]
        path.unlink()
        path.write_text(json.dumps(card), encoding="utf-8")
    document = compare.compared(A, B)
    (group,) = document["groups"]
    parts = [row["difference"] for row in document["tasks"] if row["task"] in ("scene_qa", "chart_qa")]
    assert group["difference"] == pytest.approx(sum(parts) / 2)
    assert group["mean_b"] - group["mean_a"] == pytest.approx(group["difference"])
    assert "group small" in compare.table(document)


def test_answers_cannot_write_to_the_terminal(workspace):
    workspace()
    document = compare.compared(A, B, ["scene_qa"])
    document["tasks"][0]["won"] = [
        {"id": "i", "prompt": "p", "a": "\x1b[2J\u202e\n", "b": "x" * 500, "reference": None}
        | {"score_a": 0.0, "score_b": 1.0}
    ]
    text = compare.shown(document, 1)
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert max(map(len, text.splitlines())) < 200


def test_refusals_name_what_is_missing(workspace, capsys):
    workspace()
    with pytest.raises(ConfigError, match="did you mean 'scene_qa'"):
        compare.compared(A, B, ["scene_qu"])
    with pytest.raises(ConfigError, match="no common task with a number 'cider'"):
        compare.compared(A, B, number="cider")
    with pytest.raises(EvaluationError, match="no item has the number 'cider'; they have"):
        compare.compared(A, B, ["scene_qa"], "cider")
    with pytest.raises(ArtifactError, match=r"run python -m pipelines\.scorecard checkpoint=sft/step-000301"):
        compare.compared(A, "sft/step-000301")
    for words, message in (
        (["a=x"], "b=<run>/step-<six digits> is missing"),
        ([f"a={A}", f"b={B}", "task=x"], "did you mean 'tasks'"),
        ([f"a={A}", f"b={B}", "examples=x"], "examples=x is no number"),
    ):
        with pytest.raises(SystemExit):
            compare.main(words)
        assert message in capsys.readouterr().err
    folder = Path("artifacts/predictions") / B / "scene_qa"
    rows = predictions.read_jsonl(folder / predictions.FILE)
    (folder / predictions.FILE).unlink()  # the file is a hard link
    predictions.write_jsonl(folder / predictions.FILE, [{**row, "prediction": "new"} for row in rows])
    facts = {"params": {}, "inputs": read_manifest(folder).inputs, "code": "c"}
    write_manifest(folder, schema=predictions.SCHEMA, version=1, summary={}, **facts)
    with pytest.raises(ArtifactError, match=r"but the scores were made from .*; run python -m pipelines\.score"):
        compare.compared(A, B, ["scene_qa"])
