"""The two ends of any model: inputs it accepts, the tensor it is run for, and the part of it that speaks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressor.errors import UnsupportedError


def language_model(model: nn.Module) -> str | None:
    """Return the module name of the language model inside a multimodal model, or None for any other model.

    The config says: where it has one part for text and others beside it, the module built from that part is meant.
    Models that generate nothing, such as pairs of encoders, have no language model.
    """
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        return None
    text = model.config.get_text_config()
    if text is model.config:
        return None
    names = [
        name
        for name, module in model.named_modules()
        if name and isinstance(module, PreTrainedModel) and module.config is text
    ]
    return names[0] if names else None


def example_inputs(
    model: PreTrainedModel, device: torch.device, with_mask: bool = False, length: int = 32, seed: int = 0
) -> dict[str, Tensor]:
    """Return inputs any text or image model accepts: seeded random tokens, or a seeded random image.

    Args:
        model: The model to feed.
        device: Where the inputs go; on meta they have no values.
        with_mask: Add a 4-D attention mask, which spares text models a data-dependent check on the meta device.
        length: Number of tokens.
        seed: Seed of the values.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config.get_text_config() if model.main_input_name == "input_ids" else model.config
    if model.main_input_name == "input_ids":
        tokens = torch.randint(0, config.vocab_size, (1, length), generator=generator)
        inputs = {"input_ids": tokens.to(device)}
        if with_mask:
            inputs["attention_mask"] = torch.ones(1, 1, length, length, dtype=torch.bool, device=device)
        return inputs
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or 64
        height, width = size if isinstance(size, list | tuple) else (size, size)
        image = torch.randn(1, getattr(config, "num_channels", 3), height, width, generator=generator)
        return {"pixel_values": image.to(device)}
    raise UnsupportedError(
        f"{type(model).__name__}: takes {model.main_input_name}, neither text nor images", "not supported yet"
    )


def first_tensor(output: Any) -> Tensor:
    """Return the main tensor of a block's or model's output: logits, last hidden state, or the first entry."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    value = output[0]
    assert isinstance(value, Tensor), type(value)
    return value
