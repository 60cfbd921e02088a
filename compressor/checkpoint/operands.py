"""Attention as two plain products whose operands can be looked at and rounded, for any model of transformers.

Models look their attention function up by a name in the config. Under ours, modules that carry a treatment compute
`softmax(q k^T) v` step by step and hand every operand to it; other modules go on with torch's fused attention. Masks
are always given as numbers to add, so that nothing depends on what a fused kernel would infer.

A module that rounds to LLM-FP4's floats stores one tensor, `attention_operands`, float32 `[4, 2]`: for query, key,
probability and value the scale and the mantissa bits (arXiv 2310.16836, which rounds these operands in encoders). One
that rounds to integers per token stores nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from compressor.errors import CheckpointError, UnsupportedError
from compressor.formats.activations import InputFormat
from compressor.formats.base import Slot
from compressor.formats.small_floats import SPLITS
from compressor.inputs import OPERANDS, RoundFloat, apply_ops, integer_operands

NAME = "compressor_operands"
SUFFIX = "attention_operands"
SLOT = Slot(torch.float32, (len(OPERANDS), 2))

_TREAT = "_compressor_treat"
_UNKNOWN = ("softcap", "position_bias", "cache", "s_aux")
"""Arguments that change the result in ways this function does not know."""

Treat = Callable[[str, Tensor], Tensor]


def expose(model: PreTrainedModel) -> None:
    """Let the model's attention modules look for treatments from now on, and pass their masks as numbers."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config._attn_implementation_internal = NAME


def treat(module: nn.Module, treatment: Treat | None) -> None:
    """Give an attention module a treatment of its operands, or take it away."""
    if treatment is None:
        module.__dict__.pop(_TREAT, None)
    else:
        module.__dict__[_TREAT] = treatment


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return attention, `[batch, tokens, heads, size]`, by two products of treated operands.

    Args:
        module: The attention module.
        query: `[batch, heads, tokens, size]`.
        key: `[batch, key_heads, keys, size]`.
        value: As `key`.
        attention_mask: Added to the scores, or True where they count; broadcastable to `[batch, heads, tokens, keys]`.
        dropout: Share of probabilities to drop; only 0 for treated modules.
        scaling: Factor of the scores; None for `1 / sqrt(size)`.
        is_causal: Whether tokens see only earlier ones where there is no mask; None asks the module.
        **kwargs: Anything else that a model passes.

    Raises:
        UnsupportedError: The module's attention has further ingredients.
    """
    treatment: Treat | None = module.__dict__.get(_TREAT)
    if treatment is None:
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
        return result
    if unknown := [name for name in _UNKNOWN if kwargs.get(name) is not None]:
        raise UnsupportedError(
            f"{type(module).__name__}: attention with {', '.join(unknown)} cannot round its operands",
            "leave --attention out",
        )
    shared = query.shape[1] // key.shape[1]  # query heads per key head
    q = treatment("query", query)
    k = treatment("key", key).repeat_interleave(shared, dim=1)
    scores = q @ k.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    elif (getattr(module, "is_causal", True) if is_causal is None else is_causal) and query.shape[2] > 1:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(~seen.tril(key.shape[2] - query.shape[2]), torch.finfo(scores.dtype).min)
    shares = treatment("probability", scores.float().softmax(-1).to(query.dtype))
    out = shares @ treatment("value", value).repeat_interleave(shared, dim=1)
    return out.transpose(1, 2).contiguous(), None


def stored(ops: Sequence[RoundFloat]) -> Tensor:
    """Return what a module stores of the rounding of its operands, float32 `[4, 2]` on the CPU."""
    assert len(ops) == len(OPERANDS), ops
    return torch.tensor([[float(op.scale), float(op.mantissa)] for op in ops], dtype=torch.float32)


def rebuilt(module: str, values: Tensor, bits: int) -> dict[str, RoundFloat]:
    """Return the rounding of each operand from what a module stores.

    Raises:
        CheckpointError: The values are no scales and splits.
    """
    ops = {}
    for name, (scale, mantissa) in zip(OPERANDS, values.float().tolist(), strict=True):
        if not 0 < scale < float("inf") or mantissa not in SPLITS[bits]:
            raise CheckpointError(
                f"{module}.{SUFFIX}: scale {scale:g} and {mantissa:g} mantissa bits of {name} are no {bits}-bit float",
                "the checkpoint is damaged",
            )
        device = values.device
        split = torch.tensor([int(mantissa)], dtype=torch.uint8, device=device)
        no_shift = torch.zeros(1, dtype=torch.int8, device=device)
        ops[name] = RoundFloat(bits, torch.tensor([scale], device=device), split, no_shift)
    return ops


def simulate(module: nn.Module, name: str, fmt: InputFormat) -> None:
    """Make an attention module round its operands; for searched formats it must have the buffer `attention_operands`.

    Args:
        module: The module.
        name: What errors call it.
        fmt: What they are rounded to.
    """
    if not fmt.searched:
        ops = integer_operands(fmt)
        treat(module, lambda operand, x: apply_ops(ops[operand], x))
        return
    ready: dict[str, RoundFloat] = {}
    made_of: list[Tensor] = []

    def rounding(operand: str, x: Tensor) -> Tensor:
        values = module.get_buffer(SUFFIX)
        if not made_of or made_of[0] is not values:
            ready.update(rebuilt(name, values, fmt.bits))
            made_of[:] = [values]
        return ready[operand].apply(x)

    treat(module, rounding)


def prepare_empty(model: PreTrainedModel, names: Sequence[str], fmt: InputFormat) -> None:
    """Give attention modules room for what they store, on meta, and let them round with it once it is there.

    Raises:
        CheckpointError: The model has no such module.
    """
    expose(model)
    known = {name for name, _ in model.named_modules()}
    for name in names:
        if name not in known:
            raise CheckpointError(f"{name}: has rounded operands, but the model has no such module", "wrong config?")
        module = model.get_submodule(name)
        if fmt.searched:
            module.register_buffer(SUFFIX, torch.empty(SLOT.shape, dtype=SLOT.dtype, device="meta"))
        simulate(module, name, fmt)
