"""Two evaluations of the same documents, paired one by one.

Both models saw the same documents, so a hard document is hard for both and cancels in the difference: the standard
error of the paired difference is `sqrt(2 (1 - correlation))` times that of one mean, several times smaller than what
comparing two means gives (Miller 2024, "Adding Error Bars to Evals", arXiv 2411.00640, section 4.2).

One estimator serves all samples: sums `y` over units of `x`, `theta = sum(y) / sum(x)`, whose standard error is that of
the residuals `r = y - theta x`: `var = n/(n-1) * sum(r^2) / sum(x)^2`. With documents (`x = 1`) it is the plain paired
standard error; with segments of a text it is the clustered one of `evals.perplexity`.

Units are documents and segments. Documents of one group (a phenomenon, a subject) count as separate ones, because the
groups of a benchmark are its fixed parts and not a draw from many: differences between groups are then no noise, and
ignoring the groups errs on the careful side. `by_group` makes the groups the units instead, which answers another
question: whether the result would hold for other groups of the kind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compressor.errors import RecipeError
from compressor.evals.confidence import Array, Confidence, mean_confidence, share_confidence
from compressor.evals.scores import Estimate, Samples, weighted_mean

NOT_SHARES = frozenset(
    (
        "nll",
        "kl",
        "perplexity",
        "word_perplexity",
        "byte_perplexity",
        "bits_per_byte",
        "brier_score",
        "loglikelihood",
        "cosine",
    )
)
"""Metrics that are no share of anything, even where all their values happen to lie between 0 and 1."""

VALUE_CORNERS = ((0.0, 1.0), (1.0, 1.0))
DIFFERENCE_CORNERS = ((0.0, 1.0), (1.0, 1.0), (-1.0, 1.0))
RATIO_CORNERS = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))


@dataclass(frozen=True)
class Pairs:
    """One metric of two models on the same units, in the same order.

    Attributes:
        old: Sums of the first model, float64 `[n]`.
        new: Sums of the second, float64 `[n]`.
        weight: What a unit sums over, float64 `[n]`.
        share: Whether every document has a score between 0 and 1.
        unit: What a unit is: documents, segments or groups.
    """

    old: Array
    new: Array
    weight: Array
    share: bool
    unit: str

    @property
    def scored_documents(self) -> bool:
        """Whether units are single documents with scores between 0 and 1, for which the score test is made."""
        return self.share and self.unit == "documents"

    def value(self) -> Confidence:
        """Judge the second model's mean alone."""
        if self.scored_documents:
            return share_confidence(self.new, self.weight, VALUE_CORNERS)
        return mean_confidence(self.new, self.weight)

    def difference(self) -> Confidence:
        """Judge the mean difference, second minus first."""
        if self.scored_documents:
            return share_confidence(self.new - self.old, self.weight, DIFFERENCE_CORNERS)
        return mean_confidence(self.new - self.old, self.weight)

    def ratio(self) -> Confidence:
        """Judge the second model's mean divided by the first's, by testing `new - ratio * old` (Fieller).

        Exact where a bootstrap or a delta method would approximate, and without random numbers.

        Raises:
            RecipeError: The first model has negative values, or its mean is zero.
        """
        if self.old.min() < 0 or self.new.min() < 0 or self.old.sum() <= 0:
            raise RecipeError(
                f"a relative change needs values that are not negative and a baseline above zero, which is "
                f"{self.old.sum() / self.weight.sum():.4g}",
                "give an absolute change, such as +0.02",
            )
        if self.scored_documents:
            return share_confidence(self.new, self.old, RATIO_CORNERS)
        return mean_confidence(self.new, self.old)

    def exp_ratio(self) -> Confidence:
        """Judge the ratio of the exponentials of the two means: relative perplexity from log-likelihoods.

        `exp` keeps order, so bounds of the mean difference become bounds of the ratio without any approximation.
        """
        return self.difference().through(safe_exp, _log)

    def exp_value(self) -> Confidence:
        """Judge the exponential of the second model's mean: its perplexity."""
        return self.value().through(safe_exp, _log)

    def exp_difference(self) -> Confidence:
        """Judge the difference of the exponentials, linearised around both means (delta method)."""
        total = self.weight.sum()
        means = [float(side.sum() / total) for side in (self.new, self.old)]
        new, old = (
            safe_exp(mean) * (side - mean * self.weight + self.weight)
            for mean, side in zip(means, (self.new, self.old), strict=True)
        )
        return mean_confidence(new - old, self.weight)


def pair(a: Samples, b: Samples, metric: str, *, by_group: bool = False) -> Pairs:
    """Bring two evaluations of one task into the same order.

    Args:
        a: Samples of the first model (the baseline).
        b: Samples of the second, in any order.
        metric: Key of `values`.
        by_group: Take groups instead of documents as units, where samples have groups.

    Raises:
        RecipeError: No samples, not the same documents, no values of this metric, or values that are not finite.
    """
    places = {key: index for index, key in enumerate(_keys(b))}
    order = _same_documents(a, b, places)
    columns = []
    for name, samples, index in (("baseline", a, range(len(a))), ("new", b, order)):
        if metric not in samples.values:
            known = ", ".join(sorted(samples.values)) or "nothing"
            raise RecipeError(f"the {name} evaluation has no samples of {metric!r}", f"there are samples of: {known}")
        values = np.array([samples.values[metric][i] for i in index], dtype=np.float64)
        if len(bad := np.flatnonzero(~np.isfinite(values))):
            raise RecipeError(
                f"{metric} of document {a.id[bad[0]]} is {values[bad[0]]} in the {name} evaluation", "evaluate again"
            )
        columns.append(values)
    old, new = columns
    weight = np.array(a.weight, dtype=np.float64)
    share = metric not in NOT_SHARES and all(bool(((v >= 0) & (v <= weight)).all()) for v in (old, new))
    unit = "documents" if bool((weight == 1).all()) else "segments"
    if by_group and a.group is not None:
        _, labels = np.unique(np.array(a.group), return_inverse=True)
        old, new, weight = (_sums(labels, column) for column in (old, new, weight))
        unit = "groups"
    return Pairs(old, new, weight, share, unit)


def paired_difference(a: Samples, b: Samples, metric: str, *, by_group: bool = False) -> Estimate:
    """Return the mean of `b` minus the mean of `a`, with the standard error of the paired difference.

    Args:
        a: Samples of the first model (the baseline).
        b: Samples of the second.
        metric: Key of `values`.
        by_group: Take groups instead of documents as units.

    Raises:
        RecipeError: As `pair`.
    """
    pairs = pair(a, b, metric, by_group=by_group)
    return weighted_mean((pairs.new - pairs.old).tolist(), pairs.weight.tolist())


def paired_ratio(a: Samples, b: Samples, metric: str, *, by_group: bool = False) -> Estimate:
    """Return the mean of `b` divided by the mean of `a`, with its paired standard error (delta method).

    For limits and tests use `Pairs.ratio`, which does not assume that the ratio is normal.

    Raises:
        RecipeError: As `pair`; also if the baseline's mean is zero or values are negative.
    """
    pairs = pair(a, b, metric, by_group=by_group)
    pairs.ratio()
    return weighted_mean(pairs.new.tolist(), pairs.old.tolist())


def _keys(samples: Samples) -> list[tuple[str, int | str]]:
    return list(zip(samples.group or ("",) * len(samples), samples.id, strict=True))


def _same_documents(a: Samples, b: Samples, places: dict[tuple[str, int | str], int]) -> list[int]:
    """Return where each sample of `a` is in `b`.

    Raises:
        RecipeError: Documents are missing on either side, or differ.
    """
    hint = "evaluate both models with the same tasks, data and limits"
    keys = _keys(a)
    if not keys or not places:
        raise RecipeError("there are no samples to compare", hint)
    lost, extra = [key for key in keys if key not in places], places.keys() - set(keys)
    if lost or extra:
        example = lost[0] if lost else sorted(extra, key=str)[0]
        raise RecipeError(
            f"not the same documents: {len(lost)} of {len(keys)} are missing in the new evaluation, {len(extra)} of "
            f"{len(places)} in the baseline, for example {'/'.join(str(part) for part in example if part != '')}",
            hint,
        )
    order = [places[key] for key in keys]
    for what, ours, theirs in (("hash", a.hash, b.hash), ("weight", a.weight, b.weight)):
        differ = [i for i, j in enumerate(order) if ours[i] != theirs[j]]
        if differ:
            raise RecipeError(
                f"not the same documents: another {what} for {len(differ)} of {len(keys)}, for example "
                f"{a.id[differ[0]]}",
                hint,
            )
    return order


def safe_exp(value: float) -> float:
    """Return `exp(value)`, infinite where that is too large for a float."""
    return math.exp(value) if value < 709 else math.inf


def _log(limit: float) -> float:
    return math.log(max(limit, 1e-300))  # a perplexity is above every limit that is zero or less


def _sums(labels: NDArray[np.intp], column: Array) -> Array:
    return np.bincount(labels, weights=column).astype(np.float64)
