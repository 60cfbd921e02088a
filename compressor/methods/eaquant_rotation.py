"""Rotations and the permutation that spread outliers of a layer's input over its channels.

Lin et al. 2024, "DuQuant: Distributing Outliers via Dual Transformation Makes Stronger Quantized LLMs", arXiv
2406.01721, section 3, as EAQuant uses it: rotate blocks of channels, deal channels to blocks so that all are equally
loud, rotate again. One matrix serves all blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compressor.inputs import InputOp, Permute, Rotate


def block_width(width: int, largest: int) -> int:
    """Return the largest power of two up to `largest` that divides `width`."""
    size = 1
    while size * 2 <= largest and width % (size * 2) == 0:
        size *= 2
    return size


def descriptions(width: int, largest: int) -> tuple[dict[str, object], ...]:
    """Return the JSON forms of what `fit_transform` gives for inputs of this width."""
    size = block_width(width, largest)
    first = {"op": "rotate", "size": size, "half": True}
    if size == width:
        return (first,)
    return first, {"op": "permute"}, {**first, "second": True}


def fit_transform(x: Tensor, largest: int, steps: int, generator: torch.Generator) -> tuple[InputOp, ...]:
    """Return the operations fitted to inputs `x` `[rows, width]`: one rotation if one block spans them, else three.

    Args:
        x: float32.
        largest: Largest block.
        steps: Most rotations that one matrix is the product of.
        generator: Of the random part of the base matrix.
    """
    size = block_width(x.shape[1], largest)
    base = base_rotation(size, generator).to(x)
    first = fit_rotation(x.reshape(-1, size), base, steps)
    turned = (x.unflatten(1, (-1, size)) @ first).flatten(1)
    if size == x.shape[1]:
        return (Rotate(first.half(), half=True),)
    order = zigzag(turned.abs().amax(0), x.shape[1] // size)
    mixed = turned[:, order]
    second = fit_rotation(mixed.reshape(-1, size), base, steps)
    return Rotate(first.half(), half=True), Permute(order), Rotate(second.half(), second=True, half=True)


def base_rotation(size: int, generator: torch.Generator) -> Tensor:
    """Return an orthogonal matrix whose first row is uniform, float32 `[size, size]`; the rest is random."""
    if size == 1:
        return torch.ones(1, 1)
    start = torch.eye(size, dtype=torch.float64)
    start[:, 0] = size**-0.5  # of its QR decomposition, the first column is this one
    even, _ = torch.linalg.qr(start)
    even = even * even[:1, 0].sign()
    inner, upper = torch.linalg.qr(torch.randn(size - 1, size - 1, dtype=torch.float64, generator=generator))
    mix = torch.eye(size, dtype=torch.float64)
    mix[1:, 1:] = inner * upper.diagonal().sign()
    base: Tensor = mix @ even.T
    return base.float()


def fit_rotation(x: Tensor, base: Tensor, steps: int) -> Tensor:
    """Return the product of rotations, each spreading the channel that then holds the extreme value, `[size, size]`.

    Of all products on the way, the identity included, the one with the least distance between the largest and the
    smallest value of the rotated data is returned.

    Args:
        x: `[rows, size]` float32.
        base: Orthogonal, first row uniform.
        steps: Most factors.
    """
    size = x.shape[1]
    best = product = torch.eye(size, dtype=x.dtype, device=x.device)
    least = float(x.max() - x.min()) if x.numel() else 0.0
    for _ in range(steps if size > 1 and x.numel() else 0):
        channel = int(x.abs().argmax()) % size
        swap = torch.arange(size, device=x.device)
        swap[0], swap[channel] = channel, 0
        factor = base[swap][:, swap]
        x, product = x @ factor, product @ factor
        reach = float(x.max() - x.min())
        if reach < least:
            best, least = product, reach
    return best


def zigzag(loudest: Tensor, n_blocks: int) -> Tensor:
    """Return the order that deals channels, loudest first, to blocks there and back, int64 `[channels]`.

    Args:
        loudest: Largest magnitude of every channel.
        n_blocks: They divide the channels.
    """
    ranks = loudest.argsort(descending=True, stable=True)
    rounds = ranks.view(-1, n_blocks).clone()  # [channels of a block, blocks]
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.reshape(-1).contiguous()


def turned_weight(weight: Tensor, ops: Sequence[InputOp]) -> Tensor:
    """Return the weight `[out, in]` that gives, on transformed inputs, what `weight` gives on plain ones; float32.

    Matrices are stored in half precision and hardly orthogonal then: their inverses are used, so the product is exact.
    """
    if not ops:
        return weight
    w = weight.double()
    for op in ops:
        if isinstance(op, Permute):
            w = w.index_select(1, op.order)
        else:
            assert isinstance(op, Rotate)
            inverse = torch.linalg.inv(op.matrix.double()).T  # x M (W M^-T)^T = x W^T
            w = (w.unflatten(1, (-1, inverse.shape[0])) @ inverse).flatten(1)
    return w.float()


def unturned_weight(weight: Tensor, ops: Sequence[InputOp]) -> Tensor:
    """Return the weight `[out, in]` that gives, on plain inputs, what `weight` gives on transformed ones; float32."""
    if not ops:
        return weight
    w = weight.double()
    for op in reversed(ops):
        if isinstance(op, Permute):
            w = torch.empty_like(w).index_copy_(1, op.order.long(), w)
        else:
            assert isinstance(op, Rotate)
            w = (w.unflatten(1, (-1, op.matrix.shape[0])) @ op.matrix.double().T).flatten(1)
    return w.float()


def turned_moment(moment: Tensor, ops: Sequence[InputOp]) -> Tensor:
    """Return the second moment of transformed inputs, from that of plain ones `[in, in]`; float32."""
    if not ops:
        return moment
    h = moment.double()
    for op in ops:
        for _ in range(2):  # rows, and columns: it is symmetric
            if isinstance(op, Permute):
                h = h.index_select(1, op.order).T
            else:
                assert isinstance(op, Rotate)
                matrix = op.matrix.double()
                h = (h.unflatten(1, (-1, matrix.shape[0])) @ matrix).flatten(1).T
    return h.float()
