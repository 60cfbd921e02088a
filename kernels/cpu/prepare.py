"""From an integer format's bytes to the layout of PyTorch's packed CPU operators, and back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from compressor.errors import UnsupportedError
from compressor.formats.base import PackedTensor, QParams, QuantFormat
from compressor.formats.ints import IntFormat
from compressor.kernels.cpu.layout import (
    PAD_ROWS,
    CpuWeight,
    block_rows,
    interleave,
    op_group,
    pack_planes,
    steps_of,
    unpack_planes,
)

NAMES = {f"int{bits}{kind}": bits for bits in range(2, 9) for kind in ("", "-asym")} | {"int8-bytes": 8}
"""Formats with a layout, and their bits."""


def planes_of(bits: int, symmetric: bool, whole_rows: bool) -> int:
    """Return how many 4-bit planes a format takes; 0 where one code per byte with one scale per row does.

    Zero points need planes: the byte operator has no room for them, and outside it they would cancel against results
    that are rounded already.
    """
    if bits <= 4:
        return 1
    return 0 if symmetric and whole_rows else 2


def prepare(packed: PackedTensor, fmt: QuantFormat) -> CpuWeight:
    """Return a weight in the operators' layout; exact, as its scales are bfloat16.

    Needs a byte per weight while it runs, and four of some rows.

    Raises:
        UnsupportedError: No operator takes this format.
        CheckpointError: The tensors are not what the format stores.
    """
    if not isinstance(fmt, IntFormat) or fmt.dtype != torch.bfloat16:
        raise UnsupportedError(f"no CPU operator takes {fmt.name} or its scales", "use the reference")
    codes, q = fmt.unpack(packed)
    n, k = packed.shape
    planes = planes_of(fmt.bits, fmt.symmetric, fmt.group_size is None)
    scale = q.scale.expand(n, 1) if fmt.per_tensor else q.scale  # [n, groups]
    nothing = torch.empty(0, dtype=torch.bfloat16)
    if planes == 0:
        signed = (codes.to(torch.int16) - fmt.zero_code).to(torch.int8)
        return CpuWeight((n, k), 0, 0, 0, signed, scale[:, 0].clone(), nothing, nothing.to(torch.int8))
    group, block = op_group(fmt.group_size or k), block_rows()
    if group is None or block is None:
        raise UnsupportedError(f"no CPU operator takes groups of {fmt.group_size or k}", "use the reference")
    centre = 8 if planes == 1 else 128
    zeros, rest = _zeros(scale, q.zero_point, planes)
    steps = (scale,) if planes == 1 else (scale, scale * 16)
    halves = [torch.stack(pair, -1) for pair in zip(steps, zeros, strict=True)]  # scale and zero, [n, groups, 2]
    halves = [functional.pad(half, (0, 0, 0, 0, 0, -n % (PAD_ROWS // planes))) for half in halves]
    pairs = halves[0] if planes == 1 else interleave(halves[0], halves[1], block)  # [rows, groups, 2]
    return CpuWeight(
        shape=(n, k),
        planes=planes,
        block=block,
        group=group,
        codes=pack_planes(codes + (centre - fmt.zero_code), planes, block),
        scale=pairs.repeat_interleave((fmt.group_size or k) // group, 1).transpose(0, 1).contiguous(),
        rest=rest.t().contiguous() if bool(rest.any()) else nothing,
        zero_point=nothing.to(torch.int8) if q.zero_point is None else q.zero_point.clone(),
    )


def restore(weight: CpuWeight, fmt: IntFormat) -> PackedTensor:
    """Return the bytes on disk a weight was prepared from."""
    n, k = weight.shape
    if weight.planes:
        centre = 8 if weight.planes == 1 else 128
        codes = unpack_planes(weight) - (centre - fmt.zero_code)
        repeats = (fmt.group_size or k) // weight.group
        scale = steps_of(weight)[::repeats, :n].t()  # [n, groups]
    else:
        codes = (weight.codes.to(torch.int16) + fmt.zero_code).to(torch.uint8)
        scale = weight.scale[:, None]
    scale = scale[0] if fmt.per_tensor else scale
    return fmt.pack(codes, QParams(scale.contiguous(), weight.zero_point if weight.zero_point.numel() else None))


def _zeros(scale: Tensor, zero_point: Tensor | None, planes: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return what the code in the middle of each plane adds, bfloat16 `[n, groups]` low first, and what is left.

    Zero point times scale has up to 16 bits, bfloat16 holds eight. Two planes hold all of them between them; what a
    single plane leaves is four bits at most.
    """
    points = 0 if zero_point is None else zero_point.float()  # one in all spreads
    if planes == 1:
        exact = scale.float() * (0 - points)
        zero = exact.bfloat16()
        return (zero,), (exact - zero.float()).bfloat16()
    # Both planes count from their own middle, which makes 8 * 16 + 8 of the code 128.
    exact = scale.float() * (8 - points)
    high = exact.bfloat16()
    return ((exact - high.float()).bfloat16(), high), torch.zeros_like(scale)
