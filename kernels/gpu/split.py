# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

"""Sums over inputs that several programs share: each hands in its part, the last one adds all in their order.

The order is fixed, so that the result does not depend on who comes last.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def hand_in(acc, partial_ptr, counter_ptr, tile, split, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Store one program's part `[BLOCK_N, BLOCK_M]`, and return how many came before it."""
    tl.store(_parts(partial_ptr, tile, split, BLOCK_N, BLOCK_M), acc)
    tl.debug_barrier()  # every thread's part is written before one of them says so
    return tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu")


@triton.jit
def added(
    acc, partial_ptr, counter_ptr, tile, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Return the sum of all parts, in the dtype of `acc`, and make the counter ready for the next launch."""
    total = tl.zeros((BLOCK_N, BLOCK_M), acc.dtype)
    for other in range(SPLIT):
        total += tl.load(_parts(partial_ptr, tile, tl.cast(other, tl.int64), BLOCK_N, BLOCK_M), cache_modifier=".cg")
    tl.store(counter_ptr + tile, 0)
    return total


@triton.jit
def _parts(partial_ptr, tile, split, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    inside = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    tiles = tl.num_programs(0)
    return partial_ptr + (split.to(tl.int64) * tiles + tile) * (BLOCK_N * BLOCK_M) + inside
