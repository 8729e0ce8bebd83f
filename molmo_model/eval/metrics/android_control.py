"""AndroidControl: whether the next action on a phone's screen is the one that a person took."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from molmo_model.errors import EvaluationError
from molmo_model.eval.metrics.answers import MOST_FREQUENT, answers_of, most_frequent
from molmo_model.eval.metrics.metric import Metric, Output, References, Score

_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_PLACED = ("click", "long press")
_WORDED = {"type": "type", "scroll": "scroll", "open app": "open_app"}
"""Actions with words behind them, by how they begin."""
_BARE = ("wait", "navigate home", "navigate back")


@dataclass(frozen=True)
class Action:
    """One action, as it is written in lower case."""

    kind: str
    words: str = ""
    """What is typed, where it is scrolled to, which app is opened."""
    place: tuple[float, float] | None = None
    """Percent of the screen."""


def read_action(text: str) -> Action | None:
    """`Click(10.5, 20.0)`, `Long press(...)`, `Type ...`, `Scroll up`, `Open app ...`, `Wait`, `Navigate home` or
    `Navigate back`; None for anything else."""
    text = " ".join(text.lower().split())
    for kind in _PLACED:
        if text.startswith(kind):
            numbers = [float(number) for number in _NUMBER.findall(text)[:2]]
            return Action(kind.replace(" ", "_"), place=(numbers[0], numbers[1]) if len(numbers) == 2 else None)
    for begin, kind in _WORDED.items():
        if text == begin or text.startswith(begin + " "):
            words = text[len(begin) :].strip()
            return Action(kind, words.split(" ")[0] if kind == "scroll" else words)
    return Action(text.replace(" ", "_")) if text in _BARE else None


def android_control(prediction: str, references: References) -> Score:
    """1 if the action is of the right kind and does the same; what follows `Action:` is read, if that is there."""
    metadata = references.get("metadata", {})
    target = read_action(metadata.get("target_action") or _action_of(answers_of(references)[0]))
    if target is None:
        raise EvaluationError(
            f"the target action {metadata.get('target_action')!r} is none of AndroidControl's; choose another metric"
        )
    said = read_action(_action_of(prediction))
    right = float(said is not None and _same(said, target, metadata.get("target_box")))
    values = {
        "accuracy": right,
        "kind_correct": float(said is not None and said.kind == target.kind),
        f"accuracy_{target.kind}": right,
    }
    return Score(values, parsed=said is not None, read=None if said is None else said.kind)


def _action_of(text: str) -> str:
    return text.split("Action:")[1] if "Action:" in text else text


def _same(said: Action, target: Action, box: Sequence[float] | None) -> bool:
    if said.kind == target.kind and said.place is None and target.place is None:
        return said.words == target.words
    if said.kind != target.kind and (said.kind, target.kind) != ("click", "open_app"):
        return False
    if said.place is None or box is None:
        return said.kind == target.kind and said.place is not None and said.place == target.place
    return box[0] <= said.place[0] <= box[2] and box[1] <= said.place[1] <= box[3]


METRICS: dict[str, Metric] = {
    "android_control": Metric(
        android_control,
        "accuracy",
        most_frequent,
        MOST_FREQUENT,
        "Step accuracy of AndroidControl (Li et al. 2024, arXiv:2406.03679, appendix D) as in allenai/molmo"
        " `compute_stepwise_accuracy`: a click is right inside the target's box, text and direction must be equal in"
        " lower case, and a click on an app's box stands for opening it. Different here: outer and double spaces do not"
        " count, and a place without a known box is right only exactly there (never, in that code).",
        outputs={
            "accuracy": Output("1 if the action does what the person's did"),
            "kind_correct": Output("1 if it is the same kind of action"),
            "accuracy_*": Output("1 if the action does what the person's did; over the steps with that kind of action"),
        },
        unparsed="None of AndroidControl's actions: 0.",
    ),
}
