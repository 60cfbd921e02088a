"""What methods that move factors per channel between operations get to see, and what they return.

Such a method has two turns. For every fold of a block it chooses factors `c`; the engine divides the producer by them,
multiplies the readers' columns, and divides what is known about their input. Then layers are decided as by any other
method, from weights and statistics that contain the factors already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from compressor.formats.base import QParams, QuantFormat
from compressor.methods.base import Layer, Method
from compressor.plan import Fold, FoldKind

_LARGEST = 1e4
"""Factors are kept within `1 / _LARGEST` and `_LARGEST`: beyond, a channel is as good as gone on either side."""


@dataclass(frozen=True)
class FoldSite:
    """One fold with the values behind its names.

    Attributes:
        fold: Which one.
        layers: Its readers; their statistics are those of one tensor, so the first one's serve all. Only experts have
            statistics of their own.
        formats: The format of each reader.
        storable: Factors wanted `[channels]` -> the nearest ones that leave the function as it is once the producer
            is stored.
        dense: Readers that stay dense, routers above all.
    """

    fold: Fold
    layers: tuple[Layer, ...]
    formats: tuple[QuantFormat, ...]
    storable: Callable[[Tensor], Tensor]
    dense: tuple[Layer, ...] = ()

    @property
    def is_unseen(self) -> bool:
        """Whether no calibration token reached it."""
        return self.layers[0].n_tokens == 0

    def unseen_events(self) -> tuple[str, ...]:
        """Return the sentences that say so, one for each reader."""
        return tuple(f"{layer.ref.name}: no calibration token reached it, so it is not scaled" for layer in self.layers)

    def fit(self, c: Tensor) -> list[tuple[Tensor, QParams]]:
        """Return every reader's weight with columns multiplied by `c` `[channels]`, and its min-max parameters.

        Layers that runtimes fuse share a global scale where the format has one.
        """
        weights = [layer.weight * c for layer in self.layers]
        fused: dict[str, list[Tensor]] = {}
        for w, layer in zip(weights, self.layers, strict=True):
            fused.setdefault(layer.ref.fused_with, []).append(w)
        shared: dict[str, Tensor | None] = {}
        fits = []
        for w, layer, fmt in zip(weights, self.layers, self.formats, strict=True):
            name = layer.ref.fused_with
            if name not in shared:
                shared[name] = fmt.fit_global(fused[name]) if fmt.has_global_scale else None
            fits.append((w, fmt.fit(w, shared[name])))
        return fits


@dataclass(frozen=True)
class Factors:
    """What a method chooses for one fold.

    Attributes:
        c: `[channels]` float32, positive; among the storable ones.
        events: Sentences about fall-backs; each ends in the report.
        shift: `[channels]` float32 to subtract before the division, moved into biases; None for none. Only for folds
            with `shifted` biases, and statistics that can be shifted.
    """

    c: Tensor
    events: tuple[str, ...] = ()
    shift: Tensor | None = None


@runtime_checkable
class FoldingMethod(Method, Protocol):
    """A method that moves factors per channel before it decides layers, or may do so."""

    @property
    def folds(self) -> tuple[FoldKind, ...]:
        """Where it moves them; options may decide. Nowhere if empty."""
        ...

    def fold(self, site: FoldSite) -> Factors:
        """Return the factors of one fold; ones leave everything as it is."""
        ...


def moves_factors(method: Method) -> TypeGuard[FoldingMethod]:
    """Return whether a method, with the options it has, moves factors."""
    return isinstance(method, FoldingMethod) and bool(method.folds)


def bounded(c: Tensor, dead: Tensor) -> Tensor:
    """Return factors `c` `[channels]` within bounds, and ones for channels that are dead (a mask).

    A channel that calibration shows to be silent gives no reason to move it, and its formula's value is arbitrary.
    """
    return torch.where(dead, 1.0, c.clamp(1 / _LARGEST, _LARGEST))
