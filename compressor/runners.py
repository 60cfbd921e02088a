"""Ways to go through a block sequence with one block in memory: forward, and backward for gradients of a loss.

A whole model as one unit is the sequence `BlockSequence.whole(model)`; both runners serve it unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from compressor.checkpoint.blocks import BlockSequence, Recording

Resident = Callable[[int], AbstractContextManager[None]]
"""Makes block `index` resident for the duration of a `with`; a context that does nothing if everything is."""


def forward_stream(
    blocks: BlockSequence, states: Sequence[Tensor], recording: Recording, resident: Resident
) -> Iterator[tuple[int, list[Tensor]]]:
    """Run samples through the blocks, one block resident at a time.

    Args:
        blocks: The sequence.
        states: What enters block 0, one tensor per sample.
        recording: Arguments recorded for inputs of this shape.
        resident: Loads and frees a block.

    Yields:
        Block index and the states that leave it, one tensor per sample.
    """
    current = list(states)
    for index in range(len(blocks.names)):
        with resident(index), torch.no_grad():
            current = [blocks.run(index, hidden, recording) for hidden in current]
        yield index, current


def reverse_sweep(
    blocks: BlockSequence,
    boundaries: Sequence[Tensor],
    recording: Recording,
    inputs: Mapping[str, Tensor],
    loss: Callable[[Tensor], Tensor],
    resident: Resident,
) -> Iterator[tuple[int, Tensor]]:
    """Carry the gradient of a loss backward through the blocks, recomputing one block at a time.

    While an index is yielded, that block is resident and its parameters that require gradients hold `.grad` (summed
    into whatever was there). Only one block's activations exist at any time.

    Args:
        blocks: The sequence; the part behind the last block must be resident throughout.
        boundaries: States of one sample entering block 0, 1, ..., and leaving the last block.
        recording: Arguments recorded for inputs of this shape.
        inputs: The model's inputs, for the part behind the last block.
        loss: Model output -> scalar.
        resident: Loads and frees a block.

    Yields:
        Block index, last to first, and the gradient of the loss with respect to what enters that block.
    """
    last = boundaries[-1].detach().requires_grad_()
    with torch.enable_grad():
        loss(blocks.tail(last, inputs)).backward()
    gradient = last.grad
    for index in reversed(range(len(blocks.names))):
        with resident(index):
            entering = boundaries[index].detach()
            if entering.is_floating_point():
                entering.requires_grad_()
            with torch.enable_grad():
                blocks.run(index, entering, recording).backward(gradient)
            gradient = entering.grad if entering.grad is not None else torch.zeros_like(entering)
            yield index, gradient
