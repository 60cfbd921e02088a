"""Verifying a written checkpoint in a fresh process: exit codes, the JSON on stdout, and every way to fail."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from compressor.errors import VerificationError
from compressor.formats import get_format
from compressor.runtime import load
from compressor.testing.checkpoints import write_compressed
from compressor.testing.models import sample_tokens, tiny_bert, tiny_mixtral, tiny_resnet
from compressor.verify import TOLERANCE, VerificationResult, check, main, verify


def written(model: PreTrainedModel, folder: Path, inputs: Tensor) -> Path:
    """Write a compressed checkpoint and a probe of what it gives in this process; return the probe's path."""
    write_compressed(model, folder, get_format("int4", 64, torch.float32))
    with torch.no_grad():
        expected = load(folder)(inputs)[0]
    probe = folder / "probe.st"
    save_file({"inputs": inputs, "logits": expected.contiguous()}, probe)
    return probe


@pytest.fixture
def mixtral(tmp_path: Path) -> tuple[Path, Path]:
    model = tiny_mixtral(3)
    return tmp_path, written(model, tmp_path, sample_tokens(model))


def edit(path: Path, name: str, value: Tensor | None) -> None:
    tensors = load_file(path)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_good_checkpoint_passes_with_one_json_object_on_stdout(mixtral: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "compressor.verify", *map(str, mixtral)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    result: dict[str, Any] = json.loads(child.stdout)
    keys = {"ok", "max_error", "relative_error", "tolerance", "missing", "unexpected", "error", "seconds"}
    assert result.keys() == keys
    assert result["ok"] is True
    assert result["relative_error"] < 1e-5
    assert result["tolerance"] == TOLERANCE == 1e-4
    assert result["missing"] == result["unexpected"] == []
    assert result["error"] is None
    assert VerificationResult.from_json(result).to_json() == result


def test_a_wrong_checkpoint_fails_in_a_fresh_process(mixtral: tuple[Path, Path]) -> None:
    folder, probe = mixtral
    scale = "model.layers.1.block_sparse_moe.experts.3.w2.weight_scale"
    edit(folder / "model.safetensors", scale, load_file(folder / "model.safetensors")[scale] * 1.5)
    result = verify(folder, probe)
    assert not result.ok
    assert result.relative_error > TOLERANCE
    assert result.max_error > 0
    assert result.error is None


def test_exit_codes(mixtral: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder, probe = mixtral
    assert main([str(folder), str(probe)]) == 0
    edit(probe, "logits", load_file(probe)["logits"] * 1.01)
    assert main([str(folder), str(probe)]) == 7
    first, second = capsys.readouterr().out.splitlines()
    assert (json.loads(first)["ok"], json.loads(second)["ok"]) == (True, False)
    probe.write_bytes(b"nonsense")
    assert main([str(folder), str(probe)]) == 2
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no probe" in captured.err


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo noise >&2; echo Killed >&2; exit 137", "code 137: Killed"),
        ("exit 0", "code 0: no output"),
        ("echo '{\"ok\": true}'; exit 0", "code 0: no output"),
    ],
)
def test_a_crash_is_an_error_with_its_last_line(
    script: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\n{script}\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    with pytest.raises(VerificationError, match=reason):
        verify(tmp_path, tmp_path / "probe.st")


def test_a_process_that_takes_too_long_is_an_error(mixtral: tuple[Path, Path]) -> None:
    with pytest.raises(VerificationError, match=r"not verified after 0\.01 s"):
        verify(*mixtral, timeout=0.01)


def test_encoders_and_image_models_are_verified_too(tmp_path: Path) -> None:
    bert = tiny_bert(5)
    assert check(tmp_path / "bert", written(bert, tmp_path / "bert", sample_tokens(bert))).ok
    model = tiny_resnet(7)
    model.save_pretrained(tmp_path / "resnet")
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    probe = tmp_path / "probe.st"
    with torch.no_grad():
        save_file({"inputs": image, "logits": model(image).logits}, probe)
    assert check(tmp_path / "resnet", probe).ok


def test_wrong_outputs_fail(mixtral: tuple[Path, Path]) -> None:
    folder, probe = mixtral
    logits = load_file(probe)["logits"]
    error = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
    error *= logits.norm() / error.norm()
    edit(probe, "logits", logits + 5e-5 * error)
    assert check(folder, probe).ok
    edit(probe, "logits", logits + 2e-4 * error)
    result = check(folder, probe)
    assert not result.ok
    assert result.relative_error == pytest.approx(2e-4, rel=0.05)
    edit(probe, "logits", logits[:, :-1].contiguous())
    assert "expected was [1, 39, 320]" in str(check(folder, probe).error)


def test_names_that_do_not_fit_are_listed(mixtral: tuple[Path, Path]) -> None:
    folder, probe = mixtral
    edit(folder / "model.safetensors", "model.norm.weight", None)
    edit(folder / "model.safetensors", "model.norm.bias", torch.zeros(64))
    result = check(folder, probe)
    assert not result.ok
    assert result.missing == ("model.norm.weight",)
    assert result.unexpected == ("model.norm.bias",)
    assert result.to_json()["max_error"] is None


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("model.norm.weight", torch.full((64,), float("nan")), "NaN"),
        ("model.layers.0.self_attn.q_proj.weight", torch.zeros(64, 64), "both weight and weight_packed"),
    ],
)
def test_untrustworthy_files_fail(mixtral: tuple[Path, Path], name: str, value: Tensor, reason: str) -> None:
    folder, probe = mixtral
    edit(folder / "model.safetensors", name, value)
    result = check(folder, probe)
    assert not result.ok
    assert reason in str(result.error)


def test_a_damaged_config_fails(mixtral: tuple[Path, Path]) -> None:
    folder, probe = mixtral
    (folder / "config.json").write_text("{")
    assert "config.json" in str(check(folder, probe).error)
