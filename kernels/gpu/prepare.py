"""From a format's bytes to the layout the kernels read, and back.

Formats decide which of the kernels' grids their codes live on, and where their scales go: multiplied into groups, or
into whole rows of the result.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from compressor.errors import UnsupportedError
from compressor.formats.base import PackedTensor, QParams, QuantFormat, n_groups
from compressor.formats.codebook import Codebook
from compressor.formats.e2m1 import decode_e2m1
from compressor.formats.e8m0 import decode_e8m0
from compressor.formats.float4 import SPLITS, Float4
from compressor.formats.ints import IntFormat
from compressor.formats.mxfp4 import MXFP4
from compressor.formats.nvfp4 import NVFP4
from compressor.formats.power import Power
from compressor.kernels.gpu.layout import (
    CODES,
    PAD_ROWS,
    SPARSE,
    TABLES,
    RuntimeWeight,
    chunked,
    is_signed,
    pack_words,
    table_exponent,
    table_values,
    table_words,
    unchunked,
    unpack_words,
)
from compressor.kernels.gpu.sparse import unpack

TOP_BYTE = 254
"""The E8M0 byte of a row's largest scale: its float32 is the largest power of two."""


def prepare(packed: PackedTensor, fmt: QuantFormat) -> RuntimeWeight:
    """Return a weight in the runtime layout, on the device it is on.

    Needs one byte per weight while it runs.

    Raises:
        UnsupportedError: No kernel reads this format, or its parameters are ones that no format writes.
        CheckpointError: The tensors are not what the format stores.
    """
    codes, q = fmt.unpack(packed)
    if isinstance(fmt, IntFormat):
        return _integers(codes, q, fmt)
    if isinstance(fmt, NVFP4):
        assert q.global_scale is not None, "NVFP4 parameters carry a global scale"
        if bool((q.scale.view(torch.uint8) >> 7).any()):
            raise UnsupportedError("nvfp4 with negative group scales", "quantize again: no known writer makes them")
        scale = chunked(q.scale.view(torch.uint8), fmt.group_size)
        row = _padded(q.global_scale.expand(codes.shape[0]))
        return _weight(codes, "e2m1", fmt.group_size, "e4m3", "over", scale, row)
    if isinstance(fmt, MXFP4):
        top = q.scale.amax(1)  # [n]
        moved = (q.scale.to(torch.int16) - top[:, None] + TOP_BYTE).to(torch.uint8)
        # The kernels' E2M1 values are twice as large: they count the smallest one as 1.
        row = torch.ldexp(torch.ones_like(top, dtype=torch.float32), top.to(torch.int32) - 128)
        return _weight(codes, "e2m1", fmt.group_size, "e8m0", "times", chunked(moved, fmt.group_size), _padded(row))
    if isinstance(fmt, Float4):
        return _channel_floats(codes, q)
    if isinstance(fmt, Codebook) and fmt.bits <= 4:
        return _table(codes, q, fmt)
    raise UnsupportedError(f"no kernel unpacks {fmt.name}", "use the reference")


def restore(weight: RuntimeWeight, fmt: QuantFormat) -> PackedTensor:
    """Return the bytes a weight was prepared from; the sign of zeros may be lost in fp4's E1M2."""
    codes = unpack_words(weight.words, weight.bits, weight.grid, weight.shape)
    n, k = weight.shape
    if isinstance(fmt, IntFormat):
        return fmt.pack(codes, _integer_params(weight, fmt))
    if weight.grid in TABLES:
        assert isinstance(fmt, Codebook), fmt.name
        return fmt.pack(codes, _table_params(weight, fmt))
    scale = unchunked(weight.scale, n, n_groups(k, fmt.group_size)) if weight.group else weight.row[:n, None]
    if isinstance(fmt, NVFP4):
        return fmt.pack(codes, QParams(scale.view(torch.float8_e4m3fn), global_scale=weight.row[:1].clone()))
    if isinstance(fmt, MXFP4):
        return fmt.pack(codes, QParams((scale.to(torch.int16) + _top_bytes(weight) - TOP_BYTE).to(torch.uint8)))
    assert isinstance(fmt, Float4), fmt.name
    split = "e1m2" if weight.grid == "int4" else weight.grid
    if split == "e1m2":
        signed = codes.to(torch.int16) - 8
        codes = (signed.abs() + torch.where(signed < 0, 8, 0)).to(torch.uint8)
        scale = scale * 2
    table = torch.tensor(SPLITS[split], dtype=torch.float32, device=codes.device)
    return fmt.pack(codes, QParams(scale.contiguous(), codebook=table))


def decode(weight: RuntimeWeight) -> Tensor:
    """Return the weight, float32 `[n, k]`, bit-equal to what its format decodes; zeros may differ in sign."""
    if weight.grid in SPARSE:
        return unpack(weight).float()
    codes = unpack_words(weight.words, weight.bits, weight.grid, weight.shape)
    n, k = weight.shape
    if weight.grid == "e2m1" and weight.group:
        values = decode_e2m1(codes)
    elif weight.grid in TABLES:
        values = table_values(weight.table)[codes.int()]
    elif weight.grid in SPLITS:
        values = torch.tensor(SPLITS[weight.grid], dtype=torch.float32, device=codes.device)[codes.int()]
    else:
        values = codes.float() - (1 << (int(weight.grid.removeprefix("int")) - 1))
    count = -(-k // weight.group) if weight.group else 1
    steps = weight.row[:n, None]  # [n, 1]
    if weight.scale_kind == "float":
        steps = unchunked(weight.scale, n, count).float()
    elif weight.scale_kind == "e4m3":
        steps = unchunked(weight.scale, n, count).view(torch.float8_e4m3fn).float() / steps
    elif weight.scale_kind == "e8m0":
        byte = unchunked(weight.scale, n, count).to(torch.int16) + _top_bytes(weight) - TOP_BYTE
        steps = decode_e8m0(byte.to(torch.uint8))
    spread = k if not weight.group else weight.group
    if weight.zero.numel():
        values = values + unchunked(weight.zero, n, count).float().repeat_interleave(spread, 1)[:, :k]
    return values * steps.repeat_interleave(spread, 1)[:, :k]


def _integers(codes: Tensor, q: QParams, fmt: IntFormat) -> RuntimeWeight:
    n, k = codes.shape
    if f"int{fmt.bits}" not in CODES:
        raise UnsupportedError(f"no kernel unpacks {fmt.name}", "use the reference")
    count = n_groups(k, fmt.group_size)
    group = 0 if count == 1 else fmt.group_size or 0
    scale = q.scale.expand(n, 1) if fmt.per_tensor else q.scale  # [n, groups]
    zero = torch.empty(0, dtype=torch.float16, device=codes.device)
    if q.zero_point is not None:
        points = q.zero_point.expand(n, 1) if fmt.per_tensor else q.zero_point
        zero = chunked(-points.to(torch.float16), group)
    grid = f"int{fmt.bits}"
    if group:
        return _weight(codes, grid, group, "float", "none", chunked(scale, group), None, zero)
    return _weight(codes, grid, 0, "none", "times", None, _padded(scale[:, 0].float()), zero)


def _integer_params(weight: RuntimeWeight, fmt: IntFormat) -> QParams:
    n, k = weight.shape
    count = n_groups(k, fmt.group_size)
    scale = unchunked(weight.scale, n, count) if weight.group else weight.row[:n, None]
    zero = unchunked(weight.zero, n, count).neg().to(torch.int8) if weight.zero.numel() else None
    if fmt.per_tensor:
        scale, zero = scale[0], None if zero is None else zero[0]
    return QParams(scale.to(fmt.dtype).contiguous(), zero)


def _channel_floats(codes: Tensor, q: QParams) -> RuntimeWeight:
    """Lay out LLM-FP4's small floats with one scale per row."""
    assert q.codebook is not None, "fp4 parameters carry a table"
    split = next((name for name, table in SPLITS.items() if tuple(q.codebook.tolist()) == table), None)
    if split is None:
        raise UnsupportedError("a table that is none of fp4's", f"kernels know {', '.join(SPLITS)}")
    if split == "e1m2":  # steps of one half, all the way: integers, which are the cheapest to unpack
        magnitude = (codes & 7).to(torch.int16)
        codes = (torch.where(codes >= 8, -magnitude, magnitude) + 8).to(torch.uint8)
        return _weight(codes, "int4", 0, "none", "times", None, _padded(q.scale[:, 0] * 0.5))
    return _weight(codes, split, 0, "none", "times", None, _padded(q.scale[:, 0]))


def _table(codes: Tensor, q: QParams, fmt: Codebook) -> RuntimeWeight:
    """Lay out what indexes a table of up to sixteen values."""
    n, k = codes.shape
    assert q.codebook is not None, f"{fmt.name} parameters carry a table"
    values = functional.pad(q.codebook, (0, 16 - q.codebook.numel()))
    grid = f"table{fmt.bits}bit" if fmt.bits < 4 else "table8" if is_signed(values) else "table16"
    group = 0 if n_groups(k, fmt.group_size) == 1 else fmt.group_size or 0
    scale = q.scale.reshape(1, 1).expand(n, 1) if q.scale.ndim == 1 else q.scale  # [n, groups]
    table = table_words(values, q.exponent)
    if group:
        return _weight(codes, grid, group, "float", "none", chunked(scale, group), None, table=table)
    return _weight(codes, grid, 0, "none", "times", None, _padded(scale[:, 0].float()), table=table)


def _table_params(weight: RuntimeWeight, fmt: Codebook) -> QParams:
    n, k = weight.shape
    codebook = table_values(weight.table)[: 1 << fmt.bits].clone()
    scale = unchunked(weight.scale, n, n_groups(k, fmt.group_size)) if weight.group else weight.row[:n, None]
    if not isinstance(fmt, Power):
        return QParams(scale.contiguous(), codebook=codebook)
    scale = scale[0] if fmt.per_tensor else scale
    return QParams(scale.to(fmt.dtype).contiguous(), codebook=codebook, exponent=table_exponent(weight.table))


def _weight(
    codes: Tensor,
    grid: str,
    group: int,
    scale_kind: str,
    row_kind: str,
    scale: Tensor | None,
    row: Tensor | None,
    zero: Tensor | None = None,
    table: Tensor | None = None,
) -> RuntimeWeight:
    words, bits = pack_words(codes, grid)
    n, k = codes.shape
    return RuntimeWeight(
        grid=grid,
        shape=(n, k),
        group=group,
        scale_kind=scale_kind,
        row_kind=row_kind,
        words=words,
        bits=bits,
        scale=torch.empty(0, dtype=torch.float16, device=codes.device) if scale is None else scale,
        zero=torch.empty(0, dtype=torch.float16, device=codes.device) if zero is None else zero,
        row=torch.empty(0, dtype=torch.float32, device=codes.device) if row is None else row,
        table=torch.empty(0, dtype=torch.int32, device=codes.device) if table is None else table,
    )


def _padded(row: Tensor) -> Tensor:
    """Return float32 `[rows]`, padded with ones: they divide, too."""
    return functional.pad(row.float(), (0, -row.shape[0] % PAD_ROWS), value=1.0).contiguous()


def _top_bytes(weight: RuntimeWeight) -> Tensor:
    """Return the largest E8M0 byte of every row, int16 `[n, 1]`."""
    _, exponent = torch.frexp(weight.row[: weight.shape[0], None])
    return (exponent + 127).to(torch.int16)  # frexp's mantissas are 1/2
