"""Products with the experts of a mixture: rows sorted by expert, all experts of a projection in one launch.

The weights of all experts lie in one stack, from which every expert's own weight is a view. Sorting waits for nothing:
there are as many blocks of rows as there could be at most, and those that are not needed end at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from compressor.errors import UnsupportedError
from compressor.kernels.gpu.launch import Routing, aligned, ceil_div, configuration, device_of, grouped_matmul
from compressor.kernels.gpu.layout import CODES, RuntimeWeight
from compressor.kernels.gpu.prepare import decode
from compressor.kernels.gpu.tiles import split_for

BLOCKS = (16, 32, 64, 128)
"""Rows that a program may have; also the buckets of the tile table."""


def stack(weights: Sequence[RuntimeWeight]) -> RuntimeWeight | None:
    """Return weights of equal layout as one, whose tensors have a dimension more, or None if they differ."""
    first = weights[0]
    kinds = {(w.grid, w.shape, w.group, w.scale_kind, w.row_kind, *(_slot(t) for t in w.tensors)) for w in weights}
    if len(kinds) > 1:
        return None
    columns = zip(*(weight.tensors for weight in weights), strict=True)
    words, bits, scale, zero, row, table = (torch.stack(column) for column in columns)
    return replace(first, words=words, bits=bits, scale=scale, zero=zero, row=row, table=table)


def member(experts: RuntimeWeight, expert: int) -> RuntimeWeight:
    """Return one weight of a stack; shares its memory."""
    words, bits, scale, zero, row, table = (tensor[expert] for tensor in experts.tensors)
    return replace(experts, words=words, bits=bits, scale=scale, zero=zero, row=row, table=table)


def block_rows(rows: int, n_experts: int) -> int:
    """Return how many rows a program should have when so many are spread over experts."""
    return next((size for size in BLOCKS if rows <= size * n_experts), BLOCKS[-1])


def route(chosen: Tensor, n_experts: int, block_m: int) -> Routing:
    """Sort rows by expert and cut them into blocks of one expert each, in a fixed order.

    Args:
        chosen: int64 `[rows]`: the expert of every row; beyond the last: none.
        n_experts: How many there are.
        block_m: Rows of a block.
    """
    rows = chosen.numel()
    order = chosen.argsort(stable=True)
    ends = torch.searchsorted(chosen[order], torch.arange(n_experts, device=chosen.device), right=True)  # [experts]
    starts = torch.nn.functional.pad(ends, (1, 0))[:-1]
    count = (ends - starts + block_m - 1) // block_m
    behind = count.cumsum(0)
    block = torch.arange(min(rows, rows // block_m + min(n_experts, rows)), device=chosen.device)
    expert = torch.searchsorted(behind, block, right=True)
    real = expert.clamp(max=n_experts - 1)
    first = starts[real] + (block - behind[real] + count[real]) * block_m
    blocks = torch.stack((torch.where(expert < n_experts, expert, -1), first, ends[real]), 1)
    return Routing(blocks.to(torch.int32), order.to(torch.int32), block_m)


def linear(x: Tensor, experts: RuntimeWeight, routing: Routing, rows: int) -> Tensor:
    """Return `[rows, n]`: row r is `x[r // (rows // tokens)] @ weight[expert of r].T`, zero if it has no expert.

    Args:
        x: `[tokens, k]`, float16 or bfloat16.
        experts: A stack, on the device of `x`.
        routing: Of the rows.
        rows: How many there are, a multiple of the tokens.
    """
    out: Tensor = grouped_linear(
        x, *experts.tensors, routing.blocks, routing.order, experts.grid, *experts.shape, experts.group,
        experts.scale_kind, experts.row_kind, routing.block_m, rows,
    )  # fmt: skip
    return out


@torch.library.custom_op("compressor::grouped_linear", mutates_args=())
def grouped_linear(
    x: Tensor,
    words: Tensor,
    bits: Tensor,
    scale: Tensor,
    zero: Tensor,
    row: Tensor,
    table: Tensor,
    blocks: Tensor,
    order: Tensor,
    grid: str,
    n: int,
    k: int,
    group: int,
    scale_kind: str,
    row_kind: str,
    block_m: int,
    rows: int,
) -> Tensor:
    """See `linear`; attributes one by one."""
    if x.shape[-1] != k or (x.shape[0] and rows % x.shape[0]):
        raise UnsupportedError(f"inputs {list(x.shape)} for {rows} rows and weights [{n}, {k}]", "is the router right?")
    experts = RuntimeWeight(grid, (n, k), group, scale_kind, row_kind, words, bits, scale, zero, row, table)
    routing = Routing(blocks, order, block_m)
    out = x.new_zeros(rows, n)
    if x.device.type != "cuda":
        return reference(x, experts, routing, out)
    with torch.cuda.device(x.device):
        return launch(aligned(x), experts, routing, out)


@grouped_linear.register_fake
def _(
    x: Tensor,
    words: Tensor,
    bits: Tensor,
    scale: Tensor,
    zero: Tensor,
    row: Tensor,
    table: Tensor,
    blocks: Tensor,
    order: Tensor,
    grid: str,
    n: int,
    k: int,
    group: int,
    scale_kind: str,
    row_kind: str,
    block_m: int,
    rows: int,
) -> Tensor:
    torch._check(x.shape[-1] == k, lambda: f"inputs of {x.shape[-1]} columns for weights of {k}")
    torch._check(words.shape[-1] * CODES[grid] >= k, lambda: f"{list(words.shape)} words hold no {k} columns")
    return x.new_empty(rows, n)


def launch(x: Tensor, experts: RuntimeWeight, routing: Routing, out: Tensor) -> Tensor:
    """Start the kernel on tiles of `routing.block_m` rows; see `launch.grouped_matmul`."""
    config = configuration(experts, routing.block_m, x.dtype, x.device, "")
    tiles = routing.blocks.shape[0] * ceil_div(experts.shape[0], config.tile.block_n)
    steps = ceil_div(experts.shape[1], config.tile.block_k)
    _, processors = device_of(x.device)
    return grouped_matmul(x, experts, routing, replace(config, split=split_for(tiles, steps, processors)), out)


def reference(x: Tensor, experts: RuntimeWeight, routing: Routing, out: Tensor) -> Tensor:
    """Do what the kernel does, block by block, with weights decoded and rounded to the dtype of `x`."""
    per_token = out.shape[0] // max(x.shape[0], 1)
    for expert, first, end in routing.blocks.tolist():
        if expert >= 0:
            rows = routing.order[first : min(first + routing.block_m, end)].long()
            weight = decode(member(experts, expert)).to(x.dtype)
            out[rows] = torch.nn.functional.linear(x[rows // per_token], weight)
    return out


def _slot(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device
