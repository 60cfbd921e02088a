"""Greedy continuation of a prompt, to look at what a model says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compressor.errors import RecipeError


@dataclass(frozen=True)
class Generation:
    """What came out.

    Attributes:
        text: The continuation, without prompt and special tokens.
        chat_template: Whether the prompt was put into the tokenizer's chat template.
        n_prompt: Tokens of the prompt.
        n_new: Tokens generated, an end-of-text token included.
    """

    text: str
    chat_template: bool
    n_prompt: int
    n_new: int


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 64,
    chat: bool = True,
) -> Generation:
    """Continue a prompt, always with the most likely token.

    Args:
        model: A model that can generate.
        tokenizer: Its tokenizer.
        prompt: The text, or the user's turn of a chat.
        max_new_tokens: Upper bound of what is generated.
        chat: Use the chat template if the tokenizer has one; the result says whether it did.

    Raises:
        RecipeError: A model that cannot generate, an empty prompt, or a bound below one.
    """
    if not model.can_generate():
        raise RecipeError(f"{type(model).__name__} does not generate text", "use a causal language model")
    if max_new_tokens < 1:
        raise RecipeError(f"max_new_tokens is {max_new_tokens}", "ask for at least one")
    templated = chat and bool(tokenizer.chat_template)
    if templated:
        prompt = str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        )
    # A template writes its own special tokens; adding them again would double the first one.
    ids: Tensor = tokenizer(prompt, return_tensors="pt", add_special_tokens=not templated)["input_ids"]
    if ids.shape[1] == 0:
        raise RecipeError("the prompt has no tokens", "give some text")
    ids = ids.to(model.device)
    run: Any = model
    with torch.no_grad():
        out: Tensor = run.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            # Sampling settings of the checkpoint mean nothing here, and transformers would warn about them.
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=_pad(model, tokenizer),
        )
    new = out[0, ids.shape[1] :]
    return Generation(str(tokenizer.decode(new, skip_special_tokens=True)), templated, ids.shape[1], len(new))


def _pad(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return any valid padding id: one prompt is never padded, but transformers wants to know."""
    end: Any = model.generation_config.eos_token_id if model.generation_config else None
    first: int | None = end[0] if isinstance(end, list) and end else end
    pad: int | None = tokenizer.pad_token_id
    return first if pad is None else pad
