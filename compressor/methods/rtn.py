"""RTN: fit a grid, min-max or clipped, and round each weight to the nearest code.

The baseline every other method is measured against, and the fastest way to a smaller file. No data. Ties and scale
formulas are those of the format, bit-equal to the compressed-tensors quantizer.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from compressor.calibration.stats import SecondMoment
from compressor.decision import Outcome, Quantized
from compressor.formats.base import QuantFormat, ScaledFormat
from compressor.methods.base import Layer, MethodOptions, Scope, Stream
from compressor.methods.grids import mse_clip
from compressor.plan import WeightRef


class RTNOptions(MethodOptions):
    """Options of the grid."""

    clip: Literal["none", "mse"] = Field(
        "none", description="none: scales that just cover each group; mse: shrunk to where its rounding error is least"
    )


class RTN:
    """Rounding to nearest."""

    name = "rtn"
    summary = "round to nearest on a min-max or clipped grid; no data, seconds, the baseline"
    scope = Scope.LAYER
    stream = Stream.NONE
    Options = RTNOptions

    def __init__(self, options: RTNOptions | None = None) -> None:
        self.options = options or RTNOptions()

    def stats(self, fmt: QuantFormat) -> tuple[SecondMoment, ...]:
        """Return nothing: rounding needs no data."""
        return ()

    def refuse(self, ref: WeightRef, fmt: QuantFormat) -> str | None:
        """Accept every weight the format accepts; clipping needs a format with one step per group."""
        if self.options.clip == "mse" and not isinstance(fmt, ScaledFormat):
            return f"clip=mse searches the scales of groups of inputs (integers, 4-bit floats), not those of {fmt.name}"
        return None

    def solve(self, layer: Layer, fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        """Round `layer.weight` `[out, in]` to the format's nearest codes."""
        q = layer.fit(fmt)
        if self.options.clip == "mse":
            assert isinstance(fmt, ScaledFormat)  # refused otherwise
            q = mse_clip(layer.weight, fmt, q)
        return Outcome({layer.ref.name: Quantized(fmt.encode(layer.weight, q), q)})
