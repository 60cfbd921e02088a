"""What can be cut out of a transformer's blocks: key/value heads with their query heads, and groups of neurons.

A unit is some inputs of one linear layer (the output projection of attention, the down projection of the feed-forward
part) together with the rows of the layers that compute them. Inputs that are zero and inputs that are not there give
the same output, so masking a unit shows exactly what cutting it does.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from compressor.checkpoint.blocks import WHOLE, BlockSequence
from compressor.errors import RecipeError, UnsupportedError
from compressor.stacks import is_expert_stack

Kind = Literal["heads", "neurons"]

_ATTENTION = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "dense"),
    ("self.query", "self.key", "self.value", "output.dense"),
    ("q_lin", "k_lin", "v_lin", "out_lin"),
)
"""Query, key, value and output projection, by their names inside an attention module."""

_FEED_FORWARD = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("w1", "w3"), "w2"),
    (("intermediate.dense",), "output.dense"),
    (("lin1",), "lin2"),
)
"""Layers that compute neurons, and the one that reads them."""

_HEAD_SIZE = ("head_dim", "attention_head_size")


@dataclass(frozen=True, eq=False)
class Part:
    """One attention or feed-forward part of a block.

    Attributes:
        kind: Which.
        block: Index of the block.
        name: Name of the module it is.
        reader: The linear layer whose inputs go.
        producers: Linear layer -> how many of its rows belong to one unit.
        width: Inputs of the reader that belong to one unit; the last unit of neurons may have fewer.
        inputs: Inputs of the reader.
        weights: Weights of one input of the reader and the rows that compute it; of heads, their mean.
        heads: Query heads in one unit; 0 for neurons.
        order: Neurons in the order in which they are grouped, int64 `[inputs]`; None for that of the layer.
    """

    kind: Kind
    block: int
    name: str
    reader: str
    producers: tuple[tuple[str, int], ...]
    width: int
    inputs: int
    weights: float
    heads: int = 0
    order: Tensor | None = None

    @property
    def count(self) -> int:
        """Units it has."""
        return -(-self.inputs // self.width)


@dataclass(frozen=True)
class Unit:
    """What goes or stays as a whole.

    Attributes:
        part: Where it is.
        index: Which of the part's units.
    """

    part: Part
    index: int

    @property
    def size(self) -> int:
        """How many inputs of the reader belong to it."""
        return min(self.part.width, self.part.inputs - self.index * self.part.width)

    @property
    def columns(self) -> Tensor:
        """Which inputs of the reader these are, int64 `[size]`."""
        first = self.index * self.part.width
        order = self.part.order
        return torch.arange(first, first + self.size) if order is None else order[first : first + self.size]

    def rows(self, per_unit: int) -> Tensor:
        """Return which rows of a producer belong to it, int64; `per_unit` of them belong to one unit of heads."""
        if not self.part.heads:
            return self.columns
        return torch.arange(self.index * per_unit, (self.index + 1) * per_unit)

    @property
    def weights(self) -> int:
        """Weights that go with it; biases are free."""
        return round(self.part.weights * self.size)

    def macs(self, length: int) -> int:
        """Return its multiply-adds for one sequence of so many tokens; scores that a causal mask hides count too."""
        # Each query head multiplies queries by keys, and probabilities by values, for all pairs of tokens.
        pairs = 2 * length * length * self.size if self.part.heads else 0
        return length * self.weights + pairs


def find_parts(blocks: BlockSequence, group: int, skip: Sequence[str] = ()) -> tuple[Part, ...]:
    """Return what can be cut in every block; weights are not looked at.

    Args:
        blocks: Of the model, which may be on meta.
        group: Neurons in a group.
        skip: Globs of modules that stay whole.

    Raises:
        UnsupportedError: Nothing can be cut.
        RecipeError: A glob matches nothing that could be.
    """
    if blocks.names == (WHOLE,):
        raise UnsupportedError(f"{type(blocks.model).__name__}: has no blocks", "optin prunes transformers")
    found = [part for index in range(len(blocks.names)) for part in _parts_of(blocks, index, group)]
    if not found:
        raise UnsupportedError(
            f"{type(blocks.model).__name__}: no attention or feed-forward part whose layers are known by name",
            "optin knows query, key, value and output projections, and gate, up and down projections",
        )
    for glob in skip:
        if not any(_matches(part, glob) for part in found):
            raise RecipeError(f"--skip {glob!r} matches nothing that could be cut", f"such as {found[0].name}")
    kept = tuple(part for part in found if not any(_matches(part, glob) for glob in skip))
    if not kept:
        raise RecipeError("--skip leaves nothing to cut", "skip less")
    return kept


def units_of(parts: Sequence[Part]) -> tuple[Unit, ...]:
    """Return the units of all parts, in order."""
    return tuple(Unit(part, index) for part in parts for index in range(part.count))


def count_weights(blocks: BlockSequence) -> int:
    """Return how many weights of the blocks one token is multiplied with: of experts, those that are chosen.

    Raises:
        UnsupportedError: A model with experts does not say how many are chosen.
    """
    total = 0
    for index in range(len(blocks.names)):
        for name, module in blocks.block(index).named_modules():
            if isinstance(module, nn.Linear):
                total += module.weight.numel()
            elif is_expert_stack(module):
                config = blocks.model.config.get_text_config()
                chosen = getattr(config, "num_experts_per_tok", None)
                if not chosen:
                    raise UnsupportedError(f"{name}: how many experts a token gets is not in the config")
                stacks = [param for param in module.parameters(recurse=False) if param.ndim == 3]
                total += sum(chosen * param[0].numel() for param in stacks)
    return total


def count_macs(blocks: BlockSequence, length: int) -> int:
    """Return the multiply-adds of all blocks for one sequence, as they are: linear layers and known attention.

    Embeddings and the output head, which no cut changes, are not counted.
    """
    parts = [part for index in range(len(blocks.names)) for part in _parts_of(blocks, index, 1)]
    pairs = sum(2 * length * length * part.inputs for part in parts if part.heads)
    return length * count_weights(blocks) + pairs


def _matches(part: Part, glob: str) -> bool:
    return any(fnmatch.fnmatch(name, glob) for name in (part.name, part.reader, *(name for name, _ in part.producers)))


def _parts_of(blocks: BlockSequence, index: int, group: int) -> Iterator[Part]:
    """Yield the parts of one block, attention first; no linear layer belongs to two."""
    modules = [
        (f"{blocks.names[index]}.{inside}" if inside else blocks.names[index], module)
        for inside, module in blocks.block(index).named_modules()
    ]
    taken: set[str] = set()
    found = [_attention(index, name, module) for name, module in modules]
    found += [_feed_forward(index, name, module, group) for name, module in modules]
    for part in found:
        if part is not None and part.reader not in taken:
            taken.add(part.reader)
            yield part


def _attention(block: int, prefix: str, module: nn.Module) -> Part | None:
    for names in _ATTENTION:
        layers = _linears(module, names)
        size = _head_size(module)
        if layers is None or size is None:
            continue
        query, key, value, output = layers
        n_keys, rest = divmod(key.out_features, size)
        shared = query.out_features // key.out_features
        sound = not rest and n_keys and query.out_features == shared * key.out_features
        if not sound or value.out_features != key.out_features or output.in_features != query.out_features:
            continue
        rows = (shared * size, size, size)
        per_unit = sum(n * layer.in_features for n, layer in zip(rows, layers, strict=False))
        per_unit += shared * size * output.out_features
        return Part(
            kind="heads",
            block=block,
            name=prefix,
            reader=f"{prefix}.{names[3]}",
            producers=tuple((f"{prefix}.{name}", n) for name, n in zip(names, rows, strict=False)),
            width=shared * size,
            inputs=query.out_features,
            weights=per_unit / (shared * size),
            heads=shared,
        )
    return None


def _feed_forward(block: int, prefix: str, module: nn.Module, group: int) -> Part | None:
    for names, last in _FEED_FORWARD:
        layers = _linears(module, (*names, last))
        if layers is None:
            continue
        *producers, reader = layers
        if any(layer.out_features != reader.in_features for layer in producers):
            continue
        width = min(group, reader.in_features)
        return Part(
            kind="neurons",
            block=block,
            name=prefix,
            reader=f"{prefix}.{last}",
            producers=tuple((f"{prefix}.{name}", width) for name in names),
            width=width,
            inputs=reader.in_features,
            weights=sum(layer.in_features for layer in producers) + reader.out_features,
        )
    return None


def _linears(module: nn.Module, paths: Sequence[str]) -> list[nn.Linear] | None:
    """Return the linear layers at these paths below a module, or None if one is missing or something else."""
    out = []
    for path in paths:
        found: object = module
        for step in path.split("."):
            found = getattr(found, step, None)
        if not isinstance(found, nn.Linear):
            return None
        out.append(found)
    return out


def _head_size(module: nn.Module) -> int | None:
    for owner in (module, getattr(module, "self", None)):
        for name in _HEAD_SIZE:
            size = getattr(owner, name, None)
            if isinstance(size, int) and size > 0:
                return size
    return None
