"""Smoothing factors of EAQuant: one vector for all readers of a mixture's norm, and outliers of what `down` reads.

Sections 3.1, 3.2 and 3.5 of the method, see `eaquant.md`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SMALLEST = 1e-5
"""Floor of maxima and of factors."""

_DEAD_SHARE = 1e-4
"""A column whose largest weight is below this share of the median one says nothing about how its channel should be."""

_LARGEST = 64.0
"""Factors are kept within `1 / _LARGEST` and `_LARGEST` times their geometric mean."""


def own_factors(loudest: Tensor, heaviest: Tensor, alpha: float) -> Tensor:
    """Return `a^alpha / w^(1 - alpha)`, `[channels]`, what a group of layers would choose for itself.

    Args:
        loudest: `a`, largest magnitude of every input channel.
        heaviest: `w`, largest magnitude of every column over all rows of the group.
        alpha: Exponent of the first; one minus it is that of the second.
    """
    a, w = loudest.clamp_min(_SMALLEST), heaviest.clamp_min(_SMALLEST)
    return (a.pow(alpha) / w.pow(1 - alpha)).clamp_min(_SMALLEST)


def without_dead(factors: Tensor, heaviest: Tensor) -> Tensor:
    """Return the factors with those of dead columns replaced by the smallest of the others: a maximum ignores them.

    An expert whose column is zero would otherwise hand its huge factor to all others.
    """
    dead = heaviest < _DEAD_SHARE * heaviest.median()
    if dead.all() or not dead.any():
        return factors
    return torch.where(dead, factors[~dead].min(), factors)


def aggregate(experts: Tensor, shares: Tensor | None, always: Sequence[Tensor]) -> Tensor:
    """Return one vector `[channels]` for all readers.

    Args:
        experts: Every expert's own factors, `[experts, channels]`.
        shares: Weight of every expert, for a weighted sum; None for the maximum.
        always: Factors of layers that every token passes, which take part in a maximum at the end.
    """
    s = experts.amax(0) if shares is None else (shares.unsqueeze(1) * experts).sum(0)
    for other in always:
        s = torch.maximum(s, other)
    return s


def outlier_scores(weights: Sequence[Tensor]) -> Tensor:
    """Return for every expert how far its heaviest entry sticks out of its column, `[experts]`.

    The score of a matrix is the maximum over columns of `max |w| / mean |w|`; columns of zeros do not count.
    """
    scores = []
    for weight in weights:
        size = weight.abs()
        mean = size.mean(0)
        alive = mean > 0
        scores.append((size.amax(0)[alive] / mean[alive]).max() if bool(alive.any()) else mean.new_ones(()))
    return torch.stack(scores)


def within_reach(s: Tensor) -> Tensor:
    """Return factors kept within a range around their geometric mean."""
    middle = s.log().mean().exp()
    return s.clamp(middle / _LARGEST, middle * _LARGEST)


def outlier_factors(high: Tensor, low: Tensor, share: float = 0.65, power: float = 0.7) -> Tensor:
    """Return factors `[channels]` above one for channels that reach much further than the others, else one.

    Args:
        high: Usual largest value of every channel.
        low: Usual smallest one.
        share: Quantile from which channels may be outliers; its mirror image is the other end of the range.
        power: How much of an outlier's excess its factor takes away.
    """
    q1, q3 = high.quantile(1 - share), high.quantile(share)
    s = _excess(high, _refined(high, q3 + 1.5 * (q3 - q1), upper=True), power)
    q1, q3 = low.quantile(1 - share), low.quantile(share)
    threshold = _refined(low, q1 - 1.5 * (q3 - q1), upper=False)
    return torch.maximum(s, _excess(-low, -threshold, power))


def _excess(reach: Tensor, threshold: Tensor, power: float) -> Tensor:
    """Return `(reach / v)^power` beyond the threshold, with `v` the furthest channel within it; else one."""
    beyond = reach > threshold
    inside = reach[~beyond]
    if not beyond.any() or not inside.numel() or float(inside.max()) <= 0:
        return torch.ones_like(reach)
    return torch.where(beyond, (reach / inside.max()).clamp_min(1).pow(power), 1.0)


def _refined(values: Tensor, threshold: Tensor, upper: bool) -> Tensor:
    """Move a threshold into the widest gap among the candidates beyond it, less the variance of one side."""
    candidates = (values[values > threshold] if upper else values[values < threshold]).sort(descending=True).values
    if len(candidates) < 2:
        return threshold
    best, least = threshold, -torch.inf
    for cut in range(len(candidates) - 1):
        part = candidates[cut + 1 :] if upper else candidates[: cut + 1]
        spread = float(part.var()) if len(part) > 1 else 0.0
        score = float(candidates[cut] - candidates[cut + 1]) - spread
        if score > least:
            best, least = candidates[cut + 1] if upper else candidates[cut], score
    return best
