"""AWQ: scale the channels that carry loud inputs up before rounding, and move the inverse into what comes before.

Lin et al. 2024, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv 2306.00978,
sections 3.2 (scaling) and 4 (search, clipping).

With `x` the mean magnitude of each input channel, factors `c = x^r` for r = 0, 1/20, ..., 19/20, normalised by
`sqrt(max c * min c)`, are judged by the error `sum_t |(Q(W c) / c - W) x_t|^2`, and the best are folded into the
weights. Then each group's range is shrunk to 1, 0.95, ..., 0.55 of its own, whatever gives the least error of its
products.

Differs from the paper:
- The error is that of the layers that read the scaled channels, summed, not that of the module around them (attention,
  MLP). With the second moment `H = sum x x^T` it is `d H d^T` per row, exact for all calibration tokens, and the model
  need not be run again. What attention or an activation does with the error is not seen.
- By default (`duo`) factors are `x^r / w^(1 - r)`, with `w` the mean magnitude of a column relative to its groups'
  maxima, as llm-compressor has them: columns of small weights gain from a finer grid too.
- No scaling at all is always a candidate, so the error is never above that of rounding to nearest.
- Channels that are silent in the calibration data are left alone.
- Clipping judges groups by all tokens (the paper: 512), and rows that all of `H` shows to be worse are not clipped.
- The grids are those of the format, symmetric by default. Where they can be mirrored, the longer side of each goes to
  the larger weights before factors and ranges are searched (not with `clip=False`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from compressor.calibration.channels import MeanAbs
from compressor.calibration.stats import SecondMoment, Statistic
from compressor.decision import Outcome, Quantized
from compressor.formats.base import QParams, QuantFormat, ScaledFormat, grouped
from compressor.methods.base import Layer, MethodOptions, Scope, Stream
from compressor.methods.fp4_rows import row_errors
from compressor.methods.fp4_scales import diagonal_blocks
from compressor.methods.grids import turned
from compressor.methods.scaling import Factors, FoldSite, bounded
from compressor.plan import FoldKind, WeightRef

_SMALLEST = 1e-4
"""Floor of a channel's factor before normalisation, as in the authors' code."""

_CLIP_STEPS, _CLIP_GRID = 10, 20
"""Ranges tried are `1 - i/20` for i = 0 ... 9, as in the authors' code."""

_UNCLIPPED = ("q_proj", "k_proj", "query", "key", "qkv_proj", "query_key_value", "Wqkv")
"""Last names of layers whose outputs are multiplied with each other: clipping them hurts more than their error says."""


class AWQOptions(MethodOptions):
    """Options of the search."""

    n_grid: int = Field(20, ge=1, le=200, description="exponents tried: 0, 1/n_grid, ..., (n_grid - 1)/n_grid")
    duo: bool = Field(True, description="also divide by the mean weight magnitude to the power 1 - r; false: the paper")
    clip: bool = Field(
        True, description="shrink ranges of groups afterwards, not of queries and keys; false: nor mirror grids"
    )


class AWQ:
    """Activation-aware scaling, then rounding to nearest with clipped ranges."""

    name = "awq"
    summary = "AWQ: scale loud input channels up before rounding, inverse folded into the operation before"
    scope = Scope.LAYER
    stream = Stream.FP
    folds = (FoldKind.NORM, FoldKind.PRODUCT, FoldKind.VALUE)
    Options = AWQOptions

    def __init__(self, options: AWQOptions | None = None) -> None:
        self.options = options or AWQOptions()

    def stats(self, fmt: QuantFormat) -> tuple[Statistic, ...]:
        """Return the second moment, which judges errors, and mean magnitudes, which make the candidates."""
        return (SecondMoment(), MeanAbs())

    def refuse(self, ref: WeightRef, fmt: QuantFormat) -> str | None:
        """Refuse formats without a step per group that could be shrunk."""
        if not isinstance(fmt, ScaledFormat):
            return f"method awq needs a format whose scales it can shrink (int2 ... int8, nvfp4, mxfp4), not {fmt.name}"
        return None

    def fold(self, site: FoldSite) -> Factors:
        """Choose the factors of one fold by the summed error of its readers; ones if nothing is better."""
        best = torch.ones_like(site.layers[0].weight[0])
        if site.is_unseen:
            return Factors(best, site.unseen_events())
        moment = site.layers[0].second_moment(SecondMoment())
        triangle = moment.triu(1).mul_(2) + moment.diagonal().diag()
        loud = site.layers[0].magnitude(MeanAbs())
        quiet = self._weight_magnitudes(site) if self.options.duo else None
        least = scaled_error(site, best, triangle, self.options.clip)
        for step in range(self.options.n_grid):
            c = site.storable(candidate(loud, step / self.options.n_grid, quiet))
            error = scaled_error(site, c, triangle, self.options.clip)
            if error < least:
                best, least = c, error
        return Factors(best)

    def solve(self, layer: Layer, fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        """Round a weight, already scaled, to nearest on clipped ranges."""
        assert isinstance(fmt, ScaledFormat)
        q, events = layer.fit(fmt), list[str]()
        if layer.n_tokens == 0:
            events.append(f"{layer.ref.name}: no calibration token reached it")
        elif self.options.clip:
            q = turned(layer.weight, fmt, q)
            if layer.ref.module.rpartition(".")[2] not in _UNCLIPPED:
                q = clip(layer.weight, fmt, q, layer.second_moment(SecondMoment()))
        return Outcome({layer.ref.name: Quantized(fmt.encode(layer.weight, q), q)}, tuple(events))

    def _weight_magnitudes(self, site: FoldSite) -> Tensor:
        """Return the mean of `|w|` over its group's maximum, per input channel, over all readers' rows."""
        total, rows = torch.zeros_like(site.layers[0].weight[0]), 0
        for layer, fmt in zip(site.layers, site.formats, strict=True):
            width = layer.weight.shape[1]
            magnitudes = layer.weight.abs().unflatten(1, (-1, fmt.group_size or width))  # [out, groups, group]
            total += (magnitudes / (magnitudes.amax(-1, keepdim=True) + 1e-6)).flatten(1).sum(0)
            rows += layer.weight.shape[0]
        return total / rows


def candidate(loud: Tensor, r: float, quiet: Tensor | None = None) -> Tensor:
    """Return the factors for exponent `r`, `[channels]`, with `max c * min c = 1` over channels that are not silent.

    Args:
        loud: Mean magnitude of every input channel.
        r: Exponent.
        quiet: Mean relative magnitude of every column of the weights, or None to look at inputs alone.
    """
    c = loud.pow(r)
    if quiet is not None:
        c = c / (quiet.pow(1 - r) + 1e-4)
    c = c.clamp_min(_SMALLEST)
    dead = loud == 0
    alive = c[~dead]
    if alive.numel():
        c = c / (alive.max() * alive.min()).sqrt()
    return bounded(c, dead)


def scaled_error(site: FoldSite, c: Tensor, triangle: Tensor, turn: bool) -> float:
    """Return the summed output error of the readers when columns are multiplied by `c` while they are rounded.

    Args:
        site: The fold.
        c: `[channels]`.
        triangle: The second moment as `row_errors` wants it.
        turn: Whether grids that mirror lie with their longer side to the larger weights.
    """
    total = 0.0
    for layer, fmt, (w, q) in zip(site.layers, site.formats, site.fit(c), strict=True):
        assert isinstance(fmt, ScaledFormat)
        start = turned(w, fmt, q) if turn else q
        delta = fmt.round(w, start).div_(c).sub_(layer.weight)  # [out, in]
        total += float(row_errors(delta, triangle).sum(dtype=torch.float64))
    return total


def clip(w: Tensor, fmt: ScaledFormat, q: QParams, moment: Tensor) -> QParams:
    """Shrink each group's step to the tried share of its own that gives its products the least error.

    Groups are judged by themselves; rows that all of the second moment shows to be worse go back to `q`.

    Args:
        w: `[out, in]` float32.
        fmt: The format of `q`.
        q: Min-max parameters, kept where nothing is better.
        moment: `[in, in]` mean of `x x^T`.
    """
    whole = fmt.steps(q)  # [out, groups, 1], or [1, 1, 1] for one scale in all
    shared = [dim for dim in range(3) if whole.shape[dim] == 1]  # what has one scale has one error
    blocks = diagonal_blocks(moment, fmt.group_size or w.shape[1])  # [groups, group, group]
    best, least = q, torch.full_like(whole, torch.inf)
    shares = [1 - step / _CLIP_GRID for step in range(_CLIP_STEPS)]
    for share in [*shares, *(-share for share in shares if fmt.mirrors)]:
        trial = fmt.with_steps(q, whole * share) if share < 1 else q
        delta = grouped(fmt.round(w, trial).sub_(w), fmt.group_size).transpose(0, 1)  # [groups, out, group]
        error = torch.bmm(delta, blocks).mul_(delta).transpose(0, 1).sum(shared, keepdim=True)
        best, least = pick(error < least, trial, best), torch.minimum(error, least)
    triangle = moment.triu(1).mul_(2) + moment.diagonal().diag()
    before, after = (row_errors(fmt.round(w, p).sub_(w), triangle).unsqueeze(-1) for p in (q, best))  # [out, 1, 1]
    if whole.shape[0] == 1:
        before, after = before.sum(0, keepdim=True), after.sum(0, keepdim=True)
    return pick(after < before, best, q)


def pick(wins: Tensor, a: QParams, b: QParams) -> QParams:
    """Return the scales of `a` where `wins` (broadcast to `[out, groups, 1]`), else those of `b`."""
    mask = wins.squeeze(-1).expand(a.scale.shape) if a.scale.ndim == 2 else wins.reshape(a.scale.shape)
    # As bytes: torch cannot pick among FP8 values.
    ours, theirs = (p.scale.contiguous().view(torch.uint8) for p in (a, b))
    scale = torch.where(mask.repeat_interleave(a.scale.itemsize, -1), ours, theirs)
    return replace(b, scale=scale.view(a.scale.dtype))
