"""Decoding weights from the layout of PyTorch's 4-bit CPU operator: transposed, as the layout is.

The operator keeps 64 (AVX2: 32) outputs of one input side by side. Decoded in that order, nothing but runs of 32 bytes
has to move; decoding into rows would move every single code. The product takes transposed weights almost as fast.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from compressor.kernels.cpu.layout import PAD_ROWS, CpuWeight, block_rows

AT_ONCE = 1 << 20
"""Weights decoded in one step: few enough for caches, enough to make calls cheap."""

PART = 1 << 23
"""Weights decoded before they are multiplied: more would need as much memory as a dense layer."""

SKEW = 32
"""Elements added to decoded rows, so that they do not start a power of two apart, where caches keep only a few."""

_LOW = 0x0F0F0F0F0F0F0F0F
_TOP = 0x8080808080808080 - (1 << 64)


def decoded_linear(x: Tensor, weight: CpuWeight, bias: Tensor | None) -> Tensor:
    """Return `x @ weight.T + bias` for bfloat16 `x` `[m, k]`: decodes some outputs, then multiplies by them.

    A weight is rounded to bfloat16 once, as in the reference.
    """
    tensors = (weight.codes, weight.scale, weight.rest, weight.zero_point)
    out: Tensor = decode_linear(x, *tensors, bias, *weight.shape, weight.planes, weight.group)
    return out


@torch.library.custom_op("compressor::decode_linear", mutates_args=())
def decode_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    rest: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    n: int,
    k: int,
    planes: int,
    group: int,
) -> Tensor:
    """See `decoded_linear`; a weight's attributes one by one, so that `torch.compile` sees one node."""
    weight = CpuWeight((n, k), planes, group, codes, scale, rest, zero_point)
    size = block_rows() if weight.planes else PAD_ROWS
    assert size is not None
    blocks = -(-n // size)
    step = -(-blocks // max(1, round(n * k / PART)))  # parts of equal size
    if step >= blocks:
        return functional.linear(x, _decoded(weight, 0, blocks, size), bias)
    out = x.new_empty(len(x), n)
    for first in range(0, blocks, step):
        rows = slice(first * size, min((first + step) * size, n))
        part = _decoded(weight, first, min(first + step, blocks), size)
        out[:, rows] = functional.linear(x, part, None if bias is None else bias[rows])
    return out


@decode_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    rest: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    n: int,
    k: int,
    planes: int,
    group: int,
) -> Tensor:
    torch._check(x.shape[-1] == k, lambda: f"inputs of {x.shape[-1]} columns for a weight of {k}")
    return x.new_empty(x.shape[0], n)


def _decoded(weight: CpuWeight, first: int, last: int, size: int) -> Tensor:
    """Return the rows of blocks `first` to `last`, bfloat16 `[outputs, k]`, without padding rows."""
    count = min(last * size, weight.shape[0]) - first * size
    if weight.planes:
        return _columns(weight, first, last, size).t()[:count]
    codes = weight.codes[first * size :][:count]
    scale = weight.scale[first * size :][:count, None]
    out = torch.empty(codes.shape, dtype=torch.bfloat16)
    at_once = max(1, AT_ONCE // codes.shape[1])
    for part, signed, step in zip(out.split(at_once), codes.split(at_once), scale.split(at_once), strict=True):
        part.copy_(signed).mul_(step)
    return out


def _columns(weight: CpuWeight, first: int, last: int, size: int) -> Tensor:
    """Return the outputs of some blocks, transposed: bfloat16 `[k, outputs]`, in rows that are `SKEW` longer.

    Codes less their zero points have eight bits at most, which bfloat16 holds, so that only the product is rounded.
    """
    k, group, half = weight.shape[1], weight.group, size // 2
    blocks, rows, groups = last - first, slice(first * size, last * size), k // group
    step = weight.scale[-groups:, rows, 0].contiguous()  # of the low plane, [groups, outputs]
    zero = _zero_points(weight, rows, groups)
    words = weight.codes.view(torch.int64).view(-1, weight.planes, k, half // 8)[first:last]
    out = torch.empty(k, blocks * size + SKEW, dtype=torch.bfloat16)[:, : blocks * size]
    apart, grouped = out.unflatten(1, (blocks, 2, half)), out.unflatten(0, (groups, group))
    at_once = min(groups, max(1, AT_ONCE // (blocks * size * group)))
    codes = torch.empty(2, blocks, at_once * group, half // 8, dtype=torch.int64)
    for start in range(0, groups, at_once):
        chosen = slice(start, min(start + at_once, groups))
        inputs = slice(chosen.start * group, chosen.stop * group)
        if inputs.stop - inputs.start < codes.shape[2]:
            codes = codes.new_empty(2, blocks, inputs.stop - inputs.start, half // 8)
        _signed(words[:, :, inputs], codes)
        for part in range(2):  # one by one: PyTorch's loops are slow over dimensions of two
            apart[inputs, :, part] = codes[part].view(torch.int8).transpose(0, 1)  # [inputs, blocks, half]
        if zero is not None:
            grouped[chosen].sub_(zero[chosen, None])
        grouped[chosen].mul_(step[chosen, None])
    return out


def _zero_points(weight: CpuWeight, rows: slice, groups: int) -> Tensor | None:
    """Return what to take off codes that count from the middle, bfloat16 `[groups, rows]`, or None for nothing."""
    points = weight.zero_point
    if points.numel() <= 1:
        return points.bfloat16().reshape(1, 1).expand(groups, 1) if points.numel() else None
    part = points[rows].t().bfloat16()  # [groups on disk, rows]
    part = functional.pad(part, (0, rows.stop - rows.start - part.shape[1]))
    return part.repeat_interleave(groups // len(part), 0)


def _signed(words: Tensor, out: Tensor) -> None:
    """Write codes counted from the middle one, int8 behind int64 `[2, blocks, inputs, half / 8]`: outputs r, r + half.

    Args:
        words: int64 `[blocks, planes, inputs, half / 8]`: a byte holds the codes of two outputs.
        out: See above.
    """
    low, high = out
    if words.shape[1] == 1:
        torch.bitwise_and(words[:, 0], _LOW, out=low)
        torch.bitwise_right_shift(words[:, 0], 4, out=high)
        high.bitwise_and_(_LOW)
        out.view(torch.uint8).sub_(8)
        return
    # Exchange the low half of the first plane's bytes with the high half of the second's: then each byte is one code.
    moved = torch.bitwise_right_shift(words[:, 1], 4).bitwise_xor_(words[:, 0]).bitwise_and_(_LOW)
    torch.bitwise_xor(words[:, 0], moved, out=high)
    torch.bitwise_xor(words[:, 1], moved.bitwise_left_shift_(4), out=low)
    out.bitwise_xor_(_TOP)
