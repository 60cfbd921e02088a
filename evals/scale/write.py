"""Writes a random checkpoint of a known model's shape, shard by shard: no more than a shard is ever in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from compressor.checkpoint.sink import write_json
from compressor.checkpoint.source import INDEX
from compressor.errors import RecipeError, did_you_mean, disk_error

SHARD_BYTES = 1_000_000_000
"""Size from which on a shard is written."""

STD = 0.02
"""Standard deviation of the weights, that of most models before training."""


@dataclass(frozen=True)
class Shape:
    """Widths of a Llama.

    Attributes:
        hidden: Width of the residual stream.
        intermediate: Width of the feed-forward layer.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        layers: Blocks of the whole model.
        vocab: Tokens.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int
    vocab: int


SHAPES = {
    "llama-7b": Shape(4096, 11008, 32, 32, 32, 32_000),
    "llama-70b": Shape(8192, 28_672, 64, 8, 80, 32_000),
    "tiny": Shape(64, 128, 4, 2, 4, 320),
}


def write_llama(
    folder: Path, shape: str, layers: int | None = None, seed: int = 0, say: Callable[[str], None] = lambda _: None
) -> int:
    """Write a random bf16 Llama with a tokenizer of bytes, and return the bytes of its weights.

    Args:
        folder: Where it goes; must not exist, or be empty.
        shape: One of `SHAPES`.
        layers: Blocks; None for as many as the model of that shape has.
        seed: Seed of the weights.
        say: Told of every shard.

    Raises:
        RecipeError: The shape is unknown, or the folder holds something.
        ResourceError: The disk is full.
    """
    if shape not in SHAPES:
        raise did_you_mean("shape", shape, SHAPES)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(f"{folder}: is not an empty folder", "give another one, or delete it")
    widths = SHAPES[shape]
    depth = widths.layers if layers is None else layers
    try:
        folder.mkdir(parents=True, exist_ok=True)
        total = _write_weights(folder, _tensors(widths, depth), seed, say)
        _config(widths, depth).save_pretrained(folder)
        _tokenizer().save_pretrained(folder)
    except OSError as error:
        raise disk_error(error, folder) from error
    return total


def _tensors(shape: Shape, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor, in the order they are used."""
    keys = shape.hidden // shape.heads * shape.kv_heads
    yield "model.embed_tokens.weight", (shape.vocab, shape.hidden)
    for index in range(layers):
        block = f"model.layers.{index}"
        for name, rows in (("q", shape.hidden), ("k", keys), ("v", keys), ("o", shape.hidden)):
            yield f"{block}.self_attn.{name}_proj.weight", (rows, shape.hidden)
        for name in ("gate", "up"):
            yield f"{block}.mlp.{name}_proj.weight", (shape.intermediate, shape.hidden)
        yield f"{block}.mlp.down_proj.weight", (shape.hidden, shape.intermediate)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{block}.{name}.weight", (shape.hidden,)
    yield "model.norm.weight", (shape.hidden,)
    yield "lm_head.weight", (shape.vocab, shape.hidden)


def _write_weights(
    folder: Path, tensors: Iterator[tuple[str, tuple[int, ...]]], seed: int, say: Callable[[str], None]
) -> int:
    """Fill shards one after the other, then name them by their number and write the index; returns bytes of weights."""
    generator = torch.Generator().manual_seed(seed)
    held: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        nonlocal size
        save_file(held, folder / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()
        size = 0
        say(f"shard {len(shards)}, {total / 1e9:.1f} GB so far")

    for name, dims in tensors:
        held[name] = _values(dims, generator)
        size += held[name].nbytes
        total += held[name].nbytes
        if size >= SHARD_BYTES:
            flush()
    if held:
        flush()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number}").replace(folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def _values(dims: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return random weights, or the ones a norm has before training."""
    if len(dims) == 1:
        return torch.ones(dims, dtype=torch.bfloat16)
    out = torch.empty(dims, dtype=torch.bfloat16)
    for rows in out.split(1024):  # in float32 a part at a time
        rows.copy_(torch.empty(rows.shape).normal_(std=STD, generator=generator))
    return out


def _config(shape: Shape, layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_hidden_layers=layers,
        vocab_size=shape.vocab,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer whose tokens are the 256 bytes."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)
