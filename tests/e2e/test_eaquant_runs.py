"""EAQuant from the command to the loaded model, and what its pieces do on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

import compressor
from compressor.check import check
from compressor.report import RunReport
from compressor.runtime import PackedExperts, PackedLinear
from compressor.testing import models
from compressor.testing.stock import Case, load_stock
from compressor.testing.tools import save_checkpoint, write_text


def run(model: PreTrainedModel, root: Path, **settings: Any) -> RunReport:
    source = root / "source"
    if not source.exists():
        source.mkdir(parents=True)
        save_checkpoint(model, source)
        write_text(root / "text.txt", 1500)
    options = {"rotations": 8, "block": 32, **settings.pop("options", {})}
    wanted = {"format": "int4", "group_size": "channel", "output": root / "out", "n_samples": 4, "seq_len": 32}
    chosen = {**wanted, **settings}
    return compressor.quantize(str(source), method="eaquant", data=str(root / "text.txt"), options=options, **chosen)


def logits(folder: Path, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = compressor.load(folder)(tokens).logits
    return out


@pytest.mark.parametrize("build", [models.tiny_olmoe, models.tiny_qwen2_moe, models.tiny_deepseek, models.tiny_llama])
def test_moving_factors_and_rotating_keep_the_function(build: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    """With eight bits everywhere nothing but the rounding of eight bits is left of smoothing, folds and rotations."""
    model = build().to(torch.bfloat16)
    clip = {"input_clip": 1.0}
    report = run(model, tmp_path, format="int8-asym", inputs="int8-token-asym", options=clip)
    assert report.verification["relative_error"] <= 1e-4
    errors = [row.output_error for row in report.rows if row.output_error is not None]
    assert len(errors) > 10
    assert max(errors) < 0.05  # of weights in the basis they are stored in, on inputs in the same
    loaded = compressor.load(tmp_path / "out")
    packed = [module for module in loaded.modules() if isinstance(module, PackedLinear)]
    assert packed
    assert all(module.inputs[0].describe()["op"] == "rotate" for module in packed)
    tokens = models.sample_tokens(model)
    with torch.no_grad():
        expected = model.float()(tokens).logits
    assert (logits(tmp_path / "out", tokens) - expected).norm() / expected.norm() < 0.08
    rewritten = {row.name for row in report.rows if row.action == "rewritten"}
    assert any("layernorm" in name for name in rewritten)
    assert any("mlp.gate.weight" in name for name in rewritten) == (build is not models.tiny_llama)


def test_four_bit_inputs_of_experts_with_outliers_gain_from_it(tmp_path: Path) -> None:
    model = models.tiny_olmoe()
    for name, param in model.named_parameters():
        if name.endswith("layernorm.weight"):
            param[7] *= 30  # the norm's channel is loud, and everything that reads it knows
        elif "gate_up_proj" in name:
            param[:, :, 7] /= 30
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "mlp.gate.weight")):
            param[:, 7] /= 30
    tokens = models.sample_tokens(model)
    with torch.no_grad():
        expected = model(tokens).logits
    errors = {}
    for name, options in (
        ("whole", {"rotations": 32}),
        ("base", {"smoothing": "off", "folds": False, "transform": "off"}),
    ):
        run(model, tmp_path, inputs="int4-token-asym", options=options, output=tmp_path / name)
        errors[name] = float((logits(tmp_path / name, tokens) - expected).norm() / expected.norm())
    assert errors["whole"] < 0.8 * errors["base"]


def test_weight_only_results_are_read_by_stock_transformers(tmp_path: Path) -> None:
    model = models.tiny_olmoe().to(torch.bfloat16)
    run(model, tmp_path, group_size=32)
    loaded = load_stock({"": Case(tmp_path / "out")}, tmp_path)[""]
    assert loaded.error is None
    assert not loaded.wrong_keys
    theirs, router = loaded.weights, "model.layers.0.mlp.gate.weight"
    assert torch.equal(theirs[router], load_file(tmp_path / "out" / "model.safetensors")[router])
    ours = dict(compressor.runtime.dequantized(tmp_path / "out"))
    down = torch.stack([ours[f"model.layers.0.mlp.experts.{e}.down_proj.weight"] for e in range(4)])
    assert torch.equal(theirs["model.layers.0.mlp.experts.down_proj"], down.bfloat16())


def test_each_piece_can_be_switched_off(tmp_path: Path) -> None:
    model = models.tiny_olmoe().to(torch.bfloat16)
    original = {name: param.clone() for name, param in model.named_parameters()}

    def stored(name: str, **options: Any) -> tuple[RunReport, dict[str, Tensor]]:
        report = run(model, tmp_path, options=options, output=tmp_path / name)
        return report, load_file(tmp_path / name / "model.safetensors")

    norm, router = "model.layers.0.post_attention_layernorm.weight", "model.layers.0.mlp.gate.weight"
    report, whole = stored("whole")
    assert not torch.equal(whole[norm], original[norm])
    assert len(whole[router][0].unique()) <= 64  # 64 inputs on at most 256 steps, and in the router's own dtype
    assert report.units[0]["router_agreement"] > 0.9
    _, plain = stored("plain", smoothing="off", router_bits=0)
    assert torch.equal(plain[norm], original[norm])
    assert torch.equal(plain[router], original[router])
    _, exact = stored("exact", router_bits=0)
    factors = original[norm].float() / exact[norm].float()
    assert torch.equal(factors.log2(), factors.log2().round())  # powers of two: exact in the router's few bits
    assert torch.equal(exact[router].float(), original[router].float() * factors)
    results = [stored(mode, smoothing=mode)[1][norm] for mode in ("max_gate", "sum1", "sum2", "sum3")]
    assert not any(torch.equal(result, whole[norm]) for result in results[1:])


def test_balance_gives_every_expert_its_share(tmp_path: Path) -> None:
    model = models.tiny_olmoe()
    for name, param in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            param.zero_()
    balanced = run(model, tmp_path)
    wanted = int(2 / 4 * 32 * 2.0)
    tokens = {row.tokens for row in balanced.rows if ".experts." in row.name}
    assert min(tokens) == wanted
    natural = run(model, tmp_path, options={"balance": 0}, min_expert_tokens=0, output=tmp_path / "natural")
    assert min(row.tokens for row in natural.rows if ".experts." in row.name) == 0
    assert any("has no say in smoothing" in event for event in natural.events)


def test_what_is_stored_is_described_and_checked(tmp_path: Path) -> None:
    run(models.tiny_olmoe().to(torch.bfloat16), tmp_path, inputs="int4-token")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "compressor_olmoe"
    inputs = config["quantization_config"]["inputs"]
    assert [step["op"] for step in inputs[0]] == ["rotate", "permute", "rotate", "quantize"]
    loaded = compressor.load(tmp_path / "out")
    assert any(isinstance(module, PackedExperts) for module in loaded.modules())
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = models.sample_tokens(loaded)
    with torch.no_grad():
        assert torch.equal(stock(tokens).logits, loaded(tokens).logits)
    assert check(tmp_path / "out", quick=False).ok
