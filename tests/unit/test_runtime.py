"""Loading checkpoints: equal to stock transformers bit for bit, packed in memory, and loud about anything wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel
from transformers.integrations.moe import use_experts_implementation

from compressor.checkpoint.skeleton import quiet
from compressor.errors import CheckpointError, UnsupportedError
from compressor.formats import get_format
from compressor.formats.base import QuantFormat
from compressor.runtime import KeyMismatch, PackedExperts, PackedLinear, dequantized, execution_path, load
from compressor.testing.checkpoints import dense_twin, write_compressed
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


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


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
    assert execution_path(packed) == f"reference-float32 (packed {fmt})"
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
    edit_tensors(tmp_path, replaced(name, lambda t: torch.linspace(0.001, 1, 4)))
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


Q_PROJ = "model.layers.0.self_attn.q_proj"
NORM = "model.norm.weight"


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[new] = tensors.pop(old)

    return change


def replaced(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = make(tensors[name])

    return change


def poisoned(value: float) -> Callable[[Tensor], Tensor]:
    def make(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return make


@pytest.mark.parametrize(
    ("fmt", "change", "reason"),
    [
        ("int4", renamed(NORM, "model.norm.wait"), "missing: model.norm.weight.*unexpected: model.norm.wait"),
        ("int4", lambda t: t.pop(f"{Q_PROJ}.weight_scale"), f"missing: {Q_PROJ}.weight_scale"),
        ("int4", lambda t: t.pop(f"{Q_PROJ}.weight_packed"), f"missing: {Q_PROJ}.weight"),
        ("int4", lambda t: t.update({f"{Q_PROJ}.weight_zero_point": torch.zeros(8, 1)}), "unexpected.*zero_point"),
        ("int4-asym", lambda t: t.pop(f"{Q_PROJ}.weight_zero_point"), f"missing: {Q_PROJ}.weight_zero_point"),
        ("int4-asym", replaced(f"{Q_PROJ}.weight_zero_point", lambda t: t.repeat(8, 1)), r"\[64, 1\].*\[8, 1\]"),
        ("int4-asym", replaced(f"{Q_PROJ}.weight_zero_point", lambda t: t.to(torch.int8)), "is I8"),
        ("int4", lambda t: t.update({f"{Q_PROJ}.input_shift": torch.zeros(64)}), "unexpected.*input_shift"),
        ("int4", lambda t: t.update({f"{Q_PROJ}.weight": torch.zeros(64, 64)}), "both weight and weight_packed"),
        ("int4", replaced(f"{Q_PROJ}.weight_packed", lambda t: t[:, :-1].clone()), r"\[64, 7\].*\[64, 8\]"),
        ("int4", replaced(f"{Q_PROJ}.weight_packed", lambda t: t.long()), "I64"),
        ("int4", replaced(f"{Q_PROJ}.weight_shape", lambda t: t.flip(0) + 1), r"\[65, 65\]"),
        ("int4", replaced(f"{Q_PROJ}.weight_scale", poisoned(float("nan"))), "weight_scale"),
        ("mxfp4", replaced(f"{Q_PROJ}.weight_scale", poisoned(255)), "weight_scale: 1 of"),
        ("nvfp4", replaced(f"{Q_PROJ}.weight_global_scale", lambda t: t * 0), "weight_global_scale: 1 of 1"),
        ("nvfp4", replaced(f"{Q_PROJ}.weight_scale", poisoned(float("nan"))), "weight_scale: 1 of"),
        ("fp8", lambda t: t.pop(f"{Q_PROJ}.weight_scale"), f"missing: {Q_PROJ}.weight_scale"),
        ("fp8", lambda t: t.pop(f"{Q_PROJ}.weight"), f"missing: {Q_PROJ}.weight.*unexpected: {Q_PROJ}.weight_scale"),
        ("fp8", replaced(f"{Q_PROJ}.weight", lambda t: t.float()), f"unexpected: {Q_PROJ}.weight_scale"),
        ("fp8", replaced(f"{Q_PROJ}.weight", lambda t: t[:, :-1].clone()), r"\[64, 63\].*\[64, 64\]"),
        ("fp8", replaced(f"{Q_PROJ}.weight", poisoned(float("nan"))), f"{Q_PROJ}.weight: 1 of 4096"),
        ("fp8", replaced(f"{Q_PROJ}.weight_scale", poisoned(float("inf"))), "weight_scale: 1 of"),
        ("fp8", lambda t: t.update({f"{Q_PROJ}.weight_zero_point": torch.zeros(64, 1)}), "unexpected.*zero_point"),
        ("fp8-block", replaced(f"{Q_PROJ}.weight_scale", lambda t: t.repeat(2, 1)), r"\[2, 1\].*\[1, 1\]"),
        ("mxfp8", replaced(f"{Q_PROJ}.weight_scale", poisoned(255)), "weight_scale: 1 of"),
        ("int4", replaced(NORM, poisoned(float("inf"))), "model.norm.weight: 1 of 64"),
        ("int4", replaced(NORM, lambda t: t[:-1].clone()), "model.norm.weight"),
        (
            "int4",
            lambda t: t.update({"model.layers.7.mlp.up_proj.weight_packed": torch.zeros(2)}),
            "unexpected.*layers.7",
        ),
    ],
)
def test_damaged_tensors_are_named(
    fmt: str, change: Callable[[dict[str, Tensor]], object], reason: str, tmp_path: Path
) -> None:
    write_compressed(tiny_llama(), tmp_path, make_format(fmt))
    load(tmp_path)
    edit_tensors(tmp_path, change)
    with pytest.raises(CheckpointError, match=reason):
        load(tmp_path)


def set_group(key: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["quantization_config"]["config_groups"]["group_0"].update({key: value})


def set_quantization(key: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["quantization_config"].update({key: value})


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        (set_quantization("quant_method", "awq"), CheckpointError, "awq"),
        (set_quantization("quantization_status", "initialized"), CheckpointError, "initialized"),
        (set_quantization("ignore", ["lm_head", "re:.*q_proj"]), CheckpointError, "q_proj: is stored packed"),
        (set_quantization("ignore", []), CheckpointError, "lm_head: is stored dense, but group_0"),
        (set_group("input_activations", {"num_bits": 8}), KeyMismatch, "missing: .*input_scale"),
        (set_group("input_activations", {"num_bits": 3}), UnsupportedError, "input_activations with num_bits 3"),
        (set_group("input_activations", "int8"), CheckpointError, "input_activations is 'int8'"),
        (set_group("output_activations", {"num_bits": 8}), UnsupportedError, "output_activations"),
        (set_group("format", "int-quantized"), UnsupportedError, "int-quantized"),
        (set_group("targets", ["re:model.layers.0"]), CheckpointError, r"layers\.1.* is stored packed"),
        (lambda config: config.pop("quantization_config"), CheckpointError, "is stored packed"),
        (lambda config: config.update(quantization_config=[1]), CheckpointError, "quantization_config"),
        (lambda config: config.update(architectures=["LlamaForever"]), UnsupportedError, "LlamaForever"),
        (lambda config: config.update(architectures=["logging"]), UnsupportedError, "logging"),
        (lambda config: config.pop("architectures"), CheckpointError, "architecture"),
        (lambda config: config.update(model_type="llamma"), CheckpointError, "llamma"),
        (lambda config: config.update(num_hidden_layers=3), KeyMismatch, "missing: model.layers.2"),
        (lambda config: config.update(num_hidden_layers=1), KeyMismatch, "unexpected: model.layers.1"),
        (lambda config: config.update(intermediate_size=64), CheckpointError, "mlp"),
    ],
)
def test_configs_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Any]], object], error: type[Exception], reason: str, tmp_path: Path
) -> None:
    write_compressed(tiny_llama(), tmp_path, make_format("int4"))
    edit_config(tmp_path, change)
    with pytest.raises(error, match=reason):
        load(tmp_path)


def test_a_key_mismatch_carries_all_names(tmp_path: Path) -> None:
    write_compressed(tiny_llama(), tmp_path, make_format("int4"))
    edit_tensors(tmp_path, lambda tensors: [tensors.pop(NORM), tensors.pop("model.embed_tokens.weight")])
    edit_tensors(tmp_path, lambda tensors: tensors.update({"a": torch.zeros(1), "b": torch.zeros(1)}))
    with pytest.raises(KeyMismatch) as caught:
        load(tmp_path)
    assert set(caught.value.missing) == {NORM, "model.embed_tokens.weight", "lm_head.weight"}
    assert caught.value.unexpected == ("a", "b")


EXPERT = "model.layers.1.mlp.experts.2.up_proj"


def test_experts_must_be_complete_and_all_packed(tmp_path: Path) -> None:
    write_compressed(tiny_olmoe(), tmp_path, make_format("int4"))
    stored = load_file(tmp_path / "model.safetensors")
    edit_tensors(tmp_path, lambda t: [t.pop(name) for name in stored if name.startswith(f"{EXPERT}.")])
    with pytest.raises(CheckpointError, match=r"experts\.2"):
        load(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({f"{EXPERT}.weight": torch.zeros(64, 64)}))
    with pytest.raises(CheckpointError, match=r"experts\.2\.up_proj\.weight is stored dense"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("dropped", "dense", "reason"),
    [
        (".up_proj.", False, "experts: no expert has a packed up projection"),
        (".gate_proj.", False, r"experts\.\d\..*up_proj"),
        (".down_proj.", False, r"missing: .*experts\.down_proj"),
        (".down_proj.", True, r"down_proj\.weight is stored dense"),
    ],
)
def test_every_projection_of_the_experts_must_be_packed(dropped: str, dense: bool, reason: str, tmp_path: Path) -> None:
    write_compressed(tiny_olmoe(), tmp_path, make_format("int4"))

    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if dropped in name and "experts" in name:
                del tensors[name]
                if dense:
                    tensors[f"{name.rpartition('.')[0]}.weight"] = torch.zeros(64, 64)

    edit_tensors(tmp_path, change)
    with pytest.raises((CheckpointError, UnsupportedError), match=reason):
        load(tmp_path)


def test_weights_tied_by_config_must_agree(tmp_path: Path) -> None:
    model = tiny_llama(tied=False)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config.update(tie_word_embeddings=True))
    with pytest.raises(CheckpointError, match="different values"):
        load(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    loaded = load(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize("fmt", ["fp8", "mxfp8"])
def test_codes_that_are_named_like_dense_weights_stay_packed_in_memory(fmt: str, tmp_path: Path) -> None:
    write_compressed(tiny_llama(), tmp_path, make_format(fmt))
    stored = load_file(tmp_path / "model.safetensors")
    model = load(tmp_path)
    layer = model.get_submodule(Q_PROJ)
    assert isinstance(layer, PackedLinear)
    assert layer.state_dict().keys() == {"weight", "weight_scale"}
    assert torch.equal(layer.state_dict()["weight"].view(torch.uint8), stored[f"{Q_PROJ}.weight"].view(torch.uint8))
    assert layer.weight.dtype == torch.float32
    layer.to(torch.bfloat16)
    assert layer.state_dict()["weight"].dtype == torch.float8_e4m3fn
    assert model.state_dict().keys() == stored.keys() | {"lm_head.weight"}


def test_dense_weights_of_one_byte_are_no_codes_unless_a_scale_says_so(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    name = f"{Q_PROJ}.weight"
    edit_tensors(tmp_path, replaced(name, lambda t: t.to(torch.float8_e4m3fn)))
    stored = load_file(tmp_path / "model.safetensors")[name].float()
    assert torch.equal(load(tmp_path).get_parameter(name), stored)
    assert torch.equal(dict(dequantized(tmp_path))[name], stored)
    edit_tensors(tmp_path, lambda t: t.update({f"{name}_scale": torch.ones(64, 1)}))
    with pytest.raises(CheckpointError, match=f"{Q_PROJ}: is stored packed"):
        load(tmp_path)


def test_casting_to_a_narrow_dtype_must_not_overflow(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda t: t[NORM].mul_(1e6))
    load(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        load(tmp_path, dtype=torch.float16)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_broken_files_are_refused(content: bytes, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="no such directory"):
        load(tmp_path / "nowhere")


class Activation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


class FakeExperts(nn.Module):
    """Three experts of width 16 on 32 inputs; the classes below differ in the flags of their decorators."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(67)
        self.up_proj = nn.Parameter(torch.randn(3, 16, 32, generator=generator))
        self.gate_up_proj = nn.Parameter(torch.randn(3, 32, 32, generator=generator))
        self.down_proj = nn.Parameter(torch.randn(3, 32, 16, generator=generator))
        self.act_fn = Activation()

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError


def fake(**flags: bool) -> nn.Module:
    decorated = use_experts_implementation(type("Fake", (FakeExperts,), {}), **flags)
    return decorated(None)


def packed_experts(source: nn.Module, gated: bool) -> tuple[PackedExperts, list[dict[str, Tensor]]]:
    fmt = make_format("mxfp4")
    generator = torch.Generator().manual_seed(71)
    experts, dense = [], []
    for _ in range(3):
        layers, weights = {}, {}
        for role in ("gate", "up", "down")[0 if gated else 1 :]:
            weight = torch.randn((64, 32) if role != "down" else (32, 64), generator=generator)
            qparams = fmt.fit(weight)
            codes = fmt.encode(weight, qparams)
            layers[f"{role}_proj"] = PackedLinear(fmt.pack(codes, qparams), fmt)
            weights[role] = fmt.decode(codes, qparams)
        experts.append(layers)
        dense.append(weights)
    roles = {role: f"{role}_proj" for role in dense[0]}
    return PackedExperts(source, experts, roles), dense


@pytest.mark.parametrize("gated", [True, False])
def test_packed_experts_equal_explicit_arithmetic(gated: bool) -> None:
    module, dense = packed_experts(fake(has_gate=gated), gated)
    generator = torch.Generator().manual_seed(73)
    x = torch.randn(9, 32, generator=generator)
    index = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(9)])  # 3 is no expert: skipped
    assert (index == 3).any()
    share = torch.rand(9, 2, generator=generator)
    expected = torch.zeros(9, 32, dtype=torch.float64)
    for token in range(9):
        for slot in range(2):
            expert = int(index[token, slot])
            if expert < 3:
                weights = {role: value.double() for role, value in dense[expert].items()}
                hidden = weights["up"] @ x[token].double()
                hidden = torch.tanh(weights["gate"] @ x[token].double()) * hidden if gated else torch.tanh(hidden)
                expected[token] += share[token, slot].double() * (weights["down"] @ hidden)
    assert relative(module(x, index, share), expected) < 1e-5
    assert not list(module.source.parameters())  # the dense stacks are gone
    assert "2.down_proj.weight_packed" in module.state_dict()


@pytest.mark.parametrize(
    "flags",
    [{"is_transposed": True}, {"has_bias": True}, {"has_post_expert_norm": True}, {"is_concatenated": False}],
)
def test_expert_layouts_that_are_not_computed_are_refused(flags: dict[str, bool]) -> None:
    with pytest.raises(UnsupportedError, match=f"Fake: .*{next(iter(flags))}"):
        packed_experts(fake(**flags), True)


def test_experts_that_do_not_describe_themselves_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"FakeExperts: .*has_gate"):
        packed_experts(FakeExperts(None), True)
