"""Batch normalization behind rounded convolutions: its running statistics follow what rounding did to its inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import compressor
import compressor.verify
from compressor.cli.app import app
from compressor.engine.batch_norm import Moments
from compressor.errors import RecipeError
from compressor.recipe import CalibrationSpec
from compressor.testing.images import rare_digits, tiny_classifier
from compressor.vision.calibration import calibration_images

SAMPLES = 4
LOGITS = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rare_digits(tmp_path_factory.mktemp("data") / "digits.npz")


@pytest.fixture(autouse=True)
def verified_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.verify.verify", compressor.verify.check)


def seen(folder: Path, data: Path) -> dict[str, tuple[nn.BatchNorm2d, torch.Tensor, torch.Tensor]]:
    """What every normalization of a checkpoint reads on the calibration images: itself, mean, variance."""
    model = compressor.load(folder)
    spec = CalibrationSpec(data=str(data), n_samples=SAMPLES)
    images = calibration_images(spec, folder, model.config).tokens.flatten(0, 1)
    found = {}

    def look(name: str, module: nn.BatchNorm2d) -> Any:
        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            x = arguments[0].double().transpose(0, 1).flatten(1)
            found[name] = (module, x.mean(1), x.var(1, correction=0))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(look(name, module))
    with torch.no_grad():
        model(images)
    return found


def quantized(folder: Path, data: Path, how: str | None, name: str, **more: Any) -> Path:
    source = folder / "resnet"
    if not source.exists():
        tiny_classifier("resnet").save_pretrained(source)
    wanted = {"method": "rtn", "format": "int2", "data": str(data), "n_samples": SAMPLES, **more}
    report = compressor.quantize(str(source), output=folder / name, batch_norm=how, **wanted)  # type: ignore[arg-type]
    assert report.verification["ok"]
    changed = [row for row in report.rows if row.action == "rewritten"]
    assert len(changed) == (18 if how else 0)  # mean and variance of the nine normalizations inside the stages
    assert all(".encoder." in row.name and "rounded layers" in str(row.reason) for row in changed)
    return folder / name


def test_moments_of_parts_are_those_of_the_whole() -> None:
    x = torch.randn(10, 3, 4, 5, generator=torch.Generator().manual_seed(0)) + 100
    whole, parts = Moments.of(x), Moments.of(x[:3])
    parts.add(Moments.of(x[3:]))
    torch.testing.assert_close(parts.mean, x.double().mean((0, 2, 3)))
    torch.testing.assert_close(parts.variance, x.double().var((0, 2, 3), correction=0))
    assert (whole.count, parts.count) == (200, 200)
    torch.testing.assert_close(whole.variance, parts.variance)


def test_corrected_statistics_move_by_what_rounding_did(tmp_path: Path, digits: Path) -> None:
    out = quantized(tmp_path, digits, "correct", "out")
    before, after = seen(tmp_path / "resnet", digits), seen(out, digits)
    moved = 0
    for name, (norm, mean, variance) in after.items():
        was, old_mean, old_variance = before[name]
        torch.testing.assert_close(norm.running_mean - mean, was.running_mean - old_mean, rtol=0, atol=1e-4)
        torch.testing.assert_close(norm.running_var / variance, was.running_var / old_variance, rtol=1e-3, atol=0)
        moved += not torch.equal(norm.running_mean, was.running_mean)
    assert moved == 9  # all but the stem's, which reads a dense convolution


def test_statistics_estimated_anew_are_those_of_the_images(tmp_path: Path, digits: Path) -> None:
    after = seen(quantized(tmp_path, digits, "reestimate", "out"), digits)
    for name, (norm, mean, variance) in after.items():
        if ".encoder." in name:
            torch.testing.assert_close(norm.running_mean, mean.float(), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(norm.running_var, variance.float(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_correction_serves_the_output(method: str, tmp_path: Path, digits: Path) -> None:
    outs = [quantized(tmp_path, digits, how, str(how), method=method) for how in (None, "correct")]
    with torch.no_grad():
        exact = compressor.load(tmp_path / "resnet")(LOGITS).logits
        plain, corrected = ((compressor.load(out)(LOGITS).logits - exact).norm() for out in outs)
    assert corrected < 0.9 * plain


def test_from_the_command_line(tmp_path: Path, digits: Path) -> None:
    tiny_classifier("resnet").save_pretrained(tmp_path / "resnet")
    arguments = ["quantize", str(tmp_path / "resnet"), "-m", "rtn", "-f", "int4", "--data", str(digits)]
    arguments += ["--n-samples", "2", "-o", str(tmp_path / "out")]
    bad = CliRunner().invoke(app, [*arguments, "--batch-norm", "corect"])
    assert isinstance(bad.exception, RecipeError)
    assert "did you mean correct?" in str(bad.exception.hint)
    good = CliRunner().invoke(app, [*arguments, "--batch-norm", "correct", "--quiet"], catch_exceptions=False)
    assert good.exit_code == 0
    report = json.loads((tmp_path / "out" / "compress_report.json").read_text())
    assert report["recipe"]["batch_norm"] == "correct"


def test_models_without_it_are_told_so(tmp_path: Path, digits: Path) -> None:
    tiny_classifier("convnext").save_pretrained(tmp_path / "convnext")
    with pytest.raises(RecipeError, match="--batch-norm correct: the blocks have no batch normalization"):
        compressor.quantize(
            str(tmp_path / "convnext"),
            method="rtn",
            format="int4",
            group_size="channel",
            data=str(digits),
            batch_norm="correct",
            output=tmp_path / "out",
        )
