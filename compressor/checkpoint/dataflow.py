"""Which operations a channel passes on its way to the next linear layer, seen in one forward pass on the meta device.

A factor per channel moves past an operation only if the operation is linear in each channel by itself (copies, products
with something else, a weighted sum over tokens) or at least positively homogeneous (ReLU). `DataFlow` records every
operation; `follow` walks from a module's output along such operations, carrying the number of its channel for each
element, until it meets matrix products of linear layers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compressor.checkpoint.blocks import BlockSequence

_COPIES = ("clone", "_to_copy")
_SCALINGS = ("mul", "div")
_WEIGHTED_SUMS = ("bmm", "matmul")


@dataclass(frozen=True)
class Use:
    """One operation that reads a tensor.

    Attributes:
        op: Its name, e.g. `mul`.
        module: The innermost module that was running.
        inputs: Its positional arguments.
        output: The first tensor it returned, or None.
        in_place: Whether it writes into one of its arguments.
    """

    op: str
    module: str
    inputs: tuple[Any, ...]
    output: Tensor | None
    in_place: bool


@dataclass
class Route:
    """Where the channels of one tensor go.

    Attributes:
        readers: Linear modules that read them, in order of use.
        passed: Names of the operations in between.
        obstacle: The first reason why a factor may not be moved along, or None.
    """

    readers: list[str] = field(default_factory=list)
    passed: set[str] = field(default_factory=set)
    obstacle: str | None = None

    def blocked(self, why: str) -> None:
        """Note an obstacle; the first one stays."""
        self.obstacle = self.obstacle or why


class DataFlow:
    """Everything that happened in one forward pass.

    Attributes:
        outputs: Module name -> the tensors it returned, all of one call before those of the next.
        calls: Module name -> how often it ran.
    """

    def __init__(self, model: nn.Module, exits: tuple[str, ...]) -> None:
        self._model = model
        self._exits = exits
        self._uses: dict[int, list[Use]] = {}
        self._kept: list[Any] = []  # as long as its tensors live, no storage's address is used twice
        self.outputs: dict[str, list[Tensor]] = {}
        self.calls: dict[str, int] = {}

    @classmethod
    def of(cls, blocks: BlockSequence) -> DataFlow:
        """Record a forward pass of the model a sequence of blocks belongs to, on the meta device.

        Raises:
            UnsupportedError: The model's forward cannot run on the meta device.
        """
        flow = cls(blocks.model, ("", *blocks.names))
        with flow._recorded():
            blocks.trace()
        return flow

    def follow(self, start: Tensor, linears: Mapping[str, Any], stops: Collection[str] = ()) -> Route:
        """Walk from a tensor `[..., channels]` along operations that let a factor per channel pass.

        What leaves a block, or the model, is read by something nobody can see here, which is an obstacle.

        Args:
            start: The output of a module.
            linears: The modules at which the walk may end, by name, with their `in_features`; every other reader is an
                obstacle.
            stops: Modules whose arithmetic is not in the recording and which read the channels in their order.
        """
        route = Route()
        channels = start.shape[-1]
        labels = torch.arange(channels, dtype=torch.int32).expand(start.shape)
        queue = [(start, _like(start, labels))]
        leaving = {_key(tensor) for name in self._exits for tensor in self.outputs.get(name, [])}
        visited: set[int] = set()
        while queue:
            tensor, numbers = queue.pop(0)
            if _key(tensor) in leaving:
                route.blocked("it leaves its block")
            if _key(tensor) in visited:  # a product with itself would take the factor twice
                route.blocked("two ways from it meet again")
                continue
            visited.add(_key(tensor))
            for use in self._uses.get(_key(tensor), []):
                self._pass(use, tensor, numbers, channels, linears, stops, route, queue)
        return route

    def added_and_read(self, start: Tensor, linears: Mapping[str, Any]) -> list[str]:
        """Return the linear modules that read a tensor `[..., channels]` if it is read by such and added, no more.

        Args:
            start: The output of a module.
            linears: Linear modules by name, with their `in_features`.

        Returns:
            Their names, in order of use; none if anything else happens to the tensor, or it is not added.
        """
        width = start.shape[-1] if start.ndim else 0
        numbers = _like(start, torch.arange(width, dtype=torch.int32).expand(start.shape))
        readers: list[str] = []
        added = False
        for use in self._uses.get(_key(start), []):
            mine = [i for i, arg in enumerate(use.inputs) if isinstance(arg, Tensor) and _key(arg) == _key(start)]
            if len(mine) != 1 or use.in_place:
                return []
            arg = use.inputs[mine[0]]
            seen = torch.as_strided(numbers, arg.shape, arg.stride(), arg.storage_offset())
            in_order = arg.shape[-1] == width and bool((seen == torch.arange(width, dtype=torch.int32)).all())
            if use.module in linears and use.op in ("mm", "addmm") and _reads_rows(use, mine[0]) and in_order:
                readers.append(use.module)
            elif use.op == "add":
                added = True
            else:
                return []
        return readers if added else []

    def _pass(
        self,
        use: Use,
        tensor: Tensor,
        numbers: Tensor,
        channels: int,
        linears: Mapping[str, Any],
        stops: Collection[str],
        route: Route,
        queue: list[tuple[Tensor, Tensor]],
    ) -> None:
        """Take one step of `follow`: note a reader, go on behind the operation, or find that it is an obstacle."""
        mine = [i for i, arg in enumerate(use.inputs) if isinstance(arg, Tensor) and _key(arg) == _key(tensor)]
        where = f"{use.module} ({use.op})" if use.module else use.op
        if use.module in stops:
            route.readers.append(use.module)
            return
        if use.in_place or use.output is None or len(mine) != 1:
            route.blocked(f"{where} uses it in a way a factor cannot pass")
            return
        arg = use.inputs[mine[0]]
        seen = torch.as_strided(numbers, arg.shape, arg.stride(), arg.storage_offset())
        if use.module in linears and use.op not in _COPIES:
            route.readers.append(use.module)
            width = linears[use.module].in_features
            if use.op not in ("mm", "addmm") or not _reads_rows(use, mine[0]):
                route.blocked(f"{where} is not a plain product of matrices")
            elif width != channels:
                route.blocked(f"its {channels} channels feed the {width} inputs of {use.module} (heads share them)")
            elif not (seen == torch.arange(width, dtype=torch.int32)).all():
                route.blocked(f"{use.module} reads its channels in another order")
            return
        behind = _behind(use, mine[0], seen)
        if behind is None:
            route.blocked(f"{where} reads it too" if route.readers else f"{where} is in the way")
            return
        if use.op not in _COPIES:
            route.passed.add(use.op)
        queue.append((use.output, _like(use.output, behind)))

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        stack: list[str] = []
        handles = []

        def enter(name: str) -> Any:
            def hook(*_: Any) -> None:
                if not name:  # a trace may try other inputs after a failure: only the last pass counts
                    stack.clear()
                    self._uses.clear()
                    self.outputs.clear()
                    self.calls.clear()
                stack.append(name)
                self.calls[name] = self.calls.get(name, 0) + 1

            return hook

        def leave(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                stack.pop()
                returned = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
                self.outputs.setdefault(name, []).extend(returned)

            return hook

        for name, module in self._model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave(name)))
        try:
            with _Recorder(self, stack):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, module: str) -> None:
        """Remember one operation, unless it only looks at the same memory in another shape."""
        results = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        first = results[0] if results else None
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._kept.append((inputs, results))
        in_place = bool(func._schema.is_mutable)
        if not in_place and first is not None and len(inputs) == 1 and _key(first) == _key(inputs[0]):
            return
        name = func._schema.name.rpartition("::")[2]
        # Tensors inside lists or keywords count too: whatever reads them is no operation a factor passes.
        flat = args if len([a for a in args if isinstance(a, Tensor)]) == len(inputs) else tuple(inputs)
        known = name if flat is args else f"{name} of several tensors"
        use = Use(known, module, flat, first, in_place)
        for key in {_key(tensor) for tensor in inputs}:
            self._uses.setdefault(key, []).append(use)


class _Recorder(TorchDispatchMode):
    """Sees every operation below autograd."""

    def __init__(self, flow: DataFlow, stack: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flow, self.stack = flow, stack

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.flow.note(func, args, kwargs or {}, output, self.stack[-1] if self.stack else "")
        return output


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """Return the memory of a real tensor laid out as `tensor` is, filled with `values` of its shape; 1-D."""
    size = tensor.untyped_storage().nbytes() // tensor.dtype.itemsize
    memory = torch.full((size,), -1, dtype=torch.int32)
    torch.as_strided(memory, tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(values)
    return memory


def _reads_rows(use: Use, position: int) -> bool:
    """Return whether argument `position` of a linear layer's product is its input, not its weight or bias."""
    return position == (1 if use.op == "addmm" else 0)


def _behind(use: Use, position: int, seen: Tensor) -> Tensor | None:
    """Return the channel of every element of an operation's output, or None if no factor passes it."""
    assert use.output is not None
    same_shape = use.output.shape == seen.shape
    if (use.op in _COPIES or use.op == "relu") and same_shape:
        return seen
    if use.op in _SCALINGS and position == 0 and same_shape:
        return seen
    if use.op == "mul" and position == 1 and same_shape:
        return seen
    value = 2 if use.op.startswith("_scaled_dot_product") else 1
    sums = use.op in _WEIGHTED_SUMS or use.op.startswith("_scaled_dot_product")
    if sums and position == value and seen.ndim >= 2 and (seen == seen[..., :1, :]).all():
        return seen[..., :1, :].expand(use.output.shape)
    return None
