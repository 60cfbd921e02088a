"""Operations as checkpoints store them, and what they have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compressor.errors import CheckpointError
from compressor.formats.activations import EXPONENT, INPUT_FORMATS, SCALE, InputFormat
from compressor.formats.base import Slot
from compressor.formats.small_floats import SPLITS
from compressor.inputs.base import InputOp
from compressor.inputs.floats import RoundFloat
from compressor.inputs.moves import ROTATIONS, Permute, Pow2, Rotate, Scale, Shift
from compressor.inputs.powers import RoundPower
from compressor.inputs.quantize import Quantize


def calibrated(fmt: InputFormat, loudest: Tensor, dtype: torch.dtype, exponent: Tensor | None = None) -> InputOp:
    """Return the operation that rounds to a format and just covers the calibration data.

    Args:
        fmt: The format.
        loudest: `[in]` largest magnitude of every channel; not looked at by dynamic formats.
        dtype: Dtype static scales are stored in.
        exponent: `[1]`, that of the layer's weight, for grids of powers.
    """
    if fmt.kind == "power":
        assert exponent is not None, "planned for weights with an exponent only"
        return RoundPower.calibrated(fmt, loudest.amax(), exponent)
    if fmt.searched:
        return RoundFloat.covering(fmt.bits, SPLITS[fmt.bits][0], loudest, offsets=False)
    return Quantize.calibrated(fmt, loudest.amax(), dtype)


def is_static(op: InputOp) -> bool:
    """Return whether an operation cuts off what lies beyond a stored scale."""
    return isinstance(op, RoundFloat) or (isinstance(op, Quantize | RoundPower) and op.format.static)


def saturated(op: InputOp, x: Tensor) -> int:
    """Return how many values of `x` an operation cuts off, as far as rounding does not explain it."""
    return op.saturated(x) if isinstance(op, RoundFloat | RoundPower | Quantize) else 0


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
                ops.append(Rotate(tensors[ROTATIONS[second]], second, half))
            elif name == "float":
                bits, split = int(str(entry["bits"])), tensors["input_mantissa"]
                ops.append(RoundFloat(bits, tensors[SCALE], split, tensors["input_pow2"]))
            elif name == "power":
                fmt = INPUT_FORMATS[str(entry["format"])]
                ops.append(RoundPower(fmt, tensors[EXPONENT], tensors.get(SCALE)))
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
        if entry.get("op") in ("quantize", "power") and entry.get("format") in INPUT_FORMATS:
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
            slots[ROTATIONS[bool(entry.get("second"))]] = Slot(kind, (size, size))
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
