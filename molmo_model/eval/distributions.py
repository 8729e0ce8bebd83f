"""Student's t and the sign test, in pure Python: intervals and p-values without waiting for scipy to be imported."""

import math
from functools import lru_cache
from statistics import NormalDist

from molmo_model.errors import EvaluationError


def beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function `I_x(a, b)`, by its continued fraction (NIST DLMF 8.17.22)."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    if x > (a + 1.0) / (a + b + 2.0):  # the fraction converges quickly on the other side only
        return 1.0 - beta(b, a, 1.0 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    c, d = 1.0, 1.0 / (1.0 - (a + b) * x / (a + 1.0))
    value = d
    for m in range(1, 10_000):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            c, d = 1.0 + term / c, 1.0 / (1.0 + term * d)
            value *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return front * value / a


def t_p_value(t: float, freedom: float) -> float:
    """Two-sided p-value of Student's t with so many degrees of freedom."""
    return beta(freedom / 2.0, 0.5, freedom / (freedom + t * t))


@lru_cache(maxsize=4096)
def t_quantile(confidence: float, freedom: float) -> float:
    """The `t` that a Student variable stays within, on both sides, with probability `confidence`.

    Raises:
        EvaluationError: the confidence is not between 0 and 1.
    """
    if not 0.0 < confidence < 1.0:
        raise EvaluationError(f"eval.confidence is {confidence}; it must lie between 0 and 1, such as 0.95")
    t = NormalDist().inv_cdf(0.5 + confidence / 2.0)
    if freedom == math.inf:
        return t
    # the normal quantile is below the root, from where Newton's steps only rise to it
    log_peak = math.lgamma((freedom + 1.0) / 2.0) - math.lgamma(freedom / 2.0) - 0.5 * math.log(freedom * math.pi)
    for _ in range(100):
        density = math.exp(log_peak - (freedom + 1.0) / 2.0 * math.log1p(t * t / freedom))
        step = (t_p_value(t, freedom) - (1.0 - confidence)) / (2.0 * density)
        t += step
        if abs(step) < 1e-12 * t:
            break
    return t


def sign_p_value(wins: int, losses: int) -> float:
    """Two-sided exact p-value that so uneven a split, or a more uneven one, comes from a fair coin.

    Of right and wrong answers to independent questions this is McNemar's exact test.
    """
    fewer, n = min(wins, losses), wins + losses
    if n == 0:
        return 1.0
    return min(1.0, 2.0 * beta(n - fewer, fewer + 1, 0.5))  # P(X <= fewer) of n tosses
