"""What happens to a layer's input before the matmul: an ordered list of operations, each with one definition.

Methods that treat activations (LLM-FP4's power-of-two offsets, OutlierTune's shift, EAQuant's rotation) express
themselves as these operations; the loader stores and restores them, kernels may fuse them, and `apply` below is what
any fused version must equal. Weight-only results leave the list empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from compressor.errors import CheckpointError
from compressor.formats.activations import GLOBAL_SCALE, INPUT_FORMATS, SCALE, InputFormat
from compressor.formats.base import Slot
from compressor.formats.e2m1 import E2M1_MAX, round_e2m1
from compressor.formats.e4m3 import E4M3_MAX
from compressor.formats.e8m0 import decode_e8m0, fit_e8m0
from compressor.formats.nvfp4 import ZERO_SCALE
from compressor.formats.small_floats import SPLITS, TINY, largest_value, offsets_of, round_float

OPERANDS = ("query", "key", "probability", "value")
"""What attention multiplies, in the order in which it is met, and stored."""


class InputOp(Protocol):
    """One step on `x` `[..., in]`. Float in, float out: quantization is simulated here and real in kernels."""

    def apply(self, x: Tensor) -> Tensor:
        """Return the transformed input, same shape and dtype."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return on-disk suffix -> tensor; empty for operations without parameters."""
        ...

    def describe(self) -> dict[str, object]:
        """Return JSON that, with `tensors`, rebuilds the operation."""
        ...


@dataclass(frozen=True)
class Shift:
    """Subtract a vector: `x - z`.

    Attributes:
        z: `[in]` float32.
        carry: `[out]` float32, what the layer would have made of `z`, which its output gets back; None if something
            else makes up for it.
    """

    z: Tensor
    carry: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """Return `x - z` in the dtype of `x`."""
        return x - self.z.to(x.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return the shift, and what the output gets back."""
        return {"input_shift": self.z, **({} if self.carry is None else {"input_shift_carry": self.carry})}

    def describe(self) -> dict[str, object]:
        """Return the JSON form."""
        return {"op": "shift", "carry": self.carry is not None}


@dataclass(frozen=True)
class Scale:
    """Multiply each channel by a positive number: `x * factor`. `factor` is `[in]` float32."""

    factor: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Return the scaled input in the dtype of `x`."""
        return x * self.factor.to(x.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return the factors."""
        return {"input_factor": self.factor}

    def describe(self) -> dict[str, object]:
        """Return the JSON form."""
        return {"op": "scale"}


@dataclass(frozen=True)
class Pow2:
    """Multiply each channel by a power of two: `x * 2**k`, exact in floating point. `k` is `[in]` int8."""

    k: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Return `x * 2**k`."""
        result: Tensor = torch.ldexp(x, self.k.to(torch.int32))
        return result.to(x.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return the exponents."""
        return {"input_pow2": self.k}

    def describe(self) -> dict[str, object]:
        """Return the JSON form."""
        return {"op": "pow2"}


@dataclass(frozen=True)
class Permute:
    """Reorder channels: `x[..., order]`. `order` is `[in]` int64, a permutation."""

    order: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Return the reordered input."""
        return x.index_select(-1, self.order)

    def tensors(self) -> dict[str, Tensor]:
        """Return the permutation."""
        return {"input_order": self.order}

    def describe(self) -> dict[str, object]:
        """Return the JSON form."""
        return {"op": "permute"}


@dataclass(frozen=True)
class Rotate:
    """Multiply consecutive channel blocks by a matrix, orthogonal up to its dtype: `x.blocks @ matrix`.

    Attributes:
        matrix: `[b, b]`, float32 or float16.
        second: Whether it is the second rotation of a layer's input, stored beside the first.
        half: Whether it is float16.
    """

    matrix: Tensor
    second: bool = False
    half: bool = False

    def apply(self, x: Tensor) -> Tensor:
        """Return the block-rotated input; the width must be a multiple of the matrix size."""
        blocks: Tensor = x.unflatten(-1, (-1, self.matrix.shape[0]))
        return (blocks @ self.matrix.to(x.dtype)).flatten(-2)

    def tensors(self) -> dict[str, Tensor]:
        """Return the rotation."""
        return {_ROTATIONS[self.second]: self.matrix}

    def describe(self) -> dict[str, object]:
        """Return the JSON form."""
        flags = {"half": self.half, "second": self.second}
        return {"op": "rotate", "size": self.matrix.shape[0], **{key: True for key, set_ in flags.items() if set_}}


_ROTATIONS = ("input_rotation", "input_rotation_2")
"""Suffixes of a layer's first and second rotation."""


@dataclass(frozen=True)
class Quantize:
    """Round to a format, bit-equal in float32 to what compressed-tensors simulates.

    Attributes:
        format: The grid, and what shares one scale.
        scale: `[1]` float: the stored scale of static formats (NVFP4: a divisor), None for dynamic ones.
        clip: Share of the largest magnitude that a scale made from the data covers.
    """

    format: InputFormat
    scale: Tensor | None = None
    clip: float = 1.0

    def __post_init__(self) -> None:
        if (self.scale is None) == self.format.static:
            raise CheckpointError(
                f"inputs in {self.format.name} {'need' if self.format.static else 'have no'} {SCALE} or {GLOBAL_SCALE}",
                "the checkpoint is incomplete or config.json does not belong to it",
            )

    @classmethod
    def calibrated(cls, fmt: InputFormat, largest: Tensor, dtype: torch.dtype) -> Quantize:
        """Return the operation for inputs of magnitudes up to `largest` (a scalar); a scale is stored in `dtype`.

        A largest magnitude of zero, or one that no scale fits, gives a scale that is finite and positive all the same.
        """
        if not fmt.static:
            return cls(fmt)
        largest = largest.float().reshape(1)
        if fmt.suffix == GLOBAL_SCALE:
            divisor = E4M3_MAX * top_of(fmt) / largest
            return cls(fmt, torch.where(torch.isfinite(divisor), divisor, 1.0))
        scale = (largest / top_of(fmt)).to(dtype)
        return cls(fmt, torch.where(scale == 0, torch.finfo(dtype).eps, scale))

    def apply(self, x: Tensor) -> Tensor:
        """Return the rounded input, computed in float32, in the dtype of `x`."""
        if x.numel() == 0:
            return x
        values = x.float()
        if not self.format.symmetric:
            return self._asymmetric(values).to(x.dtype)
        if self.format.group_size is not None:
            values = values.unflatten(-1, (-1, self.format.group_size))  # [..., groups, group]
        steps = self.steps(values)
        rounded = self._snap(values / steps) * steps
        return rounded.reshape(x.shape).to(x.dtype)

    def _asymmetric(self, values: Tensor) -> Tensor:
        """Return rows rounded to even steps between their smallest and largest value; zero is always a step."""
        steps, half = 2**self.format.bits - 1, 2 ** (self.format.bits - 1)
        low = values.amin(-1, keepdim=True).clamp(max=0) * self.clip
        high = values.amax(-1, keepdim=True).clamp(min=0) * self.clip
        scale = (high - low) / steps
        scale = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
        zero = (-half - low / scale).clamp_(-half, half - 1).round_()
        rounded: Tensor = ((values / scale).add_(zero).clamp_(-half, half - 1).round_() - zero) * scale
        return rounded

    def saturated(self, x: Tensor) -> int:
        """Return how many values of `x` lie beyond the reach of a static scale by more than rounding explains."""
        if not self.format.static:
            return 0
        if self.format.suffix == GLOBAL_SCALE:
            assert self.scale is not None
            # A group's scale ends at 448 over the divisor; rounding that scale, and a value, may each reach further.
            reach = E4M3_MAX * top_of(self.format) / self.scale.float() * (17 / 16) ** 2
            return int((x.float().abs() > reach).sum())
        z = x.float() / self.steps(x.float())
        top = top_of(self.format)
        low, high = (-top - 0.5, top) if self.format.kind == "int" else (-top * 17 / 16, top * 17 / 16)
        return int(((z < low) | (z > high)).sum())

    def steps(self, values: Tensor) -> Tensor:
        """Return the value of one unit of the grid, float32, broadcastable to `values`."""
        fmt = self.format
        if fmt.granularity == "tensor":
            assert self.scale is not None
            return self.scale.float()
        largest = values.abs().amax(-1, keepdim=True) * self.clip
        if fmt.scales == "e8m0":
            return decode_e8m0(fit_e8m0(largest, _EXPONENT[fmt.bits], _LARGEST_EXPONENT))
        scale = largest / top_of(fmt)
        if fmt.scales == "float":
            return torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
        assert self.scale is not None
        local = (self.scale.float() * scale).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float()
        return torch.where(local == 0, ZERO_SCALE, local) / self.scale.float()

    def _snap(self, z: Tensor) -> Tensor:
        """Return the unit nearest to every `z`, ties to even codes; overwrites `z`."""
        if self.format.kind == "int":
            largest = 2 ** (self.format.bits - 1)
            return z.clamp_(-largest, largest - 1).round_()
        if self.format.bits == 8:
            return z.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
        return round_e2m1(z)

    def tensors(self) -> dict[str, Tensor]:
        """Return the static scale, if there is one."""
        return {} if self.scale is None else {str(self.format.suffix): self.scale}

    def describe(self) -> dict[str, object]:
        """Return the JSON form."""
        return {"op": "quantize", "format": self.format.name, "clip": self.clip}


@dataclass(frozen=True)
class RoundFloat:
    """Round to small floats with a real-valued bias and a power of two per channel: `2^-k Q(2^k x)`.

    Attributes:
        bits: Bits of one code.
        scale: `[1]` float32, `2^-bias`.
        mantissa: `[1]` uint8, how many of the bits are mantissa.
        k: `[in]` int8, exponents of the channels' own factors; not negative.
    """

    bits: int
    scale: Tensor
    mantissa: Tensor
    k: Tensor

    @classmethod
    def covering(cls, bits: int, mantissa: int, loudest: Tensor, offsets: bool) -> RoundFloat:
        """Return the operation whose largest value is that of the inputs.

        Args:
            bits: Bits of one code.
            mantissa: Mantissa bits.
            loudest: `[in]` largest magnitude of every channel; all zero gives a scale of one.
            offsets: Whether quiet channels are multiplied by powers of two.
        """
        top = loudest.float().amax().reshape(1)
        scale = torch.where(top > TINY, top / largest_value(bits, mantissa), torch.ones_like(top))
        split = torch.tensor([mantissa], dtype=torch.uint8, device=loudest.device)
        start = cls(bits, scale, split, torch.zeros(len(loudest), dtype=torch.int8, device=loudest.device))
        return start.with_scale(scale, loudest if offsets and bool(top > TINY) else None)

    def with_scale(self, scale: Tensor, loudest: Tensor | None) -> RoundFloat:
        """Return the same with another scale; powers of two follow from the channels' largest magnitudes if given."""
        k = self.k if loudest is None else offsets_of(loudest, scale, self.bits, int(self.mantissa))
        return replace(self, scale=scale, k=k)

    def apply(self, x: Tensor) -> Tensor:
        """Return the rounded input, computed in float32, in the dtype of `x`."""
        k = self.k.to(torch.int32)
        rounded = self.snap(torch.ldexp(x.float(), k) / self.scale) * self.scale
        return torch.ldexp(rounded, -k).to(x.dtype)

    def snap(self, z: Tensor) -> Tensor:
        """Return the value at bias 0 nearest to every float32 `z`; overwrites `z`."""
        return round_float(z, self.bits, int(self.mantissa))

    def saturated(self, x: Tensor) -> int:
        """Return how many values of `x` lie beyond the largest float by more than rounding explains."""
        z = torch.ldexp(x.float(), self.k.to(torch.int32)) / self.scale
        mantissa = int(self.mantissa)
        half_step = 0.5 / (2 ** (mantissa + 1) - 1)  # in units of the largest value
        return int((z.abs() > largest_value(self.bits, mantissa) * (1 + half_step)).sum())

    def tensors(self) -> dict[str, Tensor]:
        """Return scale, split and exponents."""
        return {SCALE: self.scale, "input_mantissa": self.mantissa, "input_pow2": self.k}

    def describe(self) -> dict[str, object]:
        """Return the JSON form."""
        return {"op": "float", "format": f"fpq{self.bits}", "bits": self.bits}


_EXPONENT = {4: 2, 8: 8}
"""Exponent of the largest value of E2M1 and E4M3."""

_LARGEST_EXPONENT = 254 - 8
"""So that the largest value times its scale stays finite in float32."""


def top_of(fmt: InputFormat) -> float:
    """Return what the largest magnitude is mapped to: for integers half of the steps, as in compressed-tensors."""
    if fmt.kind == "int":
        return float(2**fmt.bits - 1) / 2
    return E4M3_MAX if fmt.bits == 8 else E2M1_MAX


def calibrated(fmt: InputFormat, loudest: Tensor, dtype: torch.dtype) -> InputOp:
    """Return the operation that rounds to a format and just covers the calibration data.

    Args:
        fmt: The format.
        loudest: `[in]` largest magnitude of every channel; not looked at by dynamic formats.
        dtype: Dtype static scales are stored in.
    """
    if fmt.searched:
        return RoundFloat.covering(fmt.bits, SPLITS[fmt.bits][0], loudest, offsets=False)
    return Quantize.calibrated(fmt, loudest.amax(), dtype)


def apply_ops(ops: Sequence[InputOp], x: Tensor) -> Tensor:
    """Run the operations in order."""
    for op in ops:
        x = op.apply(x)
    return x


def is_static(op: InputOp) -> bool:
    """Return whether an operation cuts off what lies beyond a stored scale."""
    return isinstance(op, RoundFloat) or (isinstance(op, Quantize) and op.format.static)


def saturated(op: InputOp, x: Tensor) -> int:
    """Return how many values of `x` an operation cuts off, as far as rounding does not explain it."""
    return op.saturated(x) if isinstance(op, RoundFloat | Quantize) else 0


def carried(ops: Sequence[InputOp]) -> Tensor | None:
    """Return what a layer's output gets back for what its input lost, `[out]` float32, or None."""
    return next((op.carry for op in ops if isinstance(op, Shift) and op.carry is not None), None)


def rebuild(descriptions: Sequence[dict[str, object]], tensors: dict[str, Tensor]) -> tuple[InputOp, ...]:
    """Rebuild stored operations; at most one of each kind, so the suffixes are unambiguous.

    Raises:
        CheckpointError: Unknown operation, or one whose tensor is missing.
    """
    ops: list[InputOp] = []
    for entry in descriptions:
        name = entry.get("op")
        try:
            if name == "shift":
                ops.append(Shift(tensors["input_shift"], tensors["input_shift_carry"] if entry.get("carry") else None))
            elif name == "scale":
                ops.append(Scale(tensors["input_factor"]))
            elif name == "pow2":
                ops.append(Pow2(tensors["input_pow2"]))
            elif name == "permute":
                ops.append(Permute(tensors["input_order"]))
            elif name == "rotate":
                second, half = bool(entry.get("second")), bool(entry.get("half"))
                ops.append(Rotate(tensors[_ROTATIONS[second]], second, half))
            elif name == "float":
                bits, split = int(str(entry["bits"])), tensors["input_mantissa"]
                ops.append(RoundFloat(bits, tensors[SCALE], split, tensors["input_pow2"]))
            elif name == "quantize":
                fmt = INPUT_FORMATS[str(entry["format"])]
                ops.append(Quantize(fmt, tensors.get(fmt.suffix or ""), float(str(entry["clip"]))))
            else:
                raise CheckpointError(f"unknown input operation {name!r}", "the checkpoint needs a newer version")
        except KeyError as missing:
            raise CheckpointError(f"input operation {name!r} lacks {missing}", "the checkpoint is incomplete") from None
    return tuple(ops)


def stored_slots(
    descriptions: Sequence[dict[str, object]], shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, Slot]:
    """Return suffix -> dtype and shape of the tensors that stored operations need.

    Args:
        descriptions: JSON forms, as `rebuild` takes them.
        shape: `[out, in]` of the layer's weight.
        dtype: Dtype of the checkpoint, which static scales are stored in.

    Raises:
        CheckpointError: Unknown operation.
    """
    slots: dict[str, Slot] = {}
    for entry in descriptions:
        if entry.get("op") == "quantize" and entry.get("format") in INPUT_FORMATS:
            slots |= INPUT_FORMATS[str(entry["format"])].layout(dtype)
        elif entry.get("op") == "float":
            slots |= {SCALE: Slot(torch.float32, (1,)), "input_mantissa": Slot(torch.uint8, (1,))}
            slots["input_pow2"] = Slot(torch.int8, (shape[1],))
        elif entry.get("op") in _VECTORS:
            suffix, kind = _VECTORS[str(entry["op"])]
            slots[suffix] = Slot(kind, (shape[1],))
            if entry.get("carry"):
                slots["input_shift_carry"] = Slot(torch.float32, (shape[0],))
        elif entry.get("op") == "rotate":
            size = int(str(entry["size"]))
            kind = torch.float16 if entry.get("half") else torch.float32
            slots[_ROTATIONS[bool(entry.get("second"))]] = Slot(kind, (size, size))
        else:
            raise CheckpointError(f"unknown input operation {entry!r}", "the checkpoint needs a newer version")
    return slots


_VECTORS = {
    "shift": ("input_shift", torch.float32),
    "scale": ("input_factor", torch.float32),
    "pow2": ("input_pow2", torch.int8),
    "permute": ("input_order", torch.int64),
}
"""Operation -> suffix and dtype of its one vector."""
