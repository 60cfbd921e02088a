"""What a compressed-tensors scheme stores for one matrix: names, dtypes and shapes, for every container of the format.

Wider than `compressor.formats`, which holds what this package can run: other programs also write MXFP6 and asymmetric
inputs, and those checkpoints can be checked too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compressor.checkpoint.source import DTYPE_NAMES, FLOATS
from compressor.errors import UnsupportedError
from compressor.formats.activations import input_format_from
from compressor.formats.base import QuantFormat
from compressor.formats.ints import IntFormat
from compressor.formats.schemes import format_from_scheme
from compressor.inputs import stored_slots

NATIVE = "native"
"""Container of formats that only this package reads."""

REMOVED = ("sparse-bitmask", "sparse-24-bitmask", "marlin-24")
"""Containers whose names survive in compressed-tensors without anything that reads them."""

_FLOAT = tuple(DTYPE_NAMES[dtype] for dtype in FLOATS)
_NAMES = {
    "nvfp4-pack-quantized": "nvfp4",
    "mxfp4-pack-quantized": "mxfp4",
    "mxfp6-pack-quantized": "mxfp6",
    "mxfp8-quantized": "mxfp8",
}


@dataclass(frozen=True)
class Expected:
    """A tensor that must be there: one of these dtypes (safetensors spelling), exactly this shape."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{' or '.join(self.dtypes)} {list(self.shape)}"


@dataclass(frozen=True)
class Scheme:
    """How the modules of one config group are stored.

    Attributes:
        group: The group's key in the config.
        container: compressed-tensors format name, or `NATIVE`.
        weights: Complete `QuantizationArgs` of the weights; empty for native schemes.
        inputs: Those of the layer's input, or None.
        native: The format of a native scheme, else None.
        steps: What a native scheme does to the layer's input, as JSON.
    """

    group: str
    container: str
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None = None
    native: QuantFormat | None = None
    steps: tuple[dict[str, object], ...] = ()

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.native.bits if self.native else int(self.weights["num_bits"])

    @property
    def group_size(self) -> int | None:
        """Inputs that share one scale; None where a scale covers whole rows, tiles or matrices."""
        if self.native:
            return self.native.group_size
        return self.weights["group_size"] if self.strategy in ("group", "tensor_group") else None

    @property
    def strategy(self) -> str:
        """What shares one scale, in compressed-tensors' words."""
        return str(self.weights.get("strategy") or "tensor")

    @property
    def symmetric(self) -> bool:
        """Whether zero is always the middle code, so that no zero points are stored."""
        if self.native:
            return bool(getattr(self.native, "symmetric", True))
        return bool(self.weights.get("symmetric", True))

    @property
    def mirrors(self) -> bool:
        """Whether scales may be negative: those of packed integers that reach further on one side of zero."""
        packed = isinstance(self.native, IntFormat) if self.native else self.container == "pack-quantized"
        return packed and self.symmetric

    @property
    def name(self) -> str:
        """What people call the weights' grid: `int4`, `nvfp4`, `fp8`."""
        if self.native:
            return self.native.name
        kind = "fp" if self.weights["type"] == "float" else "int"
        return _NAMES.get(self.container, f"{kind}{self.bits}")

    def __str__(self) -> str:
        parts = [self.name]
        if self.container not in _NAMES and not self.native:
            tile = "x".join(map(str, self.weights.get("block_structure") or ()))
            how = {"group": f"groups of {self.group_size}", "block": f"blocks of {tile}"}
            parts.append(how.get(self.strategy, f"per {self.strategy}"))
        if not self.symmetric:
            parts.append("asymmetric")
        if self.inputs is not None:
            parts.append(f"inputs {self.input_name}")
        if self.steps:
            parts.append("inputs " + ", ".join(str(step.get("format", step["op"])) for step in self.steps))
        return ", ".join(parts)

    @property
    def input_name(self) -> str:
        """What people call the grid of the inputs: `int8-token`, or at least its bits."""
        assert self.inputs is not None
        try:
            return input_format_from(self.inputs).name
        except UnsupportedError:
            return f"{'fp' if self.inputs['type'] == 'float' else 'int'}{self.inputs['num_bits']}"

    def format(self, dtype: torch.dtype) -> QuantFormat:
        """Return the format of this package that runs these weights.

        Args:
            dtype: Dtype of integer and FP8 formats' scales.

        Raises:
            UnsupportedError: There is none.
        """
        if self.native:
            return self.native
        if self.inputs is not None:
            input_format_from(self.inputs)
        return format_from_scheme(self.weights, self.container, dtype)

    def refuse(self, shape: tuple[int, int]) -> str | None:
        """Return why a matrix of this shape cannot be stored this way, or None."""
        if self.native:
            return self.native.refuse(shape)
        size = self.group_size
        if size is not None and shape[1] % size:
            return f"{shape[1]} inputs do not divide into groups of {size}"
        return None

    def layout(self, shape: tuple[int, int]) -> dict[str, Expected]:
        """Return suffix -> what must be stored for a matrix `[out, in]`.

        Raises:
            UnsupportedError: The container is not one compressed-tensors reads.
        """
        if self.native:
            slots = {**self.native.layout(shape), **stored_slots(self.steps, shape, torch.float32)}
            return {
                suffix: Expected(_FLOAT if slot.dtype in FLOATS else (DTYPE_NAMES[slot.dtype],), slot.shape)
                for suffix, slot in slots.items()
            }
        return {**self._codes(shape), **self._scales(shape), **self._zero_points(shape), **self._inputs()}

    def _codes(self, shape: tuple[int, int]) -> dict[str, Expected]:
        rows, columns = shape
        if self.container == "pack-quantized":
            words = -(-columns * self.bits // 32)
            return {"weight_packed": Expected(("I32",), (rows, words)), "weight_shape": Expected(("I64",), (2,))}
        if self.container in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
            return {"weight_packed": Expected(("U8",), (rows, columns // 2))}
        if self.container == "mxfp6-pack-quantized":
            return {"weight_packed": Expected(("U8",), (rows, 3 * columns // 4))}
        if self.container in ("int-quantized", "float-quantized", "naive-quantized", "mxfp8-quantized"):
            return {"weight": Expected(("I8",) if self.weights["type"] == "int" else ("F8_E4M3",), shape)}
        raise UnsupportedError(f"compressed-tensors has no container {self.container!r}", "fix `format` in config.json")

    def _scales(self, shape: tuple[int, int]) -> dict[str, Expected]:
        if self.container.startswith("mxfp"):
            return {"weight_scale": Expected(("U8",), self._grid(shape))}
        if self.container == "nvfp4-pack-quantized":
            return {
                "weight_scale": Expected(("F8_E4M3",), self._grid(shape)),
                "weight_global_scale": Expected(("F32",), (1,)),
            }
        return {"weight_scale": Expected(_FLOAT, self._grid(shape))}

    def _zero_points(self, shape: tuple[int, int]) -> dict[str, Expected]:
        if self.symmetric:
            return {}
        grid = self._grid(shape)
        if self.container == "pack-quantized" and self.strategy != "tensor":
            return {"weight_zero_point": Expected(("I32",), (-(-shape[0] * self.bits // 32), *grid[1:]))}
        return {"weight_zero_point": Expected(("I8",), grid)}

    def _inputs(self) -> dict[str, Expected]:
        """Static scales of the input; dynamic ones are made at run time."""
        if self.inputs is None or self.inputs.get("dynamic") is True:
            return {}
        if self.inputs.get("dynamic") == "local":
            return {"input_global_scale": Expected(("F32",), (1,))}
        stored = {"input_scale": Expected(_FLOAT, (1,))}
        return stored if self.inputs.get("symmetric", True) else {**stored, "input_zero_point": Expected(("I8",), (1,))}

    def _grid(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """Shape of the scales."""
        rows, columns = shape
        if self.strategy == "tensor":
            return (1,)
        if self.strategy == "block":
            height, width = self.weights["block_structure"]
            return (-(-rows // height), -(-columns // width))
        return (rows, columns // self.group_size if self.group_size else 1)
