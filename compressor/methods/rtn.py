"""RTN: fit a min-max grid and round each weight to the nearest code.

The baseline every other method is measured against, and the fastest way to a smaller file. No data, no search. Ties and
scale formulas are those of the format, bit-equal to the compressed-tensors quantizer.
"""

from __future__ import annotations

import torch

from compressor.calibration.stats import SecondMoment
from compressor.decision import Outcome, Quantized
from compressor.formats.base import QuantFormat
from compressor.methods.base import Layer, MethodOptions, Scope, Stream
from compressor.plan import WeightRef


class RTNOptions(MethodOptions):
    """RTN has none."""


class RTN:
    """Rounding to nearest."""

    name = "rtn"
    summary = "round to nearest on a min-max grid; no data, seconds, the baseline"
    scope = Scope.LAYER
    stream = Stream.NONE
    Options = RTNOptions

    def __init__(self, options: RTNOptions | None = None) -> None:
        self.options = options or RTNOptions()

    def stats(self, fmt: QuantFormat) -> tuple[SecondMoment, ...]:
        """Return nothing: rounding needs no data."""
        return ()

    def refuse(self, ref: WeightRef, fmt: QuantFormat) -> str | None:
        """Accept every weight the format accepts."""
        return None

    def solve(self, layer: Layer, fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        """Round `layer.weight` `[out, in]` to the format's nearest codes."""
        q = layer.fit(fmt)
        return Outcome({layer.ref.name: Quantized(fmt.encode(layer.weight, q), q)})
