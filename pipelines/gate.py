"""Gates: whether a checkpoint's score in a task is good enough for `tasks.<t>.gate`.

The asset checks of `metrics` and the summary of `python -m pipelines.score` ask here. A gate reads what lies there and
changes nothing: a failed one stops what stands on a score, the score itself stays for people to look at.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo_model.errors import ArtifactError, MolmoError
from molmo_model.eval import predictions
from molmo_model.eval.comparison import column, compare
from pipelines.compare import predicted

if TYPE_CHECKING:
    from molmo_model.config import GateConfig, Params
    from molmo_model.eval.comparison import Column


def findings(params: "Params", checkpoint: str, task: str) -> list[str]:
    """Why the gate does not hold, a sentence each; none when it does or there is no gate.

    Raises:
        MolmoError: scores that it needs are not there or do not belong together.
    """
    gate = params.tasks[task].gate
    if gate.minimum is None and gate.against is None:
        return []
    document = _metrics(checkpoint, task)
    found = _below_minimum(document, gate)
    if gate.against is not None and gate.against != checkpoint:
        found += _worse(document, _metrics(gate.against, task), gate)
    return found


def lines(params: "Params", key: Mapping[str, str]) -> list[str]:
    """What the summary of a score says of its gate; nothing where there is none."""
    gate = params.tasks[key["task"]].gate
    if gate.minimum is None and gate.against is None:
        return []
    try:
        found = findings(params, key["checkpoint"], key["task"])
    except MolmoError as error:
        found = [str(error)]
    kind = "blocking" if gate.blocking else "warning"
    return [f"gate ({kind}): FAILS: {one}" for one in found] or [f"gate ({kind}): holds"]


def _below_minimum(document: Mapping[str, Any], gate: "GateConfig") -> list[str]:
    name, task = document["primary"], document["task"]
    value = document["metrics"].get(name)
    if gate.minimum is None:
        return []
    if value is None:
        return [f"{task}: no item has the number {name}, which must reach {gate.minimum:g}"]
    lower = document["outputs"][name]["lower_is_better"]
    if value["mean"] <= gate.minimum if lower else value["mean"] >= gate.minimum:
        return []
    return [
        f"{task}: {name} of {document['checkpoint']} is {value['mean']:g}, {'above' if lower else 'below'} "
        f"tasks.{task}.gate.minimum {gate.minimum:g}; look at its failures in the report, then train further or change "
        "the minimum"
    ]


def _worse(document: Mapping[str, Any], other: Mapping[str, Any], gate: "GateConfig") -> list[str]:
    """Of the paired test against another checkpoint."""
    a, b, task, name = other["checkpoint"], document["checkpoint"], document["task"], document["primary"]
    for one in (document, other):
        if name not in one["metrics"]:
            return [f"{task}: no item of {one['checkpoint']} has the number {name}, which is to be compared"]
    mean, mean_of_a = (one["metrics"][name]["mean"] for one in (document, other))
    found = compare(_column(other), _column(document), document["confidence"])
    if -found.gain <= gate.most_loss or found.paired.p_value >= gate.p_value:
        return []
    allowed = f" by more than {gate.most_loss:g}" if gate.most_loss else ""
    return [
        f"{task}: {name} of {b} is {mean:g}, worse than {mean_of_a:g} of {a}{allowed}, p = {found.paired.p_value:.2g} "
        f"below {gate.p_value:g}, {found.paired.wins} wins and {found.paired.losses} losses; "
        f"see python -m pipelines.compare a={a} b={b} tasks={task}, then train further or change tasks.{task}.gate"
    ]


def _metrics(checkpoint: str, task: str) -> dict[str, Any]:
    path = _folder(checkpoint, task) / "metrics.json"
    if not path.is_file():
        raise ArtifactError(
            f"{task}: {checkpoint} has no scores for the gate to look at; "
            f"run python -m pipelines.score checkpoint={checkpoint} task={task}, then this again"
        )
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def _column(document: Mapping[str, Any]) -> "Column":
    checkpoint, task = document["checkpoint"], document["task"]
    scores = predictions.read_jsonl(_folder(checkpoint, task) / predictions.SCORES_FILE)
    return column(document, predicted(checkpoint, task, document["predictions"]), scores)


def _folder(checkpoint: str, task: str) -> Path:
    return Path("artifacts/metrics") / checkpoint / task
