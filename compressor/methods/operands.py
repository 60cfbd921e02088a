"""How the operands of attention's products are rounded: to what just covers them, or searched as LLM-FP4 does.

Liu et al. 2023, arXiv 2310.16836, rounds both operands of query·key and probability·value in encoders, each to a float
with one static scale. The search goes over splits and biases of either operand in turn, and minimises the error of the
product on a few samples. Scores are judged before the softmax; the paper weighs them by gradients, which is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from compressor.calibration.operands import OperandWatch
from compressor.errors import NumericalError
from compressor.formats.small_floats import SPLITS, TINY
from compressor.formats.split_floats import POINTS, SplitFloat
from compressor.inputs import OPERANDS, RoundFloat
from compressor.methods.base import Method

Pair = tuple[Tensor, Tensor]
"""Two matrices `[heads, rows, any]` and `[heads, any, columns]` that are multiplied."""


@runtime_checkable
class OperandMethod(Method, Protocol):
    """A method that searches the rounding of attention's operands; with others it just covers them."""

    def solve_operands(self, watch: OperandWatch, bits: int) -> tuple[RoundFloat, ...]:
        """Return the rounding of query, key, probability and value."""
        ...


def require_finite(watch: OperandWatch, where: str) -> None:
    """Make sure that there are ranges to round to.

    Args:
        watch: What was seen.
        where: What errors call the module.

    Raises:
        NumericalError: Operands are not finite.
    """
    for name in OPERANDS:
        if not torch.isfinite(watch.largest[name]):
            raise NumericalError(f"{where}: its {name} operand is not finite", "use other calibration data")


def covering(watch: OperandWatch, bits: int) -> tuple[RoundFloat, ...]:
    """Return min-max rounding to floats of so many bits, in the first split."""
    return tuple(RoundFloat.covering(bits, SPLITS[bits][0], watch.largest[name].reshape(1), False) for name in OPERANDS)


def search_operands(
    watch: OperandWatch, start: Sequence[RoundFloat], grid: SplitFloat, points: int, rounds: int
) -> tuple[RoundFloat, ...]:
    """Return the rounding with the least error of both products, one operand at a time; never worse than `start`.

    Args:
        watch: What was seen; its samples are what errors are measured on.
        start: What `covering` gives.
        grid: Gives the biases to try.
        points: How many of them, besides the one that just covers; at most 100.
        rounds: Times both operands of a product are searched.
    """
    out: list[RoundFloat] = []
    for (left, right), ops in zip((OPERANDS[:2], OPERANDS[2:]), (start[:2], start[2:]), strict=True):
        pairs = [(sample[left], _columns(sample, left, right)) for sample in watch.kept]
        largest = (watch.largest[left], watch.largest[right])
        out += _search_pair(pairs, largest, (ops[0], ops[1]), grid, points, rounds)
    return tuple(out)


def product_error(pairs: Sequence[Pair], a: RoundFloat, b: RoundFloat) -> float:
    """Return the squared error of the products that rounding causes, summed over samples."""
    total = 0.0
    for x, y in pairs:
        total += float((a.apply(x) @ b.apply(y) - x @ y).square().sum(dtype=torch.float64))
    return total


def _search_pair(
    pairs: Sequence[Pair],
    largest: tuple[Tensor, Tensor],
    start: tuple[RoundFloat, RoundFloat],
    grid: SplitFloat,
    points: int,
    rounds: int,
) -> tuple[RoundFloat, RoundFloat]:
    exact = [x @ y for x, y in pairs]
    ops = list(start)
    for _ in range(rounds):
        for side in (0, 1):
            others = [ops[1 - side].apply(pair[1 - side]) for pair in pairs]
            errors: list[tuple[float, int]] = []
            candidates = list(_candidates(start[side].bits, largest[side], grid, points))
            for index, op in enumerate(candidates):
                error = 0.0
                for pair, other, target in zip(pairs, others, exact, strict=True):
                    mine = op.apply(pair[side])
                    product = mine @ other if side == 0 else other @ mine
                    error += float(product.sub_(target).square_().sum(dtype=torch.float64))
                errors.append((error, index))
            ops[side] = candidates[min(errors)[1]]
    return ops[0], ops[1]


def _candidates(bits: int, largest: Tensor, grid: SplitFloat, points: int) -> Iterator[RoundFloat]:
    """Yield for every split the rounding that just covers, then those with moved biases; the first split first."""
    for mantissa in SPLITS[bits]:
        start = RoundFloat.covering(bits, mantissa, largest.reshape(1), offsets=False)
        yield start
        if float(largest) <= TINY:
            return
        rho = -start.scale.double().log2()
        for n in range(points):
            moved = grid.moved(rho, n * POINTS // points)
            yield start.with_scale(torch.exp2(-moved).float(), None)


def _columns(sample: Mapping[str, Tensor], left: str, right: str) -> Tensor:
    """Return what multiplies from the right, once per head on the left: keys transposed, values as they are."""
    x = sample[right].repeat_interleave(len(sample[left]) // len(sample[right]), dim=0)
    return x.transpose(-1, -2) if right == "key" else x
