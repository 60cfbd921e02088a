"""Writing small models as GGUF files, with their tensors in any type the `gguf` package can quantize to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressor.testing.models import tiny_tokenizer

_PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
}


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    type_of: Callable[[str], str],
    *,
    splitting: str = "gpt-2",
    extra: dict[str, Tensor] | None = None,
    leave_out: str = "",
    architecture: str = "llama",
) -> None:
    """Write a Llama or a Qwen3-MoE and the tokenizer of `tiny_tokenizer`.

    Args:
        path: The file.
        model: The model; its vocabulary may be larger than the tokenizer's.
        type_of: GGUF name of a matrix -> its type, e.g. `Q8_0`, `F16`; vectors are F32, as converters write them.
        splitting: What the file says about splitting text.
        extra: Further tensors, written as F32.
        leave_out: GGUF name of a tensor that is not written.
        architecture: What the file says it is.
    """
    config: Any = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("A tiny stray name")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if hasattr(config, "num_experts"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    else:
        writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_vocab_size(config.vocab_size)
    _write_tokenizer(writer, config.vocab_size, splitting)

    def add(name: str, value: Tensor) -> None:
        if name == leave_out:
            return
        kind = gguf.GGMLQuantizationType[type_of(name) if value.ndim > 1 else "F32"]
        array = value.detach().float().contiguous().numpy()
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)

    state = model.state_dict()
    add("token_embd.weight", state["model.embed_tokens.weight"])
    add("output_norm.weight", state["model.norm.weight"])
    if not config.tie_word_embeddings:
        add("output.weight", state["lm_head.weight"])
    for index in range(config.num_hidden_layers):
        layer = {name.partition(f"model.layers.{index}.")[2]: value for name, value in state.items()}
        for ours, theirs in _PARTS.items():
            weight = layer.get(f"{ours}.weight")
            if weight is not None and theirs in ("attn_q", "attn_k") and architecture == "llama":
                weight = _interleaved(weight, heads if theirs == "attn_q" else kv_heads)
            if weight is not None:
                add(f"blk.{index}.{theirs}.weight", weight)
        if "mlp.experts.gate_up_proj" in layer:
            gate, up = layer["mlp.experts.gate_up_proj"].chunk(2, dim=1)  # [experts, intermediate, hidden]
            stacks = {"gate": gate, "up": up, "down": layer["mlp.experts.down_proj"]}
            for name, stack in stacks.items():
                add(f"blk.{index}.ffn_{name}_exps.weight", stack)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value.float().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_read(weight: Tensor, kind: str) -> Tensor:
    """Return what a matrix is worth once written in a type and dequantized, float32."""
    type_ = gguf.GGMLQuantizationType[kind]
    array = gguf.quants.quantize(weight.detach().float().contiguous().numpy(), type_)
    return torch.tensor(gguf.quants.dequantize(array, type_), dtype=torch.float32)


def _interleaved(weight: Tensor, n_heads: int) -> Tensor:
    """Reorder the rows of q or k from halves to interleaved pairs, the rotary order GGUF uses for Llama."""
    reordered: Tensor = weight.unflatten(0, (n_heads, 2, -1)).swapaxes(1, 2).flatten(0, 2)
    return reordered


def _write_tokenizer(writer: gguf.GGUFWriter, vocab_size: int, splitting: str) -> None:
    backend = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = list(backend["vocab"])
    unused = [f"<unused{index}>" for index in range(vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list([*tokens, *unused])
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3) + [5] * len(unused))
    writer.add_token_merges([" ".join(merge) for merge in backend["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    template = tiny_tokenizer(chat_template=True).chat_template
    assert isinstance(template, str)
    writer.add_chat_template(template)
