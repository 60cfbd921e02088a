"""The whole line on a real model: quantize, evaluate against the original, gate; as a shell would run it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from compressor.testing.tools import run_cli

pytestmark = [pytest.mark.slow, pytest.mark.network]

MODEL = "smollm2-135m"


def compress(*arguments: str | Path, code: int = 0) -> str:
    done = run_cli(*arguments)
    assert done.returncode == code, f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def evaluated(folder: Path, results: Path) -> tuple[Path, Path]:
    compress("eval", folder, "--baseline", MODEL, "--max-tokens", "4096", "-o", results, "--quiet")
    return results / "compress_eval_baseline.json", results / "compress_eval.json"


def without_times(path: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    del found["timing"]
    return found


def test_int8_passes_and_int3_and_a_broken_layer_fail(tmp_path: Path) -> None:
    for bits in ("int8", "int3"):
        compress("quantize", "--method", "rtn", "--format", bits, MODEL, "-o", tmp_path / bits, "--quiet")
    base, new = evaluated(tmp_path / "int8", tmp_path / "first")
    compress("gate", base, new, "--rule", "ppl <= +2%")
    again_base, again = evaluated(tmp_path / "int8", tmp_path / "second")
    assert without_times(new) == without_times(again)
    assert without_times(base) == without_times(again_base)
    base, new = evaluated(tmp_path / "int3", tmp_path / "third")
    told = compress("gate", base, new, "--rule", "ppl <= +2%", code=3)
    assert "fail" in told
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "int8", broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.11.mlp.down_proj.weight_scale"] *= 2
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    base, new = evaluated(broken, tmp_path / "fourth")
    compress("gate", base, new, "--rule", "ppl <= +2%", "--rule", "kl <= 0.05", code=3)
