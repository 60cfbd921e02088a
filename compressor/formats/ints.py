"""Integers of 2 to 8 bits, symmetric or with zero points; one scale per group of inputs, per row, or per matrix.

On disk this is compressed-tensors' `pack-quantized`: `w = (code - 2**(bits-1) - zero_point) * scale`.

A grid without zero points has one integer more below zero than above. A negative scale turns that around, so that the
side which needs it has it: GGUF's Q4_0 and AutoRound's symmetric grid do the same. Readers only multiply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.errors import NumericalError, UnsupportedError
from compressor.formats.base import (
    PackedTensor,
    QParams,
    Slot,
    group_range,
    grouped,
    n_groups,
    refuse_matrix,
    require_layout,
)
from compressor.formats.bitstream import pack_bits, packed_words, unpack_bits

SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class IntFormat:
    """Integers; the grid reaches from `-2**(bits-1)` to `2**(bits-1) - 1`, less the zero point, times the scale.

    Attributes:
        bits: Bits of one code, 2 to 8.
        group_size: Consecutive inputs that share one scale; None for one scale per row, or per matrix.
        dtype: Dtype of the stored scales. Readers cast scales to the checkpoint's dtype, so it should be that one.
        symmetric: Whether zero is in the middle of every grid. If not, every scale has a zero point beside it.
        per_tensor: Whether one scale (and zero point) covers the whole matrix.
    """

    bits: int
    group_size: int | None
    dtype: torch.dtype
    symmetric: bool = True
    per_tensor: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UnsupportedError(f"integers of {self.bits} bits", "choose 2 to 8 bits")
        if self.group_size is not None and self.group_size < 1:
            raise UnsupportedError(f"group size {self.group_size}", "choose a positive one, or None for whole rows")
        if self.per_tensor and self.group_size is not None:
            raise UnsupportedError(f"one scale per matrix and per {self.group_size} inputs", "leave one of them out")
        if self.dtype not in SCALE_DTYPES:
            raise UnsupportedError(
                f"{self.name} scales of dtype {self.dtype}", "readers know bfloat16, float16 and float32 scales"
            )

    @property
    def name(self) -> str:
        """The name users type."""
        return f"int{self.bits}" if self.symmetric else f"int{self.bits}-asym"

    @property
    def has_global_scale(self) -> bool:
        """False: integer scales stand alone."""
        return False

    @property
    def mirrors(self) -> bool:
        """Whether searches try negative scales: not with 8 bits, where one integer of 256 makes no difference."""
        return self.symmetric and self.bits < 8

    @property
    def container(self) -> str:
        """The compressed-tensors format name."""
        return "pack-quantized"

    @property
    def zero_code(self) -> int:
        """The unsigned code of the integer 0: the one that means zero where there is no zero point."""
        return 1 << (self.bits - 1)

    def refuse(self, shape: tuple[int, ...]) -> str | None:
        """Return why a tensor of this shape cannot be stored, or None."""
        return refuse_matrix(shape, self.group_size)

    def fit_global(self, weights: Sequence[Tensor]) -> None:
        """Return None: there is no global scale."""

    def fit(self, w: Tensor, global_scale: Tensor | None = None) -> QParams:
        """Return min-max scales, shaped as `layout` says: the width of a group's range over the number of steps.

        The range always includes zero. A symmetric grid covers the larger side twice. Zero points come from scales
        that are not rounded yet, and a scale that is zero once rounded becomes the machine epsilon of its dtype; both
        as in compressed-tensors.

        Raises:
            NumericalError: `w` holds NaN or Inf, or the grid does not fit the scale dtype or float32.
        """
        assert global_scale is None, "integer formats have no global scale"
        low, high = group_range(w, self.group_size)  # [out, groups]
        if self.per_tensor:
            low, high = low.amin().reshape(1), high.amax().reshape(1)
        n_steps = 2**self.bits - 1
        zero_point = None
        if self.symmetric:
            exact = torch.maximum(low.neg(), high) / (n_steps / 2)
            furthest: Tensor | int = self.zero_code
        else:
            low, high = low.clamp(max=0), high.clamp(min=0)
            exact = (high - low) / n_steps
            # A group of zeros has neither width nor a zero point (0 / 0); any would do.
            z = (-self.zero_code - low / exact).clamp_(-self.zero_code, self.zero_code - 1).nan_to_num_(0).round_()
            zero_point = z.to(torch.int8)
            furthest = torch.maximum(self.zero_code + z, self.zero_code - 1 - z)
        scale = exact.to(self.dtype)
        scale = torch.where(scale == 0, torch.finfo(self.dtype).eps, scale)
        if not torch.isfinite(scale.float() * furthest).all():
            largest = float(torch.maximum(low.neg(), high).max())
            raise NumericalError(
                f"weights of magnitude {largest:.3g} overflow {self.name} with {self.dtype} scales",
                "keep this layer as it is with --skip, or store scales in bfloat16 or float32",
            )
        return QParams(scale, zero_point)

    def encode(self, w: Tensor, q: QParams) -> Tensor:
        """Return the nearest codes, uint8 `[out, in]`, in float32 against the stored scale; ties to even codes."""
        z = self.snap(grouped(w.float(), self.group_size) / self.steps(q), q)  # [out, groups, group]
        return z.add_(self._zeros(q)).to(torch.uint8).flatten(-2)

    def decode(self, codes: Tensor, q: QParams) -> Tensor:
        """Return `(code - 2**(bits-1) - zero_point) * scale`, float32 `[out, in]`."""
        z = grouped(codes.float(), self.group_size)  # [out, groups, group]
        return z.sub_(self._zeros(q)).mul_(self.steps(q)).flatten(-2)

    def round(self, w: Tensor, q: QParams) -> Tensor:
        """Return `decode(encode(w, q), q)` in one step, float32."""
        steps = self.steps(q)
        return self.snap(grouped(w.float(), self.group_size) / steps, q).mul_(steps).flatten(-2)

    def steps(self, q: QParams) -> Tensor:
        """Return the scales, float32 `[out, groups, 1]`, or `[1, 1, 1]` for one in all."""
        return self._spread(q.scale)

    def with_steps(self, q: QParams, steps: Tensor) -> QParams:
        """Return `q` with `steps`, shaped as `steps(q)`, in the dtype scales are stored in; zero points stay."""
        return replace(q, scale=steps.reshape(q.scale.shape).to(self.dtype))

    def snap(self, z: Tensor, q: QParams) -> Tensor:
        """Return the integer nearest to every `z`, counted from the zero point; overwrites `z`.

        The zero point is added before rounding, so that ties go to even codes as they do in compressed-tensors.
        """
        if q.zero_point is None:
            return z.round_().clamp_(-self.zero_code, self.zero_code - 1)
        zero_point = self._zeros(q) - self.zero_code
        return z.add_(zero_point).clamp_(-self.zero_code, self.zero_code - 1).round_().sub_(zero_point)

    def reach(self, q: QParams) -> tuple[Tensor | float, Tensor | float]:
        """Return half a step beyond the smallest and the largest integer."""
        return -0.5 - self._zeros(q), 2**self.bits - 0.5 - self._zeros(q)

    def _zeros(self, q: QParams) -> Tensor | int:
        """Return the unsigned codes that mean zero: a number, or float32 in the shape of `steps(q)`."""
        if q.zero_point is None:
            return self.zero_code
        return self._spread(q.zero_point).add_(self.zero_code)

    def _spread(self, values: Tensor) -> Tensor:
        """Return a float32 copy of one value per group as `[out, groups, 1]`, of one in all as `[1, 1, 1]`."""
        wide = values.to(torch.float32, copy=True)
        return wide.reshape(1, 1, 1) if self.per_tensor else wide.unsqueeze(-1)

    def layout(self, shape: tuple[int, int]) -> dict[str, Slot]:
        """Return suffix -> dtype and shape of the stored tensors."""
        rows, columns = shape
        groups = n_groups(columns, self.group_size)
        slots = {
            "weight_packed": Slot(torch.int32, (rows, packed_words(columns, self.bits))),
            "weight_scale": Slot(self.dtype, (1,) if self.per_tensor else (rows, groups)),
            "weight_shape": Slot(torch.int64, (2,)),
        }
        if not self.symmetric:
            packed = Slot(torch.int32, (packed_words(rows, self.bits), groups))
            slots["weight_zero_point"] = Slot(torch.int8, (1,)) if self.per_tensor else packed
        return slots

    def pack(self, codes: Tensor, q: QParams) -> PackedTensor:
        """Return the bytes on disk."""
        rows, columns = codes.shape
        tensors = {
            "weight_packed": pack_bits(codes, self.bits),
            "weight_scale": q.scale.contiguous(),
            "weight_shape": torch.tensor((rows, columns), device=codes.device),
        }
        if q.zero_point is not None:
            tensors["weight_zero_point"] = self._pack_zero_points(q.zero_point)
        return PackedTensor(self.name, (rows, columns), tensors)

    def unpack(self, packed: PackedTensor) -> tuple[Tensor, QParams]:
        """Return codes and scales; the exact inverse of `pack`.

        Raises:
            CheckpointError: The tensors are not what this format stores for `packed.shape`.
        """
        require_layout(self, packed)
        codes = unpack_bits(packed.tensors["weight_packed"], self.bits, packed.shape[1])
        zero_point = None
        if not self.symmetric:
            zero_point = self._unpack_zero_points(packed.tensors["weight_zero_point"], packed.shape[0])
        return codes, QParams(packed.tensors["weight_scale"], zero_point)

    def scheme(self) -> dict[str, object]:
        """Return the compressed-tensors `weights` arguments."""
        scheme: dict[str, object] = {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric}
        scheme["dynamic"] = False
        if self.group_size is None:
            return {**scheme, "strategy": "tensor" if self.per_tensor else "channel"}
        return {**scheme, "strategy": "group", "group_size": self.group_size}

    def _pack_zero_points(self, zero_point: Tensor) -> Tensor:
        """Pack `[out, groups]` along the outputs, as codes are along the inputs; a single one stays as it is."""
        if self.per_tensor:
            return zero_point.contiguous()
        unsigned = (zero_point.to(torch.int16) + self.zero_code).to(torch.uint8)
        return _transposed(pack_bits(_transposed(unsigned), self.bits))

    def _unpack_zero_points(self, stored: Tensor, rows: int) -> Tensor:
        """Return int8 zero points `[out, groups]`, or `[1]`; the inverse of `_pack_zero_points`."""
        if self.per_tensor:
            return stored
        unsigned = _transposed(unpack_bits(_transposed(stored), self.bits, rows))
        return (unsigned.to(torch.int16) - self.zero_code).to(torch.int8)


def _transposed(matrix: Tensor) -> Tensor:
    """Return a transposed copy.

    Not `contiguous`: a matrix of one row or column counts as contiguous with strides that no other dtype can view.
    """
    return matrix.t().clone(memory_format=torch.contiguous_format)
