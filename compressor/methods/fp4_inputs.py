"""LLM-FP4's joint search: split and bias of a layer's weights and of its inputs, in turn, with offsets per channel.

Liu et al. 2023, "LLM-FP4: 4-Bit Floating-Point Quantized Transformers", arXiv 2310.16836, sections 3.2 and 4; the order
of steps is that of the authors' code. The objective is `||X' W'^T - X W^T||^2` on a sample of full-precision inputs and
the loudest of all, each row counted as often as it stands for others: a sample alone misses the few tokens that decide
how far a grid must reach.

With b_j the bias at which channel j just fits and rho the bias of the whole input, channel j is multiplied by `2^k_j`,
`k_j = clip(round(b_j) - round(rho), 0, 2^E - 1)`, before it is rounded, and divided by it afterwards. Both are exact; a
kernel attaches the division to the weights' columns.

Every step picks from a list that contains what it had, so that the error never grows. A step whose circumstances are
those of its last time would pick the same, and is left out: most searches settle in the second round. Outputs of
weights of up to 4 bits are bfloat16 products where the processor has them, as in calibration: off by a thousandth where
rounding is off by a tenth.

Differs from the paper:
- Candidates of biases contain the min-max one; by default they are spaced evenly, and fewer for inputs.
- Offsets always belong to the bias at hand, and weights are always the latest ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from compressor.calibration import precision
from compressor.formats.base import QParams, SearchableFormat
from compressor.formats.float4 import Float4
from compressor.formats.small_floats import SPLITS, TINY
from compressor.formats.split_floats import POINTS, SplitFloat
from compressor.inputs import RoundFloat
from compressor.methods.fp4_rows import row_errors

_FEW = 0.5
"""Tokens per input up to which outputs are computed instead of products with a second moment, of which half is zero."""


@dataclass
class JointSearch:
    """The search of one layer.

    Attributes:
        w: `[out, in]` float32.
        x: `[tokens, in]` float32, a sample of its inputs.
        loudest: `[in]` largest magnitude of every channel over all calibration inputs.
        fmt: Format of the weights.
        bits: Of the inputs.
        offsets: Whether channels get powers of two of their own.
        points: Biases of inputs tried in each step, besides the min-max one; at most 100.
        q: The weights' parameters so far.
        counts: `[tokens]` how many inputs each of `x` stands for; None for one.
        errors: Total error after every step.
    """

    w: Tensor
    x: Tensor
    loudest: Tensor
    fmt: SearchableFormat
    bits: int
    offsets: bool
    points: int
    q: QParams
    counts: Tensor | None = None
    errors: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Errors of a row count as often as it stands for others: rows are multiplied by the root of that.
        self._root = torch.ones(len(self.x), 1) if self.counts is None else self.counts.sqrt().unsqueeze(1)
        self._root = self._root.to(self.x.device)
        self.target = (self.x * self._root) @ self.w.T  # [tokens, out]
        self.ops = {m: RoundFloat.covering(self.bits, m, self.loudest, self.offsets) for m in SPLITS[self.bits]}
        self.split = SPLITS[self.bits][0]
        # Only where one scale spans a row do splits and biases of weights depend on the inputs' rounding alone.
        self.starts = list(self.fmt.starts(self.w)) if self.fmt.group_size is None else []
        self.tables = list(self.starts)
        self.chosen = 0
        self._weights_met: RoundFloat | None = None  # the rounding of inputs that biases of weights were searched for
        self._inputs_met: Tensor | None = None  # the weight that biases of inputs were searched for
        self.errors.append(self._error(self._rounded(self.op), self._weight()))

    @property
    def op(self) -> RoundFloat:
        """What happens to inputs so far."""
        return self.ops[self.split]

    def run(self, rounds: int) -> None:
        """Go through all steps; the order is that with offsets, or that without."""
        if not bool((self.loudest > TINY).any()):
            return
        order = (
            (self._weight_biases, self._input_biases, self._weight_split, self._input_split)
            if self.offsets
            else (self._weight_biases, self._weight_split, self._input_biases, self._input_split)
        )
        for _ in range(rounds):
            for step in order:
                step()
                self.errors.append(self._error(self._rounded(self.op), self._weight()))

    def _rounded(self, op: RoundFloat) -> Tensor:
        """Return the inputs rounded, times the root of their counts."""
        return op.apply(self.x) * self._root

    def _weight(self) -> Tensor:
        return self.fmt.round(self.w, self.q)

    def _error(self, x: Tensor, w: Tensor) -> float:
        return float(self._outputs(x, w).sub_(self.target).square_().sum(dtype=torch.float64))

    def _outputs(self, x: Tensor, w: Tensor) -> Tensor:
        """Return `x @ w.T`, float32 `[tokens, out]`."""
        with precision.products(x.device, self.fmt.bits):
            return (x @ w.T).float()

    def _weight_biases(self) -> None:
        """For every split, give each row the bias with the least error of its output.

        With `x'` the rounded inputs and `d = w' - w` that is `d G d + 2 d l`, `G = sum x' x'^T` and
        `l = sum x' (x' - x)^T w`; where tokens are few beside inputs, their outputs are cheaper.
        """
        if self._weights_met is not None and _same(self._weights_met, self.op):
            return
        self._weights_met = self.op
        x = self._rounded(self.op)
        direct = len(x) < _FEW * x.shape[1]
        gram = None if direct else x.double().T @ x.double()
        slope = triangle = None
        if gram is not None:
            moved = x.double() - (self.x * self._root).double()
            slope = ((x.double().T @ moved) @ self.w.double().T).T.float()  # [out, in]
            triangle = (gram.triu(1) * 2 + gram.diagonal().diag()).float()
        for index, start in enumerate(self.starts):
            best, least = start.scale, self.w.new_full((len(self.w), 1), torch.inf)
            for candidate in self.fmt.scale_candidates(start):
                rounded = self.fmt.round(self.w, candidate)
                if slope is None or triangle is None:
                    error = self._outputs(x, rounded).sub_(self.target).square_().sum(0).unsqueeze(1)
                else:
                    delta = rounded.sub_(self.w)
                    error = row_errors(delta, triangle) + 2 * (delta * slope).sum(-1, keepdim=True)
                best = torch.where(error < least, candidate.scale, best)
                least = torch.minimum(error, least)
            self.tables[index] = replace(start, scale=best)
        if self.starts:
            self.q = self.tables[self.chosen]

    def _weight_split(self) -> None:
        if not self.starts:
            return
        x = self._rounded(self.op)
        errors = [self._error(x, self.fmt.round(self.w, q)) for q in self.tables]
        self.chosen = min(range(len(errors)), key=errors.__getitem__)
        self.q = self.tables[self.chosen]

    def _input_biases(self) -> None:
        """For every split, give the inputs the bias with the least error."""
        w = self._weight()
        if self._inputs_met is not None and torch.equal(self._inputs_met, w):
            return
        self._inputs_met = w
        for m in self.ops:
            candidates = list(self._candidates(m))
            errors = [self._error(self._rounded(op), w) for op in candidates]
            self.ops[m] = candidates[min(range(len(errors)), key=errors.__getitem__)]

    def _input_split(self) -> None:
        w = self._weight()
        errors = {m: self._error(self._rounded(op), w) for m, op in self.ops.items()}
        self.split = min(errors, key=errors.__getitem__)

    def _candidates(self, m: int) -> Iterator[RoundFloat]:
        """Yield the operation with the min-max bias of a split, then those with moved ones, offsets following."""
        start = RoundFloat.covering(self.bits, m, self.loudest, self.offsets)
        yield start
        grid = self.fmt if isinstance(self.fmt, SplitFloat) else Float4()
        rho = -start.scale.double().log2()
        for n in range(self.points):
            moved = grid.moved(rho, n * POINTS // self.points)
            yield start.with_scale(torch.exp2(-moved).float(), self.loudest if self.offsets else None)


def _same(a: RoundFloat, b: RoundFloat) -> bool:
    """Return whether two operations round alike."""
    return all(torch.equal(x, y) for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True))
