"""How sure data makes us that a true value lies above or below a limit, honest at few and at identical samples.

Everything judged here is a ratio of sums, `theta = sum(y) / sum(x)` over independent units (documents, segments of a
text, groups): a mean (`x` = weights), a paired mean difference (`y` = new - old), or a paired relative value (`y` =
new, `x` = old; Fieller 1954). That `theta` is at a limit means that `e = y - limit * x` has mean zero, so that every
question becomes one about the mean of `e`, and no resampling is needed.

* `mean_confidence`: Student's t for sums of any size, with Hall's correction for skewed data (Hall 1992, "On the
  removal of skewness by transformation", J. R. Stat. Soc. B 54): divergences have a long right tail, and the
  plain t bound then finds them small too often.
* `share_confidence`: the score test for documents scored between 0 and 1. The variance is that of the most likely
  distribution *with mean zero*, which also puts mass on outcomes that did not occur. For right-or-wrong documents it is
  Wilson's (1927) interval for one model and Tango's (1998, Stat. Med. 17) for the difference of two. When no document
  changed, the exact binomial bound (rule of three) takes its place: its normal approximation is too sure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MIN_UNITS = 10
"""Segments or groups below which Student's t with an estimated skewness says nothing reliable."""

ALIKE_SHARE = 0.95
"""`n` units without any spread show, with confidence `1 - 0.95**n`, that fewer than 5 % of all units differ."""


@dataclass(frozen=True)
class Confidence:
    """A measured value and how sure the data is about where the true one lies.

    Attributes:
        value: The estimate.
        above: Limit -> confidence in 0..1 that the true value is above it; falls as the limit rises.
        below: Limit -> confidence that the true value is below it. Not `1 - above` where data supports neither.
        units: Independent units behind it.
        note: Why the data is too little to say anything, or empty.
    """

    value: float
    above: Callable[[float], float]
    below: Callable[[float], float]
    units: int
    note: str = ""

    def lower(self, level: float) -> float:
        """Return the one-sided lower bound: the highest limit the value is above with this confidence, or -inf."""
        return _last(lambda step: self.above(self.value - step) < level, self.value, -1.0)

    def upper(self, level: float) -> float:
        """Return the one-sided upper bound, or inf."""
        return _last(lambda step: self.below(self.value + step) < level, self.value, 1.0)

    def through(self, function: Callable[[float], float], inverse: Callable[[float], float]) -> Confidence:
        """Return the confidence in `function(value)`; the function must increase."""
        return Confidence(
            function(self.value),
            lambda limit: self.above(inverse(limit)),
            lambda limit: self.below(inverse(limit)),
            self.units,
            self.note,
        )


def mean_confidence(y: Array, x: Array) -> Confidence:
    """Judge `sum(y) / sum(x)` over independent units by Student's t with Hall's correction for skewness.

    With fewer than `MIN_UNITS` units nothing is claimed. Units that are all alike have no spread to judge by; then the
    confidence is `1 - ALIKE_SHARE ** units`.

    Args:
        y: Sums of each unit, float64 `[n]`.
        x: What they are divided by, float64 `[n]`: weights, or the other model's values, whose sum is positive.
    """
    value, n = float(y.sum() / x.sum()), len(y)
    if n < MIN_UNITS:
        return _nothing(value, n, f"{n} independent units; {MIN_UNITS} are the least that can be judged")
    residual = y - value * x
    if float(np.abs(residual).max()) <= 1e-12 * float(np.abs(y).max() + np.abs(value * x).max()):
        sure = 1 - ALIKE_SHARE**n
        return Confidence(
            value,
            lambda limit: sure if limit < value else 0.0,
            lambda limit: sure if limit > value else 0.0,
            n,
            f"all {n} units are alike: no spread to judge by",
        )
    if not _clearly_positive(x):
        return _nothing(value, n, "what is divided by is not clearly above zero")

    def deviate(limit: float) -> float:
        return _hall(y - limit * x)

    return Confidence(
        value,
        lambda limit: student_t_cdf(deviate(limit), n - 1),
        lambda limit: student_t_cdf(-deviate(limit), n - 1),
        n,
    )


def share_confidence(y: Array, x: Array, corners: tuple[tuple[float, float], ...]) -> Confidence:
    """Judge `sum(y) / sum(x)` over documents whose scores lie between 0 and 1, by the score test.

    Args:
        y: Of each document, float64 `[n]`.
        x: What it is divided by, float64 `[n]`; the sum is positive.
        corners: The `(y, x)` of every extreme document that can occur, whether it did or not.
    """
    ends = np.array(corners, dtype=np.float64)  # [corners, 2]
    value = float(y.sum() / x.sum())
    alike = float(np.abs(y - value * x).max()) <= 1e-12

    def one_sided(limit: float, sign: float) -> float:
        e, possible = sign * (y - limit * x), sign * (ends[:, 0] - limit * ends[:, 1])
        low, high = float(possible.min()), float(possible.max())
        if low >= 0 or high <= 0:
            return float(high > 0)
        return (_alike_above_zero if alike else _share_above_zero)(e, low, high)

    return Confidence(value, lambda limit: one_sided(limit, 1.0), lambda limit: one_sided(limit, -1.0), len(y))


def student_t_cdf(t: float, df: int) -> float:
    """Return P(T <= t) of Student's t distribution, through the regularised incomplete beta function."""
    if math.isinf(t):
        return float(t > 0)
    tail = 0.5 * _incomplete_beta(df / 2, 0.5, df / (df + t * t))
    return tail if t < 0 else 1 - tail


def normal_cdf(z: float) -> float:
    """Return P(Z <= z) of the normal distribution."""
    return 0.5 * math.erfc(-z / math.sqrt(2))


def _nothing(value: float, units: int, note: str) -> Confidence:
    return Confidence(value, lambda _: 0.0, lambda _: 0.0, units, note)


def _clearly_positive(x: Array) -> bool:
    """Return whether a denominator is so far from zero that the set of plausible ratios is an interval."""
    spread = float(x.std(ddof=1)) / math.sqrt(len(x))
    return float(x.mean()) > 5 * spread


def _hall(e: Array) -> float:
    """Return Hall's transform of the t statistic of `mean(e)`: `T + a T^2 + a^2 T^3 / 3 + skew / (6 sqrt n)`.

    `a = skew / (3 sqrt n)`; the derivative is `(1 + a T)^2`, so the transform never turns back.
    """
    n, mean = len(e), float(e.mean())
    centred = e - mean
    variance = float((centred**2).mean())
    if variance <= 1e-30 * mean * mean:
        return math.copysign(math.inf, mean)
    t = mean / math.sqrt(variance / (n - 1))
    skew = float((centred**3).mean()) / math.sqrt(variance) ** 3
    a = skew / (3 * math.sqrt(n))
    return t + a * t * t + a * a * t**3 / 3 + a / 2


def _share_above_zero(e: Array, low: float, high: float) -> float:
    """Return the confidence that the mean of `e`, whose values lie in `[low, high]`, is above zero (score test)."""
    cells, counts = np.unique(e, return_counts=True)
    return normal_cdf(float(e.mean()) / math.sqrt(_variance_at_zero(cells, counts, low, high) / len(e)))


def _alike_above_zero(e: Array, low: float, high: float) -> float:
    """Return the same for documents that all did alike.

    Were the true mean zero, a share `q` of documents would have to score `low` instead, `(1 - q) mean + q low = 0`, and
    not one of them was seen, which has probability `(1 - q)^n`.
    """
    mean = float(e.mean())
    return 1 - (-low / (mean - low)) ** len(e) if mean > 0 else 0.0


def _variance_at_zero(cells: Array, counts: NDArray[np.int64], low: float, high: float) -> float:
    """Return the variance of the most likely distribution on the cells and `low`, `high` whose mean is zero.

    Maximising `sum counts log p` under `sum p = 1` and `sum p cells = 0` gives `p = counts / (n (1 + m cells))` with
    one multiplier `m`; it lies between `-1/high` and `-1/low`. At an end of that range an outcome that never occurred
    has to take the rest of the mass.
    """
    share = counts / counts.sum()
    first, last = -1 / high, -1 / low

    def moment(multiplier: float) -> tuple[float, float]:
        p = cells / (1 + multiplier * cells)
        return float((share * p).sum()), -float((share * p * p).sum())

    inside = (1 - 1e-12) * first, (1 - 1e-12) * last  # the ends themselves may be poles
    if moment(inside[0])[0] < 0:
        multiplier, extreme = first, high
    elif moment(inside[1])[0] > 0:
        multiplier, extreme = last, low
    else:
        multiplier, extreme = _root(moment, *inside), 0.0
    p = share / (1 + multiplier * cells)
    return float((p * cells**2).sum() + max(1 - float(p.sum()), 0.0) * extreme**2)


def _root(falling: Callable[[float], tuple[float, float]], low: float, high: float) -> float:
    """Return the zero of a falling function given as value and slope: Newton, bisection where that leaves the range."""
    at = 0.0
    for _ in range(100):
        value, slope = falling(at)
        low, high = (at, high) if value > 0 else (low, at)
        following = at - value / slope
        if not low < following < high:
            following = (low + high) / 2
        if abs(following - at) <= 1e-14 * max(abs(at), 1.0):
            break
        at = following
    return at


def _last(unsure: Callable[[float], bool], value: float, sign: float) -> float:
    """Return `value + sign * step` for the smallest step that is not unsure; infinite if there is none."""
    low, high = 0.0, 1e-6 * max(abs(value), 1e-3)
    while unsure(high):
        if high > 1e6 * max(abs(value), 1.0):
            return sign * math.inf
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if unsure(middle) else (low, middle)
    return value + sign * high


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularised incomplete beta function `I_x(a, b)` by its continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 1000):
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d, c = 1 / (1 + step * d), 1 + step / c
            fraction *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return front * fraction
