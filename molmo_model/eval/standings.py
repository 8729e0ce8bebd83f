"""Who is better in the report: pairs of checkpoints, who is level with the best, and averages over groups of tasks.

All of it honest about chance: tests are paired and clustered by image (`comparison`), p-values are Holm's over what was
looked at, and who is not significantly worse than the best is marked as the best is. No torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from molmo_model.eval.comparison import Column, Comparison, average, average_difference, compare, holm
from molmo_model.eval.scoring import Estimate


@dataclass(frozen=True)
class Reading:
    """How a number is read."""

    definition: str = ""
    lower_is_better: bool = False
    upper: float | None = 1.0
    """Largest score of an item; 1 is shown in percent, None is unbounded."""

    @classmethod
    def of(cls, metrics: Mapping[str, Any], name: str) -> "Reading":
        """Of one number of a `metrics.json`."""
        said = metrics["outputs"][name]
        return cls(said["definition"], said["lower_is_better"], said["upper"])

    @property
    def percent(self) -> bool:
        return self.upper == 1.0

    def right(self, score: float | None) -> bool | None:
        """Whether an item's score is the best that there is; None where no score is, as of an unbounded number."""
        if score is None or self.upper is None:
            return None
        return score <= 0.0 if self.lower_is_better else score >= self.upper

    def shown(self, value: float) -> str:
        """In percent with one decimal, else with as many decimals as matter."""
        if self.percent:
            return f"{value * 100:.1f}"
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


Pairs = Mapping[tuple[int, int], Comparison]
"""By the numbers of two checkpoints, the first below the second."""


def pairs(columns: Sequence[Column], confidence: float, examples: int) -> dict[tuple[int, int], Comparison]:
    """All pairs of one task's checkpoints; `examples` wins and losses of each are named."""
    return {
        (first, second): compare(columns[first], columns[second], confidence, examples)
        for first, second in combinations(range(len(columns)), 2)
    }


def level_with_best(
    means: Sequence[float], p_values: Mapping[tuple[int, int], float], lower: bool, confidence: float
) -> list[bool]:
    """Which checkpoints are the best, or not significantly worse: p-values against the best are Holm's.

    Args:
        means: what is shown of each checkpoint.
        p_values: of each pair.
    """
    best = min(range(len(means)), key=lambda index: means[index] if lower else -means[index])
    others = [index for index in range(len(means)) if index != best]
    adjusted = holm([p_values[min(index, best), max(index, best)] for index in others])
    level = {best, *(index for index, p in zip(others, adjusted, strict=True) if p >= 1.0 - confidence)}
    return [index in level for index in range(len(means))]


@dataclass(frozen=True)
class Group:
    """The unweighted average of some tasks' primary numbers, for each checkpoint."""

    name: str
    tasks: tuple[str, ...]
    left_out: tuple[str, ...]
    """Tasks of the group whose primary number is no percentage per item where more is better."""
    averages: tuple[Estimate, ...]
    best: tuple[bool, ...]


def group(name: str, tasks: Mapping[str, Sequence[Column] | None], confidence: float) -> Group | None:
    """The averages of a group; None where fewer than two of its tasks can be averaged.

    Args:
        tasks: by name, the checkpoints' scores; None of a task that cannot be averaged with others.
    """
    fit = {task: columns for task, columns in tasks.items() if columns is not None}
    if len(fit) < 2:
        return None
    checkpoints = list(zip(*fit.values(), strict=True))
    averages = [average(columns, confidence) for columns in checkpoints]
    p_values = {
        (first, second): average_difference(
            list(zip(checkpoints[first], checkpoints[second], strict=True)), confidence
        ).p_value
        for first, second in combinations(range(len(checkpoints)), 2)
    }
    best = level_with_best([one.mean for one in averages], p_values, False, confidence)
    return Group(name, tuple(fit), tuple(task for task in tasks if task not in fit), tuple(averages), tuple(best))
