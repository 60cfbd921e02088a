"""Random weights in the runtime layout, made where they are wanted: for timing and tuning, which need no real ones."""

from __future__ import annotations

import math

import torch

from compressor.kernels.gpu.int_weight import IntWeight, pack_bytes
from compressor.kernels.gpu.layout import (
    CODES,
    PAD_COLUMNS,
    PAD_ROWS,
    SPARSE,
    TABLES,
    THREE_BITS,
    RuntimeWeight,
    groups_per_chunk,
    table_words,
)
from compressor.kernels.gpu.sparse import pack

KINDS: dict[str, tuple[int, str, str]] = {
    "group": (128, "float", "none"),
    "channel": (0, "none", "times"),
    "nvfp4": (16, "e4m3", "over"),
    "mxfp4": (32, "e8m0", "times"),
    "dense": (0, "none", "none"),
}
"""What scales a weight: columns per scale, `scale_kind` and `row_kind` of `layout.RuntimeWeight`."""


def random_weight(
    grid: str,
    n: int,
    k: int,
    kind: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    group: int | None = None,
    seed: int = 0,
) -> RuntimeWeight:
    """Return a weight of random codes and scales around 0.01.

    Args:
        grid: See `layout.RuntimeWeight`.
        n: Rows.
        k: Columns.
        kind: A key of `KINDS`.
        device: Where it is made.
        dtype: Dtype of floating-point scales.
        group: Columns per scale, if others than the kind's.
        seed: Of the random numbers.
    """
    generator = torch.Generator(device).manual_seed(seed)
    if grid in SPARSE:
        dense = torch.randn(n, k, generator=generator, device=device) * 0.05
        _, least = dense.unflatten(1, (-1, 4)).abs().topk(2, -1, largest=False)
        sparse = pack(dense.unflatten(1, (-1, 4)).scatter(2, least, 0.0).flatten(1).to(SPARSE[grid]))
        assert sparse is not None, "two of four were made zero"
        return sparse
    usual, scale_kind, row_kind = KINDS[kind]
    group = usual if group is None else group
    rows, columns = -(-n // PAD_ROWS) * PAD_ROWS, -(-k // PAD_COLUMNS) * PAD_COLUMNS
    shape = (rows, columns // CODES[grid])

    def integers(low: int, high: int, size: tuple[int, ...], as_dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, size, generator=generator, device=device, dtype=torch.int64).to(as_dtype)

    scale = torch.empty(0, dtype=torch.float16, device=device)
    if group:
        per = groups_per_chunk(group)
        size = (math.ceil(columns / (group * per)), rows, per)
        if scale_kind == "float":
            scale = (torch.rand(size, generator=generator, device=device) * 0.01 + 0.005).to(dtype)
        else:
            scale = integers(*((40, 80) if scale_kind == "e4m3" else (250, 255)), size, torch.uint8)
    row = torch.empty(0, dtype=torch.float32, device=device)
    if row_kind != "none":
        row = torch.full((rows,), 100.0 if row_kind == "over" else 0.01, device=device)
        if scale_kind == "e8m0":
            row = torch.full((rows,), 2.0**-7, device=device)
    return RuntimeWeight(
        grid=grid,
        shape=(n, k),
        group=group,
        scale_kind=scale_kind,
        row_kind=row_kind,
        words=integers(-(1 << 31), 1 << 31, shape, torch.int32),
        bits=integers(-(1 << 15), 1 << 15, shape if grid in THREE_BITS else (0,), torch.int16),
        scale=scale,
        zero=torch.empty(0, dtype=torch.float16, device=device),
        row=row,
        table=_random_table(grid, generator, device),
    )


def random_int_weight(
    bits: int, n: int, k: int, group: int, device: torch.device | str = "cpu", seed: int = 0
) -> IntWeight:
    """Return a weight of random integers for products with integers, scales around 0.01.

    Args:
        bits: 4 or 8.
        n: Rows.
        k: Columns.
        group: Columns per scale; 0 for whole rows.
        device: Where it is made.
        seed: Of the random numbers.
    """
    generator = torch.Generator(device).manual_seed(seed)
    half = 1 << (bits - 1)
    numbers = torch.randint(-half, half, (n, k), generator=generator, device=device, dtype=torch.int8)
    rows = -(-n // PAD_ROWS) * PAD_ROWS
    size = (k // group, rows) if group else (rows,)
    scale = torch.rand(size, generator=generator, device=device) * 0.01 + 0.005
    sums = torch.zeros(rows, dtype=torch.float32 if group else torch.int32, device=device)
    if group:
        sums[:n] = (numbers.unflatten(1, (-1, group)).sum(-1) * scale[:, :n].T).sum(1)
    else:
        sums[:n] = numbers.sum(1, dtype=torch.int32)
    return IntWeight(bits, (n, k), group, pack_bytes(numbers, bits), scale, sums)


def _random_table(grid: str, generator: torch.Generator, device: torch.device | str) -> torch.Tensor:
    if grid not in TABLES:
        return torch.empty(0, dtype=torch.int32, device=device)
    values = torch.randn(16, generator=generator, device=device)
    return table_words(torch.cat((values[:8], -values[:8])) if grid == "table8" else values)
