"""Better scales than min-max ones before any weight is rounded: ranges shrunk to where the summed error is least.

Where a grid reaches further on one side of zero, both ways round are tried."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from compressor.formats.base import QParams, ScaledFormat, SearchableFormat, grouped

GRID, STEPS = 100, 80
"""Ranges tried: 1.00, 0.99, ..., 0.21 of the starting one."""

_ELEMENTS = 1 << 17
"""Weights whose ranges are tried at once: few enough to stay in a processor's cache through all of them."""


def mse_clip(w: Tensor, fmt: ScaledFormat, q: QParams, norm: float = 2.4, weight: Tensor | None = None) -> QParams:
    """Shrink every group's range to where `sum weight * |rounding error|**norm` over the group is least.

    Zero points stay: both ends of a range shrink by the same factor, so zero keeps its place between them. Of equal
    errors the widest range wins.

    Args:
        w: `[out, in]` float32.
        fmt: The format of `q`.
        q: Where to start, min-max parameters of `w` as a rule; no group gets worse.
        norm: Exponent of the error. Above 2, so that clipped weights count more than in a sum of squares.
        weight: `[in]` importance of every input, e.g. the diagonal of a second moment; None for equal ones.
    """
    steps = fmt.steps(q)  # [out, groups, 1]
    importance = None if weight is None else grouped(weight.float(), fmt.group_size)  # [groups, group]
    one_scale = steps.shape[0] == 1  # for the whole matrix
    at_once = w.shape[0] if one_scale else max(_ELEMENTS // w.shape[1], 1)
    best = []
    for first in range(0, w.shape[0], at_once):
        part = slice(first, first + at_once)
        own = q if one_scale else rows_of(q, part)
        best.append(_best_steps(grouped(w[part], fmt.group_size), fmt, own, norm, importance))
    return fmt.with_steps(q, torch.cat(best))


def best_start(w: Tensor, fmt: SearchableFormat, q: QParams, weight: Tensor) -> QParams:
    """Give every group the candidate scale with the least `sum weight * error**2`, and the matrix the best grid.

    Other grids than that of `q` are tried only where a scale covers a whole row: then a grid is a split of the bits.

    Args:
        w: `[out, in]` float32.
        fmt: The format.
        q: Min-max parameters of `w`; the first choice, also on ties.
        weight: `[in]` importance of every input.
    """
    unit = fmt.steps(q)  # errors are taken in this unit: their squares neither underflow nor overflow
    best, least = q, torch.inf
    for start in [q] if fmt.group_size is not None else fmt.starts(w):
        found, error = _best_candidates(w, fmt, start, unit, grouped(weight.float(), fmt.group_size))
        total = float((error.double() * unit.double().square()).sum())
        if total < least:
            best, least = found, total
    return best


def _best_candidates(
    w: Tensor, fmt: SearchableFormat, start: QParams, unit: Tensor, importance: Tensor
) -> tuple[QParams, Tensor]:
    """Return the best of the candidates around `start` for every group, and the errors `[out, groups, 1]`."""
    at_once = max(_ELEMENTS // w.shape[1], 1)
    scales, errors = [], []
    for first in range(0, w.shape[0], at_once):
        rows = slice(first, first + at_once)
        part, best = w[rows], start.scale[rows]
        least = torch.full_like(unit[rows], torch.inf)
        for candidate in fmt.scale_candidates(replace(start, scale=best)):
            delta = grouped(fmt.round(part, candidate).sub_(part), fmt.group_size).div_(unit[rows])
            error = delta.square_().mul_(importance).sum(-1, keepdim=True)
            # As bytes: torch cannot pick among FP8 values.
            wins = (error < least).squeeze(-1).repeat_interleave(best.itemsize, -1)
            best = torch.where(wins, candidate.scale.view(torch.uint8), best.view(torch.uint8))
            best, least = best.view(start.scale.dtype), torch.minimum(error, least)
        scales.append(best.view(torch.uint8))
        errors.append(least)
    return replace(start, scale=torch.cat(scales).view(start.scale.dtype)), torch.cat(errors)


def turned(w: Tensor, fmt: ScaledFormat, q: QParams) -> QParams:
    """Give every group's largest weight the last value of the grid's longer side, by a negative step if it is above 0.

    Formats whose grids do not mirror keep `q`.

    Args:
        w: `[out, in]` float32.
        fmt: The format of `q`.
        q: Min-max parameters of `w`.
    """
    if not fmt.mirrors:
        return q
    steps, groups = fmt.steps(q), grouped(w, fmt.group_size)
    shared = [dim for dim in range(3) if steps.shape[dim] == 1]  # what has one scale has one side
    above = groups.amax(shared, keepdim=True) > groups.amin(shared, keepdim=True).neg()
    low, high = fmt.reach(q)
    longer = (high - low) / 2  # 8 of int4, whose min-max scales stand for 7.5 on either side
    return fmt.with_steps(q, torch.where(above, -steps, steps) * ((longer - 0.5) / longer))


def clamped(z: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Return `z` clamped to the bounds of a format's `reach`; numbers are many times faster than tensors."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return z.clamp(torch.as_tensor(low, device=z.device), torch.as_tensor(high, device=z.device))
    return z.clamp(low, high)


def rows_of(q: QParams, rows: slice) -> QParams:
    """Return the parameters of some rows of a matrix whose scales are `[out, groups]`."""
    zero_point = None if q.zero_point is None else q.zero_point[rows]
    return replace(q, scale=q.scale[rows], zero_point=zero_point)


def _best_steps(w: Tensor, fmt: ScaledFormat, q: QParams, norm: float, importance: Tensor | None) -> Tensor:
    """Return the steps with the least error, float32 in the shape of `fmt.steps(q)`; `w` is `[out, groups, group]`."""
    start = fmt.steps(q)
    shared = [dim for dim in range(3) if start.shape[dim] == 1]  # what has one scale has one error
    w = w / start  # errors in units of the first step: their powers neither underflow nor overflow
    best, least, last = start, torch.full_like(start, torch.inf), torch.zeros_like(start)
    shares = [1 - index / GRID for index in range(STEPS)]
    for share in [*shares, *(-share for share in shares if fmt.mirrors)]:
        steps = fmt.steps(fmt.with_steps(q, start * share)) if share < 1 else start
        if torch.equal(steps, last):
            continue  # few scales can be stored: the next one is far
        last, ratio = steps, steps / start
        error = fmt.snap(w / ratio, q).mul_(ratio).sub_(w)
        # |d|**p by logarithms, which is several times faster than a power; zero gives exp2(-inf) = 0.
        error = error.square_() if norm == 2 else error.abs_().log2_().mul_(norm).exp2_()
        if importance is not None:
            error *= importance
        total = error.sum(shared, keepdim=True)
        better = total < least
        best, least = torch.where(better, steps, best), torch.where(better, total, least)
    return best
