"""Rounding the inputs of a block's layers while it runs: ranges of static scales, the operations, and their cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.calibration.capture import Capture
from compressor.calibration.channels import MaxAbs
from compressor.calibration.coverage import Coverage
from compressor.checkpoint.skeleton import Skeleton, Target
from compressor.engine.experts import Stack, Treat, find_routers, run_experts
from compressor.errors import NumericalError
from compressor.formats.activations import INPUT_FORMATS
from compressor.inputs import InputOp, apply_ops, calibrated, carried, saturated
from compressor.plan import Kind, LayerPlan
from compressor.ranks import ALONE, Ranks
from compressor.report import Row

WORTH_SAYING = 1e-3
"""Share of saturated values from which on the report says so."""


@dataclass
class _Cost:
    """What rounding did to the calibration inputs of one layer."""

    error: float = 0.0
    size: float = 0.0
    saturated: int = 0
    values: int = 0


@dataclass
class InputRounding:
    """Rounds the inputs of one block's layers.

    Attributes:
        skeleton: Holds the block.
        layers: The plan of its tensors.
        dtype: Dtype static scales are stored in.
    """

    skeleton: Skeleton
    layers: Sequence[LayerPlan]
    dtype: torch.dtype
    _handles: list[Any] = field(default_factory=list)
    _costs: dict[str, _Cost] = field(default_factory=dict)

    _stacks: dict[str, Stack] = field(default_factory=dict)
    """Module of experts that round inputs -> its parts."""
    _planned: Sequence[LayerPlan] = ()

    def __post_init__(self) -> None:
        self._planned = self.layers
        rounded = {layer.ref.owner for layer in self.layers if layer.steps}
        for ref in (layer.ref for layer in self.layers if layer.ref.role is not None):
            if ref.owner in rounded:
                assert ref.where.expert is not None
                assert ref.role is not None
                stack = self._stacks.setdefault(ref.owner, {})
                stack.setdefault(ref.where.expert, {})[ref.role] = Target(ref.param, ref.where)
        self.layers = [layer for layer in self.layers if layer.steps]

    def ranges(self, min_expert_tokens: int = 0, ranks: Ranks = ALONE) -> Capture | None:
        """Return accumulators for the largest magnitudes that static scales must cover, or None if there are none.

        Args:
            min_expert_tokens: Tokens that the range of every expert is to rest on.
            ranks: The processes that share the samples.
        """
        static = [layer for layer in self.layers if layer.ranges]
        if not static:
            return None
        widths = {layer.ref.fed_by: layer.ref.matrix[1] for layer in static if layer.ref.matrix}
        modules = {layer.ref.fed_by: self._module(layer) for layer in static}
        coverage, routers = Coverage(min_expert_tokens), find_routers(self._planned, self.skeleton)
        return Capture(widths, modules, (MaxAbs(),), self.skeleton.device, coverage, routers, ranks)

    def attach(
        self, decided: Mapping[str, tuple[InputOp, ...]], ranges: Capture | None, packed: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Round from now on, and return the tensors to store, by name on disk.

        Args:
            decided: Tensor name -> operations the method chose; layers without an entry get the plan's format.
            ranges: What `ranges` returned, after the calibration samples have passed.
            packed: The block's packed weights by name on disk: inputs on grids of powers take over their exponents.

        Raises:
            NumericalError: Inputs are not finite.
        """
        out: dict[str, Tensor] = {}
        treats: dict[str, Treat] = {}
        for layer in self.layers:
            ops = decided.get(layer.ref.name) or self._default(
                layer, ranges, packed.get(f"{layer.ref.module}.weight_exponent")
            )
            found = tuple(op.describe() for op in ops)
            assert found == layer.steps, f"{layer.ref.name}: {found} was not planned, {layer.steps} was"
            for op in ops:
                # Own storage: layers that read one tensor share its scale, and files hold no shared memory.
                out |= {f"{layer.ref.module}.{key}": value.cpu().clone() for key, value in op.tensors().items()}
            treats[layer.ref.name] = self._rounding(layer.ref.name, ops)
            if (carry := carried(ops)) is not None:
                assert layer.ref.kind is not Kind.EXPERT, f"{layer.ref.name}: experts give nothing back"
                self._handles.append(self._module(layer).register_forward_hook(_adding(carry)))
        self._treat(treats)
        return out

    @contextmanager
    def learning(
        self, ranges: Capture | None, left: float, generator: torch.Generator, exponents: Mapping[str, float]
    ) -> Iterator[None]:
        """Round to the plan's formats inside a `with`, while gradients pass as if nothing was rounded.

        Args:
            ranges: What `ranges` returned, after the calibration samples have passed.
            left: Share of values that are left as they are.
            generator: Draws them.
            exponents: Tensor name -> exponent of a weight on a grid of powers, as it is now.

        Raises:
            NumericalError: Inputs are not finite.
        """
        treats = {}
        for layer in self.layers:
            power = exponents.get(layer.ref.name)
            ops = self._default(layer, ranges, None if power is None else torch.tensor([power]))
            treats[layer.ref.name] = _straight_through(ops, left, generator)
        self._treat(treats)
        try:
            yield
        finally:
            self.detach()

    def _treat(self, treats: Mapping[str, Treat]) -> None:
        """Let the block's layers treat their inputs from now on; tensor name -> how."""
        experts: dict[str, dict[tuple[int, str], Treat]] = {name: {} for name in self._stacks}
        for layer in self.layers:
            treat = treats[layer.ref.name]
            if layer.ref.kind is Kind.EXPERT:
                assert layer.ref.where.expert is not None
                assert layer.ref.role is not None
                experts[layer.ref.owner][layer.ref.where.expert, layer.ref.role] = treat
            else:
                self._handles.append(self._module(layer).register_forward_pre_hook(_treating(treat)))
        for name, stack in self._stacks.items():
            module = self.skeleton.model.get_submodule(name)
            module.forward = partial(run_experts, module, stack, experts[name])

    def detach(self) -> None:
        """Stop rounding."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for stack in self._stacks:
            self.skeleton.model.get_submodule(stack).__dict__.pop("forward", None)

    def join(self, ranks: Ranks) -> None:
        """Add up what rounding did to the samples of all processes."""
        if ranks.size == 1:
            return
        everyones = ranks.gather(self._costs)
        self._costs = {}
        for name, cost in (item for costs in everyones for item in costs.items()):
            total = self._costs.setdefault(name, _Cost())
            total.error, total.size = total.error + cost.error, total.size + cost.size
            total.saturated, total.values = total.saturated + cost.saturated, total.values + cost.values

    def report(self, rows: list[Row]) -> tuple[list[Row], list[str]]:
        """Return rows with what rounding did to the calibration inputs that passed, and a sentence where they saturate.

        Without such inputs (nothing that the run needs goes through the compressed block) errors stay unknown.
        """
        out, events = [], []
        for row in rows:
            cost = self._costs.get(row.name)
            if cost and cost.size > 0:
                row = replace(row, input_error=(cost.error / cost.size) ** 0.5)
            if cost and cost.saturated > WORTH_SAYING * cost.values:
                events.append(f"{row.name}: {cost.saturated / cost.values:.2%} of its inputs lie beyond their scale")
            out.append(row)
        return out, events

    def _module(self, layer: LayerPlan) -> nn.Module:
        return self.skeleton.model.get_submodule(layer.ref.param.rpartition(".")[0])

    def _default(self, layer: LayerPlan, ranges: Capture | None, exponent: Tensor | None) -> tuple[InputOp, ...]:
        name = default_format(layer)
        assert name is not None, f"{layer.ref.name}: its method was to choose {layer.steps}, but did not"
        fmt = INPUT_FORMATS[name]
        loudest = torch.zeros(1, device=self.skeleton.device)
        if layer.ranges:
            assert ranges is not None
            loudest = ranges.sums[layer.ref.fed_by][MaxAbs()].value()
            if not torch.isfinite(loudest).all():
                raise NumericalError(
                    f"{layer.ref.name}: its calibration inputs are not finite",
                    "use other calibration data, or leave its inputs as they are with --skip-inputs",
                )
        return (calibrated(fmt, loudest, self.dtype, exponent),)

    def _rounding(self, name: str, ops: tuple[InputOp, ...]) -> Treat:
        """Return what rounds one layer's input and keeps the books."""

        def treat(x: Tensor) -> Tensor:
            before = apply_ops(ops[:-1], x)  # what is rounded: rounding comes last
            rounded = apply_ops(ops[-1:], before)
            cost = self._costs.setdefault(name, _Cost())
            wide = before.float()
            cost.error += float((rounded.float() - wide).square().sum(dtype=torch.float64))
            cost.size += float(wide.square().sum(dtype=torch.float64))
            cost.saturated += saturated(ops[-1], wide)
            cost.values += x.numel()
            return rounded

        return treat


def _straight_through(ops: tuple[InputOp, ...], left: float, generator: torch.Generator) -> Treat:
    """Return what rounds an input but for a share of its values; its gradient is that of the input itself."""

    def treat(x: Tensor) -> Tensor:
        own = x.detach()
        rounded = apply_ops(ops, own)
        if left:
            keep = torch.rand(x.shape, generator=generator).to(x.device) < left
            rounded = torch.where(keep, own, rounded)
        return rounded + (x - own)  # the difference is zero, and passes the gradient

    return treat


def _treating(treat: Treat) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (treat(args[0]), *args[1:])

    return hook


def _adding(carry: Tensor) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + carry.to(output.dtype)

    return hook


def default_format(layer: LayerPlan) -> str | None:
    """Return the format of a layer's inputs if rounding to it is all that happens to them, else None."""
    return layer.inputs if layer.inputs and len(layer.steps) == 1 else None
