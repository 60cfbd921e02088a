"""Tokens moved towards others while a block is learned, so that roundings hold between the calibration tokens too.

Not in the papers. At 2 bits a block learns its calibration tokens well and others badly: one in some thousands comes
out several times too large, blocks behind amplify it, and every later token attends to it instead of the first one.
What the original block makes of moved tokens is what they should become; that takes one more pass through it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.methods.base import Block

_SHARE_OF_TOKENS = 0.5


@torch.no_grad()
def blended(
    block: Block, sample: int, hidden: Tensor, reach: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return a sample's input and target with some tokens moved, by the same difference on both streams.

    Half of the tokens move, each up to `reach` of the way towards another token of the sample, or towards the one in
    its place in another sample. The first token always moves, up to all of the way, towards the first one of another
    sample: models make it unlike all others, and there are no more of them than samples.

    Args:
        block: The block.
        sample: The sample.
        hidden: What enters the block behind the compressed prefix, `[1, tokens, hidden]`.
        reach: From 0 to 1.
        generator: Everything random.

    Returns:
        The moved `hidden`, and what the original block makes of its own moved input, float32 `[1, tokens, hidden]`.
    """
    original = block.fp_inputs(sample)
    tokens = original.flatten(0, -2)  # [tokens, hidden]
    count = len(tokens)
    partner = int(torch.randint(block.n_samples, (), generator=generator))
    elsewhere = block.fp_inputs(partner).flatten(0, -2)
    elsewhere = elsewhere[torch.arange(count).clamp_(max=len(elsewhere) - 1)]  # samples may differ in length
    order, draws = torch.randperm(count, generator=generator), torch.rand(3, count, 1, generator=generator)
    share = draws[0] * reach * (draws[1] < _SHARE_OF_TOKENS)
    share[0] = draws[0, 0]
    in_place = draws[2] < 0.5
    in_place[0] = True
    device = tokens.device
    other = torch.where(in_place.to(device), elsewhere, tokens[order.to(device)])
    shift = ((other - tokens) * share.to(device)).view_as(original)
    weights = {layer.ref.name: layer.weight for layer, _ in block.layers}
    return hidden + shift, block.forward(original + shift, weights).float()
