"""SparseGPT: prune one input's weights at a time and let the weights still to come make up for each of them.

Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv 2301.00774,
Algorithm 1. With `H` the second moment of the inputs, `H^-1 = U^T U` and `U` upper triangular, removing `w_j` adds
`(w_j / U_jj)^2` to the output error of a row; masks are chosen by that cost, panel by panel, from weights that earlier
panels have already moved. It is GPTQ's loop on a grid with every number and a mask, so with a format it prunes and
rounds at once.

Differs from the paper:
- Exactly `round(size * sparsity)` weights of each panel go, the first of equal ones; the authors' code removes all
  that do not exceed a threshold.
- The damping is a share of the mean over inputs that are not always zero.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from compressor.calibration.stats import SecondMoment
from compressor.decision import Decision, Masked, Outcome, Quantized
from compressor.errors import NumericalError
from compressor.formats.base import QuantFormat, ScaledFormat
from compressor.formats.pruned import PRUNED
from compressor.methods.base import Layer, Stream
from compressor.methods.columns import Choose, Curvature, compensate, try_scales
from compressor.plan import Plan, WeightRef
from compressor.pruning.base import PruneOptions, PruningMethod, masked, refuse_shape
from compressor.pruning.masks import Pattern, keep_per_tensor

_MAX_DAMPING = 1.0


class SparseGPTOptions(PruneOptions):
    """How much, and how the loop runs."""

    damping: float = Field(
        0.01, gt=0, le=1, description="ridge added to the second moment, as a share of its mean diagonal"
    )
    block_size: int = Field(
        128, ge=32, le=1024, multiple_of=32, description="inputs among which each panel's mask is chosen"
    )


class SparseGPT(PruningMethod):
    """Pruning with error compensation, and rounding in the same loop where there is a format."""

    name = "sparsegpt"
    summary = "SparseGPT: prune input by input and let the weights still to come make up for it; also with a format"
    stream = Stream.COMPRESSED
    Options = SparseGPTOptions

    def __init__(self, options: SparseGPTOptions | None = None) -> None:
        super().__init__(options or SparseGPTOptions())
        self.options: SparseGPTOptions

    def stats(self, fmt: QuantFormat) -> tuple[SecondMoment, ...]:
        """Return the full second moment."""
        return (SecondMoment(),)

    def operations(self, plan: Plan, tokens: int) -> float:
        """Return about how many operations a run takes: second moments, their factors, and the loop."""
        shapes = {layer.ref.fed_by: layer.ref.matrix for layer in plan.compressed if layer.ref.matrix}
        moments = sum(2.0 * columns * columns * (tokens + columns) for _, columns in shapes.values())
        loop = sum(2.0 * m[0] * m[1] ** 2 for layer in plan.compressed if (m := layer.ref.matrix))
        return super().operations(plan, tokens) + moments + loop

    def refuse(self, ref: WeightRef, fmt: QuantFormat) -> str | None:
        """Refuse formats whose grid cannot be asked about one column, and shapes that do not fit the pattern."""
        if not isinstance(fmt, ScaledFormat):
            return f"method sparsegpt rounds with integers, 4-bit floats and powers, not {fmt.name}"
        if fmt.group_size and (fmt.group_size % self.options.block_size and self.options.block_size % fmt.group_size):
            return f"groups of {fmt.group_size} do not fit panels of {self.options.block_size} inputs"
        return refuse_shape(ref, self.options)

    def solve(self, layer: Layer, fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        """Prune one layer."""
        assert isinstance(fmt, ScaledFormat)
        if layer.n_tokens == 0:
            # Only experts can be unseen: there is no error to compensate.
            event = f"{layer.ref.name}: no calibration token reached it; pruned by magnitude"
            scores = layer.weight.abs()
            keep = (
                self.options.groups.choose(scores)
                if self.options.groups
                else keep_per_tensor(scores, self.options.sparsity)
            )
            return Outcome({layer.ref.name: self._decision(masked(layer.weight, keep), layer, fmt)}, (event,))
        moment = layer.second_moment(SecondMoment())
        curvature, events = self._curvature(layer, moment)
        dead = moment.diagonal() == 0
        weight = torch.where(dead, torch.zeros_like(layer.weight), layer.weight)
        chooser = PanelMask(self.options.share, self.options.groups)
        scales = fmt.fit(weight, layer.global_scale)
        choose = scales if fmt.group_size is None else _on_arrival(fmt, layer.global_scale)
        values, q = compensate(weight, fmt, curvature, choose, self.options.block_size, chooser)
        keep = chooser.mask()
        decision: Decision = Masked(keep, values)
        if fmt.name != PRUNED:
            decision = Quantized(fmt.encode(values, q), q, keep=keep)
        return Outcome({layer.ref.name: decision}, events)

    def _decision(self, decision: Masked, layer: Layer, fmt: ScaledFormat) -> Decision:
        """Return a mask's decision in the format."""
        if fmt.name == PRUNED:
            return decision
        q = fmt.fit(decision.values, layer.global_scale)
        return Quantized(fmt.encode(decision.values, q), q, keep=decision.keep)

    def _curvature(self, layer: Layer, moment: Tensor) -> tuple[Curvature, tuple[str, ...]]:
        """Factor the second moment in stored order, with more damping if need be.

        Raises:
            NumericalError: No damping makes it positive definite.
        """
        order = torch.arange(len(moment), device=moment.device)
        damping = self.options.damping
        while damping <= _MAX_DAMPING:
            curvature = Curvature.of(moment, order, damping)
            if curvature is not None:
                grown = damping > self.options.damping
                event = f"{layer.ref.name}: the second moment is singular; damping grew to {damping:g}"
                return curvature, (event,) if grown else ()
            damping *= 10
        raise NumericalError(
            f"{layer.ref.name}: the second moment of its {len(order)} inputs cannot be factored, even damped by "
            f"{damping / 10:g} of its mean diagonal",
            "use other calibration data, --method wanda, or leave the layer out with --skip",
        )


class PanelMask:
    """Chooses masks while the loop runs: a panel at a time, or one group of a pattern at a time.

    Args:
        sparsity: Share of each panel that goes.
        pattern: Groups of consecutive inputs, or None.
    """

    def __init__(self, sparsity: float, pattern: Pattern | None) -> None:
        self.sparsity, self.pattern = sparsity, pattern
        self.width = pattern.of if pattern else None
        self._chosen: list[Tensor] = []

    def choose(self, first: int, rest: Tensor, diagonal: Tensor) -> Tensor:
        """Return the mask `[inputs, out]` of a panel, given its weights as they are now and their `U_jj`."""
        scores = (rest / diagonal.unsqueeze(1)).square().T  # [out, inputs]
        keep = self.pattern.choose(scores) if self.pattern else keep_per_tensor(scores, self.sparsity)
        self._chosen.append(keep)
        return keep.T

    def mask(self) -> Tensor:
        """Return the whole mask `[out, in]` once the loop is over."""
        return torch.cat(self._chosen, 1)


def _on_arrival(fmt: ScaledFormat, global_scale: Tensor | None) -> Choose:
    """Return how a group gets its scale when its turn comes: the one with which the loop adds least error to it."""
    return lambda w, upper: try_scales(w, fmt, fmt.fit(w, global_scale), upper)
