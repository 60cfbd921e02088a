"""Hands a block's layers to the method, checks what it decides, and puts the decided values into the block."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from compressor.calibration.capture import Capture
from compressor.calibration.stats import SecondMoment
from compressor.checkpoint.skeleton import Skeleton
from compressor.checkpoint.source import DTYPES
from compressor.decision import Decision, Kept, Masked, Outcome, Quantized
from compressor.errors import NumericalError, UnsupportedError
from compressor.formats.base import QuantFormat
from compressor.formats.pruned import PRUNED
from compressor.inputs import InputOp, Permute, Rotate
from compressor.methods.base import Block, Layer, Method, Scope, is_pruned, relative_error
from compressor.methods.eaquant_rotation import turned_weight
from compressor.plan import LayerPlan
from compressor.report import Row

BlockOf = Callable[[Sequence[tuple[Layer, QuantFormat]]], Block]
"""Makes a block of its layers: adds what enters it, what should leave it, and a way to run it."""


@dataclass
class Solved:
    """What became of the tensors of one block.

    Attributes:
        rows: Report rows.
        events: Fall-backs and surprises.
        packed: Tensor name in the result -> bytes to write.
        metrics: What the method measured.
        inputs: Tensor name in the source -> what the method wants to happen to the layer's input.
    """

    rows: list[Row] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    packed: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, tuple[InputOp, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Solver:
    """Runs one method on one block after the other.

    Attributes:
        method: The method.
        skeleton: Holds the block's weights, float32; decided values are put there.
        format_of: Gives the format of a compressed layer.
        seed: Seed of the method's generators.
    """

    method: Method
    skeleton: Skeleton
    format_of: Callable[[LayerPlan], QuantFormat]
    seed: int

    def solve(
        self,
        layers: Sequence[LayerPlan],
        capture: Capture | None,
        tensors: Mapping[str, Tensor],
        block_of: BlockOf,
    ) -> Solved:
        """Let the method decide every compressed layer, and copy the others.

        Args:
            layers: All tensors of the block.
            capture: Statistics of its layers' inputs.
            tensors: Tensor name -> what is stored of the ones that stay dense.
            block_of: For methods that see whole blocks.

        Raises:
            NumericalError: Values that are not finite.
            UnsupportedError: The method left a layer out that was planned.
        """
        solved = Solved()
        for layer in layers:
            if not layer.format:
                row = Row(layer.ref.name, "kept", layer.kept_because, layer.bytes_before, layer.bytes_after)
                solved.rows.append(row)
                solved.packed[layer.ref.name] = tensors[layer.ref.name]
        for members, tasks, outcome in self._decisions(layers, capture, block_of):
            solved.events += outcome.events
            solved.metrics.update(outcome.metrics)
            for plan, task in zip(members, tasks, strict=True):
                decision, moved = self._keep_zeros(task, outcome.decisions[plan.ref.name], self.format_of(plan))
                if moved:
                    solved.events.append(f"{plan.ref.name}: {moved} pruned weights had moved and are zero again")
                row, written = self._apply(plan, task, decision)
                solved.rows.append(row)
                solved.packed.update(written)
                if isinstance(decision, Quantized) and decision.inputs:
                    solved.inputs[plan.ref.name] = decision.inputs
        return solved

    def _decisions(
        self, layers: Sequence[LayerPlan], capture: Capture | None, block_of: BlockOf
    ) -> Iterator[tuple[list[LayerPlan], list[Layer], Outcome]]:
        """Yield what the method decides at once: plans, layers and their outcome. One fused set's copies at a time."""
        fused: dict[str, list[LayerPlan]] = {}
        for layer in layers:
            if layer.format:
                fused.setdefault(layer.ref.fused_with, []).append(layer)
        method: Any = self.method
        if method.scope is Scope.BLOCK:
            plans = [plan for members in fused.values() for plan in members]
            tasks = [task for members in fused.values() for task in self._tasks(members, capture)]
            if plans:
                block = block_of([(task, self.format_of(plan)) for task, plan in zip(tasks, plans, strict=True)])
                yield plans, tasks, method.solve_block(block, self._generator(block.name))
            return
        for members in fused.values():
            tasks, fmt = self._tasks(members, capture), self.format_of(members[0])
            if method.scope is Scope.GROUP:
                yield members, tasks, method.solve_group(tasks, fmt, self._generator(members[0].ref.fused_with))
            elif method.scope is Scope.LAYER:
                for plan, task in zip(members, tasks, strict=True):
                    yield [plan], [task], method.solve(task, fmt, self._generator(task.ref.name))
            else:
                raise UnsupportedError(f"method {method.name} has scope {method.scope.value}, which cannot be run yet")

    def _tasks(self, members: Sequence[LayerPlan], capture: Capture | None) -> list[Layer]:
        """Return the layers of a fused set as the method sees them."""
        fmt = self.format_of(members[0])
        parts = [self.skeleton.part(m.ref.param, m.ref.where).detach().clone() for m in members]
        weights = [part.reshape(m.ref.matrix or part.shape) for m, part in zip(members, parts, strict=True)]
        shared = fmt.fit_global(weights) if fmt.has_global_scale else None
        return [
            Layer(m.ref, weight, shared, capture.sums[m.ref.fed_by] if capture else {}, m.steps)
            for m, weight in zip(members, weights, strict=True)
        ]

    def _generator(self, name: str) -> torch.Generator:
        """A generator that depends on the seed and the layer only, never on what ran before."""
        digest = hashlib.sha256(f"{self.seed}\0{self.method.name}\0{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def _apply(self, plan: LayerPlan, task: Layer, decision: Decision) -> tuple[Row, dict[str, Tensor]]:
        """Check a decision, put its values into the block, and return the report row and the bytes to write."""
        ref = plan.ref
        if isinstance(decision, Kept):
            raise UnsupportedError(f"{ref.name}: method {self.method.name} kept it ({decision.reason}) after planning")
        fmt = self.format_of(plan)
        if isinstance(decision, Masked):
            assert plan.format == PRUNED, f"{ref.name}: dense values for format {plan.format}"
            stored = decision.values.to(DTYPES[ref.dtype])
            decoded, written = stored.float(), {ref.name: stored.reshape(ref.shape)}
        else:
            decoded = fmt.decode(decision.codes, decision.qparams)
            packed = fmt.pack(decision.codes, decision.qparams)
            written = {f"{ref.module}.{suffix}": tensor for suffix, tensor in packed.tensors.items()}
        if not torch.isfinite(decoded).all():
            raise NumericalError(f"{ref.name}: its compressed values are not finite", "try another format")
        if isinstance(decision, Quantized) and task.weight.any() and not decoded.any():
            raise NumericalError(f"{ref.name}: all of its compressed values are zero", "give it more bits with --set")
        if decision.keep is not None:
            assert not (decoded != 0)[~decision.keep].any(), f"{ref.name}: pruned weights are not zero"
        full = SecondMoment()
        reference = _as_stored(task.weight, decision)
        has_data = full in task.stats and task.n_tokens > 0
        row = Row(
            name=ref.name,
            action=fmt.name,
            reason=None,
            bytes_before=plan.bytes_before,
            bytes_after=plan.bytes_after,
            weight_error=relative_error(reference, decoded),
            output_error=relative_error(task.weight, decoded, task.second_moment(full)) if has_data else None,
            tokens=task.n_tokens,
            inputs=plan.inputs,
            sparsity=_share(decoded == 0),
            pruned=None if decision.keep is None else _share(~decision.keep),
        )
        part = self.skeleton.part(ref.param, ref.where)
        part.copy_(decoded.view_as(part))
        return row, written

    def _keep_zeros(self, task: Layer, decision: Decision, fmt: QuantFormat) -> tuple[Decision, int]:
        """Return the decision with the zeros of a pruned matrix back in place, and how many had moved."""
        if not isinstance(decision, Quantized) or not is_pruned(task.weight) or _turns(decision):
            return decision, 0
        zeros = task.weight == 0
        decoded = fmt.decode(decision.codes, decision.qparams)
        moved = int((zeros & (decoded != 0)).sum())
        if moved:
            nothing = fmt.encode(torch.zeros_like(task.weight), decision.qparams)
            codes = torch.where(zeros, nothing, decision.codes)
            decision = replace(decision, codes=codes)
        return decision, moved


def _turns(decision: Decision) -> list[InputOp]:
    """Return the operations on a layer's input that its weight had to follow."""
    ops = decision.inputs if isinstance(decision, Quantized) else ()
    return [op for op in ops if isinstance(op, Permute | Rotate)]


def _as_stored(weight: Tensor, decision: Decision) -> Tensor:
    """Return the weight as it would be stored unrounded, `[out, in]`: for inputs that are rotated and reordered."""
    turns = _turns(decision)
    return turned_weight(weight, turns) if turns else weight


def _share(mask: Tensor) -> float:
    """Return the share of True; 0 of nothing."""
    return int(mask.sum()) / max(mask.numel(), 1)
