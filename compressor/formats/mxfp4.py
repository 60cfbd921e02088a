"""MXFP4: E2M1 codes with a power-of-two scale (E8M0) per 32 inputs.

OCP Microscaling Formats (MX) Specification 1.0. On disk this is compressed-tensors' `mxfp4-pack-quantized`:
`w = E2M1(code) * 2**(weight_scale - 127)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
from compressor.formats.bitstream import pack_nibbles, unpack_nibbles
from compressor.formats.e2m1 import E2M1_REACH, decode_e2m1, encode_e2m1, round_e2m1
from compressor.formats.e8m0 import decode_e8m0, fit_e8m0

LARGEST_EXPONENT = 252
"""Largest byte written: `6 * 2**125` is finite in float32. 253 and 254 would overflow, 255 means NaN."""

_SCALE_STEPS = (-1, 1, -2)


@dataclass(frozen=True)
class MXFP4:
    """4-bit floats in groups of 32 under a shared exponent; 4.25 bits per weight."""

    name: ClassVar[str] = "mxfp4"
    bits: ClassVar[int] = 4
    group_size: ClassVar[int] = 32
    has_global_scale: ClassVar[bool] = False
    mirrors: ClassVar[bool] = False
    container: ClassVar[str] = "mxfp4-pack-quantized"

    def refuse(self, shape: tuple[int, ...]) -> str | None:
        """Return why a tensor of this shape cannot be stored, or None."""
        return refuse_matrix(shape, self.group_size)

    def fit_global(self, weights: Sequence[Tensor]) -> None:
        """Return None: there is no global scale."""

    def fit(self, w: Tensor, global_scale: Tensor | None = None) -> QParams:
        """Return exponents, uint8 `[out, in/32]`, that send each group's largest magnitude into `[3.5, 7)`.

        With `m >= 1.75 * 2**k` counting as `2**(k+1)`, what saturates is off by less than half the top step;
        groups of zeros get byte 0.

        Raises:
            NumericalError: A weight is NaN or Inf.
        """
        assert global_scale is None, "MXFP4 has no global scale"
        return QParams(fit_e8m0(group_absmax(w, self.group_size), 2, LARGEST_EXPONENT))

    def encode(self, w: Tensor, q: QParams) -> Tensor:
        """Return the nearest codes, uint8 `[out, in]`, in float32."""
        return encode_e2m1(grouped(w.float(), self.group_size) / self.steps(q)).flatten(-2)

    def decode(self, codes: Tensor, q: QParams) -> Tensor:
        """Return `E2M1(code) * 2**(scale - 127)`, float32 `[out, in]`; exact."""
        return grouped(decode_e2m1(codes), self.group_size).mul_(self.steps(q)).flatten(-2)

    def round(self, w: Tensor, q: QParams) -> Tensor:
        """Return `decode(encode(w, q), q)` in one step, float32; scales may have further dimensions in front."""
        steps = self.steps(q)
        return round_e2m1(grouped(w.float(), self.group_size) / steps).mul_(steps).flatten(-2)

    def steps(self, q: QParams) -> Tensor:
        """Return the value of one E2M1 unit per group, float32 `[out, groups, 1]`."""
        return decode_e8m0(q.scale).unsqueeze(-1)

    def with_steps(self, q: QParams, steps: Tensor) -> QParams:
        """Return the powers of two nearest to `steps` `[out, groups, 1]`, by ratio."""
        exponent = steps.squeeze(-1).log2().round() + 127
        return replace(q, scale=exponent.clamp_(0, LARGEST_EXPONENT).to(torch.uint8))

    def snap(self, z: Tensor, q: QParams) -> Tensor:
        """Return the E2M1 value nearest to every `z`; overwrites `z`."""
        return round_e2m1(z)

    def reach(self, q: QParams) -> tuple[float, float]:
        """Return -7 and 7: half of the last step beyond 6."""
        return -E2M1_REACH, E2M1_REACH

    def layout(self, shape: tuple[int, int]) -> dict[str, Slot]:
        """Return suffix -> dtype and shape of the stored tensors."""
        rows, columns = shape
        return {
            "weight_packed": Slot(torch.uint8, (rows, columns // 2)),
            "weight_scale": Slot(torch.uint8, (rows, columns // self.group_size)),
        }

    def pack(self, codes: Tensor, q: QParams) -> PackedTensor:
        """Return the bytes on disk."""
        rows, columns = codes.shape
        tensors = {"weight_packed": pack_nibbles(codes), "weight_scale": q.scale.contiguous()}
        return PackedTensor(self.name, (rows, columns), tensors)

    def unpack(self, packed: PackedTensor) -> tuple[Tensor, QParams]:
        """Return codes and exponents; the exact inverse of `pack`.

        Raises:
            CheckpointError: The tensors are not what this format stores for `packed.shape`.
        """
        require_layout(self, packed)
        codes = unpack_nibbles(packed.tensors["weight_packed"], packed.shape[1])
        return codes, QParams(packed.tensors["weight_scale"])

    def scheme(self) -> dict[str, object]:
        """Return the compressed-tensors `weights` arguments."""
        return {
            "num_bits": 4,
            "type": "float",
            "symmetric": True,
            "strategy": "group",
            "group_size": self.group_size,
            "dynamic": False,
            "scale_dtype": "torch.uint8",
        }

    def scale_candidates(self, q: QParams) -> Iterator[QParams]:
        """Yield `q`, then its exponents moved by -1, +1 and -2.

        -2 wins rarely, where a group's largest weight meets unimportant inputs. +1 adds only 8 and 12 to the grid,
        which no weight the exponents were fitted to comes near; it serves methods that move weights as they round.
        """
        yield q
        for step in _SCALE_STEPS:
            yield QParams((q.scale.to(torch.int16) + step).clamp_(0, LARGEST_EXPONENT).to(torch.uint8))

    def starts(self, w: Tensor, global_scale: Tensor | None = None) -> Iterator[QParams]:
        """Yield the min-max parameters of `w`: there is no global scale to choose."""
        yield self.fit(w, global_scale)
