"""The experts of a block, of which only some have their weights in memory at a time.

A stack keeps its shape, so that whoever reads or writes an expert's part of it need not know; its memory is address
space that takes room only where something was written, and gives it back (Linux). While the block runs, each expert
that tokens were sent to is put in place, run and taken out again.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.calibration.capture import Capture
from compressor.calibration.coverage import Coverage
from compressor.checkpoint.sink import Sink
from compressor.checkpoint.skeleton import Skeleton
from compressor.checkpoint.source import Source
from compressor.engine.memory import FLOAT, Expert, expert_of
from compressor.engine.solver import Solved, Solver
from compressor.errors import UnsupportedError
from compressor.plan import LayerPlan
from compressor.process import release_memory
from compressor.stacks import places, refuse_stack

MAP_NORESERVE = 0x4000
"""Linux's number; Python has a name for it from 3.13 on."""

Decode = Callable[[LayerPlan, Mapping[str, Tensor]], Tensor]
"""A compressed layer and its packed tensors by name -> its values `[out, in]`."""


class SparseStack:
    """A float32 tensor of zeros that takes memory only where it is written.

    Attributes:
        tensor: `[experts, ...]`.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self._each = FLOAT * math.prod(shape[1:])  # bytes of an expert
        # Not counted against what the system may promise: most of it is never used.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self._memory = mmap.mmap(-1, max(self._each * shape[0], 1), flags=flags)
        self.tensor = torch.frombuffer(self._memory, dtype=torch.float32, count=math.prod(shape)).view(*shape)

    def drop(self, expert: int) -> None:
        """Give the memory of an expert back; what shares a page with its neighbours stays."""
        start, stop = -(-expert * self._each // mmap.PAGESIZE), (expert + 1) * self._each // mmap.PAGESIZE
        if stop > start:
            self._memory.madvise(mmap.MADV_DONTNEED, start * mmap.PAGESIZE, (stop - start) * mmap.PAGESIZE)


class ExpertChunks:
    """The experts of one block; nothing of them is in memory until it is asked for.

    Args:
        layers: All tensors of the block.
        skeleton: Its model; the block's other tensors are loaded there.
        source: Where experts are read that are not compressed yet, or stay dense.
        sink: Where those that are lie packed.
        decode: Turns packed tensors into values.
        names: Names in the result of a compressed layer's tensors.
        at_once: How many experts may be in memory.
    """

    def __init__(
        self,
        layers: Iterable[LayerPlan],
        skeleton: Skeleton,
        source: Source,
        sink: Sink,
        decode: Decode,
        names: Callable[[LayerPlan], Iterable[str]],
        at_once: int,
    ) -> None:
        self.skeleton, self.source, self.sink = skeleton, source, sink
        self._decode, self._names, self.at_once = decode, names, at_once
        self.layers: dict[Expert, list[LayerPlan]] = {}
        for layer in layers:
            if (expert := expert_of(layer)) is not None:
                self.layers.setdefault(expert, []).append(layer)
        self.names = frozenset(layer.ref.name for own in self.layers.values() for layer in own)
        self._written: set[Expert] = set()
        self._resident: set[Expert] = set()
        self._stacks: dict[str, SparseStack] = {}
        self._blind = False

    def chunks(self) -> list[list[Expert]]:
        """Return the experts, as many at a time as may be in memory."""
        experts = list(self.layers)
        return [experts[first : first + self.at_once] for first in range(0, len(experts), self.at_once)]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Let the stacks have parameters, empty yet, and run expert by expert."""
        modules = {stack: self.skeleton.model.get_submodule(stack) for stack, _ in self.layers}
        params = {layer.ref.param for own in self.layers.values() for layer in own}
        for param in params:
            owner, _, leaf = param.rpartition(".")
            self._stacks[param] = SparseStack(modules[owner].get_parameter(leaf).shape)
            modules[owner]._parameters[leaf] = nn.Parameter(self._stacks[param].tensor, requires_grad=False)
        for stack, module in modules.items():
            module.forward = partial(self._run, stack, module, module.forward)
        try:
            yield
        finally:
            for module in modules.values():
                module.__dict__.pop("forward", None)
            self.skeleton.free(params)
            self._stacks.clear()
            self._resident.clear()

    @contextmanager
    def resident(self, experts: Sequence[Expert]) -> Iterator[None]:
        """Hold these experts' original weights; while the block runs, experts return NaN: nobody looks at it."""
        self.clear()
        for expert in experts:
            self._fill(expert)
        self._blind = True
        try:
            yield
        finally:
            self._blind = False
            self._drop(experts)

    def written(self, experts: Iterable[Expert]) -> None:
        """Note that these experts are compressed and lie in the sink."""
        self._written |= set(experts)

    def clear(self) -> None:
        """Take out all experts that running the block has left in place."""
        self._drop(self._resident)
        self._resident.clear()

    def _fill(self, expert: Expert) -> None:
        for layer in self.layers[expert]:
            part = self.skeleton.part(layer.ref.param, layer.ref.where)
            if expert in self._written and layer.format:
                part.copy_(self._decode(layer, self.sink.read(self._names(layer))).view_as(part))
            else:
                part.copy_(self.source.read([layer.ref.name])[layer.ref.name].view_as(part))

    def _drop(self, experts: Iterable[Expert]) -> None:
        for expert in experts:
            for param in {layer.ref.param for layer in self.layers[expert]}:
                self._stacks[param].drop(expert[1])

    def _run(
        self,
        stack: str,
        module: nn.Module,
        forward: Callable[..., Tensor],
        hidden: Tensor,
        index: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs, `[tokens, hidden]`.

        What transformers' grouped products do with all experts at hand, in the same order: rows of one expert are
        multiplied together, and summed over a token's experts at the end.

        Args:
            stack: Name of the module.
            module: The stack.
            forward: Its own forward, which here sees one expert at a time.
            hidden: `[tokens, hidden]`.
            index: `[tokens, k]` int64; indices past the last expert mean "none".
            weights: `[tokens, k]`.
        """
        if self._blind:
            return torch.full_like(hidden, torch.nan)
        tokens, k = index.shape
        flat, each = index.reshape(-1), weights.reshape(-1, 1)
        out = hidden.new_zeros(tokens * k, hidden.shape[-1], dtype=torch.float32)
        for number in flat.unique().tolist():
            expert = stack, number
            if expert not in self.layers:
                continue
            if expert not in self._resident:
                self._fill(expert)
            pairs = torch.nonzero(flat == number).squeeze(1)
            rows = hidden[pairs // k].float()
            with _alone(module, number):
                out[pairs] = forward(rows, torch.zeros_like(index.reshape(-1, 1)[pairs]), each[pairs])
            if len(self._resident) < self.at_once:
                self._resident.add(expert)
            elif expert not in self._resident:
                self._drop([expert])
        return out.view(tokens, k, -1).sum(1).to(hidden.dtype)


def refuse_chunks(layers: Sequence[LayerPlan], skeleton: Skeleton) -> str | None:
    """Return why the experts of a block cannot be taken in chunks, or None."""
    experts = [layer for layer in layers if expert_of(layer) is not None]
    if not experts:
        return "it has no experts"
    if sys.platform != "linux" or skeleton.device.type != "cpu":
        return f"that is done on CPUs under Linux, not on {skeleton.device.type} under {sys.platform}"
    for layer in experts:
        if layer.ref.split or layer.ref.matrix != layer.ref.shape:
            return f"{layer.ref.name} lies in one tensor with other experts"
    for stack in {layer.ref.owner for layer in experts}:
        module = skeleton.model.get_submodule(stack)
        if reason := refuse_stack(module):
            return reason
        known = {(number, where) for number, _, _, where in places(module)}
        mine = [layer.ref.where for layer in experts if layer.ref.owner == stack]
        if len(mine) != len(known) or {(where.expert, where) for where in mine} != known:
            return f"{stack} is not stored expert by expert"
    fused: dict[str, Expert | None] = {}
    for layer in layers:
        if fused.setdefault(layer.ref.fused_with, expert_of(layer)) != expert_of(layer):
            return f"{layer.ref.name} is decided together with other experts"
    return None


def solve_in_chunks(
    layers: Sequence[LayerPlan],
    experts: ExpertChunks,
    tensors: Mapping[str, Tensor],
    solver: Solver,
    statistics: Callable[[Sequence[LayerPlan]], Capture | None],
) -> tuple[Solved, Coverage]:
    """Let the method decide a block's layers, the experts first, and write what it decides as it goes.

    Until the last expert is decided, the block's other layers are those of the original; so what experts see, and what
    becomes of them, does not depend on how many fit into memory.

    Args:
        layers: All tensors of the block; those that are no experts' are loaded.
        experts: The others.
        tensors: Tensor name -> what is stored of those that are loaded.
        solver: Runs the method.
        statistics: Some of the layers -> statistics of what they read, after the samples have passed.

    Returns:
        Reports, in the order of one solution for all, without bytes; and the tokens of experts.

    Raises:
        UnsupportedError: A layer reads what experts return.
    """
    solved, coverage = Solved(), Coverage()
    for chunk in experts.chunks():
        own = [layer for expert in chunk for layer in experts.layers[expert]]
        with experts.resident(chunk):
            kept = experts.source.read(layer.ref.name for layer in own if not layer.format)
            found, seen = _solve(own, experts.sink, kept, solver, statistics)
        experts.written(chunk)
        solved.add(found)
        coverage.add(seen)
        release_memory()
    with experts.resident([]):
        others = [layer for layer in layers if layer.ref.name not in experts.names]
        found, seen = _solve(others, experts.sink, tensors, solver, statistics)
    solved.add(found)
    coverage.add(seen)
    release_memory()
    order = [layer for layer in layers if not layer.format]
    order += [layer for members in solver.division(layers).sets for layer in members]
    places = {layer.ref.name: place for place, layer in enumerate(order)}
    solved.rows.sort(key=lambda row: places[row.name])
    return solved, coverage


def _solve(
    layers: Sequence[LayerPlan],
    sink: Sink,
    tensors: Mapping[str, Tensor],
    solver: Solver,
    statistics: Callable[[Sequence[LayerPlan]], Capture | None],
) -> tuple[Solved, Coverage]:
    capture = statistics(layers)
    for fed_by, totals in capture.sums.items() if capture else ():
        if any(math.isnan(total.max_abs) for total in totals.values()):
            raise UnsupportedError(
                f"{fed_by}: what it reads is not finite while experts are taken in chunks: it may be what they return",
                "leave out --max-memory",
            )
    found = solver.solve(layers, capture, tensors, _no_block)
    sink.write(found.packed)
    found.packed = {}
    return found, capture.coverage if capture else Coverage()


def _no_block(layers: Sequence[Any]) -> Any:
    raise AssertionError("methods that see whole blocks are not run in chunks")


@contextmanager
def _alone(module: Any, expert: int) -> Iterator[None]:
    """Let a stack have this expert only."""
    count = module.num_experts
    whole = {name: value for name, value in module._parameters.items() if value is not None and len(value) == count}
    module.num_experts = 1
    module._parameters.update(
        {name: nn.Parameter(value[expert : expert + 1], requires_grad=False) for name, value in whole.items()}
    )
    try:
        yield
    finally:
        module.num_experts = count
        module._parameters.update(whole)
