"""Confidence bounds: against exact formulas, against simulation at the limit, and honest where data is too little."""

import math
import time
from collections.abc import Callable

import numpy as np
import pytest

from compressor.evals.confidence import (
    MIN_UNITS,
    Array,
    Confidence,
    mean_confidence,
    normal_cdf,
    share_confidence,
    student_t_cdf,
)
from compressor.evals.paired import DIFFERENCE_CORNERS, RATIO_CORNERS, VALUE_CORNERS, Pairs

LEVEL = 0.95
RUNS = 2000
NOISE = 4 * math.sqrt(0.05 * 0.95 / RUNS)
"""Four standard errors of a simulated 5 % rate."""


def rates(draw: Callable[[], Confidence], limit: float, runs: int = RUNS) -> tuple[float, float]:
    """Return how often data from a truth exactly at the limit claims to be above and below it."""
    above = below = 0
    for _ in range(runs):
        curve = draw()
        above += curve.above(limit) >= LEVEL
        below += curve.below(limit) >= LEVEL
    return above / runs, below / runs


def at_nominal(got: tuple[float, float], slack: float = 0.0) -> bool:
    return all(abs(rate - 0.05) <= NOISE + slack for rate in got)


def outcomes(rng: np.random.Generator, n: int, loss: float, gain: float, right: float = 0.7) -> tuple[Array, Array]:
    """Draw right-or-wrong documents of two models; `loss` and `gain` are probabilities of a change."""
    place = rng.random(n)
    old = (place < right).astype(np.float64)
    new = np.where(place < loss, 0.0, np.where(place > 1 - gain, 1.0, old))
    return old, new


def documents(old: Array, new: Array) -> Pairs:
    return Pairs(old, new, np.ones(len(old)), share=True, unit="documents")


def segments(old: Array, new: Array, share: bool = False) -> Pairs:
    """Segments of 128 tokens, the last one shorter; values are means per token."""
    weight = np.full(len(old), 128.0)
    weight[-1] = 37
    return Pairs(old * weight, new * weight, weight, share=share, unit="segments")


# Textbook values of t at 95 % and 97.5 %.
@pytest.mark.parametrize(
    ("t", "df", "expected"),
    [(6.313752, 1, 0.95), (1.812461, 10, 0.95), (1.697261, 30, 0.95), (12.706205, 1, 0.975), (2.042272, 30, 0.975)],
)
def test_student_t_of_the_tables(t: float, df: int, expected: float) -> None:
    assert student_t_cdf(t, df) == pytest.approx(expected, abs=1e-7)
    assert student_t_cdf(-t, df) == pytest.approx(1 - expected, abs=1e-7)


@pytest.mark.parametrize("df", [1, 2, 9, 63, 669])
def test_student_t_is_the_integral_of_its_density(df: int) -> None:
    grid = np.linspace(0, 4, 20_001)
    front = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    density = front * (1 + grid**2 / df) ** (-(df + 1) / 2)
    integral = 0.5 + float(((density[1:] + density[:-1]) / 2).sum()) * (grid[1] - grid[0])
    assert student_t_cdf(4.0, df) == pytest.approx(integral, abs=1e-8)
    assert student_t_cdf(0.0, df) == 0.5
    assert (student_t_cdf(math.inf, df), student_t_cdf(-math.inf, df)) == (1, 0)


def test_normal_cdf() -> None:
    assert normal_cdf(1.6448536269514722) == pytest.approx(0.95, abs=1e-12)


def test_one_share_is_wilson() -> None:
    n, p, z = 40, 0.3, 1.6448536269514722
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    curve = share_confidence(np.repeat([1.0, 0.0], [12, 28]), np.ones(n), VALUE_CORNERS)
    assert curve.lower(0.95) == pytest.approx((centre - half) / (1 + z * z / n), abs=1e-9)
    assert curve.upper(0.95) == pytest.approx((centre + half) / (1 + z * z / n), abs=1e-9)


def tango(gain: int, loss: int, n: int, limit: float) -> float:
    """Return the score of "gains minus losses is above limit" (Tango 1998, equation 3), for limits of zero and more."""
    b, c = -gain - loss + (2 * n - gain + loss) * limit, -loss * limit * (1 - limit)
    q = (math.sqrt(b * b - 8 * n * c) - b) / (4 * n)  # probability of a loss, most likely under the limit
    return (gain - loss - n * limit) / math.sqrt(n * (2 * q + limit * (1 - limit)))


@pytest.mark.parametrize(("loss", "gain", "limit"), [(12, 43, 0.3), (12, 43, -0.1), (3, 0, -0.05), (0, 5, -0.01)])
def test_the_difference_of_two_shares_is_tango(loss: int, gain: int, limit: float) -> None:
    n = 100
    z = tango(gain, loss, n, limit) if limit >= 0 else -tango(loss, gain, n, -limit)
    curve = share_confidence(np.repeat([-1.0, 1.0, 0.0], [loss, gain, n - loss - gain]), np.ones(n), DIFFERENCE_CORNERS)
    assert curve.above(limit) == pytest.approx(normal_cdf(z), abs=1e-9)
    assert curve.below(limit) == pytest.approx(normal_cdf(-z), abs=1e-9)


@pytest.mark.parametrize("corners", [VALUE_CORNERS, DIFFERENCE_CORNERS, RATIO_CORNERS])
def test_exchanging_right_and_wrong_mirrors_the_bounds(corners: tuple[tuple[float, float], ...]) -> None:
    rng = np.random.default_rng(3)
    old, new = outcomes(rng, 120, 0.05, 0.02)
    y, x = {2: (new, np.ones(120)), 3: (new - old, np.ones(120)), 4: (new, old)}[len(corners)]
    curve = share_confidence(y, x, corners)
    if len(corners) == 2:
        other = share_confidence(1 - new, x, corners)
        assert curve.upper(0.95) == pytest.approx(1 - other.lower(0.95), abs=1e-9)
    elif len(corners) == 3:
        other = share_confidence(old - new, x, corners)
        assert curve.upper(0.95) == pytest.approx(-other.lower(0.95), abs=1e-9)
    else:
        other = share_confidence(old, new, corners)
        assert curve.upper(0.95) == pytest.approx(1 / other.lower(0.95), rel=1e-6)
    assert curve.lower(0.99) < curve.lower(0.95) < curve.value < curve.upper(0.95) < curve.upper(0.99)
    assert curve.above(curve.lower(0.95)) == pytest.approx(0.95, abs=1e-6)


@pytest.mark.parametrize(("n", "gain"), [(300, 0.05), (2000, 0.005)])
def test_false_alarms_of_accuracy_differences(n: int, gain: float) -> None:
    rng = np.random.default_rng(n)
    got = rates(lambda: documents(*outcomes(rng, n, gain + 0.01, gain)).difference(), -0.01)
    assert at_nominal(got), got


def test_few_changed_documents_still_err_by_little() -> None:
    # Three losses are expected in all, so that rates move in steps; the plain t test claims "above" in 21 % here.
    rng = np.random.default_rng(4)
    got = rates(lambda: documents(*outcomes(rng, 300, 0.01, 0.0)).difference(), -0.01)
    assert max(got) < 0.1, got


def test_false_alarms_of_relative_accuracy() -> None:
    rng = np.random.default_rng(5)
    got = rates(lambda: documents(*outcomes(rng, 670, 0.05 + 0.02 * 0.7, 0.05)).ratio(), 0.98)
    assert at_nominal(got), got


def test_false_alarms_of_scores_between_right_and_wrong() -> None:
    rng = np.random.default_rng(6)

    def draw() -> Confidence:
        old = rng.beta(2, 1, 200)
        changed = rng.random(200) < 0.2
        return documents(old, np.where(changed, rng.beta(2, 1.2, 200), old)).difference()

    got = rates(draw, 0.2 * (2 / 3.2 - 2 / 3))
    assert at_nominal(got), got


def test_false_alarms_of_relative_perplexity() -> None:
    rng = np.random.default_rng(7)

    def draw() -> Confidence:
        old = rng.normal(3.2, 0.5, 64)
        return segments(old, old + math.log(1.02) + 0.01 * (rng.exponential(1.0, 64) - 1)).exp_ratio()

    got = rates(draw, 1.02)
    assert at_nominal(got), got


@pytest.mark.parametrize(("n", "shape"), [(64, 6), (16, 6), (64, 0.5)])
def test_false_alarms_of_divergences(n: int, shape: float) -> None:
    rng = np.random.default_rng(8)
    got = rates(lambda: segments(np.zeros(n), rng.gamma(shape, 0.05 / shape, n)).value(), 0.05)
    assert at_nominal(got, slack=0.01), got


def test_without_the_correction_skewed_divergences_pass_too_often() -> None:
    rng = np.random.default_rng(9)
    values = rng.gamma(0.5, 0.1, (RUNS, 64))
    t = (values.mean(1) - 0.05) / (values.std(1, ddof=1) / 8)
    plain = float((t <= -1.669402).mean())  # the 5 % quantile of t with 63 degrees of freedom
    corrected = float(np.mean([mean_confidence(row, np.ones(64)).below(0.05) >= LEVEL for row in values]))
    assert plain > 0.05 + NOISE > corrected, (plain, corrected)


def test_false_alarms_of_agreement_and_of_relative_divergence() -> None:
    rng = np.random.default_rng(10)
    got = rates(lambda: segments(np.zeros(64), rng.binomial(128, 0.9, 64) / 128, share=True).value(), 0.9)
    assert at_nominal(got), got

    def draw() -> Confidence:
        old = rng.gamma(6, 0.05 / 6, 64)
        return segments(old, old * rng.gamma(50, 1.1 / 50, 64)).ratio()

    got = rates(draw, 1.1)
    assert at_nominal(got), got


def test_false_alarms_of_absolute_perplexity_changes() -> None:
    rng = np.random.default_rng(11)

    def draw() -> Confidence:
        old = rng.normal(3.0, 0.3, 64)
        return segments(old, old + rng.normal(0.02, 0.02, 64)).exp_difference()

    got = rates(draw, math.exp(3.02) - math.exp(3.0))
    assert at_nominal(got, slack=0.005), got


def test_pairing_needs_far_fewer_documents() -> None:
    """Power to show "not more than 2 points lost" of a model that lost nothing, paired and as two separate means."""
    rng, changes, right, limit, n = np.random.default_rng(12), 0.02, 0.75, -0.02, 400

    def unpaired_power(size: int) -> float:
        old, new = rng.binomial(size, right, (2, 20_000)) / size
        error = np.sqrt((old * (1 - old) + new * (1 - new)) / size)
        return float(((new - old - limit) / error >= 1.6448536).mean())

    passes = [
        documents(*outcomes(rng, n, changes, changes, right)).difference().above(limit) >= LEVEL for _ in range(400)
    ]
    paired, ratio = float(np.mean(passes)), 2 * right * (1 - right) / (2 * changes)
    assert ratio > 9  # what theory says: the ratio of the two variances
    assert paired > 0.5
    assert unpaired_power(n) < 0.25
    assert unpaired_power(int(0.7 * ratio * n)) < paired < unpaired_power(int(1.6 * ratio * n))


def test_pairing_helps_text_even_more() -> None:
    rng = np.random.default_rng(13)
    old = rng.normal(3.2, 0.4, 64)
    new = old + rng.normal(0.01, 0.01, 64)
    paired = segments(old, new).exp_ratio()
    apart = math.hypot(float(old.std(ddof=1)), float(new.std(ddof=1))) / 8
    assert (paired.upper(0.95) - paired.value) * 20 < math.expm1(1.67 * apart)


@pytest.mark.parametrize("n", [1, 3, 20, 300, 670])
def test_documents_that_did_not_change_get_the_exact_bound(n: int) -> None:
    """With 5 % probability, none of n documents changes although a share of `1 - 0.05**(1/n)` does."""
    same = documents(*[np.tile([1.0, 0.0, 1.0], n)[:n]] * 2)
    curve = same.difference()
    assert curve.value == 0
    assert curve.lower(0.95) == pytest.approx(0.05 ** (1 / n) - 1, abs=1e-9)
    assert curve.upper(0.95) == pytest.approx(1 - 0.05 ** (1 / n), abs=1e-9)
    right = documents(np.ones(n), np.ones(n))
    assert right.value().lower(0.95) == pytest.approx(0.05 ** (1 / n), abs=1e-9)
    assert right.value().upper(0.95) == pytest.approx(1)
    assert right.ratio().lower(0.95) == pytest.approx(0.05 ** (1 / n), abs=1e-6)
    assert curve.above(0.0) == curve.below(0.0) == 0  # no data shows that nothing at all changes


def test_the_smallest_sample_that_shows_no_loss_of_a_point() -> None:
    assert documents(np.ones(298), np.ones(298)).difference().above(-0.01) < 0.95
    assert documents(np.ones(299), np.ones(299)).difference().above(-0.01) >= 0.95


def test_what_cannot_be_otherwise_is_certain() -> None:
    curve = documents(np.ones(2), np.zeros(2)).difference()
    assert (curve.above(-1.5), curve.below(1.5)) == (1, 1)
    assert (curve.above(1.0), curve.below(-1.0)) == (0, 0)
    assert curve.lower(0.95) == -1


def test_segments_all_alike_need_59() -> None:
    for n, enough in ((58, False), (59, True)):
        same = segments(np.full(n, 3.0), np.full(n, 3.0)).exp_ratio()
        assert (same.above(0.99) >= 0.95) == (same.below(1.02) >= 0.95) == enough
        assert same.above(1.0) == same.below(1.0) == 0
        assert "all alike" in same.note or "are alike" in same.note
    # Identical models whose values differ from segment to segment are alike, too: what counts is the change.
    old = np.random.default_rng(14).normal(3, 0.4, 20)
    for curve in (segments(old, old).exp_ratio(), segments(old, old).ratio()):
        assert 0 < curve.below(1.02) < 0.95
        assert curve.upper(0.95) == math.inf


def test_too_few_segments_claim_nothing() -> None:
    rng = np.random.default_rng(15)
    few = segments(np.zeros(MIN_UNITS - 1), rng.normal(1, 0.01, MIN_UNITS - 1)).value()
    assert few.above(0.0) == few.below(10.0) == 0
    assert (few.lower(0.95), few.upper(0.95)) == (-math.inf, math.inf)
    assert f"{MIN_UNITS - 1} independent units" in few.note
    enough = segments(np.zeros(MIN_UNITS), rng.normal(1, 0.01, MIN_UNITS)).value()
    assert enough.above(0.5) > 0.999


def test_a_ratio_to_something_near_zero_claims_nothing() -> None:
    rng = np.random.default_rng(16)
    old = np.zeros(64)
    old[0] = 1.0
    curve = segments(old, rng.gamma(1, 1, 64)).ratio()
    assert curve.above(0.0) == curve.below(1e9) == 0
    assert "not clearly above zero" in curve.note


def test_bounds_and_confidence_agree_and_are_quick() -> None:
    rng = np.random.default_rng(17)
    old = rng.normal(3, 0.4, 64)
    started = time.perf_counter()
    for curve in (
        segments(old, old + rng.normal(0.01, 0.02, 64)).exp_ratio(),
        segments(old, old + rng.normal(0.01, 0.02, 64)).exp_difference(),
        documents(*outcomes(rng, 5000, 0.02, 0.02)).ratio(),
        documents(rng.random(5000), rng.random(5000)).difference(),
    ):
        for level in (0.9, 0.95, 0.999):
            assert curve.above(curve.lower(level)) == pytest.approx(level, abs=1e-6)
            assert curve.below(curve.upper(level)) == pytest.approx(level, abs=1e-6)
        limits = np.linspace(curve.lower(0.999), curve.upper(0.999), 25)
        assert all(np.diff([curve.above(float(limit)) for limit in limits]) <= 1e-12)
    assert time.perf_counter() - started < 10
