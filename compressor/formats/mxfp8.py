"""MXFP8: E4M3 codes with a power-of-two scale (E8M0) per 32 inputs.

OCP Microscaling Formats (MX) Specification 1.0. On disk this is compressed-tensors' `mxfp8-quantized`:
`w = float(weight) * 2**(weight_scale - 127)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressor.formats.base import (
    PackedTensor,
    QParams,
    Slot,
    group_absmax,
    grouped,
    refuse_matrix,
    require_layout,
)
from compressor.formats.e4m3 import E4M3_NAN_CODES, decode_e4m3, e4m3_weight, encode_e4m3
from compressor.formats.e8m0 import decode_e8m0, fit_e8m0

LARGEST_EXPONENT = 246
"""Largest byte written: `448 * 2**119` is finite in float32, twice that is not."""


@dataclass(frozen=True)
class MXFP8:
    """8-bit floats in groups of 32 under a shared exponent; 8.25 bits per weight."""

    name: ClassVar[str] = "mxfp8"
    bits: ClassVar[int] = 8
    group_size: ClassVar[int] = 32
    has_global_scale: ClassVar[bool] = False
    container: ClassVar[str] = "mxfp8-quantized"
    nan_codes: ClassVar[tuple[int, ...]] = E4M3_NAN_CODES

    def refuse(self, shape: tuple[int, ...]) -> str | None:
        """Return why a tensor of this shape cannot be stored, or None."""
        return refuse_matrix(shape, self.group_size)

    def fit_global(self, weights: Sequence[Tensor]) -> None:
        """Return None: there is no global scale."""

    def fit(self, w: Tensor, global_scale: Tensor | None = None) -> QParams:
        """Return exponents, uint8 `[out, in/32]`, that send each group's largest magnitude into `[224, 448)`.

        Groups of zeros get byte 0. Magnitudes from 1.75 * 2**127 on, at the end of float32, saturate.

        Raises:
            NumericalError: A weight is NaN or Inf.
        """
        assert global_scale is None, "MXFP8 has no global scale"
        return QParams(fit_e8m0(group_absmax(w, self.group_size), 8, LARGEST_EXPONENT))

    def encode(self, w: Tensor, q: QParams) -> Tensor:
        """Return the nearest codes, uint8 `[out, in]`, in float32; ties to even, no NaN."""
        return encode_e4m3(grouped(w.float(), self.group_size) / _steps(q)).flatten(-2)

    def decode(self, codes: Tensor, q: QParams) -> Tensor:
        """Return `float(weight) * 2**(scale - 127)`, float32 `[out, in]`; exact down to float32's subnormals."""
        return grouped(decode_e4m3(codes), self.group_size).mul_(_steps(q)).flatten(-2)

    def layout(self, shape: tuple[int, int]) -> dict[str, Slot]:
        """Return suffix -> dtype and shape of the stored tensors."""
        rows, columns = shape
        return {
            "weight": Slot(torch.float8_e4m3fn, shape),
            "weight_scale": Slot(torch.uint8, (rows, columns // self.group_size)),
        }

    def pack(self, codes: Tensor, q: QParams) -> PackedTensor:
        """Return the bytes on disk.

        Raises:
            NumericalError: A code means NaN.
        """
        rows, columns = codes.shape
        tensors = {"weight": e4m3_weight(codes), "weight_scale": q.scale.contiguous()}
        return PackedTensor(self.name, (rows, columns), tensors)

    def unpack(self, packed: PackedTensor) -> tuple[Tensor, QParams]:
        """Return codes and exponents; the exact inverse of `pack`.

        Raises:
            CheckpointError: The tensors are not what this format stores for `packed.shape`.
        """
        require_layout(self, packed)
        return packed.tensors["weight"].view(torch.uint8), QParams(packed.tensors["weight_scale"])

    def scheme(self) -> dict[str, object]:
        """Return the compressed-tensors `weights` arguments."""
        return {
            "num_bits": 8,
            "type": "float",
            "symmetric": True,
            "strategy": "group",
            "group_size": self.group_size,
            "dynamic": False,
            "scale_dtype": "torch.uint8",
        }


def _steps(q: QParams) -> Tensor:
    """Return the value of one E4M3 unit per group, float32 `[out, groups, 1]`."""
    return decode_e8m0(q.scale).unsqueeze(-1)
