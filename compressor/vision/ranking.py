"""How important a filter is: Beta-Rank, the L1 norm, and chance.

Beta-Rank (arXiv 2304.07461): a filter's L1 norm times the spread of what it reads over the spread of what it gives, at
every output position; like a standardised regression coefficient. The published formula divides by the spread of the
output, the published code by that of the input: two variants, and they rank almost oppositely.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from compressor.vision.pixels import Pixels
from compressor.vision.statistics import Spread, measure_spread

Ratio: TypeAlias = Literal["in_over_out", "out_over_in"]
"""The formula as published, or as in the published code."""

EPS = 1e-8
"""Positions whose spread is not above this say nothing."""


@dataclass(frozen=True)
class RankingImages:
    """What a method may look at to rank filters.

    Attributes:
        pixels: The images, with labels.
        device: Where the model is.
        seed: Of everything random.
        batch: Images per forward pass.
    """

    pixels: Pixels
    device: torch.device
    seed: int = 0
    batch: int = 64

    def batches(self) -> Iterator[Tensor]:
        """Yield the images, as the model takes them."""
        for images, _ in self.pixels.batches(self.batch):
            yield images.to(self.device)


def l1_norms(layer: nn.Module) -> Tensor:
    """Return the L1 norm of every filter, float32 `[out]`."""
    weight = layer.get_parameter("weight").detach()
    return weight.float().flatten(1).abs().sum(1)


def beta_rank(norms: Tensor, spread: Spread, ratio: Ratio, robust: bool = False) -> Tensor:
    """Return the ranking value of every filter of a layer, float32 `[out]`, not normalised.

    A filter with no position where both spreads are above `EPS` is dead and gets 0.

    Args:
        norms: L1 norm of every filter, `[out]`.
        spread: Of the layer on the ranking images.
        ratio: Which spread is on top.
        robust: Take no output spread for smaller than a thousandth of the layer's median: filters that are nearly
            constant would get huge values otherwise.
    """
    outputs = spread.outputs  # [out, positions]
    inputs = spread.inputs.repeat_interleave(len(outputs) // len(spread.inputs), 0)  # [out, positions]
    valid = (inputs > EPS) & (outputs > EPS)
    if robust:
        outputs = outputs.clamp_min(1e-3 * float(outputs.median()))
    quotient = inputs / outputs if ratio == "in_over_out" else outputs / inputs
    quotient = torch.where(valid, quotient, 0)
    return norms * quotient.sum(1) / valid.sum(1).clamp_min(1)


def normalised(scores: Tensor) -> Tensor:
    """Return scores scaled to 0..1 within their layer; all equal become 0.5."""
    low, high = scores.min(), scores.max()
    return (scores - low) / (high - low) if high > low else torch.full_like(scores, 0.5)


def rank_beta(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Tensor],
    ratio: Ratio,
    robust: bool = False,
) -> dict[str, Tensor]:
    """Return the normalised Beta-Rank value of every filter, by layer; see `measure_spread` for what it raises."""
    spreads = measure_spread(model, layers, batches)
    return {
        name: normalised(beta_rank(l1_norms(layer), spreads[name], ratio, robust)) for name, layer in layers.items()
    }


def rank_l1(layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the normalised L1 norm of every filter, by layer."""
    return {name: normalised(l1_norms(layer)) for name, layer in layers.items()}


def rank_random(layers: Mapping[str, nn.Module], seed: int) -> dict[str, Tensor]:
    """Return chance, by layer: what every method has to beat."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(len(l1_norms(layer)), generator=generator) for name, layer in layers.items()}
