"""Running statistics of batch normalization, put right behind convolutions that were rounded.

Rounding moves the mean and the spread of what a normalization reads. `correct` moves its running statistics by what
changed on the calibration images (bias correction of Nagel et al. 2019, arXiv 1906.04721, section 4.2, measured instead
of derived, and for the spread too); `reestimate` replaces them by those of the images (Sun et al. 2019, "Hybrid 8-bit
Floating Point", section 3). Images that are no fair sample, such as equally many of every class, suit the first alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.calibration.store import Boundary
from compressor.checkpoint.source import DTYPES
from compressor.engine.parts import Parts
from compressor.engine.streams import COMPRESSED, FP
from compressor.errors import NumericalError

EPS = 1e-12
"""Channels that vary less than this on the original are constant: their spread is left as it is."""


@dataclass
class Moments:
    """Mean and population variance of each channel over images and positions, float64 `[channels]`."""

    count: int
    mean: Tensor
    variance: Tensor

    def add(self, other: Moments) -> None:
        """Take further values in."""
        total = self.count + other.count
        distance = other.mean - self.mean
        squares = self.variance * self.count + other.variance * other.count
        self.variance = (squares + distance.square() * (self.count * other.count / total)) / total
        self.mean = self.mean + distance * (other.count / total)
        self.count = total

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Return those of one batch, `[images, channels, ...]`."""
        by_channel = x.detach().double().transpose(0, 1).flatten(1)  # [channels, images * positions]
        variance, mean = torch.var_mean(by_channel, dim=1, correction=0)
        return cls(by_channel.shape[1], mean, variance)


def original_moments(parts: Parts, index: int, before: Mapping[str, Boundary]) -> dict[str, Moments]:
    """Return what every normalization of a block reads while the block is the original, behind the original prefix.

    Args:
        parts: The run; its plan corrects.
        index: The block, whose own weights are loaded.
        before: Boundaries of the streams that enter it.
    """
    with _watched(_norms(parts, index)) as found:
        parts.streams.watch(index, before, FP)
    return found


def settle(
    parts: Parts, index: int, before: Mapping[str, Boundary], original: Mapping[str, Moments] | None
) -> dict[str, Tensor]:
    """Give the normalizations of a compressed block new running statistics, one after the other as they run.

    Each is measured behind those already settled: one pass over the images for each.

    Args:
        parts: The run.
        index: The block, whose compressed weights are loaded.
        before: Boundaries of the streams that enter it.
        original: What `original_moments` found, to correct by; None estimates anew.

    Returns:
        Name on disk -> what is stored.

    Raises:
        NumericalError: A statistic is not finite.
    """
    norms = _norms(parts, index)
    with _watched(norms) as order:
        parts.streams.watch(index, before, COMPRESSED)
    refs = {ref.param: ref for ref in parts.refs.values()}
    stored: dict[str, Tensor] = {}
    for place, name in enumerate(order):
        now = order[name]
        if place:  # the first has been seen as it is
            with _watched({name: norms[name]}) as found:
                parts.streams.watch(index, before, COMPRESSED)
            now = found[name]
        for leaf, value in _statistics(norms[name], now, original and original[name]).items():
            ref = refs[f"{name}.{leaf}"]
            kept = value.to(DTYPES[ref.dtype])
            if not torch.isfinite(kept).all():
                raise NumericalError(f"{ref.name}: is not finite on calibration images", "leave --batch-norm out")
            norms[name].get_buffer(leaf).copy_(kept)
            stored[ref.name] = kept.cpu()
    return stored


def _statistics(norm: Any, now: Moments, was: Moments | None) -> dict[str, Tensor]:
    """Return a normalization's new running mean and variance, float64."""
    if was is None:
        unbiased = now.variance * (now.count / max(now.count - 1, 1))  # as batch normalization counts its own
        return {"running_mean": now.mean, "running_var": unbiased}
    factor = torch.where(was.variance > EPS, now.variance / was.variance.clamp_min(EPS), 1)
    return {
        "running_mean": norm.running_mean.double() + (now.mean - was.mean),
        "running_var": norm.running_var.double() * factor,
    }


def _norms(parts: Parts, index: int) -> dict[str, nn.Module]:
    """Return the normalizations of a block that have running statistics, by name."""
    block, prefix = parts.blocks.block(index), parts.plan.blocks[index]
    return {
        f"{prefix}.{name}" if prefix else name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    }


@contextmanager
def _watched(norms: Mapping[str, nn.Module]) -> Iterator[dict[str, Moments]]:
    """Collect what normalizations read, in the order in which they first ran."""
    found: dict[str, Moments] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            moments = Moments.of(arguments[0])
            if name in found:
                found[name].add(moments)
            else:
                found[name] = moments

        return hook

    handles = [norm.register_forward_pre_hook(look(name)) for name, norm in norms.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
