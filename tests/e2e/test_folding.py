"""Methods that move factors, the whole way: written, reloaded here and in stock transformers, resumed, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma2Config, Gemma2ForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

import compressor
from compressor.engine import Engine
from compressor.errors import NumericalError
from compressor.planner import make_plan
from compressor.report import RunReport
from compressor.testing import models
from compressor.testing.models import random_model
from compressor.testing.stock import Case, load_stock
from compressor.testing.tools import save_checkpoint, tree_hash, write_text

SMALL = {"vocab_size": 320, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}


def tiny_opt() -> PreTrainedModel:
    config = OPTConfig(**SMALL, ffn_dim=128, max_position_embeddings=64, word_embed_proj_dim=64, init_std=0.12)
    return random_model(lambda: OPTForCausalLM(config), 0)


def tiny_gemma() -> PreTrainedModel:
    config = Gemma2Config(**SMALL, intermediate_size=128, num_key_value_heads=2, head_dim=16, initializer_range=0.12)
    return random_model(lambda: Gemma2ForCausalLM(config), 0)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": models.tiny_llama,
    "grouped": lambda: models.tiny_llama(kv_heads=2, tied=False),
    "opt": tiny_opt,
    "gemma": tiny_gemma,
    "olmoe": models.tiny_olmoe,
}


SCALED: dict[str, dict[str, Any]] = {
    "gptq": {"scaling": "awq"},
    "flexround": {"scaling": "awq", "iters": 4},
    "adaround": {"scaling": "awq", "iters": 4},
}
"""Methods that move AWQ's factors if asked to, with their options."""


def quantize(source: Path, out: Path, text: Path, method: str, **options: Any) -> RunReport:
    options = {"format": "int4", "options": SCALED.get(method, {}), **options}
    return compressor.quantize(
        str(source), method=method, output=out, data=str(text), n_samples=6, seq_len=32, **options
    )


def test_results_load_in_stock_transformers_and_compute_the_same(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    cases = {}
    for name, method, dtype in (
        *((name, "awq", torch.bfloat16) for name in ("llama", "grouped", "opt", "gemma")),
        ("opt", "awq", torch.float32),
        ("olmoe", "awq", torch.float32),  # the stock reader decompresses experts to the dtype of the checkpoint
        ("grouped", "smoothquant", torch.float32),
        ("gemma", "smoothquant", torch.bfloat16),
        *((name, method, torch.bfloat16) for name, method in (("grouped", "gptq"), ("opt", "flexround"))),
        *(("olmoe", method, torch.float32) for method in ("gptq", "adaround")),
    ):
        case = f"{name}-{method}-{str(dtype).removeprefix('torch.')}"
        source = save_checkpoint(MODELS[name]().to(dtype), tmp_path / f"{case}-source")
        report = quantize(source, tmp_path / case, text, method)
        assert report.verification["relative_error"] < 1e-5
        check_rows(report, source, tmp_path / case)
        cases[case] = Case(tmp_path / case, "float32")
    for case, theirs in load_stock(cases, tmp_path).items():
        assert theirs.error is None, (case, theirs.error)
        assert not theirs.wrong_keys, (case, theirs.wrong_keys)
        model = compressor.load(tmp_path / case)
        with torch.no_grad():
            ours = model(torch.tensor([[5, 3]]))[0]
        assert theirs.output is not None
        assert float((ours - theirs.output).norm() / ours.norm()) < 1e-5, case


def check_rows(report: RunReport, source: Path, out: Path) -> None:
    """Every tensor that stays dense is as it was, or is reported as rewritten and has the same dtype and shape."""
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    rewritten = {row.name for row in report.rows if row.action == "rewritten"}
    for name in before.keys() & after.keys():
        assert (before[name].dtype, before[name].shape) == (after[name].dtype, after[name].shape)
        assert torch.equal(before[name], after[name]) != (name in rewritten), name
    assert rewritten, "nothing was moved"
    assert rewritten <= before.keys() & after.keys()
    for row in report.rows:
        if row.action == "rewritten":
            assert row.reason
            assert "divided per channel by factors that move into" in row.reason


def test_awq_is_closer_to_the_original_than_rounding(tmp_path: Path) -> None:
    """Tiny random models have no loud channels, so one is given some: a norm's gain up, its readers down."""
    model = models.tiny_llama()
    generator = torch.Generator().manual_seed(0)
    for block in model.model.layers:
        for norm, readers in (
            (block.input_layernorm, (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)),
            (block.post_attention_layernorm, (block.mlp.gate_proj, block.mlp.up_proj)),
        ):
            loud = torch.randperm(64, generator=generator)[:4]
            norm.weight[loud] *= 16
            for reader in readers:
                reader.weight[:, loud] /= 4
    source, text = save_checkpoint(model, tmp_path / "source"), write_text(tmp_path / "text.txt")
    tokens = models.sample_tokens(model, 64)
    errors = {}
    runs = {
        "rtn": {"method": "rtn"},
        "awq": {"method": "awq"},
        "scaling": {"method": "awq", "options": {"clip": False}},
        "gptq": {"method": "gptq", "options": {}},
        "gptq on scaled weights": {"method": "gptq"},
    }
    for name, options in runs.items():
        quantize(source, tmp_path / name, text, format="int3", **options)
        with torch.no_grad():
            difference = compressor.load(tmp_path / name)(tokens)[0] - model(tokens)[0]
        errors[name] = float(difference.norm())
    assert errors["awq"] < 0.8 * errors["rtn"], errors
    assert errors["scaling"] < 0.9 * errors["rtn"], errors
    assert errors["gptq on scaled weights"] < 0.95 * errors["gptq"], errors


def test_layers_in_no_fold_say_why(tmp_path: Path) -> None:
    source, text = save_checkpoint(models.tiny_olmoe(), tmp_path / "source"), write_text(tmp_path / "text.txt")
    report = quantize(source, tmp_path / "out", text, "awq")
    rows = {row.name: row for row in report.rows}
    assert "router" in (rows["model.layers.0.mlp.experts.1.gate_proj.weight"].reason or "")
    assert rows["model.layers.0.mlp.experts.1.down_proj.weight"].reason is None
    assert rows["model.layers.0.mlp.gate.weight"].action == "kept"
    assert sum("awq does not scale 8 gate_proj" in event for event in report.events) == 1
    written = json.loads((tmp_path / "out" / "compress_report.json").read_text())
    assert any(row["action"] == "rewritten" for row in written["rows"])


@pytest.mark.parametrize("method", ["awq", "smoothquant", "gptq", "flexround"])
@pytest.mark.parametrize("done", [1, 2])
def test_a_run_that_was_stopped_writes_the_same_bytes(
    method: str, done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.tiny_llama(layers=3).bfloat16()
    source, text = save_checkpoint(model, tmp_path / "source"), write_text(tmp_path / "text.txt")
    whole = quantize(source, tmp_path / "whole", text, method)
    commit = Engine._commit

    def stop(self: Engine, unit: Any, finished: Any, started: float) -> Any:
        known = commit(self, unit, finished, started)
        if len(finished) == done:
            raise KeyboardInterrupt
        return known

    monkeypatch.setattr(Engine, "_commit", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", text, method)
    monkeypatch.setattr(Engine, "_commit", commit)
    again = quantize(source, tmp_path / "out", text, method)
    assert again.resumed_at == done
    assert tree_hash(tmp_path / "out") == tree_hash(tmp_path / "whole")
    assert again.rows == whole.rows


@pytest.mark.parametrize("wrong", [{"bias": None}, {"offset": 1.0}])
def test_a_fold_that_changes_the_function_stops_the_run(
    wrong: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, text = save_checkpoint(tiny_opt(), tmp_path / "source"), write_text(tmp_path / "text.txt")

    def mistaken(*args: Any) -> Any:
        plan = make_plan(*args)
        return replace(plan, folds=tuple(replace(fold, **wrong) if fold.bias else fold for fold in plan.folds))

    monkeypatch.setattr("compressor.api.job.make_plan", mistaken)
    with pytest.raises(
        NumericalError, match=r"layers\.0: moving factors between its layers changed its output"
    ) as error:
        quantize(source, tmp_path / "out", text, "smoothquant")
    assert error.value.exit_code == 7
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_quantized_value_cache_keeps_its_scale(tmp_path: Path) -> None:
    source, text = save_checkpoint(models.tiny_llama(), tmp_path / "source"), write_text(tmp_path / "text.txt")
    plain = quantize(source, tmp_path / "rtn", text, "rtn", kv_cache="fp8")
    report = quantize(source, tmp_path / "awq", text, "awq", kv_cache="fp8")
    assert plain.verification["ok"]
    assert report.verification["ok"]
    scales = [load_file(tmp_path / name / "model.safetensors") for name in ("rtn", "awq")]
    names = [name for name in scales[0] if name.endswith(("k_scale", "v_scale"))]
    assert len(names) == 4
    for name in names:
        assert torch.equal(scales[0][name], scales[1][name]), name
    assert any("does not move factors past attention" in (row.reason or "") for row in report.rows)
