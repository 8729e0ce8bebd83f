"""Two checkpoints on the same items: differences with an error clustered by image, p-values, and where they differ.

A `Column` is one checkpoint's scores of one number in one task, read once and compared as often as one likes: a pair
takes a fraction of a millisecond. Averages over a group of tasks, of one checkpoint and of a difference, stand here
too; their errors know that tasks may share images.
"""

import hashlib
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from molmo_model.errors import EvaluationError
from molmo_model.eval.scoring import (
    Estimate,
    Paired,
    difference_of,
    image_of,
    interval,
    macro_mean,
    mean_of,
    paired,
    tested,
)

if TYPE_CHECKING:
    import numpy as np

EXAMPLES = 10
"""Ids of wins, and of losses, that a comparison names."""


@dataclass(frozen=True)
class Comparison:
    """A paired comparison, with the ids of the items where it is won and lost most clearly."""

    task: str
    a: str
    b: str
    number: str
    lower_is_better: bool
    paired: Paired
    """`wins` are items on which b is better: where lower is better, it scores lower."""
    wins: list[str]
    """Ids of the items with the largest wins, the largest first; of equal ones a sample over all."""
    losses: list[str]

    @property
    def gain(self) -> float:
        """By how much b is better: the difference, its sign turned where lower is better."""
        return -self.paired.difference if self.lower_is_better else self.paired.difference


@dataclass(frozen=True, eq=False)
class Column:
    """One checkpoint's scores of one number in one task, in the order of the items' ids."""

    checkpoint: str
    task: str
    metric: str
    number: str
    upper: float | None
    lower_is_better: bool
    asked: tuple[tuple[str, str, Hashable], ...]
    """Id, prompt and image of each item."""
    values: "np.ndarray"
    """NaN where an item lacks the number."""
    weights: "np.ndarray"
    images: "np.ndarray"
    """Number of each item's image."""
    turn: "np.ndarray"
    """Rank of each item's id in a shuffled order that is the same everywhere: among equal differences the first are
    shown."""


def column(
    document: Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    scores: Sequence[Mapping[str, Any]],
    number: str | None = None,
) -> Column:
    """One checkpoint's scores, ready to be compared.

    Args:
        document: `metrics.json`, as a scorecard holds it too.
        predictions: rows of `predictions.jsonl`.
        scores: rows of `scores.jsonl`.
        number: which number; None is the primary one.

    Raises:
        EvaluationError: scores are of other items than predictions, or no item has the number.
    """
    import numpy as np

    name = document["primary"] if number is None else number
    where = f"{document['checkpoint']} {document['task']}"
    scored = {row["id"]: row for row in scores}
    rows = sorted(predictions, key=lambda row: row["id"])
    if len(scored) != len(rows) or any(row["id"] not in scored for row in rows):
        raise EvaluationError(f"{where}: scores are of other items than predictions; run score again")
    values = np.array([scored[row["id"]]["scores"].get(name, math.nan) for row in rows])
    if np.isnan(values).all():
        known = sorted({one for row in scores for one in row["scores"]})
        raise EvaluationError(f"{where}: no item has the number {name!r}; they have {', '.join(known) or 'none'}")
    codes: dict[Hashable, int] = {}
    asked = tuple((row["id"], row["prompt"], image_of(row)) for row in rows)
    shuffled = sorted(range(len(rows)), key=lambda index: hashlib.sha256(asked[index][0].encode()).digest())
    turn = np.empty(len(rows), dtype=int)
    turn[shuffled] = np.arange(len(rows))
    output = document["outputs"][name]
    return Column(
        checkpoint=document["checkpoint"],
        task=document["task"],
        metric=document["metric"],
        number=name,
        upper=output["upper"],
        lower_is_better=output["lower_is_better"],
        asked=asked,
        values=values,
        weights=np.array([float(scored[row["id"]].get("weight", 1.0)) for row in rows]),
        images=np.array([codes.setdefault(image, len(codes)) for _, _, image in asked]),
        turn=turn,
    )


def compare(a: Column, b: Column, confidence: float, examples: int = EXAMPLES) -> Comparison:
    """Compares two checkpoints in one task, item by item. The items that both have the number for count.

    Raises:
        EvaluationError: other tasks, metrics, items or prompts, or no item has the number from both.
    """
    both = _both(a, b)
    found = paired(a.values[both], b.values[both], a.images[both], confidence, (a.weights[both], b.weights[both]))
    better = (b.values - a.values)[both]
    if a.lower_is_better:
        better, found = -better, replace(found, wins=found.losses, losses=found.wins)
    shown = [_largest(a, both, sign * better, examples) for sign in (1, -1)]
    return Comparison(a.task, a.checkpoint, b.checkpoint, a.number, a.lower_is_better, found, *shown)


def average(columns: Sequence[Column], confidence: float) -> Estimate:
    """One checkpoint's unweighted mean over tasks, with an interval that knows which tasks share images.

    Raises:
        EvaluationError: no tasks, or numbers of different scales.
    """
    _one_scale(columns)
    parts = []
    for one in columns:
        has = [index for index, value in enumerate(one.values.tolist()) if not math.isnan(value)]
        values, weights = one.values[has].tolist(), one.weights[has].tolist()
        parts.append(mean_of(values, weights, [one.asked[index][2] for index in has]))
    return interval(macro_mean(parts, sum(part.n for part in parts)), columns[0].upper, confidence)


def average_difference(pairs: Sequence[tuple[Column, Column]], confidence: float) -> Paired:
    """The unweighted mean over tasks of `b - a`, with an error that knows which tasks share images.

    Wins and losses are counted over all items of all tasks.

    Raises:
        EvaluationError: no tasks, numbers of different scales, or pairs that cannot be compared.
    """
    import numpy as np

    _one_scale([one for pair in pairs for one in pair])
    total: dict[Hashable, float] = {}
    differences, wins, losses, n = [], 0, 0, 0
    for a, b in pairs:
        both = _both(a, b)
        weights = (a.weights[both], b.weights[both])
        difference, pulls = difference_of(a.values[both], b.values[both], a.images[both], weights)
        differences.append(difference)
        images = dict(zip(a.images.tolist(), (image for _, _, image in a.asked), strict=True))
        for code, pull in zip(np.unique(a.images[both]).tolist(), pulls.tolist(), strict=True):
            total[images[code]] = total.get(images[code], 0.0) + pull / len(pairs)
        better = (a.values - b.values)[both] if a.lower_is_better else (b.values - a.values)[both]
        wins, losses, n = wins + int((better > 0).sum()), losses + int((better < 0).sum()), n + len(both)
    mean = math.fsum(differences) / len(pairs)
    return Paired(mean, *tested(mean, np.array(list(total.values())), confidence), wins, losses, n)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of several tests, adjusted so that any false discovery among them is as unlikely as they say.

    Holm 1979, Scandinavian Journal of Statistics 6; valid however the tests depend on each other.
    """
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = least
    return adjusted


def _both(a: Column, b: Column) -> "np.ndarray":
    """Indices of the items that both have the number for, once it is clear that the two were asked the same."""
    import numpy as np

    names = f"{a.checkpoint} and {b.checkpoint}"
    for what in ("task", "metric", "number", "upper", "lower_is_better"):
        ours, theirs = getattr(a, what), getattr(b, what)
        if ours != theirs:
            raise EvaluationError(f"{names} differ in {what}: {ours!r} and {theirs!r}; score both with the same params")
    if a.asked != b.asked:
        raise EvaluationError(f"{names} were not asked the same in {a.task}: {_unlike(a, b)}; predict both again")
    both = np.flatnonzero(~np.isnan(a.values) & ~np.isnan(b.values))
    if not len(both):
        raise EvaluationError(f"{names}: no item of {a.task} has the number {a.number!r} from both")
    return both


def _unlike(a: Column, b: Column) -> str:
    """The first difference between two lists of questions."""
    ours, theirs = ({name: rest for name, *rest in one.asked} for one in (a, b))
    if only := sorted(ours.keys() ^ theirs.keys()):
        return f"{len(ours)} and {len(theirs)} items, such as {only[0]!r} only in one"
    name = next(name for name in ours if ours[name] != theirs[name])
    for what, left, right in zip(("prompt", "image"), ours[name], theirs[name], strict=True):
        if left != right:
            return f"item {name!r} has {what} {left!r} and {right!r}"
    raise AssertionError(name)


def _largest(one: Column, both: "np.ndarray", better: "np.ndarray", wanted: int) -> list[str]:
    """Ids of the items with the largest positive values, the largest first; equal ones in a shuffled order."""
    import numpy as np

    positive = np.flatnonzero(better > 0)
    order = np.lexsort((one.turn[both[positive]], -better[positive]))[:wanted]
    return [one.asked[index][0] for index in both[positive[order]]]


def _one_scale(columns: Sequence[Column]) -> None:
    if not columns:
        raise EvaluationError("no tasks to average over")
    scales = {(one.upper, one.lower_is_better): one for one in columns}
    if len(scales) > 1:
        first, second, *_ = scales.values()
        raise EvaluationError(
            f"{first.number} of {first.task} (largest value {first.upper}) and {second.number} of {second.task} "
            f"(largest value {second.upper}) are on different scales; average them apart"
        )
