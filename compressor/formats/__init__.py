"""Weight formats by the names users type.

Add one: a file with the class, a line in `BUILDERS`, a row in the README table, and a test class that derives from
`compressor.testing.FormatConformance`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeAlias

from compressor.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    import torch

    from compressor.formats.base import QuantFormat
    from compressor.formats.fp8 import Granularity

DEFAULT_GROUP_SIZE = 64

GroupSize: TypeAlias = int | Literal["tensor"] | None
"""Inputs that share one scale; `"tensor"` for one scale per matrix, None for one per row."""

Builder: TypeAlias = "Callable[[GroupSize, torch.dtype], QuantFormat]"


def _ints(bits: int, symmetric: bool = True) -> Builder:
    def build(group_size: GroupSize, dtype: torch.dtype) -> QuantFormat:
        from compressor.formats.ints import IntFormat

        if group_size == "tensor":
            return IntFormat(bits, None, dtype, symmetric, per_tensor=True)
        return IntFormat(bits, group_size, dtype, symmetric)

    return build


def _int_bytes(group_size: GroupSize, dtype: torch.dtype) -> QuantFormat:
    from compressor.formats.int_bytes import IntBytes

    if group_size == "tensor":
        return IntBytes(None, dtype, per_tensor=True)
    return IntBytes(group_size, dtype)


def _nvfp4(group_size: GroupSize, dtype: torch.dtype) -> QuantFormat:
    from compressor.formats.nvfp4 import NVFP4

    return NVFP4()


def _mxfp4(group_size: GroupSize, dtype: torch.dtype) -> QuantFormat:
    from compressor.formats.mxfp4 import MXFP4

    return MXFP4()


def _fp8(granularity: Granularity) -> Builder:
    def build(group_size: GroupSize, dtype: torch.dtype) -> QuantFormat:
        from compressor.formats.fp8 import FP8

        return FP8(granularity, dtype)

    return build


def _mxfp8(group_size: GroupSize, dtype: torch.dtype) -> QuantFormat:
    from compressor.formats.mxfp8 import MXFP8

    return MXFP8()


def _fp4(group_size: GroupSize, dtype: torch.dtype) -> QuantFormat:
    from compressor.formats.float4 import Float4

    return Float4()


def _wide_float(bits: int) -> Builder:
    def build(group_size: GroupSize, dtype: torch.dtype) -> QuantFormat:
        from compressor.formats.split_floats import WideFloat

        return WideFloat(bits)

    return build


def _power(bits: int) -> Builder:
    def build(group_size: GroupSize, dtype: torch.dtype) -> QuantFormat:
        import torch

        from compressor.formats.power import Power

        stored = torch.float32 if dtype == torch.float16 else dtype  # float16 has no room for the smallest steps
        if group_size == "tensor":
            return Power(bits, None, stored, per_tensor=True)
        return Power(bits, group_size, stored)

    return build


BUILDERS: dict[str, Builder] = {
    **{f"int{bits}": _ints(bits) for bits in range(2, 9)},
    **{f"int{bits}-asym": _ints(bits, symmetric=False) for bits in range(2, 9)},
    "int8-bytes": _int_bytes,
    "nvfp4": _nvfp4,
    "mxfp4": _mxfp4,
    "fp4": _fp4,
    "fp6": _wide_float(6),
    "fp8-searched": _wide_float(8),
    **{f"power{bits}": _power(bits) for bits in range(2, 9)},
    "fp8": _fp8("channel"),
    "fp8-tensor": _fp8("tensor"),
    "fp8-block": _fp8("block"),
    "mxfp8": _mxfp8,
}
FIXED_GROUP: dict[str, int | None] = {
    "nvfp4": 16,
    "mxfp4": 32,
    "fp4": None,
    "fp6": None,
    "fp8-searched": None,
    "fp8": None,
    "fp8-tensor": None,
    "fp8-block": 128,
    "mxfp8": 32,
}
"""Group size of every format that has only one; None where a scale covers whole rows."""

CHANNEL_FIRST = frozenset({"int8-bytes"})
"""Formats with one scale per output channel unless a whole matrix shares one; they have no groups."""

ASYMMETRIC = frozenset(name for name in BUILDERS if name.endswith("-asym"))
"""Formats with a zero point for every scale."""

_GROUPS = "per 64 inputs (--group-size N, channel or tensor)"

SUMMARIES: dict[str, str] = {
    **{f"int{bits}": f"symmetric integers, one scale {_GROUPS}" for bits in range(2, 9)},
    **{f"int{bits}-asym": f"asymmetric integers, one scale and zero point {_GROUPS}" for bits in range(2, 9)},
    "int8-bytes": "symmetric 8-bit integers, one per byte, one scale per output channel (or tensor); for int8 inputs",
    "nvfp4": "4-bit floats (E2M1), FP8 scale per 16 inputs, one FP32 scale per fused set of layers; 4.5 bits",
    "mxfp4": "4-bit floats (E2M1), power-of-two scale per 32 inputs; 4.25 bits",
    "fp4": "LLM-FP4's 4-bit floats: E2M1, E1M2 or E3M0 per layer, real scale per output channel; 4 bits; native only",
    "fp6": "LLM-FP4's 6-bit floats: E1M4 to E5M0 per layer, real scale per output channel; 6 bits; native only",
    "fp8-searched": "LLM-FP4's 8-bit floats: E1M6 to E5M2 per layer, real scale per output channel; native only",
    **{f"power{bits}": f"NUPES' signed powers of integers, one scale {_GROUPS}; native only" for bits in range(2, 9)},
    "fp8": "8-bit floats (E4M3), one scale per output channel; 8 bits",
    "fp8-tensor": "8-bit floats (E4M3), one scale per matrix; 8 bits",
    "fp8-block": "8-bit floats (E4M3), one scale per 128 x 128 tile; 8 bits",
    "mxfp8": "8-bit floats (E4M3), power-of-two scale per 32 inputs; 8.25 bits",
}


def parse_group_size(name: str, text: str | None) -> GroupSize:
    """Turn `--group-size` into a group size for format `name`.

    Raises:
        RecipeError: Not a positive number, `channel` or `tensor`, or the format has only one group size, another one.
    """
    if name == "pruned":
        if text is not None:
            raise RecipeError(
                f"pruned weights have no scales, but got --group-size {text}", "leave it out, or --format"
            )
        return None
    if text is None:
        return None if name in CHANNEL_FIRST else FIXED_GROUP.get(name, DEFAULT_GROUP_SIZE)
    value: GroupSize
    if text == "channel":
        value = None
    elif text == "tensor":
        value = "tensor"
    elif text.isdecimal() and int(text) > 0:
        value = int(text)
    else:
        raise RecipeError(
            f"--group-size {text!r} is neither a positive number nor 'channel' nor 'tensor'", "try --group-size 64"
        )
    if name in CHANNEL_FIRST and isinstance(value, int):
        raise RecipeError(f"{name} has one scale per channel or per matrix, not --group-size {text}", "leave it out")
    if name not in FIXED_GROUP:
        return value
    if value != ("tensor" if name == "fp8-tensor" else FIXED_GROUP[name]):
        raise RecipeError(f"{name} has {_grouping(name)}, not --group-size {text}", "leave --group-size out")
    return FIXED_GROUP[name]


def _grouping(name: str) -> str:
    """Say what shares one scale in a format that leaves no choice."""
    tiles = {"fp8-tensor": "one scale per matrix", "fp8-block": "one scale per 128 x 128 tile"}
    size = FIXED_GROUP[name]
    return tiles.get(name) or ("one scale per output channel" if size is None else f"groups of {size}")


def get_format(name: str, group_size: GroupSize, dtype: torch.dtype) -> QuantFormat:
    """Build a format.

    Args:
        name: A key of `BUILDERS`, or `pruned`.
        group_size: Inputs per scale, None for one scale per row (as `parse_group_size` returns it).
        dtype: The checkpoint's dtype: formats with floating scales store them in it, as readers cast them to it.

    Raises:
        RecipeError: Unknown name.
    """
    if name == "pruned":  # not in the list: users ask for it with another verb
        from compressor.formats.pruned import Pruned

        return Pruned(dtype)
    if name not in BUILDERS:
        raise did_you_mean("format", name, BUILDERS)
    return BUILDERS[name](group_size, dtype)
