"""Masking units, and cutting them out: rows of the layers that compute them, columns of the one that reads them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compressor.checkpoint.blocks import BlockSequence, Recording
from compressor.errors import UnsupportedError
from compressor.structured.units import Part, Unit

NOISE = 1e-4
"""Relative difference of a cut and a masked output, in float32, from which on the cut is wrong."""


@contextmanager
def masked(model: nn.Module, units: Iterable[Unit]) -> Iterator[None]:
    """Compute as if these units were gone."""
    by_reader: dict[str, list[Tensor]] = {}
    for unit in units:
        by_reader.setdefault(unit.part.reader, []).append(unit.columns)

    def zeroing(columns: Tensor) -> Any:
        def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (args[0].index_fill(-1, columns.to(args[0].device), 0), *args[1:])

        return before

    handles = [
        model.get_submodule(reader).register_forward_pre_hook(zeroing(torch.cat(columns)))
        for reader, columns in by_reader.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cut(model: nn.Module, gone: Sequence[Unit], prefix: str = "") -> dict[str, list[int]]:
    """Cut units out of a model, in place.

    Args:
        model: Has the parts' modules under their names.
        gone: What goes; never all units of a part.
        prefix: What the names begin with if `model` is a module of the model, with its dot.

    Returns:
        Linear layer -> which of its original outputs it kept.
    """
    by_part: dict[Part, set[int]] = {}
    for unit in gone:
        by_part.setdefault(unit.part, set()).add(unit.index)
    kept: dict[str, list[int]] = {}
    for part, indices in by_part.items():
        stay = [unit for unit in (Unit(part, n) for n in range(part.count)) if unit.index not in indices]
        assert stay, f"{part.name}: nothing would be left"
        _narrow(_linear(model, part.reader, prefix), 1, torch.cat([unit.columns for unit in stay]).sort().values)
        for name, size in part.producers:
            rows = torch.cat([unit.rows(size) for unit in stay]).sort().values
            _narrow(_linear(model, name, prefix), 0, rows)
            kept[name] = rows.tolist()
    return kept


@torch.no_grad()
def try_cuts(blocks: BlockSequence, parts: Sequence[Part], hidden: Sequence[Tensor], recording: Recording) -> None:
    """Cut a unit out of a copy of every part and compare with masking it, before any long work.

    Args:
        blocks: With weights.
        parts: What will be cut.
        hidden: What enters each block.
        recording: The blocks' other arguments.

    Raises:
        UnsupportedError: A block does not run with less in it, or computes something else.
    """
    for part in parts:
        if part.count < 2:
            continue
        name, whole, gone = blocks.names[part.block], blocks.block(part.block), [Unit(part, 0)]
        with masked(blocks.model, gone):
            expected = blocks.run(part.block, hidden[part.block], recording)
        narrow = copy.deepcopy(whole)
        cut(narrow, gone, f"{name}.")
        parent, _, leaf = name.rpartition(".")
        siblings: Any = blocks.model.get_submodule(parent)
        try:
            siblings._modules[leaf] = narrow
            found = blocks.run(part.block, hidden[part.block], recording)
        except (RuntimeError, ValueError) as error:
            raise _no_cut(part, str(error).splitlines()[0]) from error
        finally:
            siblings._modules[leaf] = whole
        off = relative_difference(found, expected)
        if not off <= NOISE:
            raise _no_cut(part, f"with one unit less its output is off by {off:.1e} from what masking it gives")


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return `||found - expected|| / ||expected||`."""
    size = float(expected.double().norm())
    return float((found.double() - expected.double()).norm()) / max(size, 1e-30)


def _no_cut(part: Part, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{part.name}: its {part.kind} cannot be cut: {why}", f"--skip '*{part.name.rpartition('.')[2]}'"
    )


def _linear(model: nn.Module, name: str, prefix: str) -> nn.Linear:
    found = model.get_submodule(name.removeprefix(prefix))
    assert isinstance(found, nn.Linear), name
    return found


def _narrow(layer: nn.Linear, dim: int, stay: Tensor) -> None:
    """Keep some outputs (dimension 0) or inputs (1) of a linear layer."""
    stay = stay.to(layer.weight.device)
    layer.weight = nn.Parameter(layer.weight.detach().index_select(dim, stay), requires_grad=False)
    if dim == 0 and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[stay], requires_grad=False)
    layer.out_features, layer.in_features = layer.weight.shape
