"""Which process solves which layers of a block.

Layers that must agree are one set. Sets that read the same tensor need the same statistics, which are large: they go to
one process together. The heaviest go first, each to the process with the least to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compressor.methods.base import Scope
from compressor.plan import LayerPlan


@dataclass(frozen=True)
class Division:
    """The work on one block, divided.

    Attributes:
        sets: Layers that are decided together, in plan order.
        owners: For each set the process that solves it.
        keepers: fed_by id -> the process that solves all that reads this tensor.
    """

    sets: tuple[tuple[LayerPlan, ...], ...]
    owners: tuple[int, ...]
    keepers: dict[str, int]


def divide(layers: Sequence[LayerPlan], scope: Scope, n_processes: int) -> Division:
    """Divide the compressed layers of a block; for methods that decide blocks, all of them go to process 0."""
    fused: dict[str, list[LayerPlan]] = {}
    for layer in layers:
        fused.setdefault(layer.ref.fused_with, []).append(layer)
    sets = tuple(tuple(members) for members in fused.values())
    if scope is Scope.BLOCK:
        whole = (tuple(layer for members in sets for layer in members),) if sets else ()
        return Division(whole, (0,) * len(whole), {layer.ref.fed_by: 0 for layer in layers})
    share = _shares(sets)
    loads = [0.0] * n_processes
    owner_of: dict[int, int] = {}
    costs: dict[int, float] = {}
    for index, members in enumerate(sets):
        costs[share[index]] = costs.get(share[index], 0.0) + sum(_cost(layer) for layer in members)
    for chosen in sorted(costs, key=lambda name: (-costs[name], name)):
        owner_of[chosen] = min(range(n_processes), key=lambda rank: (loads[rank], rank))
        loads[owner_of[chosen]] += costs[chosen]
    owners = tuple(owner_of[share[index]] for index in range(len(sets)))
    keepers = {layer.ref.fed_by: owner for members, owner in zip(sets, owners, strict=True) for layer in members}
    return Division(sets, owners, keepers)


def _shares(sets: Sequence[Sequence[LayerPlan]]) -> list[int]:
    """Return for each set the first one it hangs together with, by tensors that both read."""
    first_of: dict[str, int] = {}
    share = list(range(len(sets)))
    for index, members in enumerate(sets):
        met = {first_of[layer.ref.fed_by] for layer in members if layer.ref.fed_by in first_of}
        roots = {share[other] for other in met} | {index}
        root = min(roots)
        share = [root if found in roots else found for found in share]
        for layer in members:
            first_of.setdefault(layer.ref.fed_by, index)
    return share


def _cost(layer: LayerPlan) -> float:
    """Return about how much work a layer is: every row is solved against all pairs of inputs."""
    assert layer.ref.matrix is not None, layer.ref.name
    rows, columns = layer.ref.matrix
    return float(rows) * columns * columns
