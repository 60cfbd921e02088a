"""Tiny models and tokenizers, random or written out here, that tests and plug-in authors build without a download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import (
    BertConfig,
    BertModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>")
_MERGES = ("h e", "Ġ t", "Ġt he", "i n", "e r", "a n", "Ġ a", "an d", "o n", "r e", "Ġ s", "o u", "in g", "e n", "o r")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<bos>{{ message['role'] }}\n{{ message['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)


def tiny_tokenizer(*, add_bos: bool = False, chat_template: bool = False) -> PreTrainedTokenizerFast:
    """Build a byte-level BPE tokenizer: three special tokens, 256 bytes and fifteen merges, 274 tokens in all.

    Any text survives encoding and decoding unchanged. Needs no file and no training, so ids never change.

    Args:
        add_bos: Put `<bos>` before every text by default, as Llama tokenizers do.
        chat_template: Carry a chat template.
    """
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [(left, right) for left, right in (merge.split(" ") for merge in _MERGES)]
    tokens += [left + right for left, right in merges]
    backend = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", tokens.index("<bos>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    if chat_template:
        tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def tiny_llama(
    seed: int = 0,
    *,
    tied: bool = True,
    kv_heads: int = 4,
    layers: int = 2,
    hidden_size: int = 64,
    intermediate_size: int = 128,
) -> PreTrainedModel:
    """Build a Llama with four heads and 320 tokens. `kv_heads` below 4 gives grouped queries."""
    config = LlamaConfig(
        **{**_TEXT, "hidden_size": hidden_size},
        num_hidden_layers=layers,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate_size,
        tie_word_embeddings=tied,
    )
    return random_model(lambda: LlamaForCausalLM(config), seed)


def tiny_bert(seed: int = 0) -> PreTrainedModel:
    """Build a BERT encoder of two layers; its output is `last_hidden_state`, its linears have biases."""
    config = BertConfig(**_TEXT, num_hidden_layers=2, intermediate_size=128)
    return random_model(lambda: BertModel(config), seed)


def tiny_olmoe(seed: int = 0, *, hidden_size: int = 64, intermediate_size: int = 64) -> PreTrainedModel:
    """Build an OLMoE: four experts per layer, two per token, not renormalised."""
    config = OlmoeConfig(
        **{**_TEXT, "hidden_size": hidden_size},
        num_hidden_layers=2,
        intermediate_size=intermediate_size,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=False,
    )
    return random_model(lambda: OlmoeForCausalLM(config), seed)


def tiny_mixtral(seed: int = 0) -> PreTrainedModel:
    """Build a Mixtral: four experts per layer, stored as `w1`, `w3`, `w2` under `block_sparse_moe`."""
    config = MixtralConfig(
        **_TEXT,
        num_hidden_layers=2,
        num_key_value_heads=2,
        intermediate_size=128,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    return random_model(lambda: MixtralForCausalLM(config), seed)


def tiny_qwen2_moe(seed: int = 0) -> PreTrainedModel:
    """Build a Qwen2-MoE: one dense layer, then one with four experts, a shared expert and its one-row gate."""
    config = Qwen2MoeConfig(
        **_TEXT,
        num_hidden_layers=2,
        num_key_value_heads=2,
        intermediate_size=128,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=128,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
    )
    return random_model(lambda: Qwen2MoeForCausalLM(config), seed)


def tiny_qwen3_moe(seed: int = 0) -> PreTrainedModel:
    """Build a Qwen3-MoE: four experts per layer, two per token, shares renormalised."""
    config = Qwen3MoeConfig(
        **_TEXT,
        num_hidden_layers=2,
        num_key_value_heads=2,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    )
    return random_model(lambda: Qwen3MoeForCausalLM(config), seed)


def tiny_deepseek(seed: int = 0) -> PreTrainedModel:
    """Build a DeepSeek-V3: one dense layer, then one with a sigmoid router, groups, and a shared expert."""
    config = DeepseekV3Config(
        **_TEXT,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        intermediate_size=128,
        moe_intermediate_size=64,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    )
    return random_model(lambda: DeepseekV3ForCausalLM(config), seed)


def tiny_gpt_oss(seed: int = 0, *, hidden_size: int = 64) -> PreTrainedModel:
    """Build a GPT-OSS: four experts per layer in stacks that are transposed, interleaved and biased, also on disk."""
    config = GptOssConfig(
        **{**_TEXT, "hidden_size": hidden_size},
        num_hidden_layers=2,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    model = random_model(lambda: GptOssForCausalLM(config), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if name.endswith(("proj_bias", "router.bias")):
            param.normal_(0, 0.2, generator=generator)  # the class starts them at zero
    return model


def tiny_resnet(seed: int = 0) -> PreTrainedModel:
    """Build a ResNet classifier of two stages for 3 x 32 x 32 images and ten classes, with used-looking statistics."""
    stages: dict[str, Any] = {"embedding_size": 64, "hidden_sizes": [64, 128], "depths": [1, 1], "num_labels": 10}
    config = ResNetConfig(**stages, layer_type="basic")
    model = random_model(lambda: ResNetForImageClassification(config), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2, generator=generator)
    return model


def sample_tokens(model: PreTrainedModel, length: int = 40, seed: int = 0) -> torch.Tensor:
    """Return random token ids that are no special tokens, int64 `[1, length]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL_TOKENS), model.config.vocab_size, (1, length), generator=generator)


# Wide initial weights: with the usual 0.02 every next-token distribution is flat and errors do not show.
_TEXT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.12,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def random_model(build: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    """Build a float32 model in eval mode whose norm gains and biases are random too; global random state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        for name, param in model.named_parameters():
            if param.ndim == 1:
                torch.nn.init.normal_(param, mean=1.0 if name.endswith("weight") else 0.0, std=0.2)
            elif name.endswith("gate.weight"):
                torch.nn.init.normal_(param, std=0.5)  # routers start at zero or near it: all experts would tie
    model.eval().requires_grad_(False)
    return model
