"""Formats of a layer's inputs: a grid, what shares one scale, and whether scales are stored or made from the data.

Scales and rounding are those of compressed-tensors' `input_activations`. A format here is known from headers alone;
`compressor.inputs.Quantize` carries it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from compressor.errors import RecipeError, UnsupportedError, did_you_mean

if TYPE_CHECKING:
    import torch

    from compressor.formats.base import Slot

Granularity = Literal["token", "tensor", "group"]

SCALE, GLOBAL_SCALE, EXPONENT = "input_scale", "input_global_scale", "input_exponent"
"""Suffixes of what is stored: a multiplier, NVFP4's divisor (float32), the exponent of powers (float32)."""


@dataclass(frozen=True)
class InputFormat:
    """How inputs are rounded; zero stays zero.

    Attributes:
        name: What users type.
        bits: Bits of one code.
        kind: `int`, codes from `-2**(bits-1)`; `float`: E4M3 for 8 bits, E2M1 for 4; or `power`: signed powers with the
            exponent of the weights they meet; native only.
        granularity: What shares one scale: a row of inputs (`token`), all of them (`tensor`), or `group_size`
            neighbours of one row.
        static: Whether a scale from calibration is stored. Of groups it is a global one, with scales of their own
            made from the data.
        group_size: Inputs of a group, else None.
        scales: What scales of groups are rounded to: nothing, FP8, or powers of two (`e8m0`).
        symmetric: Whether the grid reaches as far below zero as above; else every row has a zero point of its own.
        searched: LLM-FP4's own floats: any split of the bits, a real bias, powers of two per channel; native only.
    """

    name: str
    bits: int
    kind: Literal["int", "float", "power"]
    granularity: Granularity
    static: bool = False
    group_size: int | None = None
    scales: Literal["float", "fp8", "e8m0"] = "float"
    searched: bool = False
    symmetric: bool = True

    @property
    def native(self) -> bool:
        """Whether only this package's own checkpoints can say it."""
        return self.searched or self.kind == "power"

    @property
    def suffix(self) -> str | None:
        """Last name of the stored scale, or None if nothing is stored."""
        if not self.static:
            return None
        return GLOBAL_SCALE if self.granularity == "group" else SCALE

    def layout(self, dtype: torch.dtype) -> dict[str, Slot]:
        """Return suffix -> dtype and shape of what is stored; `dtype` is that of the checkpoint."""
        import torch

        from compressor.formats.base import Slot  # names alone must not cost the import of torch

        if self.kind == "power":
            names = (EXPONENT, SCALE) if self.static else (EXPONENT,)
            return {name: Slot(torch.float32, (1,)) for name in names}
        if self.suffix is None:
            return {}
        return {self.suffix: Slot(torch.float32 if self.suffix == GLOBAL_SCALE else dtype, (1,))}

    def refuse(self, in_features: int) -> str | None:
        """Return why inputs of this width cannot be rounded, or None."""
        if self.group_size is not None and in_features % self.group_size:
            return f"{in_features} inputs do not divide into groups of {self.group_size}"
        return None

    def describe(self) -> dict[str, object]:
        """Return the JSON form of rounding to this format; see `compressor.inputs.Quantize.describe`."""
        if self.searched:
            return {"op": "float", "format": self.name, "bits": self.bits}
        if self.kind == "power":
            return {"op": "power", "format": self.name}
        return {"op": "quantize", "format": self.name, "clip": 1.0}

    def arguments(self) -> dict[str, object]:
        """Return the compressed-tensors `input_activations`; native formats have none."""
        assert not self.native, self.name
        out: dict[str, object] = {"num_bits": self.bits, "type": self.kind, "symmetric": self.symmetric}
        out["strategy"] = "tensor_group" if self.scales == "fp8" else str(self.granularity)
        out["dynamic"] = "local" if self.scales == "fp8" else not self.static
        if self.group_size is not None:
            out["group_size"] = self.group_size
        if self.scales != "float":
            out["scale_dtype"] = {"fp8": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}[self.scales]
        return out


_ALL = (
    *(InputFormat(f"int{bits}-token", bits, "int", "token") for bits in range(4, 9)),
    *(InputFormat(f"int{bits}-token-asym", bits, "int", "token", symmetric=False) for bits in range(4, 9)),
    *(InputFormat(f"int{bits}-tensor", bits, "int", "tensor", static=True) for bits in range(4, 9)),
    InputFormat("fp8-token", 8, "float", "token"),
    InputFormat("fp8-tensor", 8, "float", "tensor", static=True),
    InputFormat("fp8-group", 8, "float", "group", group_size=128),
    InputFormat("nvfp4", 4, "float", "group", static=True, group_size=16, scales="fp8"),
    InputFormat("mxfp4", 4, "float", "group", group_size=32, scales="e8m0"),
    InputFormat("mxfp8", 8, "float", "group", group_size=32, scales="e8m0"),
    *(InputFormat(f"fpq{bits}", bits, "float", "tensor", static=True, searched=True) for bits in (4, 6, 8)),
    *(InputFormat(f"power{bits}-token", bits, "power", "token") for bits in range(4, 9)),
    *(InputFormat(f"power{bits}-tensor", bits, "power", "tensor", static=True) for bits in range(4, 9)),
)
INPUT_FORMATS: dict[str, InputFormat] = {fmt.name: fmt for fmt in _ALL}
ATTENTION_FORMATS: dict[str, InputFormat] = {
    fmt.name: fmt for fmt in _ALL if fmt.searched or (fmt.kind == "int" and fmt.granularity == "token")
}
"""What queries, keys and values can be rounded to; searched formats round probabilities as well."""

_STATIC = "one scale per layer, from calibration"
_DYNAMIC = "one scale per token, made at run time"
INPUT_SUMMARIES: dict[str, str] = {
    **{f"int{bits}-token": f"symmetric integers, {_DYNAMIC}" for bits in range(4, 9)},
    **{f"int{bits}-token-asym": f"integers with a zero point per token, {_DYNAMIC}" for bits in range(4, 9)},
    **{f"int{bits}-tensor": f"symmetric integers, {_STATIC}" for bits in range(4, 9)},
    "fp8-token": f"8-bit floats (E4M3), {_DYNAMIC}",
    "fp8-tensor": f"8-bit floats (E4M3), {_STATIC}",
    "fp8-group": "8-bit floats (E4M3), one scale per 128 inputs of a token, made at run time",
    "nvfp4": "4-bit floats (E2M1), FP8 scale per 16 inputs made at run time, one FP32 scale per layer from calibration",
    "mxfp4": "4-bit floats (E2M1), power-of-two scale per 32 inputs, made at run time",
    "mxfp8": "8-bit floats (E4M3), power-of-two scale per 32 inputs, made at run time",
    **{
        f"fpq{bits}": "LLM-FP4's floats: split and real bias per layer, powers of two per channel" for bits in (4, 6, 8)
    },
    **{f"power{bits}-token": f"powers, the exponent of their weights, {_DYNAMIC}" for bits in range(4, 9)},
    **{f"power{bits}-tensor": f"powers, the exponent of their weights, {_STATIC}" for bits in range(4, 9)},
}


def get_input_format(name: str) -> InputFormat:
    """Return the input format of this name.

    Raises:
        RecipeError: There is none.
    """
    if name not in INPUT_FORMATS:
        raise did_you_mean("format of inputs", name, INPUT_FORMATS)
    return INPUT_FORMATS[name]


def get_attention_format(name: str) -> InputFormat:
    """Return the format of this name that operands of attention can be rounded to: searched, or integers per token.

    Raises:
        RecipeError: There is none.
    """
    if name in INPUT_FORMATS and name not in ATTENTION_FORMATS:
        names = ", ".join(ATTENTION_FORMATS)
        raise RecipeError(f"--attention {name}: operands of attention are rounded to {names}", "use int8-token")
    if name not in ATTENTION_FORMATS:
        raise did_you_mean("format of operands of attention", name, ATTENTION_FORMATS)
    return ATTENTION_FORMATS[name]


def input_format_from(arguments: Mapping[str, Any]) -> InputFormat:
    """Return the input format that compressed-tensors `input_activations` describe.

    Args:
        arguments: As in `config.json`; left-out keys have that library's defaults.

    Raises:
        UnsupportedError: There is none; the message shows the arguments.
    """
    size, dynamic = arguments.get("group_size"), arguments.get("dynamic", False)
    strategy = arguments.get("strategy")
    if strategy is None:
        strategy = "group" if size else "tensor"
    wanted = {
        "num_bits": arguments.get("num_bits", 8),
        "type": arguments.get("type", "int"),
        "symmetric": bool(arguments.get("symmetric", True)),
        "strategy": strategy,
        "dynamic": dynamic,
        "group_size": size if strategy in ("group", "tensor_group") else None,
        "scale_dtype": None if arguments.get("scale_dtype") is None else str(arguments["scale_dtype"]),
    }
    for fmt in (entry for entry in _ALL if not entry.native):
        ours = {"group_size": None, "scale_dtype": None, **fmt.arguments()}
        # NVFP4 and MX scales follow from the strategy and the group size: the key may be left out.
        if ours == wanted or (fmt.scales == "fp8" and {**ours, "scale_dtype": None} == wanted):
            return fmt
    said = ", ".join(f"{key} {value}" for key, value in wanted.items() if value is not None)
    raise UnsupportedError(
        f"input_activations with {said} are not run here",
        "a score without them would be that of another model: use another reader for this one",
    )
