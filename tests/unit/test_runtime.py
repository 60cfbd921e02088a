"""Loading checkpoints: equal to stock transformers bit for bit, packed in memory, and loud about anything wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel

from compressor.checkpoint.config import quiet
from compressor.errors import CheckpointError
from compressor.formats import get_format
from compressor.formats.base import QuantFormat
from compressor.runtime import PackedExperts, PackedLinear, dequantized, execution_path, load
from compressor.testing.checkpoints import dense_twin, edit_tensors, write_compressed
from compressor.testing.models import (
    sample_tokens,
    tiny_bert,
    tiny_llama,
    tiny_mixtral,
    tiny_olmoe,
    tiny_qwen2_moe,
    tiny_resnet,
)

Builder = Callable[[int], PreTrainedModel]
MODELS: dict[str, Builder] = {
    "llama-tied": tiny_llama,
    "llama-gqa-untied": lambda seed: tiny_llama(seed, tied=False, kv_heads=2),
    "bert": tiny_bert,
    "olmoe": tiny_olmoe,
    "mixtral": tiny_mixtral,
    "qwen2-moe": tiny_qwen2_moe,
}
COMPRESSED = {"llama-tied": 14, "llama-gqa-untied": 14, "bert": 12, "olmoe": 32, "mixtral": 32, "qwen2-moe": 26}


def make_format(name: str, dtype: torch.dtype = torch.float32) -> QuantFormat:
    return get_format(name, 64, dtype)


def output(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens)[0]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).double().norm() / b.double().norm())


@pytest.mark.parametrize("fmt", ["int4", "int4-asym", "nvfp4", "mxfp4", "fp8", "fp8-block"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_model_computes_what_the_dequantized_one_does(name: str, fmt: str, tmp_path: Path) -> None:
    model = MODELS[name](17)
    chosen = write_compressed(model, tmp_path / "packed", make_format(fmt))
    assert len(chosen) == COMPRESSED[name]
    weights = {key: value for key, value in dequantized(tmp_path / "packed") if key.removesuffix(".weight") in chosen}
    assert len(weights) == len(chosen)
    dense_twin(model, weights, tmp_path / "dense")
    with quiet():
        reference = type(model).from_pretrained(tmp_path / "dense")
    tokens = sample_tokens(model, seed=3)
    packed = load(tmp_path / "packed")
    out, expected = output(packed, tokens), output(reference, tokens)
    assert relative(out, expected) < 1e-5
    assert relative(output(model, tokens), expected) > 0.002  # the comparison could have failed
    assert torch.equal(output(load(tmp_path / "dense"), tokens), expected)
    kernel = "cpu-table" if fmt in ("nvfp4", "mxfp4") else "reference"
    assert execution_path(packed) == f"{kernel}-float32 (packed {fmt})"
    assert not packed.training
    assert not any(parameter.requires_grad for parameter in packed.parameters())


@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [
        (name, dtype)
        for name in ("int4", "int8", "int3", "fp8", "fp8-tensor", "fp8-block")
        for dtype in (torch.bfloat16, torch.float32)
    ]
    + [(name, torch.bfloat16) for name in ("nvfp4", "mxfp4", "mxfp8")],
)
def test_stock_transformers_reads_the_same_bits(
    fmt: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(23, tied=False, kv_heads=2).to(torch.bfloat16)
    write_compressed(model, tmp_path, make_format(fmt, torch.bfloat16))
    tokens = sample_tokens(model)
    with quiet():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        output(stock, tokens)  # its first forward decompresses
    ours = load(tmp_path, dtype=dtype)
    compared = 0
    for name, module in ours.named_modules():
        if isinstance(module, PackedLinear):
            weight = module.dequantize()
            assert weight.dtype == dtype
            assert torch.equal(weight, stock.get_submodule(name).weight), name
            compared += 1
    assert compared == 14
    expected = output(stock, tokens)
    # Kernels for bfloat16 do not round the decoded weight to it; the reference does, as stock readers do.
    assert relative(output(ours, tokens), expected) < (0.03 if dtype == torch.bfloat16 else 1e-30)
    monkeypatch.setenv("COMPRESS_KERNEL", "reference")
    assert torch.equal(output(load(tmp_path, dtype=dtype), tokens), expected)


@pytest.mark.parametrize("fmt", ["int4", "mxfp4", "fp8", "fp8-tensor"])
@pytest.mark.parametrize("name", ["olmoe", "mixtral", "qwen2-moe"])
def test_stock_transformers_reads_the_same_experts(name: str, fmt: str, tmp_path: Path) -> None:
    model = MODELS[name](29).to(torch.bfloat16)
    write_compressed(model, tmp_path, make_format(fmt, torch.bfloat16))
    with quiet():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        output(stock, sample_tokens(model))
    compared = 0
    for path, module in load(tmp_path, dtype=torch.bfloat16).named_modules():
        if isinstance(module, PackedExperts):
            experts = stock.get_submodule(path)
            for index in range(4):
                gate_up = torch.cat([module.projection(index, role).dequantize() for role in ("gate", "up")])
                assert torch.equal(gate_up, experts.gate_up_proj[index])
                assert torch.equal(module.projection(index, "down").dequantize(), experts.down_proj[index])
                compared += 1
    assert compared == (4 if name == "qwen2-moe" else 8)


def test_float32_scales_are_rounded_to_the_dtype_the_model_is_loaded_in(tmp_path: Path) -> None:
    write_compressed(tiny_llama(31), tmp_path, make_format("int4", torch.float32))
    with quiet():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        output(stock, sample_tokens(stock))
    name = "model.layers.1.mlp.down_proj"
    layer = load(tmp_path, dtype=torch.bfloat16).get_submodule(name)
    assert isinstance(layer, PackedLinear)
    assert torch.equal(layer.dequantize(), stock.get_submodule(name).weight)


def test_a_dense_checkpoint_loads_as_stock_does(tmp_path: Path) -> None:
    model = tiny_llama(37)
    model.generation_config.max_new_tokens = 11
    model.save_pretrained(tmp_path)
    with quiet():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = load(tmp_path, dtype=torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    assert ours.config.dtype == torch.bfloat16
    assert ours.generation_config is not None
    assert ours.generation_config.max_new_tokens == 11
    assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
    expected, got = dict(stock.named_buffers()), dict(ours.named_buffers())
    assert expected.keys() == got.keys()
    assert expected
    for name, buffer in expected.items():
        assert got[name].dtype == buffer.dtype
        assert torch.equal(got[name], buffer), name
    tokens = sample_tokens(model)
    assert torch.equal(output(ours, tokens), output(stock, tokens))
    assert execution_path(ours) == "dense-bfloat16"


def test_buffers_and_parameters_kept_in_float32_stay_so(tmp_path: Path) -> None:
    config = DeepseekV3Config(
        vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
        moe_intermediate_size=64, first_k_dense_replace=0, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=16,
        qk_nope_head_dim=16, v_head_dim=16,
    )  # fmt: skip
    DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: torch.linspace(0.001, 1, 4)}))
    with quiet():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    ours = load(tmp_path, dtype=torch.bfloat16).state_dict()
    assert ours[name].dtype == torch.float32
    assert ours.keys() == stock.keys()
    for key, value in stock.items():
        assert ours[key].dtype == value.dtype, key
        assert torch.equal(ours[key], value), key


def test_a_convolutional_checkpoint_loads(tmp_path: Path) -> None:
    model = tiny_resnet(41)
    model.save_pretrained(tmp_path)
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(41))
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(image).logits, model(image).logits)


def test_an_encoder_without_head_loads_from_a_bare_base_model(tmp_path: Path) -> None:
    model = tiny_bert(43)
    model.save_pretrained(tmp_path)
    with quiet():
        stock = AutoModel.from_pretrained(tmp_path)
    tokens = sample_tokens(model)
    assert torch.equal(load(tmp_path)(tokens).last_hidden_state, stock(tokens).last_hidden_state)


def test_shards_load(tmp_path: Path) -> None:
    model = tiny_mixtral(47)
    write_compressed(model, tmp_path, make_format("int4"))
    tokens = sample_tokens(model)
    expected = output(load(tmp_path), tokens)
    split_in_shards(tmp_path)
    assert torch.equal(output(load(tmp_path), tokens), expected)


def split_in_shards(folder: Path, names: tuple[str, str] = ("a.safetensors", "b.safetensors")) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for index, file in enumerate(names):
        part = dict(list(tensors.items())[index::2])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_an_index_cannot_point_outside_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    write_compressed(tiny_llama(), folder, make_format("int4"))
    split_in_shards(folder, ("a.safetensors", "../b.safetensors"))
    assert (tmp_path / "b.safetensors").is_file()
    with pytest.raises(CheckpointError, match=r"\.\./b\.safetensors"):
        load(folder)


def test_packed_weights_stay_packed_in_memory(tmp_path: Path) -> None:
    write_compressed(tiny_olmoe(53), tmp_path, make_format("int4"))
    model = load(tmp_path)
    packed = sum(b.nbytes for m in model.modules() if isinstance(m, PackedLinear) for b in m.buffers(recurse=False))
    on_disk = load_file(tmp_path / "model.safetensors")
    assert packed == sum(tensor.nbytes for name, tensor in on_disk.items() if ".weight_" in name)
    dense = sum(parameter.nbytes for parameter in model.parameters())
    assert dense == sum(tensor.nbytes for name, tensor in on_disk.items() if ".weight_" not in name)


def test_a_loaded_model_generates(tmp_path: Path) -> None:
    model = tiny_llama(59)
    write_compressed(model, tmp_path, make_format("int8"))
    packed = load(tmp_path)
    tokens = sample_tokens(model, 5)
    ids = packed.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False, pad_token_id=2
    )
    step = tokens
    for _ in range(ids.shape[1] - 5):  # may end early
        step = torch.cat([step, output(packed, step)[:, -1:].argmax(-1)], -1)
    assert ids.shape[1] > 5
    assert torch.equal(ids, step)


def test_dequantized_yields_every_tensor_once(tmp_path: Path) -> None:
    model = tiny_llama(61).to(torch.bfloat16)
    write_compressed(model, tmp_path, make_format("nvfp4"))
    weights = dict(dequantized(tmp_path))
    with quiet():
        model.save_pretrained(tmp_path / "dense")
    original = load_file(tmp_path / "dense" / "model.safetensors")
    assert weights.keys() == original.keys()
    for name, value in weights.items():
        assert value.dtype == torch.float32
        assert value.shape == original[name].shape
        assert relative(value, original[name].float()) < 0.15
    assert torch.equal(weights["model.norm.weight"], original["model.norm.weight"].float())
