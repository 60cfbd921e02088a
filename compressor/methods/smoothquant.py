"""SmoothQuant: divide inputs by a factor per channel that flattens their outliers, and multiply the weights by it.

Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", arXiv
2211.10438, section 4.

With `a` the largest magnitude of each input channel and `b` that of its column over all readers,
`c = a^alpha / b^(1 - alpha)`, folded into the norm before. Weights are then rounded to nearest.

Differs from the paper:
- Inputs are rounded as the recipe says (`--inputs`), on scales of compressed-tensors: the largest magnitude is half of
  all steps, where the authors' code maps it to the largest positive code. Attention's operands are not rounded.
- Channels that are silent in the calibration data are left alone.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from compressor.calibration.channels import MaxAbs
from compressor.calibration.stats import Statistic
from compressor.decision import Outcome, Quantized
from compressor.formats.base import QuantFormat
from compressor.methods.base import Layer, MethodOptions, Scope, Stream
from compressor.methods.scaling import Factors, FoldSite, bounded
from compressor.plan import FoldKind, WeightRef

_SMALLEST = 1e-5
"""Floor of column maxima and of factors, as in the authors' code."""


class SmoothQuantOptions(MethodOptions):
    """Options of the factors."""

    alpha: float = Field(
        0.5, ge=0, le=1, description="how much of the difficulty moves from inputs to weights: 0 none, 1 all"
    )


class SmoothQuant:
    """Outliers of inputs moved into the weights, then rounding to nearest."""

    name = "smoothquant"
    summary = "SmoothQuant: move outliers of inputs into the weights, then round to nearest"
    scope = Scope.LAYER
    stream = Stream.FP
    folds = (FoldKind.NORM,)
    Options = SmoothQuantOptions

    def __init__(self, options: SmoothQuantOptions | None = None) -> None:
        self.options = options or SmoothQuantOptions()

    def stats(self, fmt: QuantFormat) -> tuple[Statistic, ...]:
        """Return the largest magnitude of each channel."""
        return (MaxAbs(),)

    def refuse(self, ref: WeightRef, fmt: QuantFormat) -> str | None:
        """Accept every weight the format accepts."""
        return None

    def fold(self, site: FoldSite) -> Factors:
        """Return the factors of one fold; ones where no calibration token came by."""
        if site.is_unseen:
            return Factors(torch.ones_like(site.layers[0].weight[0]), site.unseen_events())
        loudest = site.layers[0].magnitude(MaxAbs())
        heaviest = torch.stack([layer.weight.abs().amax(0) for layer in site.layers]).amax(0)
        return Factors(site.storable(factors(loudest, heaviest, self.options.alpha)))

    def solve(self, layer: Layer, fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        """Round a weight, smoothed where it has a fold, to nearest."""
        q = layer.fit(fmt)
        return Outcome({layer.ref.name: Quantized(fmt.encode(layer.weight, q), q)})


def factors(loudest: Tensor, heaviest: Tensor, alpha: float) -> Tensor:
    """Return `c`, `[channels]`.

    Args:
        loudest: Largest magnitude of every input channel.
        heaviest: Largest magnitude of every column over all layers that read the channels.
        alpha: Exponent of the first; one minus it is that of the second.
    """
    c = (loudest.pow(alpha) / heaviest.clamp_min(_SMALLEST).pow(1 - alpha)).clamp_min(_SMALLEST)
    return bounded(c, loudest == 0)
