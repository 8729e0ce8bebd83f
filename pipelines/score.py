"""Stage 2 of evaluation: scores one checkpoint's answers to one task, with intervals, beside the majority answer.

Pure functions over `predictions.jsonl`; no torch, a fraction of a second.
"""

import json
from itertools import product
from typing import Any

from pipelines.stage import Build, Stage, main


def build(stage: Build) -> dict[str, Any]:
    """Writes `metrics.json` and, per item, `scores.jsonl`."""
    from molmo_model.config import lookup
    from molmo_model.eval import predictions
    from molmo_model.eval.metrics import METRICS
    from molmo_model.eval.scoring import as_json, score_task

    folder, task = stage.inputs["predictions"], stage.params.tasks[stage.key["task"]]
    metric = lookup(METRICS, task.metric, f"metric of tasks.{stage.key['task']}.metric")
    rows = predictions.read_predictions(folder / predictions.FILE)
    training = predictions.read_jsonl(folder / predictions.TRAINING_FILE)
    scored = score_task(metric, rows, training, stage.params.eval.confidence)
    document = {
        "task": stage.key["task"],
        "checkpoint": stage.key["checkpoint"],
        "metric": task.metric,
        "primary": metric.primary,
        "metrics": as_json(scored.metrics),
        "confidence": stage.params.eval.confidence,
        "baseline": {
            "answer": scored.constant,
            "rule": metric.constant_rule
            if training
            else f"{metric.constant_rule}; no training examples: evaluation's own",
            "metrics": as_json(scored.baseline),
        },
        "unparsed": scored.unparsed,
        "predictions": stage.stamp["inputs"]["predictions"],
        "citation": metric.citation,
    }
    (stage.out / "metrics.json").write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    predictions.write_jsonl(
        stage.out / predictions.SCORES_FILE,
        (
            {"id": row["id"], "scores": {k: round(v, 6) for k, v in score.values.items()}, "parsed": score.parsed}
            for row, score in zip(rows, scored.scores, strict=True)
        ),
    )
    primary = scored.metrics[metric.primary]
    return {
        "primary": metric.primary,
        "mean": round(primary.mean, 6),
        "low": round(primary.low, 6),
        "high": round(primary.high, 6),
        "n": primary.n,
        "baseline": round(scored.baseline[metric.primary].mean, 6),
        "unparsed": scored.unparsed,
    }


STAGE = Stage(
    name="score",
    schema="molmo/metrics",
    version=1,
    keys=("checkpoint", "task"),
    out="artifacts/metrics/{checkpoint}/{task}",
    params=("eval.confidence", "tasks.{task}"),
    build=build,
    partitions=lambda params: [
        {"checkpoint": checkpoint, "task": task} for checkpoint, task in product(params.eval.checkpoints, params.tasks)
    ],
    inputs=lambda params, key: {"predictions": f"artifacts/predictions/{key['checkpoint']}/{key['task']}"},
)

if __name__ == "__main__":
    main(STAGE)
