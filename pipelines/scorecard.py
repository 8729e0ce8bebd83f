"""Gathers all tasks' metrics of one checkpoint, with the scores per example, into one artefact.

Reports and gates stand on scorecards: one per checkpoint, however many tasks there are.
"""

import json
import shutil
from typing import Any

from pipelines.stage import Build, Stage, main


def build(stage: Build) -> dict[str, Any]:
    """Writes `scorecard.json` and `scores/<task>.jsonl`."""
    from molmo_model.errors import EvaluationError
    from molmo_model.eval.predictions import SCORES_FILE

    tasks = {}
    (stage.out / "scores").mkdir()
    for task, folder in stage.inputs.items():
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        if (metrics["task"], metrics["checkpoint"]) != (task, stage.key["checkpoint"]):
            raise EvaluationError(
                f"{folder / 'metrics.json'} is of {metrics['checkpoint']} {metrics['task']}, "
                f"not of {stage.key['checkpoint']} {task}; run the score stage again"
            )
        tasks[task] = {**metrics, "digest": stage.stamp["inputs"][task]}
        shutil.copyfile(folder / SCORES_FILE, stage.out / "scores" / f"{task}.jsonl")
    document = {"checkpoint": stage.key["checkpoint"], "tasks": tasks}
    (stage.out / "scorecard.json").write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    primary = {task: metrics["metrics"].get(metrics["primary"]) for task, metrics in tasks.items()}
    return {task: None if value is None else value["mean"] for task, value in primary.items()}


STAGE = Stage(
    name="scorecard",
    schema="molmo/scorecard",
    version=1,
    keys=("checkpoint",),
    out="artifacts/scorecards/{checkpoint}",
    params=("tasks",),
    build=build,
    partitions=lambda params: [{"checkpoint": checkpoint} for checkpoint in params.eval.checkpoints],
    inputs=lambda params, key: {task: f"artifacts/metrics/{key['checkpoint']}/{task}" for task in params.tasks},
)

if __name__ == "__main__":
    main(STAGE)
