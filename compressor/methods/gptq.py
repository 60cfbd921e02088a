"""GPTQ: round one input's weights at a time and push each rounding error onto the weights not yet rounded.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv 2210.17323, Algorithm 1; activation order and static groups as in the authors' later code.

With `H` the second moment of the inputs, `H^-1 = U^T U` and `U` upper triangular, rounding input j with error `d_j`
adds `(d_j / U_jj)^2` to the output error of a row, and the weights still to come move by `-d_j U_jk / U_jj`.
`1 / U_jj^2` is what is left of the variance of input j once the inputs rounded after it have explained their part.

Differs from the paper:
- By default groups are rounded one after the other, loudest first, and each takes its scale when its turn comes: the
  one with which the loop itself, tried on the group, adds least output error. `order=static, grid=minmax` is the usual
  GPTQ.
- Inputs that are zero on all calibration data are rounded to nearest instead of losing their weights. Nothing else
  moves them, and data that did not need them is no proof that nothing will.
- The damping is a share of the mean over inputs that are not zero.
- With `scaling=awq` factors per channel move out of the weights first (Lin et al. 2023, arXiv 2306.00978).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from compressor.calibration.stats import SecondMoment, Statistic
from compressor.decision import Decision, Outcome, Quantized
from compressor.errors import NumericalError
from compressor.formats.base import QParams, QuantFormat, ScaledFormat, SearchableFormat
from compressor.methods.base import Layer, Scope, Stream, is_pruned
from compressor.methods.columns import Choose, Curvature, Zeros, compensate, try_scales
from compressor.methods.exponent import searched
from compressor.methods.grids import best_start, mse_clip, rows_of
from compressor.methods.scaled import Scaled, ScalingOptions
from compressor.plan import WeightRef

_MAX_DAMPING = 10.0
"""Of the mean variance. Beyond, inputs look independent and the result is rounding to nearest."""

_ROWS = 4096
"""Rows solved at once, which bounds memory; rows do not depend on each other."""


class GPTQOptions(ScalingOptions):
    """Options of the loop and its grid."""

    damping: float = Field(
        0.01, gt=0, le=1, description="ridge added to the second moment, as a share of its mean diagonal"
    )
    block_size: int = Field(
        128, ge=1, le=1024, description="inputs rounded before the rest is updated; changes speed, not the result"
    )
    order: Literal["group", "static", "none"] = Field(
        "group",
        description="of inputs: group: loudest groups first, scales from the weights as they are then; static: loudest "
        "inputs first, scales up front; none: as stored, scales up front",
    )
    grid: Literal["output", "mse", "minmax"] = Field(
        "output",
        description="scales by the error they add to the output; by the error of the weights; or covering all weights",
    )


class GPTQ(Scaled):
    """Rounding with error compensation."""

    name = "gptq"
    summary = "GPTQ: round input by input, moving each error onto the weights still to come"
    scope = Scope.GROUP
    stream = Stream.COMPRESSED
    Options = GPTQOptions
    options: GPTQOptions

    def __init__(self, options: GPTQOptions | None = None) -> None:
        self.options = options or GPTQOptions()

    def stats(self, fmt: QuantFormat) -> tuple[Statistic, ...]:
        """Return the full second moment, and what factors are chosen by."""
        return self.with_factor_stats((SecondMoment(),), fmt)

    def refuse(self, ref: WeightRef, fmt: QuantFormat) -> str | None:
        """Refuse formats whose grid cannot be asked about one column."""
        if not isinstance(fmt, ScaledFormat):
            return (
                "method gptq rounds with integers, 4-bit floats and powers (int2 ... int8, nvfp4, mxfp4, fp4, "
                f"power2 ... power8), not {fmt.name}"
            )
        return None

    def solve_group(self, layers: Sequence[Layer], fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        """Round the layers; those that read the same input share its factor."""
        decisions: dict[str, Decision] = {}
        events: list[str] = []
        alike: dict[int, list[Layer]] = {}
        for layer in layers:
            alike.setdefault(id(layer.stats[SecondMoment()]), []).append(layer)
        for members in alike.values():
            if members[0].n_tokens == 0:
                # Only experts can be unseen. There is no error to compensate: round to nearest, and say so.
                for layer in members:
                    q = layer.fit(fmt)
                    decisions[layer.ref.name] = Quantized(fmt.encode(layer.weight, q), q)
                    events.append(f"{layer.ref.name}: no calibration token reached it")
                continue
            outcome = self.round_with(members[0].second_moment(SecondMoment()), members, fmt)
            decisions |= outcome.decisions
            events += outcome.events
        return Outcome(decisions, tuple(events))

    def round_with(self, moment: Tensor, layers: Sequence[Layer], fmt: QuantFormat) -> Outcome:
        """Round layers that read the same input, given its second moment `[in, in]` float32.

        Raises:
            NumericalError: No damping makes the moment positive definite.
        """
        assert isinstance(fmt, ScaledFormat)
        names, events = ", ".join(layer.ref.name for layer in layers), list[str]()
        curvature = self._curvature(moment, layers[0].ref.name, fmt)
        if curvature.n_dead:
            events.append(
                f"{names}: {curvature.n_dead} of {len(curvature.order)} inputs are zero on all calibration data; "
                "their weights were rounded to nearest"
            )
        if curvature.damping > self.options.damping:
            events.append(
                f"{names}: the second moment is singular; damping grew from {self.options.damping:g} "
                f"to {curvature.damping:g}"
            )
        decided = {layer.ref.name: self._solve(layer, fmt, curvature) for layer in layers}
        return Outcome(decided, tuple(events))

    def _curvature(self, moment: Tensor, name: str, fmt: QuantFormat) -> Curvature:
        """Factor the second moment of a layer's input in the order asked for, with more damping if need be.

        Raises:
            NumericalError: No damping makes it positive definite.
        """
        order = input_order(moment.diagonal(), self.options.order, fmt.group_size)
        damping = self.options.damping
        while damping <= _MAX_DAMPING:
            curvature = Curvature.of(moment, order, damping)
            if curvature is not None:
                return curvature
            damping *= 10
        raise NumericalError(
            f"{name}: the second moment of its {len(order)} inputs cannot be factored, even damped by "
            f"{damping / 10:g} of its mean diagonal {float(moment.diagonal().mean()):.3g}",
            "use other calibration data, round this layer to nearest (--method rtn), or leave it out with --skip",
        )

    def _solve(self, layer: Layer, fmt: ScaledFormat, curvature: Curvature) -> Quantized:
        """Choose the exponent of a power grid, scales, now or as the loop goes, and round."""
        fmt = searched(layer.weight, fmt, clip=self.options.grid != "minmax")
        on_arrival = self.options.order == "group" and fmt.group_size is not None
        fixed = None if on_arrival else self._scales(layer.weight, fmt, layer.fit(fmt), curvature.variance)
        whole = fixed is not None and fmt.steps(fixed).shape[0] == 1  # one scale for all rows
        keep = layer.weight != 0 if is_pruned(layer.weight) else None
        values, parts = [], []
        for first in range(0, layer.weight.shape[0], _ROWS):
            rows = slice(first, first + _ROWS)
            scales = (
                self._choice(fmt, layer.global_scale) if fixed is None else fixed if whole else rows_of(fixed, rows)
            )
            zeros = None if keep is None else Zeros(keep[rows].T[curvature.order])
            rounded, q = compensate(layer.weight[rows], fmt, curvature, scales, self.options.block_size, zeros)
            values.append(rounded)
            parts.append(q)
        q = fixed if fixed is not None else stacked(parts)
        return Quantized(fmt.encode(torch.cat(values), q), q)

    def _scales(self, w: Tensor, fmt: ScaledFormat, q: QParams, variance: Tensor) -> QParams:
        """Return the parameters to round `w` `[out, in]` with, given its min-max ones."""
        if self.options.grid == "minmax":
            return q
        if self.options.grid == "mse":
            return mse_clip(w, fmt, q)
        if isinstance(fmt, SearchableFormat):
            return best_start(w, fmt, q, variance)
        return mse_clip(w, fmt, q, norm=2.0, weight=variance)

    def _choice(self, fmt: ScaledFormat, global_scale: Tensor | None) -> Choose:
        """Return how a group that is about to be rounded gets its parameters."""

        def choose(w: Tensor, upper: Tensor) -> QParams:
            q = fmt.fit(w, global_scale)
            if self.options.grid == "output" and len(upper) <= self.options.block_size:
                return try_scales(w, fmt, q, upper)
            return self._scales(w, fmt, q, upper.diagonal().square().reciprocal())

        return choose


def input_order(variance: Tensor, order: str, group_size: int | None) -> Tensor:
    """Return the inputs in the order they are rounded in, int64 `[in]`; equal ones as stored.

    Args:
        variance: `[in]` mean square of every input.
        order: `none`, `static` or `group`, as the option.
        group_size: Inputs per group; None for one group.
    """
    if order == "none":
        return torch.arange(len(variance), device=variance.device)
    by_input = variance.argsort(descending=True, stable=True)
    if order == "static" or group_size is None:
        return by_input
    loudness = variance.view(-1, group_size).sum(1)
    place = loudness.argsort(descending=True, stable=True).argsort()  # of every group
    return by_input[place[by_input // group_size].argsort(stable=True)]


def stacked(parts: Sequence[QParams]) -> QParams:
    """Return the parameters of a matrix from those of its rows, in order."""
    first = parts[0]
    if len(parts) == 1:
        return first
    # As bytes: torch joins FP8 values on some devices only.
    scale = torch.cat([q.scale.view(torch.uint8) for q in parts]).view(first.scale.dtype)
    zeros = [q.zero_point for q in parts if q.zero_point is not None]
    return replace(first, scale=scale, zero_point=torch.cat(zeros) if zeros else None)
