"""Stage 2 of evaluation: scores one checkpoint's answers to one task, with intervals, beside the majority answer.

Pure functions over `predictions.jsonl`; no torch, a fraction of a second. Only a metric that asks a judge may wait for
one.
"""

import contextlib
import gc
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import gate
from pipelines.stage import Build, Stage, main, state_root

if TYPE_CHECKING:
    from molmo_model.config import TaskConfig
    from molmo_model.eval.judges import CachedJudge
    from molmo_model.eval.metrics import Metric
    from molmo_model.eval.scoring import TaskScores


def build(stage: Build) -> dict[str, Any]:
    """Writes `metrics.json` and, per item, `scores.jsonl`."""
    with _collector_at_rest():
        return _build(stage)


@contextlib.contextmanager
def _collector_at_rest() -> Iterator[None]:
    """No search for cycles meanwhile: none are made, and looking through ten thousand rows again and again takes a
    third of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _build(stage: Build) -> dict[str, Any]:
    from molmo_model.eval import predictions
    from molmo_model.eval.scoring import score_lines, score_task

    folder, task = stage.inputs["predictions"], stage.params.tasks[stage.key["task"]]
    metric, also = _metrics(task, stage.key["task"])
    rows = predictions.read_predictions(folder / predictions.FILE)
    training = predictions.read_jsonl(folder / predictions.TRAINING_FILE)
    if private := bool(rows) and all(row["references"].get("answer", "") is None for row in rows):
        scored = _unscored(stage.key, len(rows))
    else:
        judge = _judge(stage.params) if _is_judged(task) else None
        scored = score_task(metric, rows, training, stage.params.eval.confidence, also=also, judge=judge)
        if judge is not None:
            _tell(judge, stage.key)
    slices = [] if private else _slices(stage, metric, rows, scored)
    document = _document(stage, metric, scored, bool(training)) | {"slices": slices}
    (stage.out / "metrics.json").write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    with open(stage.out / predictions.SCORES_FILE, "w", encoding="utf-8") as file:
        file.writelines(score_lines(rows, scored.scores))
    return _summary(document)


def _unscored(cell: dict[str, str], items: int) -> "TaskScores":
    """No numbers: the right answers of a test set are not public."""
    from molmo_model.eval.metrics import Score
    from molmo_model.eval.scoring import TaskScores

    print(
        f"score: {cell['task']}: the right answers are not public, so there is no number; `python -m pipelines.submit "
        f"checkpoint={cell['checkpoint']} task={cell['task']}` writes the file for the test server"
    )
    nothing = [Score({})] * items
    return TaskScores({}, {}, None, None, nothing, nothing)


def _metrics(task: "TaskConfig", name: str) -> tuple["Metric", dict[str, "Metric"]]:
    """The task's metric, and the further ones by name."""
    from molmo_model.config import lookup
    from molmo_model.errors import ConfigError
    from molmo_model.eval.metrics import METRICS

    named = [task.metric, *task.also]
    if twice := sorted({one for one in named if named.count(one) > 1}):
        raise ConfigError(f"tasks.{name}: {', '.join(twice)} stands twice in metric and also; name each once")
    also = {one: lookup(METRICS, one, f"metric of tasks.{name}.also") for one in task.also}
    return lookup(METRICS, task.metric, f"metric of tasks.{name}.metric"), also


def judgements() -> Path:
    """The store of what judges said that all scores share: not the state of one of them."""
    return state_root() / "judgements"


def _judge(params: Any) -> "CachedJudge":
    from molmo_model.eval.judges import judge_of

    return judge_of(params.eval, params.runtime, judgements())


def _tell(judge: "CachedJudge", cell: dict[str, str]) -> None:
    """Says why judgements are missing, and how to have them."""
    for problem in judge.problems:
        print(f"score: {cell['task']}: {problem}")
    if judge.missing:
        print(
            f"score: {cell['task']}: {judge.missing} of {judge.asked} judgements by {judge.name} are missing; their "
            "items are left out. With a judge that answers (eval.judge, runtime.judge_url), `python -m pipelines.score "
            f"checkpoint={cell['checkpoint']} task={cell['task']} overwrite=true` asks for these alone"
        )


def _is_judged(task: "TaskConfig") -> bool:
    from molmo_model.eval.metrics import METRICS

    return any(name in METRICS and METRICS[name].judged for name in (task.metric, *task.also))


def _judge_params(params: Any, key: Any) -> tuple[str, ...]:
    """Who judges counts where anything is judged, and nowhere else."""
    return ("eval.judge", "eval.judge_model") if _is_judged(params.tasks[key["task"]]) else ()


def _document(stage: Build, metric: "Metric", scored: "TaskScores", trained: bool) -> dict[str, Any]:
    """`metrics.json` without the slices."""
    from dataclasses import asdict

    from molmo_model.eval.scoring import as_json

    task = stage.params.tasks[stage.key["task"]]
    rule = metric.constant_rule if trained else f"{metric.constant_rule}; no training examples: evaluation's own"
    return {
        "task": stage.key["task"],
        "checkpoint": stage.key["checkpoint"],
        "metric": task.metric,
        "also": list(task.also),
        "groups": list(task.groups),
        "primary": metric.primary,
        "metrics": as_json(scored.metrics),
        "outputs": {name: asdict(output) for name, output in scored.outputs.items()},
        "confidence": stage.params.eval.confidence,
        "baseline": None
        if scored.baseline is None
        else {"answer": scored.constant, "rule": rule, "metrics": as_json(scored.baseline)},
        "judged": None if scored.judged is None else asdict(scored.judged),
        "unparsed": scored.unparsed,
        "predictions": stage.stamp["inputs"]["predictions"],
        "citation": metric.citation,
    }


def _slices(stage: Build, metric: "Metric", rows: list[dict[str, Any]], scored: "TaskScores") -> list[dict[str, Any]]:
    """The metric's numbers over every slice; those named by a pattern (`correct_*`) and of further metrics are not."""
    from molmo_model.eval.scoring import as_json, clusters_of, numbers
    from molmo_model.eval.slices import slices

    task, images = stage.params.tasks[stage.key["task"]], clusters_of(rows)
    table = []
    for one in slices(rows, task.slices, stage.key["task"]):
        scores, clusters = [scored.own[item] for item in one.items], [images[item] for item in one.items]
        found = numbers(metric, scores, clusters, stage.params.eval.confidence)
        shown = as_json({name: value for name, value in found.items() if name in metric.outputs})
        table.append({"by": one.by, "value": one.value, "n": len(one.items), "metrics": shown})
    return table


def _summary(document: dict[str, Any]) -> dict[str, Any]:
    """The primary number beside its baseline; None where no item has it."""
    primary, baseline, judged = document["primary"], document["baseline"], document["judged"]
    value = document["metrics"].get(primary)
    return {
        "primary": primary,
        **{name: None if value is None else value[name] for name in ("mean", "low", "high", "n")},
        "baseline": None if baseline is None else baseline["metrics"][primary]["mean"],
        "unparsed": document["unparsed"],
        **({} if judged is None else {f"judgements {name}": judged[name] for name in ("asked", "missing")}),
    }


STAGE = Stage(
    name="score",
    schema="molmo/metrics",
    version=2,
    keys=("checkpoint", "task"),
    out="artifacts/metrics/{checkpoint}/{task}",
    params=("eval.confidence", "tasks.{task}"),
    more_params=_judge_params,
    build=build,
    partitions=lambda params: [
        {"checkpoint": checkpoint, "task": task} for checkpoint, task in product(params.eval.checkpoints, params.tasks)
    ],
    inputs=lambda params, key: {"predictions": f"artifacts/predictions/{key['checkpoint']}/{key['task']}"},
)

if __name__ == "__main__":
    main(STAGE, remarks=gate.lines)
