"""Experts that a checkpoint stores as one tensor per layer: taken apart, compressed, written and run one by one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GraniteMoeConfig, GraniteMoeForCausalLM, PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from typer.testing import CliRunner

import compressor
from compressor.check.finding import Severity
from compressor.check.run import check
from compressor.checkpoint.fused_experts import split_experts
from compressor.checkpoint.skeleton import Skeleton
from compressor.checkpoint.source import Source
from compressor.cli.app import app
from compressor.errors import CheckpointError
from compressor.inspection import inspect_checkpoint
from compressor.runtime import PackedExperts, dequantized
from compressor.stacks import places
from compressor.testing import models
from compressor.testing.stock import Case, load_stock
from compressor.testing.tools import save_checkpoint, write_text

STACKS = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")


def tiny_granite() -> PreTrainedModel:
    """A mixture whose stacks lie as others have them, but have names of their own on disk."""
    config = GraniteMoeConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.12,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return models.random_model(lambda: GraniteMoeForCausalLM(config), 0)


def mxfp4_checkpoint(folder: Path) -> PreTrainedModel:
    """Write a GPT-OSS as it is published, experts in blocks of MXFP4; returns the float32 model it stands for."""
    model = models.tiny_gpt_oss()
    save_checkpoint(copy.deepcopy(model).to(torch.bfloat16), folder)
    for param in model.parameters():
        param.copy_(param.bfloat16())
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(122, 126, blocks.shape[:-1], generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        model.get_parameter(name).data.copy_(convert_moe_packed_tensors(blocks, scales))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def quantize(source: Path, out: Path, **settings: Any) -> Path:
    compressor.quantize(str(source), output=out, **{"method": "rtn", "format": "int4", "group_size": 32, **settings})
    return out


def put(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Give a dense float32 model the weights that a checkpoint of ours stands for."""
    model = model.float()
    values = dict(dequantized(folder))
    for stack, module in model.named_modules():
        for expert, role, leaf, where in places(module) if type(module).__name__.endswith("Experts") else ():
            where.of(module.get_parameter(leaf).data).copy_(values.pop(f"{stack}.{expert}.{role}_proj.weight"))
    model.load_state_dict(values, strict=False)
    assert not values.keys() - set(model.state_dict())
    return model


@pytest.mark.parametrize("build", [models.tiny_gpt_oss, tiny_granite])
def test_the_loaded_model_is_the_dense_one_with_the_decoded_weights(
    build: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    source = save_checkpoint(build().to(torch.bfloat16), tmp_path / "source")
    out = quantize(source, tmp_path / "out")
    loaded = compressor.load(out)
    assert sum(isinstance(module, PackedExperts) for module in loaded.modules()) == 2
    tokens = models.sample_tokens(loaded)
    with torch.no_grad():
        if build is models.tiny_gpt_oss:  # names of Granite's other tensors differ on disk
            torch.testing.assert_close(loaded(tokens).logits, put(build(), out)(tokens).logits, rtol=1e-4, atol=1e-4)
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)  # this package is imported
        torch.testing.assert_close(model(tokens).logits, loaded(tokens).logits, rtol=0, atol=0)
    assert loaded.generate(tokens[:, :5], max_new_tokens=4, do_sample=False).shape == (1, 9)


def test_stock_transformers_raises_and_the_plan_says_so(tmp_path: Path) -> None:
    source = save_checkpoint(models.tiny_gpt_oss().to(torch.bfloat16), tmp_path / "source")
    out = quantize(source, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "compressor_gpt_oss"
    events = json.loads((out / "compress_report.json").read_text())["events"]
    assert any("stored one by one, which compressor.load alone reads" in event for event in events)
    answer = load_stock({"out": Case(out)}, tmp_path)["out"]
    assert answer.error is not None
    assert "compressor_gpt_oss" in answer.error


def test_experts_that_all_stay_dense_stay_one_tensor(tmp_path: Path) -> None:
    source = save_checkpoint(models.tiny_gpt_oss().to(torch.bfloat16), tmp_path / "source")
    out = quantize(source, tmp_path / "out", skip=["*.experts.*"])
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    for stack in STACKS:
        for leaf in ("gate_up_proj", "down_proj", "gate_up_proj_bias"):
            assert torch.equal(before[f"{stack}.{leaf}"], after[f"{stack}.{leaf}"])
    assert not any(".experts.0." in name for name in after)
    assert torch.isfinite(compressor.load(out)(models.sample_tokens(models.tiny_gpt_oss())).logits).all()


def test_experts_of_some_layers_alone(tmp_path: Path) -> None:
    """Elsewhere readers want all experts packed or none; these checkpoints have one reader, which takes both."""
    source = save_checkpoint(models.tiny_gpt_oss().to(torch.bfloat16), tmp_path / "source")
    out = quantize(source, tmp_path / "out", skip=[f"{STACKS[0]}.*"])
    names = set(load_file(out / "model.safetensors"))
    assert {f"{STACKS[0]}.down_proj", f"{STACKS[1]}.3.down_proj.weight_packed"} <= names
    loaded = compressor.load(out)
    assert [isinstance(loaded.get_submodule(stack), PackedExperts) for stack in STACKS] == [False, True]
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokens = models.sample_tokens(loaded)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, loaded(tokens).logits, rtol=0, atol=0)


def test_reading_expert_by_expert_gives_what_the_stack_holds(tmp_path: Path) -> None:
    model = models.tiny_gpt_oss().to(torch.bfloat16)
    source = Source.open(save_checkpoint(model, tmp_path))
    split = split_experts(source, Skeleton.build(tmp_path))
    module: Any = model.get_submodule(STACKS[0])
    read = split.read(name for name in split.tensors if name.startswith(f"{STACKS[0]}.") and "bias" not in name)
    assert len(read) == 4 * 3
    for expert in range(4):
        gate_up, down = module.gate_up_proj[expert], module.down_proj[expert]
        assert torch.equal(read[f"{STACKS[0]}.{expert}.gate_proj.weight"], gate_up[:, 0::2].T)
        assert torch.equal(read[f"{STACKS[0]}.{expert}.up_proj.weight"], gate_up[:, 1::2].T)
        assert torch.equal(read[f"{STACKS[0]}.{expert}.down_proj.weight"], down.T)
    assert sum(info.nbytes for info in split.tensors.values()) == sum(info.nbytes for info in source.tensors.values())


def test_check_inspect_and_bits(tmp_path: Path) -> None:
    source = save_checkpoint(models.tiny_gpt_oss().to(torch.bfloat16), tmp_path / "source")
    text = write_text(tmp_path / "text.txt", 1500)
    data = {"data": str(text), "n_samples": 4, "seq_len": 24}
    out = quantize(source, tmp_path / "out", format=None, target_bits=4.5, **data)
    chosen = [row for row in json.loads((out / "compress_report.json").read_text())["rows"] if row["action"] != "kept"]
    assert len({row["action"] for row in chosen if ".experts." in row["name"]}) <= 2  # one for each layer's experts
    assert not check(out).findings(Severity.ERROR)
    seen = inspect_checkpoint(out, ["*.experts.2.gate_proj"], source)
    assert len(seen.layers) == 2
    assert all(drawing.original for drawing in seen.drawings)
    done = CliRunner().invoke(app, ["quantize", str(source), "-m", "rtn", "--dry-run"])
    assert done.exit_code == 0, done.output


# --- GPT-OSS as it is published: experts in MXFP4 ---


def test_published_stacks_are_decoded_and_mxfp4_keeps_every_value(tmp_path: Path) -> None:
    model = mxfp4_checkpoint(tmp_path / "source")
    tokens = models.sample_tokens(model)
    with torch.no_grad():
        dense = compressor.load(tmp_path / "source")  # a baseline for `compress eval`
        torch.testing.assert_close(dense(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
    out = quantize(tmp_path / "source", tmp_path / "out", format="mxfp4", group_size=None, skip=["*.self_attn.*"])
    values = dict(dequantized(out))
    for stack in STACKS:
        module = model.get_submodule(stack)
        for expert, role, leaf, where in places(module):
            expected: Tensor = where.of(module.get_parameter(leaf)).float()
            assert torch.equal(values[f"{stack}.{expert}.{role}_proj.weight"], expected)
    report = json.loads((out / "compress_report.json").read_text())
    assert any("MXFP4" in event for event in report["events"])
    quantize(tmp_path / "source", tmp_path / "four")
    assert torch.isfinite(compressor.load(tmp_path / "four")(tokens).logits).all()


def test_published_stacks_that_stay_dense_are_written_decoded(tmp_path: Path) -> None:
    model = mxfp4_checkpoint(tmp_path / "source")
    out = quantize(tmp_path / "source", tmp_path / "out", skip=["*.experts.*"])
    after = load_file(out / "model.safetensors")
    for stack in STACKS:
        for leaf in ("gate_up_proj", "down_proj"):
            assert torch.equal(after[f"{stack}.{leaf}"], model.get_parameter(f"{stack}.{leaf}").bfloat16())


def test_published_stacks_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    mxfp4_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"{STACKS[0]}.down_proj_scales"
    save_file({**tensors, name: tensors[name][:, :3].clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="down_proj_blocks: is U8"):
        Source.open(tmp_path)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="down_proj_scales: is missing"):
        Source.open(tmp_path)
