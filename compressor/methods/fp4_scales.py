"""Searches of scales by output error, for LLM-FP4: whole rows, groups by themselves, and groups given all others.

Liu et al. 2023, "LLM-FP4: 4-Bit Floating-Point Quantized Transformers", arXiv 2310.16836, section 3.
The top of `fp4.py` says what is ours in it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from compressor.formats.base import QParams, SearchableFormat
from compressor.methods.fp4_rows import row_errors

_ELEMENTS = 1 << 22
"""Weights whose candidates are rounded at once, which bounds memory: a handful of float32 tensors of this size."""

_ROWS = 128
"""Rows searched at once at least, if memory allows: fewer make products of matrices slow."""


def search_rows(
    w: Tensor, fmt: SearchableFormat, start: QParams, moment: Tensor, limit: float = torch.inf
) -> tuple[QParams, float]:
    """Choose every row's scale by the error of its output, out of all candidates; the first on ties.

    Args:
        w: `[out, in]` float32.
        fmt: A format with one scale per output channel.
        start: Min-max parameters; the first candidate, so no row gets worse.
        moment: `[in, in]` mean of `x x^T`.
        limit: Summed error from which on the result is not wanted; the search then ends early.

    Returns:
        The chosen parameters and the error `d H d^T` summed over rows; `start` and infinity if it reaches `limit`.
    """
    triangle = moment.triu(1).mul_(2) + moment.diagonal().diag()
    at_once = max(min(_ELEMENTS // w.shape[1], max(w.shape[0] // 8, _ROWS)), 1)
    scales, total = [], 0.0
    for rows in range(0, w.shape[0], at_once):
        if total >= limit:
            return start, torch.inf
        part = w[rows : rows + at_once]
        best, least = start.scale[rows : rows + at_once], w.new_full((len(part), 1), torch.inf)
        for candidate in fmt.scale_candidates(replace(start, scale=best)):
            error = row_errors(fmt.round(part, candidate).sub_(part), triangle)  # [rows, 1]
            # As bytes: torch cannot pick among FP8 values.
            best = torch.where(error < least, candidate.scale.view(torch.uint8), best.view(torch.uint8))
            best = best.view(start.scale.dtype)
            least = torch.minimum(error, least)
        scales.append(best)
        total += float(least.sum(dtype=torch.float64))
    return (replace(start, scale=torch.cat(scales)), total) if total < limit else (start, torch.inf)


def diagonal_blocks(moment: Tensor, size: int) -> Tensor:
    """Return the diagonal blocks `[in/size, size, size]` of `moment` `[in, in]`."""
    groups = moment.shape[0] // size
    return moment.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def search_groups(w: Tensor, fmt: SearchableFormat, start: QParams, blocks: Tensor) -> tuple[QParams, float]:
    """Choose every group's scale on its own, ignoring correlations between groups.

    Args:
        w: `[out, in]` float32.
        fmt: The format whose candidates are tried.
        start: Min-max parameters; the first candidate, so the result is never worse.
        blocks: `[groups, size, size]` diagonal blocks of the second moment.

    Returns:
        The chosen parameters and the summed error `d H d^T` with all but the diagonal blocks of `H` left out.
    """
    trials = _Trials(w, fmt, start)
    errors = [trials.choose(group, own)[0] for group, own in enumerate(blocks)]  # groups x [out]
    return trials.chosen, float(torch.stack(errors).sum(dtype=torch.float64))


def better_rows(w: Tensor, fmt: SearchableFormat, a: QParams, b: QParams, moment: Tensor) -> tuple[QParams, float]:
    """Return for each row the parameters with the smaller error `d H d^T`, `b` on ties, and the error of all rows.

    Args:
        w: `[out, in]` float32.
        fmt: The format of both.
        a: Parameters with the same global scale as `b`.
        b: Parameters.
        moment: `[in, in]` mean of `x x^T`.
    """
    deltas = [fmt.round(w, q).sub_(w) for q in (a, b)]  # [out, in]
    error_a, error_b = (((delta @ moment) * delta).sum(-1, keepdim=True) for delta in deltas)  # [out, 1]
    scale = torch.where(error_a < error_b, a.scale.view(torch.uint8), b.scale.view(torch.uint8)).view(b.scale.dtype)
    return replace(b, scale=scale), float(torch.minimum(error_a, error_b).sum(dtype=torch.float64))


def sweep(w: Tensor, fmt: SearchableFormat, q: QParams, moment: Tensor) -> QParams:
    """Go over the groups once; each takes the scale that is best given all other groups' current errors.

    With `d` the row's error and `g` the group's columns, the part of `d H d^T` that depends on the group is
    `d_g H_gg d_g^T + 2 d_g (H d)_g'`, where `(H d)'` leaves the group itself out.

    Args:
        w: `[out, in]` float32.
        fmt: The format whose candidates are tried.
        q: Where to start; returned unchanged where nothing is better.
        moment: `[in, in]` mean of `x x^T`.
    """
    trials = _Trials(w, fmt, q)
    delta = fmt.round(w, q).sub_(w)  # [out, in]
    for group in range(q.scale.shape[1]):
        columns = trials.columns(group)
        own = moment[columns, columns]
        others = delta @ moment[:, columns] - delta[:, columns] @ own  # [out, size]
        _, delta[:, columns] = trials.choose(group, own, 2 * others)
    return trials.chosen


class _Trials:
    """Tries every candidate scale of one group at a time, for all rows at once."""

    def __init__(self, w: Tensor, fmt: SearchableFormat, start: QParams) -> None:
        self.w, self.fmt, self.start = w, fmt, start
        self.size = fmt.group_size or w.shape[1]
        # As bytes: torch cannot pick among FP8 values.
        assert start.scale.dtype.itemsize == 1, "a group's scale is picked as one byte"
        self.scales = torch.stack([q.scale.view(torch.uint8) for q in fmt.scale_candidates(start)], -1)
        self.best = self.scales[..., 0].clone()  # [out, groups]

    @property
    def chosen(self) -> QParams:
        """The parameters chosen so far."""
        return replace(self.start, scale=self.best.view(self.start.scale.dtype))

    def columns(self, group: int) -> slice:
        """Return the inputs of a group."""
        return slice(group * self.size, (group + 1) * self.size)

    def choose(self, group: int, own: Tensor, linear: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Take the scale that minimises `d own d^T + d linear^T` in each row, the first candidate on ties.

        Args:
            group: Which group.
            own: `[size, size]` second moment of its inputs.
            linear: `[out, size]` what the other groups' errors add, or None.

        Returns:
            The minimum `[out]` and the rounding error `d` `[out, size]` it is reached with.
        """
        part = self.w[:, self.columns(group)].contiguous()
        scales = self.scales[:, group].T.unsqueeze(-1).contiguous()  # [candidates, out, 1]
        trial = self.fmt.round(part, replace(self.start, scale=scales.view(self.start.scale.dtype))).sub_(part)
        slope = trial @ own  # [candidates, out, size]
        if linear is not None:
            slope += linear
        error, index = slope.mul_(trial).sum(-1).min(0)  # [out]
        self.best[:, group] = self.scales[:, group].gather(1, index.unsqueeze(1)).squeeze(1)
        return error, trial[index, torch.arange(len(index), device=index.device)]
