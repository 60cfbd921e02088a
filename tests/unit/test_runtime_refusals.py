"""Checkpoints that are damaged, incomplete or say wrong things are refused, and what is wrong is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from compressor.errors import CheckpointError, UnsupportedError
from compressor.formats import get_format
from compressor.formats.base import QuantFormat
from compressor.runtime import KeyMismatch, PackedLinear, dequantized, load
from compressor.testing.checkpoints import edit_config, edit_tensors, write_compressed
from compressor.testing.models import (
    tiny_llama,
    tiny_olmoe,
)


def make_format(name: str, dtype: torch.dtype = torch.float32) -> QuantFormat:
    return get_format(name, 64, dtype)


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
