"""Symmetric integers of 2 to 8 bits with one scale per group of inputs or per row.

On disk this is compressed-tensors' `pack-quantized`: `w = (code - 2**(bits-1)) * scale`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import CheckpointError, NumericalError, UnsupportedError
from compressor.formats.base import (
    PackedTensor,
    QParams,
    Slot,
    group_absmax,
    grouped,
    n_groups,
    refuse_matrix,
    require_layout,
)
from compressor.formats.bitstream import pack_bits, packed_words, unpack_bits

SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class IntFormat:
    """Symmetric integers; the grid reaches from `-2**(bits-1)` to `2**(bits-1) - 1` times the scale.

    Attributes:
        bits: Bits of one code, 2 to 8.
        group_size: Consecutive inputs that share one scale; None for one scale per row.
        dtype: Dtype of the stored scales. Readers cast scales to the checkpoint's dtype, so it should be that one.
    """

    bits: int
    group_size: int | None
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UnsupportedError(f"integers of {self.bits} bits", "choose 2 to 8 bits")
        if self.group_size is not None and self.group_size < 1:
            raise UnsupportedError(f"group size {self.group_size}", "choose a positive one, or None for whole rows")
        if self.dtype not in SCALE_DTYPES:
            raise UnsupportedError(
                f"int{self.bits} scales of dtype {self.dtype}", "readers know bfloat16, float16 and float32 scales"
            )

    @property
    def name(self) -> str:
        """The name users type."""
        return f"int{self.bits}"

    @property
    def has_global_scale(self) -> bool:
        """False: integer scales stand alone."""
        return False

    @property
    def container(self) -> str:
        """The compressed-tensors format name."""
        return "pack-quantized"

    @property
    def zero_code(self) -> int:
        """The unsigned code that means zero."""
        return 1 << (self.bits - 1)

    def refuse(self, shape: tuple[int, ...]) -> str | None:
        """Return why a tensor of this shape cannot be stored, or None."""
        return refuse_matrix(shape, self.group_size)

    def fit_global(self, weights: Sequence[Tensor]) -> None:
        """Return None: there is no global scale."""

    def fit(self, w: Tensor, global_scale: Tensor | None = None) -> QParams:
        """Return min-max scales `[out, groups]`: the largest magnitude over half the number of steps, then rounded.

        A scale that is zero once rounded becomes the machine epsilon of its dtype, as in compressed-tensors.

        Raises:
            NumericalError: `w` holds NaN or Inf, or the grid does not fit the scale dtype or float32.
        """
        assert global_scale is None, "integer formats have no global scale"
        absmax = group_absmax(w, self.group_size)  # [out, groups]
        scale = (absmax / ((2**self.bits - 1) / 2)).to(self.dtype)
        scale = torch.where(scale == 0, torch.finfo(self.dtype).eps, scale)
        if not torch.isfinite(scale.float() * self.zero_code).all():
            raise NumericalError(
                f"weights of magnitude {float(absmax.max()):.3g} overflow {self.name} with {self.dtype} scales",
                "keep this layer as it is with --skip, or store scales in bfloat16 or float32",
            )
        return QParams(scale)

    def encode(self, w: Tensor, q: QParams) -> Tensor:
        """Return the nearest codes, uint8 `[out, in]`, in float32 against the stored scale; ties to even integers."""
        z = grouped(w.float(), self.group_size) / q.scale.float().unsqueeze(-1)  # [out, groups, group]
        z.round_().clamp_(-self.zero_code, self.zero_code - 1).add_(self.zero_code)
        return z.to(torch.uint8).flatten(-2)

    def decode(self, codes: Tensor, q: QParams) -> Tensor:
        """Return `(code - 2**(bits-1)) * scale`, float32 `[out, in]`."""
        signed = codes.float().sub_(self.zero_code)
        return grouped(signed, self.group_size).mul_(q.scale.float().unsqueeze(-1)).flatten(-2)

    def layout(self, shape: tuple[int, int]) -> dict[str, Slot]:
        """Return suffix -> dtype and shape of the stored tensors."""
        rows, columns = shape
        return {
            "weight_packed": Slot(torch.int32, (rows, packed_words(columns, self.bits))),
            "weight_scale": Slot(self.dtype, (rows, n_groups(columns, self.group_size))),
            "weight_shape": Slot(torch.int64, (2,)),
        }

    def pack(self, codes: Tensor, q: QParams) -> PackedTensor:
        """Return the bytes on disk."""
        rows, columns = codes.shape
        tensors = {
            "weight_packed": pack_bits(codes, self.bits),
            "weight_scale": q.scale.contiguous(),
            "weight_shape": torch.tensor((rows, columns), device=codes.device),
        }
        return PackedTensor(self.name, (rows, columns), tensors)

    def unpack(self, packed: PackedTensor) -> tuple[Tensor, QParams]:
        """Return codes and scales; the exact inverse of `pack`.

        Raises:
            CheckpointError: The tensors are not what this format stores for `packed.shape`.
        """
        require_layout(self, packed)
        stored = tuple(packed.tensors["weight_shape"].tolist())
        if stored != packed.shape:
            raise CheckpointError(
                f"weight_shape says {list(stored)}, the model expects {list(packed.shape)}",
                "config.json and weights belong to different models, or the file is damaged",
            )
        codes = unpack_bits(packed.tensors["weight_packed"], self.bits, packed.shape[1])
        return codes, QParams(packed.tensors["weight_scale"])

    def scheme(self) -> dict[str, object]:
        """Return the compressed-tensors `weights` arguments."""
        scheme: dict[str, object] = {"num_bits": self.bits, "type": "int", "symmetric": True, "dynamic": False}
        if self.group_size is None:
            return {**scheme, "strategy": "channel"}
        return {**scheme, "strategy": "group", "group_size": self.group_size}
