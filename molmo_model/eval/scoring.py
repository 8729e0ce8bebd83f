"""From scores per item to numbers with an uncertainty: means, clustered standard errors and intervals.

Pure Python, so that scoring a task starts in a fraction of a second. Questions about one image are not independent:
all errors here are clustered by image. Two checkpoints are compared in `eval.comparison`.
"""

import math
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from json.encoder import encode_basestring
from operator import mul
from typing import TYPE_CHECKING, Any, TypeAlias

from molmo_model.artifacts import canonical_json
from molmo_model.errors import EvaluationError
from molmo_model.eval.distributions import sign_p_value, t_p_value, t_quantile
from molmo_model.eval.metrics.metric import Judge, Metric, Output, References, Score

if TYPE_CHECKING:
    import numpy as np

    Floats: TypeAlias = Sequence[float] | np.ndarray

MOST = sys.float_info.max
EXACT = 1e-12
"""Standard errors below are rounding: all scores are equal."""


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
    """Two systems on the same items: mean of `b - a`, its standard error, interval, and a two-sided p-value."""

    difference: float
    stderr: float
    low: float
    high: float
    p_value: float
    """Of Student's t with one degree of freedom less than there are images; of the sign test where all scores differ by
    the same, which leaves no variance."""
    wins: int
    """Items where b scores higher."""
    losses: int
    """Items where a scores higher."""
    n: int
    exact_p_value: float | None = None
    """Of the exact sign test over images, where every score is 0 or 1: McNemar's test, if each image has one
    question."""

    @property
    def ties(self) -> int:
        return self.n - self.wins - self.losses


@dataclass(frozen=True)
class Mean:
    """A weighted mean, and what each image does to it."""

    value: float
    pulls: Mapping[Hashable, float]
    """By image: the sum of `weight * (score - mean) / all weights`; what more weight for it would change."""
    shares: Mapping[Hashable, float]
    """By image: its part of all weights."""
    n: int

    @property
    def stderr(self) -> float:
        """The standard error when scores of one image may agree; 0 for a single image.

        The linearised (Taylor) variance of a ratio of two sums over images, with the factor G/(G-1) for G images
        (CR1; Liang and Zeger 1986; Cochran 1977, section 6). Of unweighted scores, one per image, it is
        `s / sqrt(n)`.
        """
        images = len(self.pulls)
        if images < 2:
            return 0.0
        return math.sqrt(math.fsum(pull**2 for pull in self.pulls.values()) * images / (images - 1))

    @property
    def images(self) -> float:
        """Effective number of images: of equal shares their number, fewer where some have more questions (Kish)."""
        return 1.0 / math.fsum(share**2 for share in self.shares.values())


@dataclass(frozen=True)
class Judged:
    """What a judge was asked while a task was scored."""

    asked: int
    missing: int
    """Prompts without an answer: the judge is offline and the cache has none."""
    judge: str


@dataclass(frozen=True)
class TaskScores:
    """A task's numbers, and the scores per item that they average, in the order of the predictions."""

    metrics: dict[str, Estimate]
    """By name; the numbers of further metrics are `<metric>.<number>`. A number that no item has is left out."""
    outputs: dict[str, Output]
    """What each of them is."""
    baseline: dict[str, Estimate] | None
    """The same numbers for one constant answer; None where a judge or a measurement leaves none to give."""
    constant: str | None
    """That answer."""
    scores: list[Score]
    own: list[Score]
    """The same of the first metric alone."""
    judged: Judged | None = None

    @property
    def unparsed(self) -> int:
        """Answers that were not of the form that the metric asks for; they are among the scores, mostly as 0."""
        return sum(not score.parsed for score in self.scores)


def score_task(
    metric: Metric,
    predictions: Sequence[Mapping[str, Any]],
    training: Sequence[References],
    confidence: float,
    *,
    also: Mapping[str, Metric] | None = None,
    judge: Judge | None = None,
) -> TaskScores:
    """Scores a task's predictions, and beside them the constant answer that the training references suggest.

    Args:
        predictions: rows of `predictions.jsonl`.
        training: references of training items; without any, the constant answer is chosen from the evaluation's own
            references, which flatters the baseline.
        also: further metrics by name.
        judge: who is asked where a metric asks; None is nobody.

    Raises:
        EvaluationError: there are no predictions, references do not fit the metric, or a score is not a number that
            its metric says it can be; with the item's id.
    """
    if not predictions:
        raise EvaluationError("there are no predictions to score; the task selected no example")
    items = [_item(row) for row in predictions]
    images = clusters_of(predictions)
    table, asking = {"": metric, **(also or {})}, judge or Nobody()
    scored = {name: _scores(one, items, asking) for name, one in table.items()}
    constant = None
    baseline: dict[str, Estimate] | None = None
    if not (metric.judged or metric.measured):
        constant = metric.constant(training or [references for _, references, _ in items])
        said = [(constant, references, name) for _, references, name in items]
        plain = {name: one for name, one in table.items() if not (one.judged or one.measured)}
        baseline = _numbers(
            plain, {name: _scores(one, said, asking) for name, one in plain.items()}, images, confidence
        )
    metrics = _numbers(table, scored, images, confidence)
    outputs = {name: _output(table, name) for name in metrics}
    judged = Judged(asking.asked, asking.missing, asking.name) if any(one.judged for one in table.values()) else None
    return TaskScores(metrics, outputs, baseline, constant, _merged(scored), scored[""], judged)


def numbers(
    metric: Metric, scores: Sequence[Score], images: Sequence[Hashable], confidence: float
) -> dict[str, Estimate]:
    """Every number of a metric over items: the means, then macro averages, functions and exponentials of them.

    A macro average is the unweighted mean of means; its error is clustered by image over all of its parts. The interval
    of an exponential is that of the mean with both ends transformed, its standard error that of the delta method.
    """
    means = {name: mean_of(*columns) for name, columns in _columns(scores, images).items()}
    for name, pattern in metric.macro.items():
        parts = [means[part] for part in means if fnmatchcase(part, pattern) and part not in metric.macro]
        if parts:
            means[name] = macro_mean(parts, len(scores))
    for name, function in metric.functions.items() if means else ():
        means[name] = function_mean(function, means, len(scores))
    found = {name: interval(mean, metric.output(name).upper, confidence) for name, mean in means.items()}
    return found | {name: _exponential(found[of], name) for name, of in metric.exponentials.items() if of in found}


def as_json(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    """Estimates as plain values, rounded to 6 decimals: beyond what any number of examples can resolve."""
    return {
        name: {
            "mean": round(one.mean, 6),
            "stderr": round(one.stderr, 6),
            "low": round(one.low, 6),
            "high": round(one.high, 6),
            "n": one.n,
        }
        for name, one in estimates.items()
    }


def score_lines(rows: Sequence[Mapping[str, Any]], scores: Sequence[Score]) -> Iterator[str]:
    """The lines of `scores.jsonl`, canonical JSON: `id`, `scores` by name, `parsed`; `weight` unless it is 1, `read` if
    anything was.

    Few scores are unlike each other, so all but the id is written once for equal ones.
    """
    known: dict[Hashable, str] = {}
    for row, score in zip(rows, scores, strict=True):
        facts = (*score.values, *score.values.values(), score.parsed, score.weight, score.read)
        if facts not in known:
            known[facts] = canonical_json(_fields(score))
        yield f'{{"id":{encode_basestring(row["id"])},{known[facts][1:]}\n'


def _fields(score: Score) -> dict[str, Any]:
    rounded = {name: round(float(value), 6) for name, value in score.values.items()}
    fields: dict[str, Any] = {"parsed": score.parsed, "scores": rounded}
    if score.weight != 1.0:
        fields["weight"] = score.weight
    if score.read is not None:
        fields["read"] = score.read
    return fields


def image_of(row: Mapping[str, Any]) -> Hashable:
    """Questions about the same pictures are one cluster; questions without a picture each are their own."""
    return tuple(row["image"]["sha256"]) or row["id"]


def clusters_of(predictions: Sequence[Mapping[str, Any]]) -> list[int]:
    """The number of each row's image, in order of appearance."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(image_of(row), len(numbers)) for row in predictions]


def estimate(
    values: Sequence[float],
    clusters: Sequence[Hashable],
    confidence: float,
    weights: Sequence[float] | None = None,
    upper: float | None = 1.0,
) -> Estimate:
    """Mean of scores with a standard error clustered by image and an interval; see `interval`.

    Args:
        values: one score per example.
        clusters: the image of each example.
        confidence: such as 0.95.
        weights: of each example; None is 1 each.
        upper: largest possible score; None is unbounded.

    Raises:
        EvaluationError: no values, a value outside `[0, upper]`, or lengths that differ.
    """
    for number, value in enumerate(values):
        _check_value(value, upper, f"number {number}")
    return interval(mean_of(values, [1.0] * len(values) if weights is None else weights, clusters), upper, confidence)


def mean_of(values: Sequence[float], weights: Sequence[float], images: Sequence[Hashable]) -> Mean:
    """The weighted mean of scores with each image's part in it.

    Raises:
        EvaluationError: no values, lengths that differ, or weights that are all 0.
    """
    if not values:
        raise EvaluationError("no scores to average; the task selected no example")
    if not len(values) == len(weights) == len(images):
        raise EvaluationError(f"{len(values)} scores but {len(images)} images; one image per score is needed")
    whole = math.fsum(weights)
    if not whole > 0.0:
        raise EvaluationError(f"the weights of {len(values)} scores add up to {whole}; there is nothing to average")
    mean = math.fsum(map(mul, values, weights)) / whole
    pulls: dict[Hashable, float] = {}
    shares: dict[Hashable, float] = {}
    for value, weight, image in zip(values, weights, images, strict=True):
        share = weight / whole
        pulls[image] = pulls.get(image, 0.0) + share * (value - mean)
        shares[image] = shares.get(image, 0.0) + share
    return Mean(mean, pulls, shares, len(values))


def interval(mean: Mean, upper: float | None, confidence: float) -> Estimate:
    """The two-sided confidence interval of a mean.

    Of scores in `[0, upper]`: Wilson's score interval (Wilson 1927) at the effective sample size `p(1-p)/stderr^2`
    (Korn and Graubard 1998), so it stays inside, is never empty at 0 or 1, and equals the plain Wilson interval for
    independent right-or-wrong scores up to the `n/(n-1)` of the variance. Fewer images than items shrink that size by
    the squared ratio of Student quantiles with `n-1` and `G-1` degrees of freedom, as they propose. Where all scores
    are equal the effective size is the effective number of images.

    Of unbounded scores: `mean +- t * stderr` with `G-1` degrees of freedom, cut at 0.

    Both lean on the law of large numbers over images. Simulated (five questions an image, images of unlike difficulty,
    600 draws), 95% intervals of right-or-wrong scores held the truth 92 to 99 times in 100 from 3 images on; of skewed
    unbounded scores 88 times with 3 images, 92 with 5 to 20, 94 with 50. One image with most of the weight is as few
    images. A single one says nothing about others: an unbounded number then has an empty interval.
    """
    stderr, images = mean.stderr, len(mean.pulls)
    if upper is None:
        half = t_quantile(confidence, images - 1) * stderr if stderr > 0.0 else 0.0
        return Estimate(mean.value, stderr, max(0.0, mean.value - half), mean.value + half, mean.n)
    share = min(1.0, max(0.0, mean.value / upper))
    spread, error = share * (1.0 - share), stderr / upper
    size = mean.images
    if error > EXACT and spread > EXACT:
        size = spread / error**2
        if images < mean.n:
            size *= (t_quantile(confidence, mean.n - 1) / t_quantile(confidence, images - 1)) ** 2
    low, high = wilson(share, size, confidence)
    return Estimate(mean.value, stderr, min(low * upper, mean.value), max(high * upper, mean.value), mean.n)


def wilson(mean: float, size: float, confidence: float) -> tuple[float, float]:
    """Wilson's score interval of a proportion `mean` of `size` trials."""
    z = t_quantile(confidence, math.inf)
    shrink = 1.0 + z * z / size
    centre = (mean + z * z / (2.0 * size)) / shrink
    half = z * math.sqrt(mean * (1.0 - mean) / size + z * z / (4.0 * size * size)) / shrink
    # the interval holds its mean even where rounding would leave it out by one bit
    return min(mean, max(0.0, centre - half)), max(mean, min(1.0, centre + half))


def paired(
    a: "Floats",
    b: "Floats",
    clusters: Sequence[Hashable],
    confidence: float,
    weights: "tuple[Floats, Floats] | None" = None,
) -> Paired:
    """Compares two systems item by item, clustered by image, with Student's t.

    Args:
        a, b: a score per item each, lists or arrays.
        clusters: the image of each item.
        weights: of each item for a and for b; None is 1 each.

    Raises:
        EvaluationError: no values, lengths that differ, or weights that are all 0.
    """
    import numpy as np

    if not len(a) == len(b) == len(clusters):
        raise EvaluationError(
            f"paired comparison of {len(a)} with {len(b)} scores of {len(clusters)} images; all need the same items"
        )
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    difference, pulls = difference_of(first, second, clusters, weights)
    stderr, low, high, p_value = tested(difference, pulls, confidence)
    exact = None
    if all(((scores == 0.0) | (scores == 1.0)).all() for scores in (first, second)):
        by_image = np.bincount(_codes(clusters), second - first)
        exact = sign_p_value(int((by_image > 0).sum()), int((by_image < 0).sum()))
    wins, losses = int((second > first).sum()), int((second < first).sum())
    return Paired(difference, stderr, low, high, p_value, wins, losses, len(first), exact)


def difference_of(
    a: "np.ndarray", b: "np.ndarray", clusters: Sequence[Hashable], weights: "tuple[Floats, Floats] | None" = None
) -> "tuple[float, np.ndarray]":
    """The difference of two weighted means, and what each image pulls at it, as `_codes` numbers images."""
    import numpy as np

    if not len(a):
        raise EvaluationError("no scores to average; the task selected no example")
    means, pulls = [], np.zeros(len(a))
    for sign, values, given in zip((-1.0, 1.0), (a, b), weights or (None, None), strict=True):
        weighing = np.ones(len(values)) if given is None else np.asarray(given, dtype=float)
        whole = float(weighing.sum())
        if not whole > 0.0:
            raise EvaluationError(f"the weights of {len(values)} scores add up to {whole}; there is nothing to average")
        means.append(float((values * weighing).sum() / whole))
        pulls += sign * weighing / whole * (values - means[-1])
    return means[1] - means[0], np.bincount(_codes(clusters), pulls)


def tested(difference: float, pulls: "np.ndarray", confidence: float) -> tuple[float, float, float, float]:
    """Standard error, both ends of the interval, and p-value of a difference, from what each image pulls at it."""
    images = len(pulls)
    stderr = math.sqrt(float((pulls**2).sum()) * images / (images - 1)) if images > 1 else 0.0
    if stderr <= EXACT:
        return 0.0, difference, difference, sign_p_value(images, 0) if abs(difference) > EXACT else 1.0
    half = t_quantile(confidence, images - 1) * stderr
    return stderr, difference - half, difference + half, t_p_value(difference / stderr, images - 1)


def _codes(clusters: Sequence[Hashable]) -> "np.ndarray":
    """Images by number, without gaps; whole numbers keep their order."""
    import numpy as np

    if not isinstance(clusters, np.ndarray):
        numbers: dict[Hashable, int] = {}
        return np.array([numbers.setdefault(image, len(numbers)) for image in clusters])
    codes: np.ndarray = np.unique(clusters, return_inverse=True)[1]
    return codes


def macro_mean(parts: Sequence[Mean], items: int) -> Mean:
    """The unweighted mean of means; an image, and an item, may have a part in several of them."""
    return Mean(
        math.fsum(part.value for part in parts) / len(parts),
        _added([part.pulls for part in parts], len(parts)),
        _added([part.shares for part in parts], len(parts)),
        min(items, sum(part.n for part in parts)),
    )


def function_mean(function: Callable[[Mapping[str, float]], float], means: Mapping[str, Mean], items: int) -> Mean:
    """A smooth function of means, with each image's pull to first order (the delta method)."""
    at = {name: mean.value for name, mean in means.items()}
    pulls: dict[Hashable, float] = {}
    for name, mean in means.items():
        step = 1e-6 * max(abs(at[name]), 1e-3)
        slope = (function({**at, name: at[name] + step}) - function({**at, name: at[name] - step})) / (2 * step)
        for image, pull in mean.pulls.items():
            pulls[image] = pulls.get(image, 0.0) + slope * pull
    shares = max((mean.shares for mean in means.values()), key=len)
    return Mean(function(at), pulls, shares, items)


def _added(parts: Sequence[Mapping[Hashable, float]], divisor: int) -> dict[Hashable, float]:
    added: dict[Hashable, float] = {}
    for part in parts:
        for image, value in part.items():
            added[image] = added.get(image, 0.0) + value / divisor
    return added


def _exponential(of: Estimate, name: str) -> Estimate:
    try:
        mean, low, high = math.exp(of.mean), math.exp(of.low), math.exp(of.high)
    except OverflowError:
        raise EvaluationError(f"{name} is e to the power of {of.mean}, no finite number") from None
    return Estimate(mean, mean * of.stderr, low, high, of.n)


def _columns(
    scores: Sequence[Score], images: Sequence[Hashable]
) -> Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[Hashable]]]:
    """By name: values, weights and images of the items that have it."""
    names = scores[0].values.keys() if scores else ()
    if all(score.values.keys() == names for score in scores):  # nearly always, and twice as quick
        weights = [score.weight for score in scores]
        return {name: ([score.values[name] for score in scores], weights, images) for name in names}
    columns: dict[str, tuple[list[Any], list[Any], list[Any]]] = {}
    for score, image in zip(scores, images, strict=True):
        for name, value in score.values.items():
            if name not in columns:
                columns[name] = ([], [], [])
            values, weights, clusters = columns[name]
            values.append(value)
            weights.append(score.weight)
            clusters.append(image)
    return columns


def _numbers(
    table: Mapping[str, Metric],
    scored: Mapping[str, Sequence[Score]],
    images: Sequence[Hashable],
    confidence: float,
) -> dict[str, Estimate]:
    """The numbers of several metrics, named apart; the first metric's have plain names."""
    return {
        _named(metric, name): one
        for metric, scores in scored.items()
        for name, one in numbers(table[metric], scores, images, confidence).items()
    }


def _named(metric: str, number: str) -> str:
    return f"{metric}.{number}" if metric else number


def _output(table: Mapping[str, Metric], name: str) -> Output:
    metric = next((metric for metric in table if metric and name.startswith(f"{metric}.")), "")
    return table[metric].output(name[len(metric) + 1 :] if metric else name)


def _item(row: Mapping[str, Any]) -> tuple[str, References, str]:
    """What was said, what it is compared with, and the item's id."""
    if row.get("measured") is None:
        return row["prediction"], row["references"], row["id"]
    return row["prediction"], {**row["references"], "measured": row["measured"]}, row["id"]


def _scores(metric: Metric, items: Sequence[tuple[str, References, str]], judge: Judge) -> list[Score]:
    """One checked score per item."""
    if metric.measured and (lacking := next((name for _, one, name in items if "measured" not in one), None)):
        raise EvaluationError(
            f"{lacking}: the metric scores what was measured on the reference answer, and nothing was; "
            "set tasks.<name>.kind: loss and predict again"
        )
    if metric.score_all is not None:
        scores = metric.score_all([(said, references) for said, references, _ in items], judge)
        if len(scores) != len(items):
            raise EvaluationError(f"the metric gave {len(scores)} scores for {len(items)} items; it must give one each")
    else:
        scores = [_score(metric, said, references, name) for said, references, name in items]
    limits: dict[str, float] = {}
    for score, (_, _, item) in zip(scores, items, strict=True):
        for name, value in score.values.items():
            if name not in limits:
                upper = metric.output(name).upper
                limits[name] = MOST if upper is None else upper
            if not 0.0 <= value <= limits[name]:  # NaN fails every comparison
                _check_value(value, metric.output(name).upper, f"{item}: {name}")
        if not 0.0 <= score.weight <= MOST:
            raise EvaluationError(f"{item}: the weight is {score.weight}; weights are finite and not below 0")
    return scores


def _score(metric: Metric, said: str, references: References, item: str) -> Score:
    try:
        return metric.score(said, references)
    except EvaluationError as error:
        raise EvaluationError(f"{item}: {error}") from error


def _check_value(value: float, upper: float | None, where: str) -> None:
    """NaN fails every comparison, so it is refused too."""
    if not 0.0 <= value <= (MOST if upper is None else upper):
        bounds = "are finite and not below 0" if upper is None else f"lie in [0, {upper:g}]"
        raise EvaluationError(f"{where}: a score is {value}; scores {bounds}")


def _merged(scored: Mapping[str, Sequence[Score]]) -> list[Score]:
    """The scores of all metrics in one per item: form, weight and what was read are the first metric's."""
    first, *more = scored.items()
    if not more:
        return list(first[1])
    merged = []
    for index, score in enumerate(first[1]):
        values = dict(score.values)
        for metric, others in more:
            other = others[index]
            if other.weight != score.weight:
                raise EvaluationError(
                    f"metric {metric!r} of tasks.<name>.also weighs an item {other.weight}, the task's metric "
                    f"{score.weight}; score them in two tasks"
                )
            values |= {_named(metric, name): value for name, value in other.values.items()}
        merged.append(Score(values, score.parsed, score.weight, score.read))
    return merged


@dataclass
class Nobody:
    """The judge where there is none."""

    name: str = "nobody"
    asked: int = 0
    missing: int = 0

    def ask(self, prompts: Sequence[str]) -> list[str | None]:
        self.asked += len(prompts)
        self.missing += len(prompts)
        return [None] * len(prompts)
