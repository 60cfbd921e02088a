"""Output errors of rounded rows, the objective that LLM-FP4's and AWQ's searches share."""

from __future__ import annotations

from torch import Tensor

_NARROWEST = 96
"""Columns below which a product of matrices is no longer efficient."""


def row_errors(delta: Tensor, triangle: Tensor) -> Tensor:
    """Return `d H d^T` of every row of `delta` `[rows, in]`, as `[rows, 1]`.

    Args:
        delta: Rounding errors.
        triangle: `[in, in]` upper triangle of `H` with everything above the diagonal doubled, zeros below. Only blocks
            that are not zero are multiplied, which is little more than half of `H`.
    """
    width = max(delta.shape[1] // 8, _NARROWEST)
    total = delta.new_zeros(delta.shape[0], 1)
    for start in range(0, delta.shape[1], width):
        stop = min(start + width, delta.shape[1])
        slope = delta[:, :stop] @ triangle[:stop, start:stop]
        total += slope.mul_(delta[:, start:stop]).sum(-1, keepdim=True)
    return total
