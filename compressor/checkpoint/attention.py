"""Attention as plain bfloat16 products, for learning on processors.

torch's fused attention saves memory, not operations, and its bfloat16 passes on processors take about twice as long as
the products they stand for (forward and backward together, 512 tokens, 9 heads of 64). While a block is learned, its
samples are short and run one at a time, so the `tokens x tokens` scores are affordable.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "compressor_products"

_UNKNOWN = ("softcap", "position_bias", "cache")
"""Arguments that change the result and are left to transformers."""


@contextmanager
def as_products(model: PreTrainedModel) -> Iterator[None]:
    """Let a model that uses torch's fused attention compute it with `attend` inside the `with`."""
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa":
        yield
        return
    AttentionInterface.register(NAME, attend)
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = "sdpa"


def attend(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return what transformers' `sdpa_attention_forward` returns; by products under autocast on a processor.

    Args:
        module: The attention module.
        query: `[batch, heads, tokens, size]`.
        key: `[batch, key_heads, tokens, size]`.
        value: As `key`.
        attention_mask: Broadcastable to `[batch, heads, tokens, tokens]`, bool or added; None leaves it to `is_causal`.
        dropout: Share of probabilities to drop.
        scaling: Factor of the scores; None for `1 / sqrt(size)`.
        is_causal: Whether tokens see only earlier ones; None asks the module.
        **kwargs: Anything else that a model passes.

    Returns:
        `[batch, tokens, heads, size]`, and None for the probabilities.
    """
    batch, heads, tokens, size = query.shape
    unusual = dropout > 0 or any(kwargs.get(name) is not None for name in _UNKNOWN) or tokens != key.shape[2]
    if unusual or query.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
        return result
    shared = heads // key.shape[1]  # query heads per key head
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # Autocast would take the softmax to float32 and back; torch's bfloat16 one sums in float32 anyway.
    with torch.autocast("cpu", enabled=False):
        scaled = query.bfloat16() * (size**-0.5 if scaling is None else scaling)
        # The query heads that share a key head become rows of one product.
        scores = scaled.reshape(batch, -1, shared * tokens, size) @ key.bfloat16().transpose(-1, -2)
        scores = scores.view(batch, heads, tokens, tokens)
        if attention_mask is not None:
            scores = scores + _added(attention_mask)
        elif causal:
            scores = scores + _causal(tokens)
        shares = scores.softmax(-1)
        leaving = shares.view(batch, -1, shared * tokens, tokens) @ value.bfloat16()
    return leaving.view(batch, heads, tokens, value.shape[-1]).transpose(1, 2).contiguous(), None


def _added(mask: Tensor) -> Tensor:
    """Return what is added to the scores, bfloat16: 0 where a token is seen and a very negative number elsewhere."""
    if mask.dtype != torch.bool:
        return mask.bfloat16()
    unseen = torch.finfo(torch.bfloat16).min
    return torch.zeros_like(mask, dtype=torch.bfloat16).masked_fill_(~mask, unseen)


@lru_cache(maxsize=2)
def _causal(tokens: int) -> Tensor:
    return _added(torch.ones(tokens, tokens, dtype=torch.bool).tril())
