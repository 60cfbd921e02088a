"""A model as a chain of blocks: decoder layers, encoder layers, CNN stages, or the whole model as one.

The chain is found by structure, traced once on the meta device (who reads which tensor, what a block returns), and run
block by block with the arguments the model itself would pass. Passing block 0's arguments to every block is wrong for
models that alternate attention types, so each block's own are recorded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressor.checkpoint.config import quiet
from compressor.checkpoint.ends import example_inputs, first_tensor, language_model
from compressor.checkpoint.skeleton import META
from compressor.errors import UnsupportedError
from compressor.stacks import is_expert_stack

WHOLE = ""
"""Name of the single block of a model that is treated as one unit."""


@dataclass(frozen=True)
class Trace:
    """What one forward pass on the meta device shows.

    Attributes:
        reads: Module name -> id of the tensor it reads; equal ids mean the same tensor.
        experts: Names of modules that hold fused expert stacks.
    """

    reads: dict[str, str]
    experts: tuple[str, ...]


@dataclass(frozen=True)
class Recording:
    """The arguments each block gets besides hidden states, for inputs of one shape: block name -> (args, kwargs)."""

    arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]]

    def check_same(self, other: Recording) -> None:
        """Refuse models whose block arguments change from sample to sample: one recording could not serve all.

        Raises:
            UnsupportedError: Names the first block whose arguments differ.
        """
        for name, mine in self.arguments.items():
            if not _equal(mine, other.arguments[name]):
                raise UnsupportedError(
                    f"{name} gets arguments that depend on the sample", "this architecture is not supported yet"
                )


@dataclass
class BlockSequence:
    """The chain of blocks of one model.

    Attributes:
        model: The model the blocks belong to.
        names: Module names of the blocks, in order; `(WHOLE,)` when the model is one unit.
        language: Module name of the language model inside a multimodal one, which the blocks belong to; else None.
    """

    model: PreTrainedModel
    names: tuple[str, ...]
    language: str | None = None
    _returns_tuple: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def find(cls, model: PreTrainedModel) -> BlockSequence:
        """Find the stack of blocks: the outermost module list that holds most of the parameters.

        Of a multimodal model only the language model is searched, however large its towers are.

        Raises:
            UnsupportedError: Two lists of similar weight compete, and no config says which is the language model.
        """
        language = language_model(model)
        lists: list[tuple[int, str, nn.ModuleList]] = []
        for name, module in model.named_modules():
            if language is not None and not name.startswith(f"{language}."):
                continue
            inside = any(name.startswith(f"{outer}.") for _, outer, _ in lists)
            if isinstance(module, nn.ModuleList) and len(module) and not inside:
                size = sum(param.numel() for param in module.parameters())
                if size:
                    lists.append((size, name, module))
        if not lists:
            return cls.whole(model)
        lists.sort(key=lambda entry: -entry[0])
        if len(lists) > 1 and lists[1][0] > 0.25 * lists[0][0]:
            raise UnsupportedError(
                f"{type(model).__name__}: {lists[0][1]} and {lists[1][1]} are both stacks of blocks",
                "models with several towers are not supported yet",
            )
        _, name, module = lists[0]
        return cls(model, tuple(f"{name}.{index}" for index in range(len(module))), language)

    @classmethod
    def whole(cls, model: PreTrainedModel) -> BlockSequence:
        """Return a sequence whose single unit is the whole model."""
        return cls(model, (WHOLE,))

    def block(self, index: int) -> nn.Module:
        """Return a block's module."""
        return self.model.get_submodule(self.names[index]) if self.names[index] else self.model

    def index_of(self, param: str) -> int | None:
        """Return the block a parameter name lies in, or None."""
        for index, name in enumerate(self.names):
            if not name or param.startswith(f"{name}."):
                return index
        return None

    def beside(self, param: str) -> str | None:
        """Return the part of a multimodal model, a tower or projector, that a parameter belongs to, or None.

        Only parts beside the language model count; its head does not.
        """
        if self.language is None or param.startswith(f"{self.language}."):
            return None
        parent = self.language.rpartition(".")[0]
        inside = param.removeprefix(f"{parent}.") if parent else param
        if parent and inside == param:
            return None
        child = inside.partition(".")[0]
        part = f"{parent}.{child}" if parent else child
        return None if self.model.get_submodule(part) is self.model.get_output_embeddings() else part

    def trace(self) -> Trace:
        """Run the model once on the meta device; costs no memory and no arithmetic.

        Raises:
            UnsupportedError: The model's forward cannot run on the meta device.
        """
        problem: Exception | None = None
        for with_mask in (True, False):
            try:
                return self._trace(example_inputs(self.model, META, with_mask))
            except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
                problem = error
        reason = str(problem).strip().splitlines()[0]
        raise UnsupportedError(
            f"{type(self.model).__name__}: its forward pass cannot be traced without weights ({reason})",
            "this architecture is not supported yet",
        ) from problem

    def _trace(self, inputs: Mapping[str, Tensor]) -> Trace:
        seen: dict[str, Tensor] = {}  # keeps the tensors alive, so that no storage is used twice
        experts = tuple(name for name, module in self.model.named_modules() if is_expert_stack(module))
        undo: list[Any] = []

        def watch(name: str, module: nn.Module) -> None:
            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                value = args[0] if args else next(iter(kwargs.values()), None)
                if isinstance(value, Tensor) and value.is_floating_point():
                    seen.setdefault(name, value)

            undo.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)

        def note_output(name: str, module: nn.Module) -> None:
            def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                self._returns_tuple[name] = isinstance(output, tuple)

            undo.append(module.register_forward_hook(after).remove)

        try:
            for name, module in self.model.named_modules():
                if any(param.ndim >= 2 for param in module.parameters(recurse=False)):
                    watch(name, module)
                if name in experts:
                    # Routing is data-dependent, which meta tensors cannot do; the shape is all the rest needs.
                    module.forward = lambda hidden, *args, **kwargs: torch.empty_like(hidden)
                    undo.append(lambda module=module: module.__dict__.pop("forward"))
                if name in self.names and name:
                    note_output(name, module)
            with torch.no_grad(), self._without_cache():
                self.model(**inputs)
        finally:
            for action in undo:
                action()
        ids: dict[tuple[int, int, int], str] = {}
        reads = {}
        for name, tensor in seen.items():
            key = (tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tensor.shape[-1])
            reads[name] = ids.setdefault(key, name)
        return Trace(reads, experts)

    def prologue(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Recording]:
        """Run everything before block 0.

        Returns:
            The hidden states that enter block 0, and each block's own further arguments.
        """
        if self.names == (WHOLE,):
            rest = {key: value for key, value in inputs.items() if key != self.model.main_input_name}
            return inputs[self.model.main_input_name], Recording({WHOLE: ((), rest)})
        entering: list[Tensor] = []
        arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def record(name: str, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            entering.append(hidden)
            arguments[name] = (args, kwargs)
            if name == self.names[-1]:
                raise _Stop
            return hidden

        with self._replaced(record), torch.no_grad(), self._without_cache():
            try:
                self.model(**inputs)
            except _Stop:
                pass
            else:
                raise UnsupportedError(f"{type(self.model).__name__}: its blocks did not run in order")
        if list(arguments) != list(self.names):
            raise UnsupportedError(f"{type(self.model).__name__}: its blocks did not run in order")
        return entering[0], Recording(arguments)

    def run(
        self, index: int, hidden: Tensor, recording: Recording, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Run one block, whose weights must be loaded, with the arguments recorded for inputs of this shape.

        Args:
            index: Which block.
            hidden: States that enter it.
            recording: Its other arguments.
            weights: Parameter name in the model -> tensor that takes its place in this call alone; gradients flow
                into it.
        """
        name, block = self.names[index], self.block(index)
        args, kwargs = recording.arguments[name]
        if name == WHOLE:
            args, kwargs = (), {self.model.main_input_name: hidden, **kwargs}
        else:
            args = (hidden, *args)
        if not weights:
            return first_tensor(block(*args, **kwargs))
        prefix = f"{name}." if name else ""
        inside = {param.removeprefix(prefix): weight for param, weight in weights.items()}
        return first_tensor(torch.func.functional_call(block, inside, args, kwargs))

    def tail(self, hidden: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run everything after the last block on `hidden` and return the model's main output (logits or states)."""
        if self.names == (WHOLE,):
            return hidden

        def inject(name: str, passing: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            return hidden if name == self.names[-1] else passing

        with self._replaced(inject), self._without_cache():
            return first_tensor(self.model(**inputs))

    @contextmanager
    def _without_cache(self) -> Iterator[None]:
        """Keep the model from making a key/value cache, and from adding up what its routers do.

        Blocks would share a cache, and running one would change it. Losses of routers look at values, which are not
        there yet where a model is traced.
        """
        config = self.model.config.get_text_config()
        names = [name for name in ("use_cache", "output_router_logits") if hasattr(config, name)]
        before = {name: getattr(config, name) for name in names}
        try:
            for name in names:
                setattr(config, name, False)
            with quiet():
                yield
        finally:
            for name, value in before.items():
                setattr(config, name, value)

    @contextmanager
    def _replaced(self, function: Any) -> Iterator[None]:
        """Replace every block's forward by `function(name, hidden, args, kwargs)`."""

        def stand_in(name: str) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if args:
                    hidden, rest = args[0], args[1:]
                else:
                    hidden, rest = kwargs.pop("hidden_states"), ()
                out = function(name, hidden, rest, kwargs)
                return (out,) if self._returns_tuple.get(name) else out

            return forward

        try:
            for index, name in enumerate(self.names):
                self.block(index).forward = stand_in(name)
            yield
        finally:
            for index in range(len(self.names)):
                self.block(index).__dict__.pop("forward", None)


class _Stop(Exception):
    """Ends the prologue at the last block: nothing behind it has weights."""


def _equal(a: Any, b: Any) -> bool:
    """Compare nested arguments by value; objects that hold no tensors count as equal."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return isinstance(a, Tensor) == isinstance(b, Tensor)
