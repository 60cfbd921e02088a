"""NVFP4: E2M1 codes, an FP8 (E4M3) scale per 16 inputs and one float32 scale per set of fused layers.

On disk this is compressed-tensors' `nvfp4-pack-quantized`; its global scale is a divisor:
`w = E2M1(code) * weight_scale / weight_global_scale`.
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
from compressor.formats.e2m1 import E2M1_MAX, E2M1_REACH, decode_e2m1, encode_e2m1, round_e2m1

FP8_MAX = 448.0
SMALLEST_SCALE = 2.0**-9
"""The smallest positive FP8 value."""

ZERO_SCALE = 0.125
"""What replaces a group scale that rounds to zero, as in compressed-tensors."""

_SMALLEST_FP8_CODE, _LARGEST_FP8_CODE = 1, 126  # positive and finite; 0 is zero, 127 is NaN
_SCALE_STEPS = (-1, 1, -2, 2, -3, 3, -4, -5, -6, -7, -8)  # near first; eight steps are one binade
_GLOBAL_FACTORS = tuple(2 ** (-i / 8) for i in range(1, 8))  # down to 0.545; one more step would repeat the lattice


@dataclass(frozen=True)
class NVFP4:
    """4-bit floats in groups of 16; 4.5 bits per weight, plus four bytes per matrix."""

    name: ClassVar[str] = "nvfp4"
    bits: ClassVar[int] = 4
    group_size: ClassVar[int] = 16
    has_global_scale: ClassVar[bool] = True
    mirrors: ClassVar[bool] = False
    container: ClassVar[str] = "nvfp4-pack-quantized"

    def refuse(self, shape: tuple[int, ...]) -> str | None:
        """Return why a tensor of this shape cannot be stored, or None."""
        return refuse_matrix(shape, self.group_size)

    def fit_global(self, weights: Sequence[Tensor]) -> Tensor:
        """Return the divisor `[1]` float32 that sends the largest magnitude of all `weights` to `448 * 6`.

        Below about 8e-36 that divisor exceeds float32; then it is 1, as in compressed-tensors, and all codes are zero.

        Raises:
            NumericalError: A weight is NaN or Inf.
        """
        absmax = torch.stack([group_absmax(w, None).amax() for w in weights]).amax().reshape(1)
        divisor = FP8_MAX * E2M1_MAX / absmax
        return torch.where(torch.isfinite(divisor), divisor, 1.0)

    def fit(self, w: Tensor, global_scale: Tensor | None = None) -> QParams:
        """Return min-max FP8 scales `[out, in/16]` under `global_scale`, or under this matrix's own.

        A global scale made for smaller weights saturates the FP8 scales at 448, and the codes at 6.

        Raises:
            NumericalError: A weight is NaN or Inf.
        """
        absmax = group_absmax(w, self.group_size)  # [out, groups]
        divisor = self.fit_global([absmax]) if global_scale is None else global_scale
        scale = (divisor * (absmax / E2M1_MAX)).clamp_(max=FP8_MAX).to(torch.float8_e4m3fn).float()
        scale = torch.where(scale == 0, ZERO_SCALE, scale)
        return QParams(scale.to(torch.float8_e4m3fn), global_scale=divisor)

    def encode(self, w: Tensor, q: QParams) -> Tensor:
        """Return the nearest codes, uint8 `[out, in]`, in float32 against the stored scales."""
        return encode_e2m1(grouped(w.float(), self.group_size) / self.steps(q)).flatten(-2)

    def decode(self, codes: Tensor, q: QParams) -> Tensor:
        """Return `E2M1(code) * (scale / global_scale)`, float32 `[out, in]`."""
        return grouped(decode_e2m1(codes), self.group_size).mul_(self.steps(q)).flatten(-2)

    def round(self, w: Tensor, q: QParams) -> Tensor:
        """Return `decode(encode(w, q), q)` in one step, float32; scales may have further dimensions in front."""
        steps = self.steps(q)
        return round_e2m1(grouped(w.float(), self.group_size) / steps).mul_(steps).flatten(-2)

    def steps(self, q: QParams) -> Tensor:
        """Return the value of one E2M1 unit per group, float32 `[out, groups, 1]`."""
        assert q.global_scale is not None, "NVFP4 parameters carry a global scale"
        return (q.scale.float() / q.global_scale).unsqueeze(-1)

    def with_steps(self, q: QParams, steps: Tensor) -> QParams:
        """Return `q` with the positive FP8 scales nearest to `steps` `[out, groups, 1]` under its global scale."""
        assert q.global_scale is not None, "NVFP4 parameters carry a global scale"
        scale = (steps.squeeze(-1) * q.global_scale).clamp(SMALLEST_SCALE, FP8_MAX)
        return replace(q, scale=scale.to(torch.float8_e4m3fn))

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
            "weight_scale": Slot(torch.float8_e4m3fn, (rows, columns // self.group_size)),
            "weight_global_scale": Slot(torch.float32, (1,)),
        }

    def pack(self, codes: Tensor, q: QParams) -> PackedTensor:
        """Return the bytes on disk."""
        assert q.global_scale is not None, "NVFP4 parameters carry a global scale"
        rows, columns = codes.shape
        tensors = {
            "weight_packed": pack_nibbles(codes),
            "weight_scale": q.scale.contiguous(),
            # Own storage: fused matrices share this tensor, and safetensors refuses shared memory in one file.
            "weight_global_scale": q.global_scale.clone(),
        }
        return PackedTensor(self.name, (rows, columns), tensors)

    def unpack(self, packed: PackedTensor) -> tuple[Tensor, QParams]:
        """Return codes and parameters; the exact inverse of `pack`.

        Raises:
            CheckpointError: The tensors are not what this format stores for `packed.shape`.
        """
        require_layout(self, packed)
        codes = unpack_nibbles(packed.tensors["weight_packed"], packed.shape[1])
        return codes, QParams(packed.tensors["weight_scale"], global_scale=packed.tensors["weight_global_scale"])

    def scheme(self) -> dict[str, object]:
        """Return the compressed-tensors `weights` arguments."""
        return {
            "num_bits": 4,
            "type": "float",
            "symmetric": True,
            "strategy": "tensor_group",
            "group_size": self.group_size,
            "dynamic": False,
            "scale_dtype": "torch.float8_e4m3fn",
        }

    def scale_candidates(self, q: QParams) -> Iterator[QParams]:
        """Yield `q`, then its scales moved by -8 to +3 FP8 codes (eight codes are a factor of two), near ones first."""
        yield q
        codes = q.scale.view(torch.uint8).to(torch.int16)
        for step in _SCALE_STEPS:
            moved = (codes + step).clamp_(_SMALLEST_FP8_CODE, _LARGEST_FP8_CODE).to(torch.uint8)
            yield replace(q, scale=moved.view(torch.float8_e4m3fn))

    def starts(self, w: Tensor, global_scale: Tensor | None = None) -> Iterator[QParams]:
        """Yield min-max parameters under the given divisor, then under smaller ones within a factor of two.

        They shift the FP8 lattice of group scales, whose spacing is 6 to 13 %; larger ones would saturate it.
        """
        divisor = self.fit_global([w]) if global_scale is None else global_scale
        yield self.fit(w, divisor)
        for factor in _GLOBAL_FACTORS:
            yield self.fit(w, divisor * factor)
