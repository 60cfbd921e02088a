"""Hands a block's layers to the method, checks what it decides, and puts the decided values into the block.

Sets of layers that need not agree are independent: processes solve some each, and send the others the packed bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from compressor.calibration.capture import Capture
from compressor.calibration.stats import SecondMoment
from compressor.checkpoint.skeleton import Skeleton
from compressor.checkpoint.source import DTYPES, all_finite
from compressor.decision import Decision, Kept, Masked, Outcome, Quantized
from compressor.engine.division import Division, divide
from compressor.errors import NumericalError, UnsupportedError
from compressor.formats.base import PackedTensor, QuantFormat
from compressor.formats.pruned import PRUNED
from compressor.inputs import InputOp, Permute, Rotate, Scale
from compressor.methods.base import Block, Layer, Method, Scope, is_pruned, relative_error
from compressor.methods.eaquant_rotation import unturned_weight
from compressor.plan import LayerPlan
from compressor.ranks import ALONE, Ranks
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

    def add(self, other: Solved) -> None:
        """Add what became of further tensors."""
        self.rows += other.rows
        self.events += other.events
        self.packed.update(other.packed)
        self.metrics.update(other.metrics)
        self.inputs.update(other.inputs)


@dataclass(frozen=True)
class Solver:
    """Runs one method on one block after the other.

    Attributes:
        method: The method.
        skeleton: Holds the block's weights, float32; decided values are put there.
        format_of: Gives the format of a compressed layer.
        seed: Seed of the method's generators.
        ranks: The processes that share the work.
    """

    method: Method
    skeleton: Skeleton
    format_of: Callable[[LayerPlan], QuantFormat]
    seed: int
    ranks: Ranks = ALONE

    def division(self, layers: Sequence[LayerPlan]) -> Division:
        """Return which process solves which compressed layers of a block."""
        return divide([layer for layer in layers if layer.format], self.method.scope, self.ranks.size)

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
        division = self.division(layers)
        own = {
            index: self._solve_set(members, capture, block_of)
            for index, members in enumerate(division.sets)
            if division.owners[index] == self.ranks.rank
        }
        for index, members in enumerate(division.sets):
            solved.add(self._shared(members, own.pop(index, Solved()), division.owners[index]))
        return solved

    def _solve_set(self, members: Sequence[LayerPlan], capture: Capture | None, block_of: BlockOf) -> Solved:
        """Let the method decide layers that belong together. The copies of one set are in memory at a time."""
        solved = Solved()
        method: Any = self.method
        if method.scope is Scope.BLOCK:
            tasks = [task for group in _fused(members) for task in self._tasks(group, capture)]
            block = block_of([(task, self.format_of(plan)) for task, plan in zip(tasks, members, strict=True)])
            self._carry_out(solved, members, tasks, method.solve_block(block, self._generator(block.name)))
            return solved
        tasks, fmt = self._tasks(members, capture), self.format_of(members[0])
        if method.scope is Scope.GROUP:
            outcome = method.solve_group(tasks, fmt, self._generator(members[0].ref.fused_with))
            self._carry_out(solved, members, tasks, outcome)
        elif method.scope is Scope.LAYER:
            for plan, task in zip(members, tasks, strict=True):
                self._carry_out(solved, [plan], [task], method.solve(task, fmt, self._generator(task.ref.name)))
        else:
            raise UnsupportedError(f"method {method.name} has scope {method.scope.value}, which cannot be run yet")
        return solved

    def _carry_out(
        self, solved: Solved, members: Sequence[LayerPlan], tasks: Sequence[Layer], outcome: Outcome
    ) -> None:
        """Check what the method decided at once, put it into the block, and note what is to be written and reported."""
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

    def _shared(self, members: Sequence[LayerPlan], own: Solved, owner: int) -> Solved:
        """Return what `owner` made of a set; where that was another process, its values are put into the block too."""
        if self.ranks.size == 1:
            return own
        packed = self.ranks.share_tensors(own.packed, owner)
        theirs = self.ranks.share(replace(own, packed={}, inputs=_on(torch.device("cpu"), own.inputs)), owner)
        if owner == self.ranks.rank:
            return own
        for plan in members:
            values = self.unpacked(plan, packed)
            part = self.skeleton.part(plan.ref.param, plan.ref.where)
            part.copy_(values.view_as(part))
        return replace(theirs, packed=packed, inputs=_on(self.skeleton.device, theirs.inputs))

    def unpacked(self, plan: LayerPlan, packed: Mapping[str, Tensor]) -> Tensor:
        """Return the values that packed bytes stand for, which are those their owner has, bit for bit."""
        ref, fmt = plan.ref, self.format_of(plan)
        if plan.format == PRUNED:
            return packed[ref.name].float()
        assert ref.matrix is not None
        suffixes = fmt.layout(ref.matrix)
        tensors = {suffix: packed[f"{ref.module}.{suffix}"].to(self.skeleton.device) for suffix in suffixes}
        return fmt.decode(*fmt.unpack(PackedTensor(fmt.name, ref.matrix, tensors)))

    def _tasks(self, members: Sequence[LayerPlan], capture: Capture | None) -> list[Layer]:
        """Return the layers of a fused set as the method sees them."""
        fmt = self.format_of(members[0])
        views = [self.skeleton.part(m.ref.param, m.ref.where).detach() for m in members]
        parts = [view.clone(memory_format=torch.contiguous_format) for view in views]  # experts may lie transposed
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
        if not all_finite(decoded):
            raise NumericalError(f"{ref.name}: its compressed values are not finite", "try another format")
        if isinstance(decision, Quantized) and task.weight.any() and not decoded.any():
            raise NumericalError(f"{ref.name}: all of its compressed values are zero", "give it more bits with --set")
        if decision.keep is not None:
            assert not (decoded != 0)[~decision.keep].any(), f"{ref.name}: pruned weights are not zero"
        full = SecondMoment()
        used = _on_plain_inputs(decoded, decision)
        moment = task.second_moment(full) if full in task.stats and task.n_tokens > 0 else None
        row = Row(
            name=ref.name,
            action=fmt.name,
            reason=None,
            bytes_before=plan.bytes_before,
            bytes_after=plan.bytes_after,
            weight_error=relative_error(task.weight, used),
            output_error=relative_error(task.weight, used, moment) if moment is not None else None,
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
        moved = int(torch.count_nonzero(decoded[zeros]))
        if moved:
            nothing = fmt.encode(torch.zeros_like(task.weight), decision.qparams)
            codes = torch.where(zeros, nothing, decision.codes)
            decision = replace(decision, codes=codes)
        return decision, moved


def _fused(members: Sequence[LayerPlan]) -> list[list[LayerPlan]]:
    """Return neighbours that are fused, together."""
    groups: dict[str, list[LayerPlan]] = {}
    for plan in members:
        groups.setdefault(plan.ref.fused_with, []).append(plan)
    return list(groups.values())


def _on(device: torch.device, inputs: Mapping[str, tuple[InputOp, ...]]) -> dict[str, tuple[InputOp, ...]]:
    """Return operations with their tensors on a device."""

    def moved(op: Any) -> Any:
        found = {entry.name: getattr(op, entry.name) for entry in fields(op)}
        return replace(op, **{name: value.to(device) for name, value in found.items() if isinstance(value, Tensor)})

    return {name: tuple(moved(op) for op in ops) for name, ops in inputs.items()}


def _turns(decision: Decision) -> list[InputOp]:
    """Return the operations on a layer's input that its weight had to follow."""
    ops = decision.inputs if isinstance(decision, Quantized) else ()
    return [op for op in ops if isinstance(op, Permute | Rotate)]


def _on_plain_inputs(decoded: Tensor, decision: Decision) -> Tensor:
    """Return the weight `[out, in]` that does to a layer's own inputs what `decoded` does to scaled or turned ones."""
    weight = unturned_weight(decoded, _turns(decision))
    for op in decision.inputs if isinstance(decision, Quantized) else ():
        if isinstance(op, Scale):
            weight = weight * op.factor
    return weight


def _share(mask: Tensor) -> float:
    """Return the share of True; 0 of nothing."""
    return int(torch.count_nonzero(mask)) / max(mask.numel(), 1)
