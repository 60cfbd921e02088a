"""Tiny vision-language models, random and built without a download, and an image for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from compressor.testing.models import random_model

IMAGE_TOKEN = 5

_TEXT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "initializer_range": 0.12,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def tiny_llava(seed: int = 0, *, vision_width: int = 32) -> PreTrainedModel:
    """Build a Llava: Llama behind CLIP. A wide tower has more parameters than the language model."""
    sizes = {**_VISION, "hidden_size": vision_width, "intermediate_size": 2 * vision_width}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes),
        text_config=LlamaConfig(**_TEXT),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
    )
    return random_model(lambda: LlavaForConditionalGeneration(config), seed)


def tiny_qwen_vl(seed: int = 0) -> PreTrainedModel:
    """Build a Qwen2.5-VL: biases on q, k and v, three-dimensional rotary positions, a tower with window attention."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    vision: dict[str, Any] = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
    vision |= {"out_hidden_size": 64, "patch_size": 8, "window_size": 32, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(
        text_config={**_TEXT, "rope_parameters": rope, "head_dim": 16},
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
    )
    return random_model(lambda: Qwen2_5_VLForConditionalGeneration(config), seed)


def tiny_smolvlm(seed: int = 0) -> PreTrainedModel:
    """Build a SmolVLM: Llama behind SigLIP and a pixel-shuffling connector."""
    config = SmolVLMConfig(text_config=LlamaConfig(**_TEXT), vision_config=_VISION, image_token_id=IMAGE_TOKEN)
    return random_model(lambda: SmolVLMForConditionalGeneration(config), seed)


def tiny_gemma3(seed: int = 0) -> PreTrainedModel:
    """Build a Gemma 3: sliding and full attention in turn, head tied to the embedding, SigLIP in front."""
    config = Gemma3Config(
        text_config={**_TEXT, "head_dim": 16, "sliding_window": 16},
        vision_config={**_VISION, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=6,
        eoi_token_index=7,
    )
    return random_model(lambda: Gemma3ForConditionalGeneration(config), seed)


def tiny_clip(seed: int = 0) -> PreTrainedModel:
    """Build a CLIP: two encoders of equal weight and no language model."""
    text = {**{key: value for key, value in _TEXT.items() if key != "num_key_value_heads"}, "hidden_size": 32}
    config = CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=32)
    return random_model(lambda: CLIPModel(config), seed)


def image_inputs(model: PreTrainedModel, seed: int = 0) -> dict[str, Tensor]:
    """Return a prompt with one random image of 32 x 32 for `tiny_llava`."""
    assert isinstance(model, LlavaForConditionalGeneration), type(model)
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(10, 320, (1, 12), generator=generator)
    image = torch.full((1, 16), IMAGE_TOKEN)  # one token per patch of 8 x 8
    return {
        "input_ids": torch.cat((words[:, :4], image, words[:, 4:]), 1),
        "pixel_values": torch.randn(1, 3, 32, 32, generator=generator),
    }
