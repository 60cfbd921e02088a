"""Rounding weights by themselves: tables of embeddings, and the output head, which lie outside the blocks.

Liu et al. 2023, arXiv 2310.16836, rounds embedding tables row by row without data: each row takes the bias with the
least squared error, and the table the split with the least in total. Other formats are fitted to the largest values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.decision import Quantized
from compressor.formats.base import QParams, QuantFormat
from compressor.formats.split_floats import SplitFloat

STRIDE = 4
"""Of the biases of a search every so-manieth is tried: tables have tens of thousands of rows, and neighbours differ
little."""

_ELEMENTS = 1 << 22
"""Values rounded at once."""


def round_table(w: Tensor, fmt: QuantFormat) -> Quantized:
    """Return codes and parameters of a matrix that no data is looked at for.

    Args:
        w: `[rows, in]` float32.
        fmt: Its format.
    """
    q = search_table(w, fmt) if isinstance(fmt, SplitFloat) else fmt.fit(w, fmt.fit_global([w]))
    return Quantized(fmt.encode(w, q), q)


def search_table(w: Tensor, fmt: SplitFloat) -> QParams:
    """Return for every row the bias with the least squared error, in the split with the least in total."""
    best, least = None, torch.inf
    step = max(1, _ELEMENTS // w.shape[1])
    for start in fmt.starts(w):
        scales, total = [], 0.0
        for first in range(0, len(w), step):
            part = w[first : first + step]
            scale, error = _search_rows(part, fmt, QParams(start.scale[first : first + step], codebook=start.codebook))
            scales.append(scale)
            total += error
        if total < least:
            best, least = QParams(torch.cat(scales), codebook=start.codebook), total
    assert best is not None, "a format has at least one split"
    return best


def _search_rows(w: Tensor, fmt: SplitFloat, start: QParams) -> tuple[Tensor, float]:
    """Return the best scale of every row, `[rows, 1]`, and the summed squared error."""
    best, least = start.scale, w.new_full((len(w), 1), torch.inf)
    for index, candidate in enumerate(fmt.scale_candidates(start)):
        if index % STRIDE and index:
            continue
        error = fmt.round(w, candidate).sub_(w).square_().sum(-1, keepdim=True)
        best = torch.where(error < least, candidate.scale, best)
        least = torch.minimum(error, least)
    return best, float(least.sum(dtype=torch.float64))
