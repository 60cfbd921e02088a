"""8-bit integers stored one code per byte: what kernels that multiply integers by integers read.

On disk this is compressed-tensors' `int-quantized`: `w = weight * weight_scale`, with `weight` int8. The codes of this
module are unsigned, as those of `IntFormat`: a stored byte plus 128.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from compressor.errors import UnsupportedError
from compressor.formats.base import PackedTensor, QParams, Slot, require_layout
from compressor.formats.ints import IntFormat


@dataclass(frozen=True)
class IntBytes(IntFormat):
    """Symmetric 8-bit integers with one scale per output channel, or per matrix."""

    bits: int = field(default=8, init=False)
    group_size: int | None = None
    dtype: torch.dtype = torch.bfloat16
    symmetric: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if self.group_size is not None:
            raise UnsupportedError(
                f"{self.name} in groups of {self.group_size}", "it has one scale per channel or per matrix"
            )
        super().__post_init__()

    @property
    def name(self) -> str:
        """The name users type."""
        return "int8-bytes"

    @property
    def container(self) -> str:
        """The compressed-tensors format name."""
        return "int-quantized"

    def layout(self, shape: tuple[int, int]) -> dict[str, Slot]:
        """Return suffix -> dtype and shape of the stored tensors."""
        scale = (1,) if self.per_tensor else (shape[0], 1)
        return {"weight": Slot(torch.int8, shape), "weight_scale": Slot(self.dtype, scale)}

    def pack(self, codes: Tensor, q: QParams) -> PackedTensor:
        """Return the bytes on disk."""
        rows, columns = codes.shape
        signed = codes.bitwise_xor(0x80).view(torch.int8)  # minus 128, without leaving the byte
        return PackedTensor(self.name, (rows, columns), {"weight": signed, "weight_scale": q.scale.contiguous()})

    def unpack(self, packed: PackedTensor) -> tuple[Tensor, QParams]:
        """Return codes and scales; the exact inverse of `pack`.

        Raises:
            CheckpointError: The tensors are not what this format stores for `packed.shape`.
        """
        require_layout(self, packed)
        codes = packed.tensors["weight"].view(torch.uint8).bitwise_xor(0x80)
        return codes, QParams(packed.tensors["weight_scale"])
