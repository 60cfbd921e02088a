"""The loop of GPTQ: columns are rounded in turn, and each error moves the columns still to come.

Frantar et al. 2022, arXiv 2210.17323, Algorithm 1. Matrices are held transposed, inputs first, so that what one step
reads and writes lies together in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from compressor.formats.base import QParams, ScaledFormat, SearchableFormat

Choose = Callable[[Tensor, Tensor], QParams]
"""Weights `[out, group]` of one group, as they are when it is about to be rounded and in the order of rounding, and its
diagonal block of `U` -> their parameters, scales `[out, 1]`."""


class Pruning(Protocol):
    """Says in the middle of the loop which weights become zero."""

    @property
    def width(self) -> int | None:
        """Inputs it is asked about at a time, a divisor of 32; None for the whole block that is rounded next."""
        ...

    def choose(self, first: int, rest: Tensor, diagonal: Tensor) -> Tensor:
        """Return what stays, bool `[inputs, out]`.

        Args:
            first: Place of the first of these inputs in the order of rounding.
            rest: `[inputs, out]` float32, the weights as they are now.
            diagonal: `[inputs]`, their `U_jj`.
        """
        ...


@dataclass(frozen=True)
class Zeros:
    """Weights that are zero already stay so.

    Attributes:
        keep: bool `[in, out]` in the order of rounding.
    """

    keep: Tensor
    width: int | None = None

    def choose(self, first: int, rest: Tensor, diagonal: Tensor) -> Tensor:
        """Return the mask of these inputs."""
        return self.keep[first : first + len(rest)]


_PIECE = 32
"""Columns that update each other one by one; further ones are updated by products of matrices."""

_SHRINK, _TRIALS = 0.05, 15
"""Scales tried where a format has no list of its own: 1.00, 0.95, ..., 0.30 of the min-max one."""


@dataclass(frozen=True)
class Curvature:
    """The factored second moment of a layer's input.

    Attributes:
        order: int64 `[in]`, the inputs in the order they are rounded in.
        upper: `[in, in]` float32 upper triangular `U` with `H^-1 = U^T U`, rows and columns in that order.
        variance: `[in]` float32, as stored: `1 / U_jj^2`, the output error of a unit rounding error in input j.
        damping: The share of the mean diagonal that was added.
        n_dead: Inputs that were always zero.
    """

    order: Tensor
    upper: Tensor
    variance: Tensor
    damping: float
    n_dead: int

    @classmethod
    def of(cls, moment: Tensor, order: Tensor, damping: float) -> Curvature | None:
        """Factor `moment` `[in, in]` float32, damped by a share of its mean diagonal; None if it is too singular."""
        backwards = order.flip(0)
        h = moment[backwards.unsqueeze(1), backwards]
        diagonal = h.diagonal()
        n_live = int((diagonal > 0).sum())
        mean = diagonal.sum() / n_live if n_live else torch.ones_like(diagonal[0])
        diagonal += damping * mean
        # With H = R R^T and R upper triangular, U is the inverse of R: no inverse of H is needed. R is the Cholesky
        # factor of H with rows and columns in reverse, itself in reverse.
        lower, failed = torch.linalg.cholesky_ex(h)
        if bool(failed):
            return None
        inverse = torch.linalg.solve_triangular(lower, torch.eye(len(order), device=h.device), upper=False)
        if not torch.isfinite(inverse).all():
            return None
        variance = torch.empty_like(diagonal)
        variance[backwards] = lower.diagonal().square()
        return cls(order, inverse.flip(0, 1), variance, damping, len(order) - n_live)


def compensate(
    w: Tensor,
    fmt: ScaledFormat,
    curvature: Curvature,
    scales: QParams | Choose,
    block: int,
    pruning: Pruning | None = None,
) -> tuple[Tensor, QParams]:
    """Round `w` column by column, in the order of `curvature`.

    Args:
        w: `[out, in]` float32.
        fmt: The format.
        curvature: Of the layer's input.
        scales: Parameters of `w`; or a function that gives those of each group when its turn comes, for which the
            order must keep groups together.
        block: Columns rounded before those behind them are updated.
        pruning: Which weights become zero instead of being rounded, if any.

    Returns:
        What the codes must decode to, float32 `[out, in]`, and the parameters.
    """
    order, upper = curvature.order, curvature.upper
    n_rows, n_columns = w.shape
    size = fmt.group_size or n_columns
    group_of = (order // size).tolist()  # position -> group
    rest = w.T[order].contiguous()  # [in, out]; columns already done keep the value they had in their turn
    values = torch.empty_like(rest)
    keep = torch.ones_like(rest, dtype=torch.bool) if pruning else torch.empty(0, dtype=torch.bool)
    grids = {} if callable(scales) else {g: group_params(scales, g) for g in range(n_columns // size)}
    steps = {g: _row_steps(fmt, q, n_rows) for g, q in grids.items()}
    # Blocks end where groups end: a group that chooses its scale needs all of its columns up to date.
    block = max(block // size, 1) * size if fmt.group_size else block
    for low in range(0, n_columns, block):
        high = min(low + block, n_columns)
        errors = rest.new_empty(high - low, n_rows)
        if pruning and pruning.width is None:
            keep[low:high] = pruning.choose(low, rest[low:high], upper.diagonal()[low:high])
        for first, last in _pieces(low, high, size):
            if callable(scales) and first % size == 0:
                own = slice(first, first + size)
                group = group_of[first]
                grids[group] = scales((rest[own] * keep[own] if pruning else rest[own]).T.contiguous(), upper[own, own])
                steps[group] = _row_steps(fmt, grids[group], n_rows)
            for j in range(first, last):
                step = steps[group_of[j]]
                if pruning and pruning.width and j % pruning.width == 0:
                    few = slice(j, j + pruning.width)
                    keep[few] = pruning.choose(j, rest[few], upper.diagonal()[few])
                z = (rest[j] / step).view(-1, 1, 1)
                values[j] = fmt.snap(z, grids[group_of[j]]).view(-1) * step
                if pruning:
                    values[j].masked_fill_(~keep[j], 0.0)
                error = torch.sub(rest[j], values[j], out=errors[j - low]).div_(upper[j, j])
                rest[j + 1 : last].addr_(upper[j, j + 1 : last], error, alpha=-1)
            rest[last:high].addmm_(upper[first:last, last:high].T, errors[first - low : last - low], alpha=-1)
        rest[high:].addmm_(upper[low:high, high:].T, errors, alpha=-1)
    q = scales if not callable(scales) else _joined([grids[g] for g in range(n_columns // size)])
    return values[order.argsort()].T.contiguous(), q


def try_scales(w: Tensor, fmt: ScaledFormat, q: QParams, upper: Tensor) -> QParams:
    """Choose every row's scale for one group by running the loop on the group with each; the first on ties.

    Args:
        w: `[out, group]` float32, in the order the columns are rounded in.
        fmt: The format.
        q: Min-max parameters of `w`, the first choice.
        upper: `[group, group]`, the group's diagonal block of `U`.

    Returns:
        `q` with the scales whose rounding adds least to the output error, `sum (d_j / U_jj)^2`.
    """
    steps = torch.cat([fmt.steps(candidate)[:, 0] for candidate in scale_choices(fmt, q)], 1)  # [out, choices]
    trial = w.T.unsqueeze(2).repeat(1, 1, steps.shape[1])  # [group, out, choices]
    flat = trial.view(len(trial), -1)
    total = torch.zeros_like(steps)
    for j in range(len(trial)):
        value = fmt.snap((trial[j] / steps).unsqueeze(1), q).squeeze(1).mul_(steps)
        error = trial[j].sub_(value).div_(upper[j, j])
        total.addcmul_(error, error)
        flat[j + 1 :].addr_(upper[j, j + 1 :], flat[j], alpha=-1)
    # A scale that became zero when it was stored divides zero by zero.
    best = total.nan_to_num_(nan=torch.inf).argmin(1, keepdim=True)  # [out, 1]
    return fmt.with_steps(q, steps.gather(1, best).unsqueeze(-1))


def scale_choices(fmt: ScaledFormat, q: QParams) -> Iterator[QParams]:
    """Yield `q`, then `q` with other scales: the format's own list, or smaller and smaller ones, both ways round."""
    if isinstance(fmt, SearchableFormat):
        yield from fmt.scale_candidates(q)
        return
    yield q
    steps = fmt.steps(q)
    shares = [1 - _SHRINK * index for index in range(_TRIALS)]
    for share in [*shares[1:], *(-share for share in shares if fmt.mirrors)]:
        yield fmt.with_steps(q, steps * share)


def group_params(q: QParams, group: int) -> QParams:
    """Return the parameters of one group of every row, scales `[out, 1]`; all of them where there is one in all."""
    if q.scale.dim() == 1:
        return q
    own = slice(group, group + 1)
    return replace(q, scale=q.scale[:, own], zero_point=None if q.zero_point is None else q.zero_point[:, own])


def _row_steps(fmt: ScaledFormat, q: QParams, n_rows: int) -> Tensor:
    """Return the step of every row in one group, float32 `[out]`."""
    return fmt.steps(q).reshape(-1).expand(n_rows).contiguous()


def _pieces(low: int, high: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the columns from `low` to `high` in pieces that do not cross the ends of groups."""
    for start in range(low, high, size):
        stop = min(start + size, high)
        for first in range(start, stop, _PIECE):
            yield first, min(first + _PIECE, stop)


def _joined(groups: list[QParams]) -> QParams:
    """Return the parameters of a matrix from those of its groups."""
    first = groups[0]
    # As bytes: torch joins FP8 values on some devices only.
    scale = torch.stack([q.scale.view(torch.uint8) for q in groups], 1).flatten(1).view(first.scale.dtype)
    zeros = [q.zero_point for q in groups if q.zero_point is not None]
    return replace(first, scale=scale, zero_point=torch.cat(zeros, 1) if zeros else None)
