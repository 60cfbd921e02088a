"""Attention by products against transformers' fused one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from compressor.checkpoint.attention import NAME, as_products, attend
from compressor.testing.models import tiny_llama

TOKENS = 24


class Attention(nn.Module):
    """What the functions ask a module about."""

    num_key_value_groups = 3
    is_causal = True


def operands(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = [(2, 6, TOKENS, 16), (2, 2, TOKENS, 16), (2, 2, TOKENS, 16)]
    query, key, value = (torch.randn(shape, generator=rng).requires_grad_() for shape in shapes)
    return query, key, value


def masks() -> dict[str, dict[str, Any]]:
    window = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().triu(-5)[None, None]
    return {
        "causal": {"attention_mask": None},
        "all": {"attention_mask": None, "is_causal": False},
        "bool": {"attention_mask": window},
        "added": {"attention_mask": torch.zeros(1, 1, TOKENS, TOKENS).masked_fill(~window, -1e9)},
        "scaled": {"attention_mask": None, "scaling": 0.5},
    }


@pytest.mark.parametrize("case", masks())
def test_products_are_attention(case: str) -> None:
    arguments, found = masks()[case], {}
    for function in (attend, sdpa_attention_forward):
        query, key, value = operands(3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            leaving = function(Attention(), query, key, value, **arguments)[0]
        leaving.float().square().sum().backward()
        assert query.grad is not None
        assert key.grad is not None
        assert value.grad is not None
        found[function.__name__] = [leaving.detach().float(), query.grad, key.grad, value.grad]
    for ours, theirs in zip(*found.values(), strict=True):
        assert ours.shape == theirs.shape
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02


def test_without_autocast_it_is_left_to_transformers() -> None:
    query, key, value = operands(4)
    ours, theirs = (f(Attention(), query, key, value, None)[0] for f in (attend, sdpa_attention_forward))
    assert torch.equal(ours, theirs)


def test_the_model_gets_its_own_attention_back() -> None:
    model = tiny_llama()
    tokens = torch.arange(12)[None]
    before = model(tokens).logits
    with as_products(model):
        assert model.config._attn_implementation == NAME
        assert torch.equal(model(tokens).logits, before)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not torch.equal(model(tokens).logits, before)
    assert model.config._attn_implementation == "sdpa"
