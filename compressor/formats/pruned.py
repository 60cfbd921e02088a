"""Weights that keep the dtype they have, zeros included: the format of pruned layers.

Its "grid" is every number there is, so that loops that round one input after the other prune without rounding. There
are no codes and nothing is packed: a pruned layer is written as a dense tensor, which everything loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from compressor.formats.base import PackedTensor, QParams, Slot, refuse_matrix

PRUNED = "pruned"
"""Its name in plans and reports; users ask for it with `compress prune`, not with `--format`."""


@dataclass(frozen=True)
class Pruned:
    """Dense values with zeros among them.

    Attributes:
        dtype: What they are stored in, where the tensor itself does not say.
    """

    dtype: torch.dtype

    name = PRUNED
    group_size: int | None = None
    has_global_scale = False
    mirrors = False
    container: str | None = "dense"

    @property
    def bits(self) -> int:
        """Bits of one value."""
        return 8 * self.dtype.itemsize

    def refuse(self, shape: tuple[int, ...]) -> str | None:
        """Refuse what is no matrix."""
        return refuse_matrix(shape, None)

    def fit_global(self, weights: Sequence[Tensor]) -> Tensor | None:
        """Return None: there are no scales."""
        return None

    def fit(self, w: Tensor, global_scale: Tensor | None = None) -> QParams:
        """Return a step of one for the whole matrix."""
        return QParams(torch.ones(1, device=w.device))

    def steps(self, q: QParams) -> Tensor:
        """Return the step, `[1, 1, 1]`."""
        return q.scale.float().view(1, 1, 1)

    def with_steps(self, q: QParams, steps: Tensor) -> QParams:
        """Return `q`: the step is one."""
        return q

    def snap(self, z: Tensor, q: QParams) -> Tensor:
        """Return `z`: every number is on the grid."""
        return z

    def round(self, w: Tensor, q: QParams) -> Tensor:
        """Return `w` in float32."""
        return w.float()

    def reach(self, q: QParams) -> tuple[Tensor | float, Tensor | float]:
        """Return infinities: nothing saturates."""
        return -torch.inf, torch.inf

    def encode(self, w: Tensor, q: QParams) -> NoReturn:
        """Raise: dense values have no codes."""
        raise NotImplementedError("pruned weights have no codes; return Masked")

    def decode(self, codes: Tensor, q: QParams) -> NoReturn:
        """Raise: dense values have no codes."""
        raise NotImplementedError("pruned weights have no codes; return Masked")

    def pack(self, codes: Tensor, q: QParams) -> NoReturn:
        """Raise: dense values are not packed."""
        raise NotImplementedError("pruned weights are not packed")

    def unpack(self, packed: PackedTensor) -> NoReturn:
        """Raise: dense values are not packed."""
        raise NotImplementedError("pruned weights are not packed")

    def layout(self, shape: tuple[int, int]) -> dict[str, Slot]:
        """Return the one dense tensor."""
        return {"weight": Slot(self.dtype, shape)}

    def scheme(self) -> dict[str, object] | None:
        """Return None: there is nothing to say about a dense tensor."""
        return None
