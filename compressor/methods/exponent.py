"""The search for the exponent of a power grid that rounds a matrix, or a whole network, with the least error.

Yvinec et al. 2023, "PowerQuant: Automorphism Search for Non-Uniform Quantization", ICLR, arXiv 2301.09858, and NUPES,
arXiv 2308.05600. The objective is `sum |W - W'|**2`. As a function of the exponent it has jumps and several local
minima, so: a grid from 0.2 to 1, golden-section search around its best point, and the best of all that was evaluated.
The exponent 1, a plain integer grid, is always among them; so the result never rounds worse than integers do.

Differs from the papers: bounded search instead of Nelder-Mead. Exponents have three decimals, and errors are those of
the scales as they are stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from compressor.formats.base import ScaledFormat, grouped
from compressor.formats.codebook import TINY
from compressor.formats.power import LARGEST_EXPONENT, Power

SMALLEST, STEP = 200, 50
"""The grid in thousandths: 0.20, 0.25, ..., 1.00."""

CLIPS = (1.0, 0.85, 0.7, 0.55, 0.4)
"""Shares of the largest weight that the grid of a group may reach, where clipping is part of the search."""

SAMPLE = 1 << 16
"""Weights of a matrix that exponents are ranked on."""

_ELEMENTS = 1 << 17
"""Weights rounded at once: few enough to stay in a processor's cache."""

_GOLDEN = (math.sqrt(5) - 1) / 2

Rounding = Literal["nearest", "power"]


@dataclass(frozen=True)
class Objective:
    """What the search minimises.

    Attributes:
        rounding: `nearest` value, or the value whose `power` is nearest, as in the papers.
        clip: Let every group reach as far as is best for it, instead of to its largest weight.
        relative: Divide each matrix' error by its own size, so that none outweighs the others.
    """

    rounding: Rounding = "nearest"
    clip: bool = False
    relative: bool = False

    def error(self, w: Tensor, fmt: Power, exponent: float, largest: Tensor | None = None) -> float:
        """Return the squared error of rounding `w` `[out, in]` on the grid with an exponent.

        Args:
            w: float32.
            fmt: The format.
            exponent: The exponent.
            largest: What the scales cover; `fmt.absmax(w)` if None.
        """
        largest = fmt.absmax(w) if largest is None else largest
        rows = max(_ELEMENTS // w.shape[1], 1)
        parts = (slice(first, first + rows) for first in range(0, len(w), rows))
        total = sum(self._part(w[part], fmt, exponent, largest if fmt.per_tensor else largest[part]) for part in parts)
        if not self.relative:
            return total
        size = float(w.square().sum(dtype=torch.float64))
        return total / size if size else 0.0

    def _part(self, w: Tensor, fmt: Power, exponent: float, largest: Tensor) -> float:
        unit = (largest.reshape(1, 1) if fmt.per_tensor else largest).clamp(min=TINY).unsqueeze(-1)
        least: Tensor | None = None
        for share in CLIPS if self.clip else (1.0,):
            q = fmt.params(largest * share, exponent)
            codes = fmt.encode_powers if self.rounding == "power" else fmt.encode
            # In units of the largest weight, as squares of small numbers underflow.
            delta = grouped(fmt.decode(codes(w, q), q).sub_(w), fmt.group_size).div_(unit)
            error = delta.square_().sum(-1, keepdim=True)  # [out, groups, 1]
            if fmt.per_tensor and self.clip:
                error = error.sum().reshape(1, 1, 1)
            least = error if least is None else torch.minimum(least, error)
        assert least is not None
        return float((least.double() * unit.double().square()).sum())


@dataclass(frozen=True)
class Part:
    """Evenly spread rows of a matrix, to judge exponents by.

    Attributes:
        w: `[rows, in]` float32.
        fmt: The format of the matrix.
        largest: What the scales of these rows cover.
    """

    w: Tensor
    fmt: Power
    largest: Tensor

    @classmethod
    def of(cls, w: Tensor, fmt: Power, limit: int = SAMPLE) -> Part:
        """Take rows of a matrix `[out, in]` with at most `limit` weights in all (but at least one row)."""
        largest = fmt.absmax(w)
        count = max(limit // w.shape[1], 1)
        if count >= len(w):
            return cls(w, fmt, largest)
        rows = torch.arange(count, device=w.device) * len(w) // count
        return cls(w[rows], fmt, largest if fmt.per_tensor else largest[rows])


def search_exponent(parts: Sequence[Part], objective: Objective) -> float:
    """Return the exponent with the least error summed over matrices, rounded to three decimals; 1 on ties."""
    found: dict[int, float] = {}

    def error(thousandths: int) -> float:
        if thousandths not in found:
            tried = (objective.error(part.w, part.fmt, thousandths / 1000, part.largest) for part in parts)
            found[thousandths] = sum(tried)
        return found[thousandths]

    for thousandths in range(1000, SMALLEST - 1, -STEP):
        error(thousandths)
    around = min(found, key=found.__getitem__)
    _golden(error, max(around - STEP, SMALLEST), min(around + STEP, 1000))
    # Of equal errors the first that was tried wins, and that is 1.
    return min(found, key=found.__getitem__) / 1000


def best_exponent(w: Tensor, fmt: Power, objective: Objective) -> float:
    """Return the best exponent for a matrix `[out, in]`, float32.

    Large ones are searched on a part of their rows; then the winner is compared with exponent 1 on all of them.
    """
    part = Part.of(w, fmt)
    found = search_exponent([part], objective)
    if found == LARGEST_EXPONENT or part.w is w:
        return found
    return found if objective.error(w, fmt, found) < objective.error(w, fmt, LARGEST_EXPONENT) else LARGEST_EXPONENT


def searched(w: Tensor, fmt: ScaledFormat, clip: bool = False) -> ScaledFormat:
    """Return `fmt` with the best exponent for `w` `[out, in]` if it is a power grid without one, else `fmt` itself."""
    if not isinstance(fmt, Power) or fmt.exponent is not None:
        return fmt
    return replace(fmt, exponent=best_exponent(w, fmt, Objective(clip=clip)))


def _golden(error: Callable[[int], float], low: int, high: int) -> None:
    """Narrow an interval of thousandths to a minimum by golden sections, evaluating `error` on the way."""
    while high - low > 3:
        left, right = round(high - _GOLDEN * (high - low)), round(low + _GOLDEN * (high - low))
        if error(left) <= error(right):
            high = right
        else:
            low = left
    for thousandths in range(low, high + 1):
        error(thousandths)
