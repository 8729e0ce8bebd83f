"""Pointing: one-to-one matching of predicted points to targets, and who hit what.

The rule is that of Molmo's pointing evaluation (Deitke et al. 2024, arXiv:2409.17146; allenai/molmo,
`olmo/eval/evaluators.py`): assign predictions to targets with the least sum of distances (Hungarian algorithm), then
count a pair when the predicted point lies inside the target's region: its mask (`metadata.masks`, see `masks`; the
point is rounded to a pixel), its box (`metadata.boxes`, percent), or a circle (`metadata.radius`). An answer that is
not exactly one tag of points scores 0. One thing is corrected: that code compares pixels with percent in the
assignment, here both are pixels.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from molmo_model.errors import EvaluationError
from molmo_model.eval.metrics.masks import contains
from molmo_model.preprocessing.points import Point, parse_exact

FALLBACK_RADIUS = 5.0
"""Percent of the longer side around a target point that counts as hit, where the data give no mask, box or radius."""


def score(predicted: Sequence[Point], references: Mapping[str, Any]) -> tuple[float, float, float]:
    """Precision, recall and F1 of predicted points in percent; without targets all are 1 iff nothing is predicted.

    Raises:
        EvaluationError: the reference answer is no points, or there are masks or boxes, but not one for each target.
    """
    targets = targets_of(references)
    if not targets or not predicted:
        right = float(not targets and not predicted)
        return right, right, right
    _require_regions(targets, references.get("metadata", {}))
    width, height = references["width"], references["height"]
    points = [(x / 100 * width, y / 100 * height) for x, y in predicted]
    goals = [(x / 100 * width, y / 100 * height) for x, y in targets]
    pairs = assignment([[math.dist(point, goal) for goal in goals] for point in points])
    hits = sum(_inside(points[i], goals[j], j, references) for i, j in pairs)
    precision, recall = hits / len(points), hits / len(goals)
    return precision, recall, 2 * precision * recall / (precision + recall) if hits else 0.0


def targets_of(references: Mapping[str, Any]) -> Sequence[Point]:
    """The points of the reference answer; the empty sequence where there is nothing to point at.

    Raises:
        EvaluationError: the reference answer is no points at all, which is not the same.
    """
    targets: Sequence[Point] | None = references.get("points")
    if targets is None:  # a text may still be a tag of points, or say that there are none
        targets = parse_exact(references.get("answer") or "")
    if targets is None:
        raise EvaluationError(f"the reference answer {references.get('answer')!r} is no points; choose another metric")
    return targets


def _inside(point: Point, goal: Point, number: int, references: Mapping[str, Any]) -> bool:
    """Whether a point in pixels lies in the region of target `number`: its mask, its box, or a circle around it."""
    width, height, metadata = references["width"], references["height"], references.get("metadata", {})
    if masks := metadata.get("masks"):
        rows, columns = masks[number]["size"]
        return contains(masks[number], round(point[0] * (columns / width)), round(point[1] * (rows / height)))
    if boxes := metadata.get("boxes"):
        left, top, right, bottom = boxes[number]
        return left <= point[0] / width * 100 <= right and top <= point[1] / height * 100 <= bottom
    radius = metadata.get("radius", FALLBACK_RADIUS)
    return math.dist(point, goal) <= radius / 100 * max(width, height)


def in_any_region(point: Point, references: Mapping[str, Any]) -> bool:
    """Whether a point in percent lies in some target's mask, box or circle.

    Raises:
        EvaluationError: the references have no region at all.
    """
    require_any_region(references)
    metadata = references.get("metadata", {})
    if masks := metadata.get("masks"):
        return any(
            contains(mask, int(point[0] / 100 * mask["size"][1]), int(point[1] / 100 * mask["size"][0]))
            for mask in masks
        )
    if boxes := metadata.get("boxes"):
        return any(box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3] for box in boxes)
    width, height = references["width"], references["height"]
    place = (point[0] / 100 * width, point[1] / 100 * height)
    goals = [(x / 100 * width, y / 100 * height) for x, y in targets_of(references)]
    return any(_inside(place, goal, number, references) for number, goal in enumerate(goals))


def require_any_region(references: Mapping[str, Any]) -> None:
    """Refuses references without masks, boxes and points."""
    metadata = references.get("metadata", {})
    if not (metadata.get("masks") or metadata.get("boxes") or references.get("points")):
        raise EvaluationError("the references have neither masks, boxes nor points; choose another metric")


def _require_regions(targets: Sequence[Point], metadata: Mapping[str, Any]) -> None:
    for name in ("masks", "boxes"):
        regions = metadata.get(name)
        if regions is not None and len(regions) != len(targets):
            raise EvaluationError(
                f"metadata.{name} has {len(regions)} for {len(targets)} points; it must have one each"
            )


def assignment(costs: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Pairs (row, column) of a rectangular cost matrix with the least sum, `min(rows, columns)` of them, by row.

    Shortest augmenting paths with dual variables (Jonker and Volgenant 1987), O(rows^2 columns). Own code because
    importing scipy takes longer than scoring a task.
    """
    if not costs or not costs[0]:
        return []
    if len(costs) > len(costs[0]):
        return sorted((row, column) for column, row in assignment(list(zip(*costs, strict=True))))
    rows, columns = len(costs), len(costs[0])
    row_dual, column_dual = [0.0] * rows, [0.0] * columns
    row_of: list[int | None] = [None] * columns
    for start in range(rows):
        _augment(costs, start, row_dual, column_dual, row_of)
    return sorted((row, column) for column, row in enumerate(row_of) if row is not None)


def _augment(
    costs: Sequence[Sequence[float]],
    start: int,
    row_dual: list[float],
    column_dual: list[float],
    row_of: list[int | None],
) -> None:
    """Gives row `start` a column along the cheapest alternating path; changes the duals and `row_of` in place."""
    columns = len(column_dual)
    distance = [math.inf] * columns
    before: list[int | None] = [None] * columns
    done: list[int] = []
    open_columns = set(range(columns))
    row, last, reached = start, None, 0.0
    while True:
        for column in open_columns:
            through = reached + costs[row][column] - row_dual[row] - column_dual[column]
            if through < distance[column]:
                distance[column], before[column] = through, last
        last = min(open_columns, key=lambda column: (distance[column], column))
        reached = distance[last]
        open_columns.remove(last)
        owner = row_of[last]
        if owner is None:
            break
        done.append(last)
        row = owner
    row_dual[start] += reached
    for column in done:
        owner = row_of[column]
        if owner is not None:
            row_dual[owner] += reached - distance[column]
            column_dual[column] -= reached - distance[column]
    while last is not None:
        previous = before[last]
        row_of[last] = start if previous is None else row_of[previous]
        last = previous
