"""Decoding weights from the layout of PyTorch's 4-bit CPU operator: transposed, as the layout is.

The operator keeps the codes of one input side by side, 32 bytes (AVX2: 16) of them. Decoded in that order, nothing but
these runs has to move; decoding into rows would move every single code. The product takes transposed weights almost as
fast.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from compressor.kernels.cpu.layout import CpuWeight, steps_of

AT_ONCE = 1 << 19
"""Weights that a thread decodes in one step: few enough for its caches, enough to make calls cheap."""

PART = 1 << 23
"""Weights decoded before they are multiplied: more would need as much memory as a dense layer."""

FEW_ROWS, FEW_PART = 128, 1 << 21
"""Up to so many rows of activations, only so many weights per thread are: they are multiplied from the cache then. With
more rows, reading the activations anew for every part costs more than that brings."""

LINE = 64
"""Bytes added to blocks of codes, for the same reason as `SKEW`."""

SKEW = 32
"""Elements added to decoded rows, so that they do not start a power of two apart, where caches keep only a few."""

_LOW = 0x0F0F0F0F0F0F0F0F
_TOP = 0x8080808080808080 - (1 << 64)
_BLOCK = 64  # outputs of a part are a multiple of it, where no layout says more


def decoded_linear(x: Tensor, weight: CpuWeight, bias: Tensor | None) -> Tensor:
    """Return `x @ weight.T + bias` for bfloat16 `x` `[m, k]`: decodes some outputs, then multiplies by them.

    A weight is rounded to bfloat16 once, as in the reference.
    """
    tensors = (weight.codes, weight.scale, weight.rest, weight.zero_point)
    out: Tensor = decode_linear(x, *tensors, bias, *weight.shape, weight.planes, weight.block, weight.group)
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
    block: int,
    group: int,
) -> Tensor:
    """See `decoded_linear`; a weight's attributes one by one, so that `torch.compile` sees one node."""
    weight = CpuWeight((n, k), planes, block, group, codes, scale, rest, zero_point)
    size = weight.outputs if weight.planes else _BLOCK
    blocks = -(-n // size)
    most = min(PART, FEW_PART * torch.get_num_threads()) if len(x) <= FEW_ROWS else PART
    at_once = -(-blocks // max(1, round(n * k / most)))  # blocks of parts of equal size
    parts = _parts(weight, at_once, size)
    if at_once >= blocks:
        return functional.linear(x, next(parts)[1], bias)
    out = x.new_empty(len(x), n)
    for rows, part in parts:
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
    block: int,
    group: int,
) -> Tensor:
    torch._check(x.shape[-1] == k, lambda: f"inputs of {x.shape[-1]} columns for a weight of {k}")
    return x.new_empty(x.shape[0], n)


def _parts(weight: CpuWeight, at_once: int, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the weight some blocks of `size` outputs at a time, bfloat16 `[outputs, k]`, without padding."""
    n = weight.shape[0]
    steps = _grid(weight) if weight.planes else None
    for start in range(0, n, at_once * size):
        rows = slice(start, min(start + at_once * size, n))
        if steps is None:
            yield rows, _bytes(weight, rows)
        else:
            whole = slice(start, -(-rows.stop // size) * size)
            yield rows, _columns(weight, whole, *steps).t()[: rows.stop - start]


def _bytes(weight: CpuWeight, rows: slice) -> Tensor:
    """Return outputs of a weight of one code per byte, bfloat16 `[outputs, k]`."""
    codes, scale = weight.codes[rows], weight.scale[rows, None]
    out = torch.empty(codes.shape, dtype=torch.bfloat16)
    at_once = max(1, AT_ONCE * torch.get_num_threads() // codes.shape[1])
    for part, signed, step in zip(out.split(at_once), codes.split(at_once), scale.split(at_once), strict=True):
        part.copy_(signed).mul_(step)
    return out


def _columns(weight: CpuWeight, rows: slice, step: Tensor, zero: Tensor | None) -> Tensor:
    """Return the outputs of whole blocks, transposed: bfloat16 `[k, outputs]`, in rows that are `SKEW` longer.

    Codes less their zero points have eight bits at most, which bfloat16 holds, so that only the product is rounded.

    Args:
        weight: The weight.
        rows: Its outputs, of whole blocks.
        step: See `_grid`.
        zero: See `_grid`.
    """
    k, group, half = weight.shape[1], weight.group, weight.block // 2
    outputs, groups = rows.stop - rows.start, k // group
    blocks = outputs // weight.outputs
    stored = weight.codes.view(-1, k, half)[rows.start // weight.outputs :][:blocks]
    out = torch.empty(k, outputs + SKEW, dtype=torch.bfloat16)[:, :outputs]
    apart, grouped = out.unflatten(1, (blocks, -1, half)), out.unflatten(0, (groups, group))
    middle = None
    if zero is not None and weight.planes == 1:  # codes and zero points fit bytes: less work than with numbers
        middle = zero[:, rows].to(torch.uint8).unflatten(1, (blocks, 2, half)).permute(2, 1, 0, 3).unsqueeze(3)
    at_once = min(groups, max(1, AT_ONCE * torch.get_num_threads() // (outputs * group)))
    scratch = torch.empty(3 - weight.planes, blocks, at_once * group * half + LINE, dtype=torch.uint8)
    for start in range(0, groups, at_once):
        chosen = slice(start, min(start + at_once, groups))
        inputs = slice(chosen.start * group, chosen.stop * group)
        count = inputs.stop - inputs.start
        codes = scratch[:, :, : count * half].unflatten(2, (count, half))
        _split(stored[:, inputs], codes)
        if weight.planes == 1:
            codes.unflatten(2, (-1, group)).sub_(8 if middle is None else middle[:, :, chosen])
        for place, signed in enumerate(codes.view(torch.int8)):  # loops over dimensions of two would be slow
            apart[inputs, :, place] = signed.transpose(0, 1)  # [inputs, blocks, half]
        if zero is not None and middle is None:
            grouped[chosen].sub_(zero[chosen, None, rows])
        grouped[chosen].mul_(step[chosen, None, rows])
    return out


def _split(stored: Tensor, codes: Tensor) -> None:
    """Copy codes, one in a byte.

    Args:
        stored: As the operator holds them, uint8 `[blocks, inputs, half]`.
        codes: uint8 `[2, blocks, inputs, half]`, those of low halves first; or `[1, ...]` where a byte is a code: then
            as signed ones that count from the middle.
    """
    words = stored.view(torch.int64)
    if len(codes) == 1:
        torch.bitwise_xor(words, _TOP, out=codes[0].view(torch.int64))
        return
    torch.bitwise_and(words, _LOW, out=codes[0].view(torch.int64))
    torch.bitwise_right_shift(stored, 4, out=codes[1])


def _grid(weight: CpuWeight) -> tuple[Tensor, Tensor | None]:
    """Return scales and zero points, bfloat16 `[groups, outputs]`, padding outputs too; None for no zero points.

    Zero points count from the code 0 where there is one plane, else from the code in the middle.
    """
    step, points = steps_of(weight), weight.zero_point.bfloat16()
    if not points.numel():
        return step, None
    points = points + 8 if weight.planes == 1 else points
    if points.numel() == 1:
        return step, points.reshape(1, 1).expand(step.shape)
    points = functional.pad(points, (0, 0, 0, step.shape[1] - len(points))).t()  # [groups on disk, outputs]
    return step, points.repeat_interleave(len(step) // len(points), 0)
