"""How much of a block fits into a given memory: all of it, or its dense layers and some experts at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from compressor.calibration.stats import Statistic
from compressor.errors import RecipeError, ResourceError
from compressor.plan import Kind, LayerPlan

FLOAT = 4
"""Bytes of a weight in memory, and of a number of a statistic."""

COPIES = 5
"""Copies of a layer while it is solved: the weight, a candidate, two errors, a product; of its statistic: factors."""

MARGIN = 0.05
"""Share of the memory that is left to what is not counted: bytes being packed, what allocators keep for themselves."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?B)")
_UNITS = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}

Expert = tuple[str, int]
"""Module name of a stack, and an index into it."""


def parse_memory(text: str) -> float:
    """Read `6GB` or `800 MB`; returns bytes.

    Raises:
        RecipeError: It is no size.
    """
    found = _SIZE.fullmatch(text.strip())
    if not found or float(found[1]) <= 0:
        raise RecipeError(f"--max-memory {text!r} is no size", "write 6GB or 800MB")
    return float(found[1]) * _UNITS[found[2]]


def expert_of(layer: LayerPlan) -> Expert | None:
    """Return the expert of a stack that a layer belongs to, or None."""
    ref = layer.ref
    return (ref.owner, ref.where.expert) if ref.kind is Kind.EXPERT and ref.where.expert is not None else None


@dataclass(frozen=True)
class Needs:
    """Bytes that a block takes beside what the process has in memory anyway.

    Attributes:
        whole: With everything in memory at once.
        dense: Its layers that belong to no expert, as stored and in float32, and what solving one layer takes.
        expert: The largest expert with its statistics.
    """

    whole: int
    dense: int
    expert: int

    @classmethod
    def of(cls, layers: Sequence[LayerPlan], specs: Iterable[Statistic], rows: int) -> Needs:
        """Count.

        Args:
            layers: All tensors of the block.
            specs: Statistics of every input.
            rows: Rows `[hidden]` that pass between a router, its experts and back, of one sample.
        """
        specs = tuple(specs)
        experts: dict[Expert, list[LayerPlan]] = {}
        others: list[LayerPlan] = []
        for layer in layers:
            expert = expert_of(layer)
            (others if expert is None else experts.setdefault(expert, [])).append(layer)
        solver = COPIES * FLOAT * _largest(layers, specs)
        width = max((layer.ref.matrix[1] for layer in layers if layer.ref.matrix), default=0)
        dense = _weights(others) + _statistics(others, specs) + solver + 3 * FLOAT * rows * width
        largest = max((_weights(own) + _statistics(own, specs) for own in experts.values()), default=0)
        return cls(_weights(layers) + _statistics(layers, specs) + solver, dense, largest)

    def at_once(self, free: float, block: str) -> int:
        """Return how many experts fit beside the dense layers.

        Raises:
            ResourceError: None.
        """
        count = int((free - self.dense) // max(self.expert, 1))
        if count < 1:
            lack = self.dense + self.expert - free
            raise ResourceError(
                f"{block}: its dense layers and one expert take {(self.dense + self.expert) / 1e9:.2f} GB, "
                f"{lack / 1e9:.2f} GB more than --max-memory leaves",
                "raise --max-memory",
            )
        return count


def _weights(layers: Iterable[LayerPlan]) -> int:
    """Return the bytes of weights, in float32 and as stored."""
    return sum(FLOAT * layer.ref.numel + layer.bytes_before for layer in layers)


def _statistics(layers: Iterable[LayerPlan], specs: Sequence[Statistic]) -> int:
    """Return the bytes of statistics: the total and the open lane of each."""
    widths = {layer.ref.fed_by: layer.ref.matrix[1] for layer in layers if layer.format and layer.ref.matrix}
    return sum(2 * FLOAT * spec.size(width) for width in widths.values() for spec in specs)


def _largest(layers: Iterable[LayerPlan], specs: Sequence[Statistic]) -> int:
    """Return the numbers of the largest compressed layer, or of the largest statistic if that is more."""
    compressed = [layer.ref for layer in layers if layer.format and layer.ref.matrix]
    sizes = [spec.size(ref.matrix[1]) for ref in compressed for spec in specs if ref.matrix]
    return max([ref.numel for ref in compressed] + sizes, default=0)
