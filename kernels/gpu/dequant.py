# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Writing packed weights out as a dense matrix, bit-equal to what their format decodes.

For so many rows of activations that a dense matrix product beats the packed one, which decodes anew for every tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compressor.kernels.gpu.decode import decode
from compressor.kernels.gpu.lookup import table_codes
from compressor.kernels.gpu.matmul import load_groups, per_word


@triton.jit(do_not_specialize=["or0", "or1", "or2"])
def unpack_weight(
    words_ptr, bits_ptr, scale_ptr, zero_ptr, row_ptr, table_ptr, out_ptr, n, k, words_stride, bits_stride,
    scale_stride, out_stride, or0, or1, or2,
    GRID: tl.constexpr, GROUP: tl.constexpr, PER: tl.constexpr, SCALE: tl.constexpr, ROW: tl.constexpr,
    HAS_ZERO: tl.constexpr, CODES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Write `weight[n, k]` on a grid of `ceil(n / BLOCK_N)` times `ceil(k / BLOCK_K)` programs.

    Arguments are those of `matmul.packed_matmul`, constants those of float16; `out_ptr` is `[n, k]`, of any dtype.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.program_id(1)
    offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_w = step * (BLOCK_K // CODES) + tl.arange(0, BLOCK_K // CODES)
    words_at = offs_n[:, None].to(tl.int64) * words_stride + offs_w[None, :]
    words = tl.load(words_ptr + words_at, eviction_policy="evict_first")
    bits = words
    SPARSE: tl.constexpr = GRID == "float16-2of4" or GRID == "bfloat16-2of4"
    if GRID == "int3" or GRID == "table3bit" or SPARSE:
        BITS: tl.constexpr = BLOCK_K // (4 * CODES if SPARSE else CODES)
        bits_at = offs_n[:, None].to(tl.int64) * bits_stride + (step * BITS + tl.arange(0, BITS))[None, :]
        bits = tl.load(bits_ptr + bits_at, eviction_policy="evict_first").to(tl.uint32)
    if GRID == "table2bit" or GRID == "table3bit" or GRID == "table8" or GRID == "table16":
        values = tl.load(table_ptr + table_codes(words, bits, GRID)).to(tl.float32, bitcast=True)
    else:  # codes, E2M1 values and the like are exact in float16; everything after it is float32
        DTYPE: tl.constexpr = tl.bfloat16 if GRID == "bfloat16-2of4" else tl.float16
        values = decode(words, bits, or0, or1, or2, words, words, words, GRID, False, False, DTYPE, INTERPRET)
        values = values.to(tl.float32)
    if GRID == "e2m1" and GROUP > 0:
        values *= 16384.0  # the format's own values, of which the smallest is one half
    elif GRID == "e2m1" or GRID == "e3m0":
        values *= 32768.0
    if HAS_ZERO:
        zero = load_groups(zero_ptr, scale_stride, step, offs_n, GROUP, PER, BLOCK_K).to(tl.float32)
        values += per_word(zero, GROUP, CODES, BLOCK_K)[:, :, None, None]
    row = tl.full((BLOCK_N, 1), 1.0, tl.float32)
    if ROW > 0:
        row = tl.load(row_ptr + offs_n)[:, None]
    steps = row
    if SCALE != "none":
        raw = load_groups(scale_ptr, scale_stride, step, offs_n, GROUP, PER, BLOCK_K)
        steps = per_word(_steps(raw, row, SCALE), GROUP, CODES, BLOCK_K)
    values = (values * steps[:, :, None, None]).reshape(BLOCK_N, BLOCK_K)
    out_ptrs = out_ptr + offs_n[:, None].to(tl.int64) * out_stride + offs_k[None, :]
    tl.store(out_ptrs, values.to(out_ptr.dtype.element_ty), mask=(offs_n < n)[:, None] & (offs_k < k)[None, :])


@triton.jit
def _steps(raw, row, SCALE: tl.constexpr):
    """Return float32 scales as their format defines them."""
    if SCALE == "e4m3":
        # E4M3 bytes read as float16 are 2**-8 times their value, subnormal ones too.
        scale = (raw.to(tl.uint16) << 7).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.div_rn(scale, tl.broadcast_to(row, scale.shape))
    elif SCALE == "e8m0":
        # The row's power of two was taken out of its bytes: 254 there is byte `top`, and the row holds 2**(top - 128).
        top = (row.to(tl.uint32, bitcast=True) >> 23).to(tl.int32) + 1
        byte = raw.to(tl.int32) + top - 254
        return tl.where(byte > 0, byte << 23, 1 << 22).to(tl.float32, bitcast=True)
    else:
        return raw.to(tl.float32)
