"""The layout of 16-bit weights of which at least two of every four columns are zero: 9 bits per weight.

A word holds the two columns that are kept of four, the first one in its lower half. Which two, one of six patterns, is
three bits of a nibble; four words' nibbles are 16 bits. That a weight is this sparse is checked, not declared: pruned
checkpoints are dense ones.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional

from compressor.kernels.gpu.layout import CODES, PAD_ROWS, SPARSE, RuntimeWeight, pad_columns

PATTERNS = tuple(combinations(range(4), 2))
"""The columns that are kept, by pattern."""

_OF_MASK = tuple(
    next((i for i, kept in enumerate(PATTERNS) if mask & ~sum(1 << place for place in kept) == 0), -1)
    for mask in range(16)
)
"""The first pattern that keeps all the columns of a mask; -1: they are too many."""

_ROWS_AT_ONCE = 1024


def is_sparse(weight: Tensor) -> bool:
    """Return whether at least two of every four neighbours in every row of `[n, k]` are zero."""
    if weight.shape[1] % 4:
        return False
    parts = weight.split(_ROWS_AT_ONCE)
    return all(bool((part.unflatten(1, (-1, 4)) != 0).sum(-1).le(2).all()) for part in parts)


def pack(weight: Tensor) -> RuntimeWeight | None:
    """Return a weight `[n, k]` in the layout of its dtype, or None if it has none: too few zeros, or not 16 bits wide.

    Zeros lose their sign.
    """
    grid = next((name for name, dtype in SPARSE.items() if dtype == weight.dtype), None)
    if grid is None or not is_sparse(weight):
        return None
    n, k = weight.shape
    rows, columns = (-(-size // pad) * pad for size, pad in ((n, PAD_ROWS), (k, pad_columns(grid))))
    words = torch.zeros(rows, columns // CODES[grid], dtype=torch.int32, device=weight.device)
    bits = torch.zeros(rows, columns // 16, dtype=torch.int16, device=weight.device)
    of_mask, kept = torch.tensor(_OF_MASK, device=weight.device), torch.tensor(PATTERNS, device=weight.device)
    powers = torch.tensor([1, 2, 4, 8], device=weight.device)
    for start in range(0, n, _ROWS_AT_ONCE):
        part = functional.pad(weight[start : start + _ROWS_AT_ONCE], (0, columns - k)).unflatten(1, (-1, 4))
        pattern = of_mask[((part != 0) * powers).sum(-1)]  # [rows, words]
        values = part.gather(2, kept[pattern]).contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
        words[start : start + len(part)] = values[..., 0] | values[..., 1] << 16
        nibbles = pattern.unflatten(1, (-1, 4)) << torch.tensor([0, 4, 8, 12], device=weight.device)
        bits[start : start + len(part)] = nibbles.sum(-1).to(torch.int16)  # patterns are less than 8: no sign
    empty = torch.empty(0, dtype=torch.float16, device=weight.device)
    return RuntimeWeight(
        grid=grid,
        shape=(n, k),
        group=0,
        scale_kind="none",
        row_kind="none",
        words=words,
        bits=bits,
        scale=empty,
        zero=empty,
        row=empty.float(),
        table=empty.to(torch.int32),
    )


def unpack(weight: RuntimeWeight) -> Tensor:
    """Return the weight `[n, k]` that `pack` was given, in its dtype."""
    n, k = weight.shape
    shifts = torch.tensor([0, 4, 8, 12], device=weight.words.device)
    pattern = (weight.bits[:n].to(torch.int64)[..., None] >> shifts & 7).flatten(1)  # [n, words]
    values = torch.stack((weight.words[:n] & 0xFFFF, weight.words[:n] >> 16), -1).to(torch.int16)
    kept = torch.tensor(PATTERNS, device=values.device)[pattern]  # [n, words, 2]
    dense = values.new_zeros(*pattern.shape, 4).scatter_(2, kept, values)
    return dense.view(SPARSE[weight.grid]).flatten(1)[:, :k].contiguous()
