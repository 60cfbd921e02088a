"""Running statistics of batch normalization, put right behind convolutions that were rounded.

Rounding moves what a normalization reads. `correct` gives it the statistics with which, channel by channel, it comes
closest to what the original's gives on the calibration images: an affine fit, as a normalization in evaluation is
affine in each channel. It goes on from bias correction (Nagel et al. 2019, arXiv 1906.04721, section 4.2), which moves
the mean alone. `reestimate` takes the statistics of the images themselves, which must then be a fair sample (Sun et al.
2019, "Hybrid 8-bit Floating Point", section 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
"""Channels that vary less than this are constant: their spread is left as it is."""

SLOPES = (0.25, 4.0)
"""Bounds of the fitted slope: beyond them a channel has lost what it said, and noise would be fitted."""


@dataclass
class Moments:
    """Of one normalization's inputs over images and positions, float64 `[channels]`.

    Attributes:
        count: Values of a channel.
        now: Mean behind the rounded layers.
        was: Mean behind the original's.
        spread: Population variance behind the rounded layers.
        shared: Covariance of the two.
    """

    count: int
    now: Tensor
    was: Tensor
    spread: Tensor
    shared: Tensor

    @classmethod
    def of(cls, now: Tensor, was: Tensor) -> Moments:
        """Return those of one batch, both `[images, channels, ...]`."""
        a, b = (x.detach().double().transpose(0, 1).flatten(1) for x in (now, was))  # [channels, images * positions]
        mean, before = a.mean(1), b.mean(1)
        away = a - mean[:, None]
        return cls(a.shape[1], mean, before, away.square().mean(1), (away * (b - before[:, None])).mean(1))

    def add(self, other: Moments) -> None:
        """Take further values in."""
        total = self.count + other.count
        mine, theirs = self.count / total, other.count / total
        moved, before = other.now - self.now, other.was - self.was
        self.spread = mine * self.spread + theirs * other.spread + mine * theirs * moved.square()
        self.shared = mine * self.shared + theirs * other.shared + mine * theirs * moved * before
        self.now, self.was = self.now + theirs * moved, self.was + theirs * before
        self.count = total


def original_state(parts: Parts, index: int) -> dict[str, Tensor]:
    """Return copies of a block's parameters and statistics, by name in the model, before it is compressed."""
    prefix = parts.plan.blocks[index]
    state = parts.blocks.block(index).state_dict()
    return {f"{prefix}.{name}" if prefix else name: tensor.detach().clone() for name, tensor in state.items()}


def settle(
    parts: Parts, index: int, before: Mapping[str, Boundary], original: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Give the normalizations of a compressed block new running statistics, one after the other as they run.

    Each is measured behind those already settled: one pass over the images for each, two to correct.

    Args:
        parts: The run.
        index: The block, whose compressed weights are loaded.
        before: Boundaries of the streams that enter it.
        original: What `original_state` kept, to correct by; None estimates anew.

    Returns:
        Name on disk -> what is stored.

    Raises:
        NumericalError: A statistic is not finite.
    """
    refs = {ref.param: ref for ref in parts.refs.values()}
    norms, stored = _norms(parts, index), {}
    with torch.no_grad():
        for name in _in_order(parts, index, before, norms):
            moments = _measure(parts, index, before, norms[name], original)
            for leaf, value in statistics(norms[name], moments, original is not None).items():
                ref = refs[f"{name}.{leaf}"]
                kept = value.to(DTYPES[ref.dtype])
                if not torch.isfinite(kept).all():
                    raise NumericalError(f"{ref.name}: is not finite on calibration images", "leave --batch-norm out")
                norms[name].get_buffer(leaf).copy_(kept)
                stored[ref.name] = kept.cpu()
    return stored


def statistics(norm: Any, moments: Moments, correct: bool) -> dict[str, Tensor]:
    """Return a normalization's new running mean and variance, float64 `[channels]`.

    Args:
        norm: As it is in the original.
        moments: Of what it reads.
        correct: Fit the original's output; else take the statistics of the images.
    """
    if not correct:
        unbiased = moments.spread * (moments.count / max(moments.count - 1, 1))  # as batch normalization counts its own
        return {"running_mean": moments.now, "running_var": unbiased}
    slope = (moments.shared / moments.spread.clamp_min(EPS)).clamp(*SLOPES)
    slope = torch.where(moments.spread > EPS, slope, 1)
    # slope * (now - mean(now)) + mean(was), less the old mean and over the old spread, is what the original gives.
    return {
        "running_mean": moments.now - (moments.was - norm.running_mean.double()) / slope,
        "running_var": ((norm.running_var.double() + norm.eps) / slope.square() - norm.eps).clamp_min(0),
    }


def _measure(
    parts: Parts, index: int, before: Mapping[str, Boundary], norm: nn.Module, original: Mapping[str, Tensor] | None
) -> Moments:
    found: Moments | None = None
    stores, run = parts.streams.stores, parts.streams.run
    for sample in range(parts.streams.n_samples):
        with _watched({"": norm}) as seen:
            run(index, stores[COMPRESSED].read(before[COMPRESSED], sample))
            now = was = seen[""]
            if original is not None:
                run(index, stores[FP].read(before[FP], sample), original)
                was = seen[""]
        moments = Moments.of(now, was)
        if found is None:
            found = moments
        else:
            found.add(moments)
    assert found is not None
    return found


def _in_order(
    parts: Parts, index: int, before: Mapping[str, Boundary], norms: Mapping[str, nn.Module]
) -> tuple[str, ...]:
    """Return the names of the normalizations that run, in the order in which they do."""
    with _watched(norms) as seen:
        parts.streams.run(index, parts.streams.stores[COMPRESSED].read(before[COMPRESSED], 0))
    return tuple(seen)


def _norms(parts: Parts, index: int) -> dict[str, nn.Module]:
    """Return the normalizations of a block that have running statistics, by name."""
    block, prefix = parts.blocks.block(index), parts.plan.blocks[index]
    return {
        f"{prefix}.{name}" if prefix else name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    }


@contextmanager
def _watched(norms: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Keep what normalizations read last, in the order in which they first ran."""
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen[name] = arguments[0]

        return hook

    handles = [norm.register_forward_pre_hook(look(name)) for name, norm in norms.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
