"""Weight formats by the names users type.

Add one: a file with the class, a line in `BUILDERS`, a row in the README table, and a test class that derives from
`compressor.testing.FormatConformance`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from compressor.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    import torch

    from compressor.formats.base import QuantFormat

DEFAULT_GROUP_SIZE = 64


def _ints(bits: int) -> Callable[[int | None, torch.dtype], QuantFormat]:
    def build(group_size: int | None, dtype: torch.dtype) -> QuantFormat:
        from compressor.formats.ints import IntFormat

        return IntFormat(bits, group_size, dtype)

    return build


def _nvfp4(group_size: int | None, dtype: torch.dtype) -> QuantFormat:
    from compressor.formats.nvfp4 import NVFP4

    return NVFP4()


def _mxfp4(group_size: int | None, dtype: torch.dtype) -> QuantFormat:
    from compressor.formats.mxfp4 import MXFP4

    return MXFP4()


BUILDERS: dict[str, Callable[[int | None, torch.dtype], QuantFormat]] = {
    **{f"int{bits}": _ints(bits) for bits in range(2, 9)},
    "nvfp4": _nvfp4,
    "mxfp4": _mxfp4,
}
FIXED_GROUP = {"nvfp4": 16, "mxfp4": 32}

SUMMARIES: dict[str, str] = {
    **{
        f"int{bits}": f"symmetric {bits}-bit integers, one scale per group of 64 inputs (--group-size N|channel)"
        for bits in range(2, 9)
    },
    "nvfp4": "4-bit floats (E2M1), FP8 scale per 16 inputs, one FP32 scale per fused set of layers; 4.5 bits",
    "mxfp4": "4-bit floats (E2M1), power-of-two scale per 32 inputs; 4.25 bits",
}


def parse_group_size(name: str, text: str | None) -> int | None:
    """Turn `--group-size` into a group size for format `name`; None means one group per row.

    Raises:
        RecipeError: Not a positive number or `channel`, or the format's group size is fixed to another value.
    """
    fixed = FIXED_GROUP.get(name)
    if text is None:
        return fixed or DEFAULT_GROUP_SIZE
    if text == "channel":
        value = None
    elif text.isdecimal() and int(text) > 0:
        value = int(text)
    else:
        raise RecipeError(f"--group-size {text!r} is neither a positive number nor 'channel'", "try --group-size 64")
    if fixed and value != fixed:
        raise RecipeError(f"{name} has groups of {fixed}, not {text}", f"leave --group-size out, or set it to {fixed}")
    return value


def get_format(name: str, group_size: int | None, dtype: torch.dtype) -> QuantFormat:
    """Build a format.

    Args:
        name: A key of `BUILDERS`.
        group_size: Inputs per scale, None for one scale per row (as `parse_group_size` returns it).
        dtype: The checkpoint's dtype: formats with floating scales store them in it, as readers cast them to it.

    Raises:
        RecipeError: Unknown name.
    """
    if name not in BUILDERS:
        raise did_you_mean("format", name, BUILDERS)
    return BUILDERS[name](group_size, dtype)
