"""The metric report: one self-contained page that compares the checkpoints of `eval.checkpoints` over all tasks.

Scores with intervals beside the majority answer, averages of groups, curves, paired comparisons, slices, examples with
pictures, points and regions, and the lineage of every number; licence, source and revision of the data; also as CSV and
JSON. No torch. `python -m pipelines.publish to=...` puts it where others can open it.
"""

import json
from pathlib import Path
from typing import Any

from pipelines.stage import Build, Stage, main


def build(stage: Build) -> dict[str, Any]:
    """Collects scorecards, predictions, pictures and losses, and writes the report."""
    from functools import cache

    from molmo_model.data.shard_reader import ShardReader
    from molmo_model.eval import report, report_data

    @cache
    def reader(dataset: str) -> ShardReader:
        return ShardReader(stage.inputs[f"shards/{dataset}"])

    checkpoints, tasks = stage.params.eval.checkpoints, stage.params.tasks
    results = _with_numbers({task: {name: _evaluated(stage, name, task) for name in checkpoints} for task in tasks})
    inputs = report_data.Inputs(
        results=results,
        losses={run: _losses(stage.inputs[f"checkpoints/{run}"]) for run in _runs(stage.params)},
        example=lambda dataset, row: reader(dataset).read(row),
        confidence=stage.params.eval.confidence,
        examples=stage.params.eval.report_examples,
        checkpoints=checkpoints,
        training={run: _training(stage.inputs[f"checkpoints/{run}"]) for run in _runs(stage.params)},
        data=_data(stage),
    )
    return report.write(inputs, stage.out)


def _with_numbers(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The tasks whose primary number every checkpoint has; the others (right answers that are not public, judgements
    that are missing) are said and left out.

    Raises:
        EvaluationError: no task has one.
    """
    from molmo_model.errors import EvaluationError

    def has_number(one: Any) -> bool:
        return one.metrics["primary"] in one.metrics["metrics"]

    shown = {task: cells for task, cells in results.items() if all(map(has_number, cells.values()))}
    if without := ", ".join(task for task in results if task not in shown):
        print(f"report: left out, for want of a number of every checkpoint: {without}")
    if results and not shown:
        raise EvaluationError(f"no task has a number of every checkpoint ({without}); there is nothing to report")
    return shown


def _evaluated(stage: Build, checkpoint: str, task: str) -> Any:
    """One checkpoint's result in one task, with its lineage."""
    from molmo_model.artifacts import read_manifest
    from molmo_model.eval import predictions
    from molmo_model.eval.report_data import Evaluated, Lineage

    card, folder = stage.inputs[f"scorecards/{checkpoint}"], stage.inputs[f"predictions/{checkpoint}/{task}"]
    metrics = json.loads((card / "scorecard.json").read_text(encoding="utf-8"))["tasks"][task]
    manifest = read_manifest(folder, predictions.SCHEMA)
    return Evaluated(
        metrics=metrics,
        lineage=Lineage(
            predictions=manifest.digest,
            metrics=metrics["digest"],
            weights=manifest.inputs["checkpoint"],
            shards=manifest.inputs["shards"],
            code=manifest.code,
            params=manifest.params,
        ),
        predictions=predictions.read_predictions(folder / predictions.FILE),
        scores=predictions.read_jsonl(card / "scores" / f"{task}.jsonl"),
    )


def _losses(folder: Path) -> list[tuple[int, float]]:
    """The loss of every step of a run."""
    from molmo_model.train.metrics_log import METRICS, read_metrics

    return [(line["step"], line["loss"]) for line in read_metrics(folder / METRICS)]


def _training(folder: Path) -> Any:
    """What a run's checkpoints were made from."""
    from molmo_model.artifacts import read_manifest
    from molmo_model.eval.report_data import Training

    manifest = read_manifest(folder)
    return Training(manifest.digest, manifest.code, manifest.inputs, manifest.params)


def _data(stage: Build) -> list[Any]:
    """The datasets behind the numbers: those that the runs shown were trained on, and those that the tasks ask."""
    from molmo_model.artifacts import read_manifest
    from molmo_model.config import drawn_datasets
    from molmo_model.eval.report_data import DataSource

    trained = {run: drawn_datasets(stage.params, run) for run in _runs(stage.params)}
    return [
        DataSource(
            dataset=name,
            summary=read_manifest(stage.inputs[f"shards/{name}"]).summary,
            runs=[run for run, datasets in trained.items() if name in datasets],
            tasks=[task for task, config in stage.params.tasks.items() if config.dataset == name],
        )
        for name in _datasets(stage.params)
    ]


def _datasets(params: Any) -> list[str]:
    """The datasets of all tasks and of the runs shown, in the order of the params."""
    from molmo_model.config import drawn_datasets

    used = {task.dataset for task in params.tasks.values()}.union(
        *(drawn_datasets(params, run) for run in _runs(params))
    )
    return [name for name in params.datasets if name in used]


def _runs(params: Any) -> list[str]:
    """The runs whose checkpoints are compared."""
    return list(dict.fromkeys(name for c in params.eval.checkpoints if (name := c.partition("/")[0]) in params.runs))


def _inputs(params: Any, key: Any) -> dict[str, str]:
    checkpoints = params.eval.checkpoints
    return {
        **{f"scorecards/{name}": f"artifacts/scorecards/{name}" for name in checkpoints},
        **{
            f"predictions/{name}/{task}": f"artifacts/predictions/{name}/{task}"
            for name in checkpoints
            for task in params.tasks
        },
        **{f"shards/{name}": f"artifacts/shards/{name}" for name in _datasets(params)},
        **{f"checkpoints/{run}": f"artifacts/checkpoints/{run}" for run in _runs(params)},
    }


def _templates(params: Any, key: Any) -> dict[str, str]:
    """The page's template, style and script: part of the code that is no Python."""
    from molmo_model.artifacts import path_digest
    from molmo_model.source_digest import ROOT

    return {"templates": path_digest(ROOT / "molmo_model" / "eval" / "templates")}


STAGE = Stage(
    name="report",
    schema="molmo/report",
    version=2,
    keys=(),
    out="artifacts/report",
    params=("eval",),
    build=build,
    partitions=lambda params: [{}],
    inputs=_inputs,
    fingerprints=_templates,
)

if __name__ == "__main__":
    main(STAGE)
