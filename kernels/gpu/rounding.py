"""Which of a layer's input operations one kernel carries out: what it computes, in plain torch.

The kernels `quantize.quantize_rows` and `rotate.quantize_rotated` do the end of a layer's operations in one launch:
reorder channels, turn blocks of them, shift them, scale them, round to integers or to 8-bit floats. `codes_of` is what
they must equal, and itself equals `compressor.inputs` bit for bit. A rotation is a sum, which no two matrix products
add up in the same order: there equal means but for numbers that the last bit of a sum pushes over a rounding boundary.

LLM-FP4's small floats become integers as well, where a byte holds them with their channels' powers of two attached: 4
bits with one mantissa bit are whole numbers up to 12, shifted by up to 3; see `kernels.reference.small_floats`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.formats.e4m3 import E4M3_MAX
from compressor.formats.small_floats import SPLITS, round_float
from compressor.inputs import InputOp, Permute, Quantize, Rotate, RoundFloat, Scale, Shift
from compressor.kernels.reference.small_floats import tops, unit

BITS = {"int": (4, 5, 6, 7, 8), "float": (8,), "power": ()}
"""Bits of codes that kernels multiply, by kind of input format."""

SIZES = (16, 32, 64, 128)
"""Columns of the blocks that the matrix unit turns, all at once."""


@dataclass(frozen=True)
class Rounding:
    """Codes for activations: `codes - zero` times a scale per row.

    Attributes:
        bits: Bits of a code; integers reach from `-2**(bits-1)`.
        symmetric: Whether zero is always code 0.
        clip: Share of the largest magnitude that a scale made from the data covers.
        step: float32 `[1]`: the stored scale; empty if every row makes its own.
        order: int32 `[k]`: channels in the order in which the weight has them; empty: as they are.
        shift: float32 `[k]`, subtracted then; empty: nothing.
        factor: float32 `[k]`, multiplied by then; empty: nothing.
        floating: Codes are the bytes of E4M3 floats, not integers.
        matrix: `[b, b]`: what every block of `b` channels is multiplied by after they are reordered, `b` in `SIZES`.
        mantissa: Codes are small floats with so many mantissa bits as integers; None: they are none. Then `step` is
            their scale and `factor` the channels' powers of two, if not all are 1.
        offset: Of small floats, the exponent of the largest factor. Codes of channels of factor `2^k` are
            `2^(offset - k)` times as large, so that all are worth the same.
    """

    bits: int
    symmetric: bool
    clip: float
    step: Tensor
    order: Tensor
    shift: Tensor
    factor: Tensor
    floating: bool = False
    matrix: Tensor | None = None
    mantissa: int | None = None
    offset: int = 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The first four tensors, in the order of the attributes."""
        return (self.step, self.order, self.shift, self.factor)

    @property
    def worth(self) -> float:
        """What a code is worth where `step` is 1: less than 1 for small floats only."""
        return 1.0 if self.mantissa is None else unit(self.mantissa) * 2.0**-self.offset


def kind_of(ops: Sequence[InputOp]) -> str:
    """Return what these operations end in, if a kernel does that: `int`, `fp8`, `split`, or the empty string.

    `split` are small floats that fit a byte as integers.
    """
    last = ops[-1] if ops else None
    if isinstance(last, RoundFloat):
        mantissa, (least, most) = int(last.mantissa), (int(end) for end in last.k.aminmax())
        known = mantissa in SPLITS.get(last.bits, ()) and least >= 0  # what a file says may be anything
        return "split" if known and tops(last.bits, mantissa, most) < 128 else ""
    if not isinstance(last, Quantize):
        return ""
    fmt = last.format
    if fmt.granularity == "group" or fmt.bits not in BITS[fmt.kind]:
        return ""
    return "int" if fmt.kind == "int" else "fp8"


def fused(
    ops: Sequence[InputOp], device: torch.device, rotations: bool = False
) -> tuple[tuple[InputOp, ...], Rounding]:
    """Return the operations that must run before, and the end that the kernel does.

    Args:
        ops: All operations of a layer; `kind_of` knows them.
        device: Where they are.
        rotations: Whether the kernel turns blocks of channels.
    """
    assert kind_of(ops), "asked before"
    *before, last = ops
    empty = torch.empty(0, device=device)
    if isinstance(last, RoundFloat):
        offset = int(last.k.max())
        factor = torch.ldexp(torch.ones_like(last.k, dtype=torch.float32), last.k.int()) if offset else empty
        none = empty.to(torch.int32)
        rounding = Rounding(
            last.bits, True, 1.0, last.scale.float(), none, empty, factor, mantissa=int(last.mantissa), offset=offset
        )
        return tuple(before), rounding
    assert isinstance(last, Quantize)
    found: dict[str, Tensor] = {}
    for kind, name in ((Scale, "factor"), (Shift, "shift"), (Rotate, "matrix"), (Permute, "order")):
        if before and isinstance(before[-1], kind):
            if kind is Rotate and not (rotations and before[-1].describe()["size"] in SIZES):
                continue
            found[name] = next(iter(before.pop().tensors().values()))
    return tuple(before), Rounding(
        bits=last.format.bits,
        symmetric=last.format.symmetric,
        clip=last.clip,
        step=empty if last.scale is None else last.scale.float(),
        order=found["order"].to(torch.int32) if "order" in found else empty.to(torch.int32),
        shift=found["shift"].float() if "shift" in found else empty,
        factor=found["factor"].float() if "factor" in found else empty,
        floating=last.format.kind == "float",
        matrix=found.get("matrix"),
    )


def codes_of(x: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes int8 `[m, k]`, scales float32 `[m]` and zero points int32 `[m]` of activations `[m, k]`.

    Floats are bytes, too: view them as float8_e4m3fn. A row with NaN gets the scale NaN and whatever codes.
    """
    if rounding.order.numel():
        x = x.index_select(-1, rounding.order)
    if rounding.matrix is not None:
        x = Rotate(rounding.matrix).apply(x)
    if rounding.shift.numel():
        x = x - rounding.shift.to(x.dtype)
    if rounding.factor.numel():
        x = x * rounding.factor.to(x.dtype)
    v = x.float()
    half = 1 << (rounding.bits - 1)
    zero = v.new_zeros(len(v), 1)
    if rounding.step.numel():
        scale = rounding.step.expand(len(v), 1)
    elif rounding.symmetric:
        top = E4M3_MAX if rounding.floating else (2**rounding.bits - 1) / 2
        scale = _positive(v.abs().amax(-1, keepdim=True) * rounding.clip / top)
    else:
        low = v.amin(-1, keepdim=True).clamp(max=0) * rounding.clip
        high = v.amax(-1, keepdim=True).clamp(min=0) * rounding.clip
        scale = _positive((high - low) / (2**rounding.bits - 1))
        zero = (-half - low / scale).clamp(-half, half - 1).round()
    if rounding.mantissa is not None:
        up = rounding.factor if rounding.factor.numel() else 1.0
        whole = round_float(v / scale, rounding.bits, rounding.mantissa) / unit(rounding.mantissa)
        codes = (whole * (2.0**rounding.offset / up)).nan_to_num(0.0).to(torch.int8)
    elif rounding.floating:
        codes = (v / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.int8)
    else:
        codes = (v / scale + zero).clamp(-half, half - 1).round().nan_to_num(0.0).to(torch.int8)
    scale = torch.where(v.isnan().any(-1, keepdim=True), torch.nan, scale * rounding.worth)
    return codes, scale.flatten(), zero.flatten().nan_to_num(0.0).to(torch.int32)


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
