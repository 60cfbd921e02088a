"""Methods on experts of several architectures: every expert is compressed, none is lost, and the result loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import compressor
from compressor.runtime import PackedExperts, dequantized
from compressor.testing import models
from compressor.testing.tools import save_checkpoint, write_text

RUNS: list[tuple[Callable[[], PreTrainedModel], str, dict[str, Any]]] = [
    (models.tiny_mixtral, "rtn", {"format": "int4", "inputs": "int8-token"}),
    (models.tiny_mixtral, "gptq", {"format": "int4"}),
    (models.tiny_mixtral, "flexround", {"format": "int4", "options": {"iters": 2}}),
    (models.tiny_qwen3_moe, "fp4", {"format": "mxfp4", "inputs": "mxfp8"}),
    (models.tiny_qwen3_moe, "gptq", {"format": "int4", "inputs": "int8-token"}),
    (models.tiny_qwen3_moe, "nupes", {"format": "power4", "group_size": 32, "options": {"iters": 2}}),
    (models.tiny_olmoe, "fp4", {"format": "mxfp4"}),
    (models.tiny_olmoe, "flexround", {"format": "int4", "inputs": "int4-token", "options": {"iters": 2}}),
    (models.tiny_olmoe, "outliertune", {"format": "int8", "group_size": "channel"}),
    (models.tiny_deepseek, "rtn", {"format": "mxfp4"}),
    (models.tiny_deepseek, "gptq", {"format": "int4", "inputs": "int8-tensor"}),
    (models.tiny_deepseek, "nupes", {"format": "power4", "group_size": 32, "options": {"iters": 2}}),
]


@pytest.mark.parametrize(("build", "method", "settings"), RUNS, ids=lambda part: getattr(part, "__name__", None))
def test_every_expert_is_compressed(
    build: Callable[[], PreTrainedModel], method: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = build().to(torch.bfloat16)
    source, text = save_checkpoint(model, tmp_path / "source"), write_text(tmp_path / "text.txt", 1500)
    if settings["format"] == "int4":
        settings = {"group_size": 32 if settings.get("inputs") != "int4-token" else "channel", **settings}
    report = compressor.quantize(
        str(source), method=method, output=tmp_path / "out", data=str(text), n_samples=4, seq_len=24, **settings
    )
    stacks = [module for module in model.modules() if type(module).__name__.endswith("Experts")]
    rows = [row for row in report.rows if ".experts." in row.name]
    assert len(rows) == len(stacks) * 4 * 3
    for row in rows:
        assert row.action == ("int8-bytes" if method == "outliertune" else settings["format"])
        assert row.inputs == (settings.get("inputs") or ("int8-token" if method == "outliertune" else None))
        assert row.error is not None
        assert row.error < 0.2, row.name
    for name, weight in dequantized(tmp_path / "out"):
        assert torch.isfinite(weight).all()
        assert ".experts." not in name or weight.any()
    loaded = compressor.load(tmp_path / "out")
    assert sum(isinstance(module, PackedExperts) for module in loaded.modules()) == len(stacks)
    tokens = models.sample_tokens(model)
    with torch.no_grad():
        expected, got = model.float()(tokens).logits, loaded(tokens).logits
    assert (got - expected).norm() / expected.norm() < 0.8  # wide random weights, and routers that choose anew
