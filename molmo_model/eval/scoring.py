"""From scores per example to numbers with an uncertainty: means, clustered standard errors, intervals, paired tests.

Pure Python, so that scoring a task starts in a fraction of a second. Questions about one image are not independent:
all errors here are clustered by image.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from molmo_model.errors import EvaluationError
from molmo_model.eval.metrics import Metric, Score


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` scores with its standard error and a two-sided confidence interval `[low, high]`."""

    mean: float
    stderr: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Paired:
    """Two systems on the same examples: mean of `b - a`, its standard error, interval, and a two-sided p-value."""

    difference: float
    stderr: float
    low: float
    high: float
    p_value: float
    wins: int
    """Examples where b scores higher."""
    losses: int
    """Examples where a scores higher."""
    n: int


@dataclass(frozen=True)
class TaskScores:
    """A task's numbers, and the scores per example that they average, in the order of the predictions."""

    metrics: dict[str, Estimate]
    baseline: dict[str, Estimate]
    """The same metrics for one constant answer."""
    constant: str
    """That answer."""
    scores: list[Score]

    @property
    def unparsed(self) -> int:
        """Answers that were not of the form that the metric asks for; they are among the scores, mostly as 0."""
        return sum(not score.parsed for score in self.scores)


def score_task(
    metric: Metric, predictions: Sequence[Mapping[str, Any]], training: Sequence[Mapping[str, Any]], confidence: float
) -> TaskScores:
    """Scores a task's predictions, and beside them the constant answer that the training references suggest.

    Args:
        predictions: rows of `predictions.jsonl`.
        training: references of training items; without any, the constant answer is chosen from the evaluation's own
            references, which flatters the baseline.

    Raises:
        EvaluationError: there are no predictions, or references do not fit the metric.
    """
    if not predictions:
        raise EvaluationError("there are no predictions to score; the task selected no example")
    references = [row["references"] for row in predictions]
    clusters = [_image_of(row) for row in predictions]
    scores = [metric.score(row["prediction"], row["references"]) for row in predictions]
    constant = metric.constant(training or references)
    baseline = [metric.score(constant, item) for item in references]
    return TaskScores(
        _estimates(scores, clusters, confidence), _estimates(baseline, clusters, confidence), constant, scores
    )


def as_json(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    """Estimates as plain values, rounded to 6 decimals: beyond what any number of examples can resolve."""
    return {name: {k: round(v, 6) for k, v in asdict(value).items()} for name, value in estimates.items()}


def _estimates(scores: Sequence[Score], clusters: Sequence[Hashable], confidence: float) -> dict[str, Estimate]:
    return {name: estimate([score.values[name] for score in scores], clusters, confidence) for name in scores[0].values}


def _image_of(row: Mapping[str, Any]) -> Hashable:
    """Questions about the same pictures are one cluster; questions without a picture each are their own."""
    return tuple(row["image"]["sha256"]) or row["id"]


def estimate(values: Sequence[float], clusters: Sequence[Hashable], confidence: float) -> Estimate:
    """Mean of scores in [0, 1], with a standard error clustered by image and a Wilson interval.

    The interval is Wilson's score interval (Wilson 1927) at the effective sample size `p(1-p)/stderr^2` (Korn and
    Graubard 1998), so it stays inside [0, 1], is never empty at 0 or 1, and equals the plain Wilson interval for
    independent right-or-wrong scores up to the `n/(n-1)` of the variance. Where all scores are equal the effective size
    is the number of images.

    Args:
        values: one score per example.
        clusters: the image of each example.
        confidence: such as 0.95.

    Raises:
        EvaluationError: no values, a value outside [0, 1], or lengths that differ.
    """
    _check(values, clusters)
    if not all(0.0 <= value <= 1.0 for value in values):
        wrong = next(value for value in values if not 0.0 <= value <= 1.0)
        raise EvaluationError(f"a score is {wrong}; scores lie in [0, 1]")
    mean = math.fsum(values) / len(values)
    stderr = clustered_stderr(values, clusters)
    spread = mean * (1.0 - mean)
    size = spread / stderr**2 if stderr > 1e-12 and spread > 0.0 else float(len(set(clusters)))
    low, high = wilson(mean, size, confidence)
    return Estimate(mean, stderr, low, high, len(values))


def clustered_stderr(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Standard error of the mean when scores of one cluster may agree; 0 for a single cluster.

    The cluster-robust variance with the factor G/(G-1) for G clusters (CR1; Liang and Zeger 1986); equals the usual
    `s / sqrt(n)` when every cluster has one member.
    """
    mean = math.fsum(values) / len(values)
    sums: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    if len(sums) < 2:
        return 0.0
    return math.sqrt(math.fsum(total**2 for total in sums.values()) * len(sums) / (len(sums) - 1)) / len(values)


def wilson(mean: float, size: float, confidence: float) -> tuple[float, float]:
    """Wilson's score interval of a proportion `mean` of `size` trials."""
    z = _z(confidence)
    shrink = 1.0 + z * z / size
    centre = (mean + z * z / (2.0 * size)) / shrink
    half = z * math.sqrt(mean * (1.0 - mean) / size + z * z / (4.0 * size * size)) / shrink
    # the interval holds its mean even where rounding would leave it out by one bit
    return min(mean, max(0.0, centre - half)), max(mean, min(1.0, centre + half))


def paired(a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable], confidence: float) -> Paired:
    """Compares two systems example by example, clustered by image, with a normal approximation.

    Raises:
        EvaluationError: no values, or lengths that differ.
    """
    if len(a) != len(b):
        raise EvaluationError(f"paired comparison of {len(a)} with {len(b)} scores; both need the same examples")
    _check(a, clusters)
    differences = [second - first for first, second in zip(a, b, strict=True)]
    mean = math.fsum(differences) / len(differences)
    stderr = clustered_stderr(differences, clusters)
    p_value = 2.0 * NormalDist().cdf(-abs(mean) / stderr) if stderr > 0.0 else 1.0
    half = _z(confidence) * stderr
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return Paired(mean, stderr, mean - half, mean + half, p_value, wins, losses, len(differences))


def _check(values: Sequence[float], clusters: Sequence[Hashable]) -> None:
    if not values:
        raise EvaluationError("no scores to average; the task selected no example")
    if len(values) != len(clusters):
        raise EvaluationError(f"{len(values)} scores but {len(clusters)} images; one image per score is needed")


def _z(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise EvaluationError(f"eval.confidence is {confidence}; it must lie between 0 and 1, such as 0.95")
    return NormalDist().inv_cdf(0.5 + confidence / 2.0)
