"""Batch normalization behind rounded convolutions: its running statistics follow what rounding did to its inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import compressor
import compressor.verify
from compressor.cli.app import app
from compressor.engine.batch_norm import Moments, statistics
from compressor.errors import RecipeError
from compressor.recipe import CalibrationSpec
from compressor.testing.images import rare_digits, tiny_classifier
from compressor.vision.calibration import calibration_images
from compressor.vision.images import read_data
from compressor.vision.pixels import Preprocess

SAMPLES = 4


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rare_digits(tmp_path_factory.mktemp("data") / "digits.npz")


@pytest.fixture(autouse=True)
def verified_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.verify.verify", compressor.verify.check)


def outputs(folder: Path, data: Path) -> dict[str, tuple[nn.BatchNorm2d, torch.Tensor, torch.Tensor]]:
    """Every normalization of a checkpoint, and what it reads and gives on calibration images, `[channels, values]`."""
    model = compressor.load(folder)
    spec = CalibrationSpec(data=str(data), n_samples=SAMPLES)
    images = calibration_images(spec, folder, model.config).tokens.flatten(0, 1)
    found = {}

    def look(name: str) -> Any:
        def hook(module: nn.BatchNorm2d, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            read, gave = (x.double().transpose(0, 1).flatten(1).clone() for x in (arguments[0], output))
            found[name] = (module, read, gave)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(look(name))
    with torch.no_grad():
        model(images)
    return found


def quantized(folder: Path, data: Path, how: str | None, name: str, **more: Any) -> Path:
    source = folder / "resnet"
    if not source.exists():
        tiny_classifier("resnet").save_pretrained(source)
    wanted = {"method": "rtn", "format": "int3", "data": str(data), "n_samples": SAMPLES, **more}
    report = compressor.quantize(str(source), output=folder / name, batch_norm=how, **wanted)  # type: ignore[arg-type]
    assert report.verification["ok"]
    changed = [row for row in report.rows if row.action == "rewritten"]
    assert len(changed) == (18 if how else 0)  # mean and variance of the nine normalizations inside the stages
    assert all(".encoder." in row.name and "rounded layers" in str(row.reason) for row in changed)
    return folder / name


def test_moments_of_parts_are_those_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    now, noise = (torch.randn(10, 3, 4, 5, generator=generator) for _ in range(2))
    now, was = now + 100, 2 * now + noise
    parts = Moments.of(now[:3], was[:3])
    parts.add(Moments.of(now[3:], was[3:]))
    flat = [x.double().transpose(0, 1).flatten(1) for x in (now, was)]
    expected = torch.stack([torch.cov(torch.stack(pair), correction=0) for pair in zip(*flat, strict=True)])
    torch.testing.assert_close(parts.now, flat[0].mean(1))
    torch.testing.assert_close(parts.was, flat[1].mean(1))
    torch.testing.assert_close(parts.spread, expected[:, 0, 0])
    torch.testing.assert_close(parts.shared, expected[:, 0, 1])
    assert parts.count == 200


def test_statistics_by_hand() -> None:
    norm = nn.BatchNorm1d(1, eps=0.0)
    norm.running_mean.fill_(1.0)
    norm.running_var.fill_(4.0)
    was, now = torch.tensor([[3.0], [5.0]]), torch.tensor([[10.0], [14.0]])  # now = 2 * was + 4
    moments = Moments.of(now, was)
    found = statistics(norm, moments, correct=True)
    assert (float(found["running_mean"]), float(found["running_var"])) == (6.0, 16.0)
    torch.testing.assert_close((now - 6) / 4, (was - 1) / 2)
    anew = statistics(norm, moments, correct=False)
    assert (float(anew["running_mean"]), float(anew["running_var"])) == (12.0, 8.0)


def test_corrected_normalizations_give_what_the_originals_do(tmp_path: Path, digits: Path) -> None:
    out = quantized(tmp_path, digits, "correct", "out")
    before, after = outputs(tmp_path / "resnet", digits), outputs(out, digits)
    fitted = 0
    for name, (norm, _, gave) in after.items():
        was, _, wanted = before[name]
        if ".encoder." not in name:
            assert torch.equal(norm.running_mean, was.running_mean)
            continue
        torch.testing.assert_close(gave.mean(1), wanted.mean(1), rtol=0, atol=1e-4)
        away, wanted_away = gave - gave.mean(1, keepdim=True), wanted - wanted.mean(1, keepdim=True)
        slopes = (away * wanted_away).mean(1) / away.square().mean(1)
        assert (slopes - 1).abs().median() < 1e-4  # single channels may lie at the bounds
        fitted += 1
    assert fitted == 9


def test_statistics_estimated_anew_are_those_of_the_images(tmp_path: Path, digits: Path) -> None:
    for name, (norm, read, _) in outputs(quantized(tmp_path, digits, "reestimate", "out"), digits).items():
        if ".encoder." in name:
            torch.testing.assert_close(norm.running_mean, read.mean(1).float(), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(norm.running_var, read.var(1).float(), rtol=1e-3, atol=1e-5)


def test_correction_serves_the_output_of_other_images(tmp_path: Path, digits: Path) -> None:
    outs = [quantized(tmp_path, digits, how, str(how)) for how in (None, "correct")]
    test = read_data(str(digits)).test
    chosen = [np.asarray(test.read(index)) for index in range(0, len(test), 8)]
    images = Preprocess(tmp_path / "resnet", 3)(chosen)
    with torch.no_grad():
        exact = compressor.load(tmp_path / "resnet")(images).logits
        plain, corrected = ((compressor.load(out)(images).logits - exact).norm() for out in outs)
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
