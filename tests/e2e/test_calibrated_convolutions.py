"""Convolutions rounded with calibration images: statistics of their windows, learned rounding, and what it buys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import compressor
import compressor.verify
from compressor import api
from compressor.calibration.capture import windows
from compressor.errors import RecipeError
from compressor.formats.ints import IntFormat
from compressor.methods.base import Layer
from compressor.methods.flexround import Division, FlexRoundOptions
from compressor.plan import Kind, WeightRef, Where
from compressor.recipe import Recipe
from compressor.report import RunReport
from compressor.testing.images import rare_digits, tiny_classifier
from compressor.vision.images import read_data
from compressor.vision.pixels import Preprocess


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": (3, 1), "dilation": 2},
        {"kernel_size": (5, 3), "padding": "same"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        {"kernel_size": 1, "stride": 2},
    ],
)
def test_windows_times_matrix_is_the_convolution(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, bias=False, **settings).requires_grad_(False)
    x = torch.randn(3, 4, 9, 7)
    expected = conv(x)
    got = windows(conv, x) @ conv.weight.flatten(1).T  # [3 * positions, out]
    torch.testing.assert_close(got.view(3, -1, 6).transpose(1, 2).reshape(expected.shape), expected)


def test_channel_divisors_of_a_convolution_have_the_gradient_of_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (5, 3, 2, 2)
    w = torch.randn(5, 12, generator=generator)
    where = Where()
    ref = WeightRef("c.weight", "c.weight", where, Kind.CONV, shape, (5, 12), "F32", 0, "c", "c.weight")
    fmt = IntFormat(3, None, torch.float32)
    layer = Layer(ref, w)
    rounding = Division(layer, fmt.fit(w), fmt, FlexRoundOptions())
    for variable, _ in rounding.groups:
        variable.add_(0.1 * torch.randn(variable.shape, generator=generator))
    rounding.value()
    gradient = torch.randn(w.shape, generator=generator)
    rounding.backward(gradient, 0.0)
    step = fmt.steps(rounding.params())[:, 0]  # [out, 1]
    channel = rounding.log_channel.clone().requires_grad_()  # [in, 1]
    divided = w * torch.exp(-rounding.log_divisor - rounding.log_row - channel.repeat_interleave(4, 0).T)
    z = divided / step
    passed = z + (z.round() - z).detach()
    (passed.clamp(-4, 3) * step).backward(gradient)
    assert rounding.log_channel.grad is not None
    assert channel.grad is not None
    torch.testing.assert_close(rounding.log_channel.grad, channel.grad, rtol=1e-4, atol=1e-5)
    without = Division(layer, fmt.fit(w), fmt, FlexRoundOptions(channel_divisor=False))
    linear = Division(replace(layer, ref=replace(ref, kind=Kind.LINEAR)), fmt.fit(w), fmt, FlexRoundOptions())
    assert len(without.groups) == len(linear.groups) == len(rounding.groups) - 1


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rare_digits(tmp_path_factory.mktemp("data") / "digits.npz")


@pytest.fixture(autouse=True)
def verified_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare most tests the fresh process."""
    if "serve_the_output" not in request.node.name:
        monkeypatch.setattr("compressor.verify.verify", compressor.verify.check)


def quantized(root: Path, data: Path, kind: str = "resnet", **more: Any) -> tuple[RunReport, Path]:
    source = root / kind
    if not source.exists():
        tiny_classifier(kind).save_pretrained(source)
    out = root / f"out-{len(list(root.iterdir()))}"
    wanted = {"format": "int3", "data": str(data), "n_samples": 8, **more}
    return compressor.quantize(str(source), output=out, **wanted), out


def off_by(out: Path, source: Path, data: Path) -> float:
    """Relative error of the logits on test images, which no method saw."""
    test = read_data(str(data)).test
    images = Preprocess(source, 3)([np.asarray(test.read(index)) for index in range(0, len(test), 8)])
    with torch.no_grad():
        expected, got = compressor.load(source)(images).logits, compressor.load(out)(images).logits
    return float((got - expected).norm() / expected.norm())


def test_methods_with_data_serve_the_output_better_than_rounding_to_nearest(tmp_path: Path, digits: Path) -> None:
    errors = {}
    for name, more in {
        "rtn": {"method": "rtn"},
        "gptq": {"method": "gptq"},
        "adaround": {"method": "adaround", "options": {"iters": 60}},
        "flexround": {"method": "flexround", "options": {"iters": 60}},
        "nupes": {"method": "nupes", "format": "power3", "options": {"iters": 60}},
    }.items():
        report, out = quantized(tmp_path, digits, **more)  # type: ignore[arg-type]
        assert report.verification["ok"], name
        convolutions = [row for row in report.rows if row.action != "kept"]
        assert len(convolutions) == 9
        errors[name] = off_by(out, tmp_path / "resnet", digits)
    assert all(errors[name] < 0.9 * errors["rtn"] for name in errors if name != "rtn"), errors


def test_the_same_images_give_the_same_bytes(tmp_path: Path, digits: Path) -> None:
    more: dict[str, Any] = {"method": "flexround", "options": {"iters": 2}}
    first, one = quantized(tmp_path, digits, **more)
    second, two = quantized(tmp_path, digits, **more)
    assert first.digest == second.digest
    files = [path.name for path in one.glob("*.safetensors")]
    assert files
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in files)
    other, _ = quantized(tmp_path, digits, n_samples=4, **more)
    assert other.digest != first.digest


def test_grouped_convolutions_are_learned_and_said_to_stay_where_statistics_are_wanted(
    tmp_path: Path, digits: Path
) -> None:
    few: dict[str, Any] = {"format": "int4", "n_samples": 2}
    report, _ = quantized(tmp_path, digits, "mobilenet", method="flexround", options={"iters": 1}, **few)
    assert sum(row.action == "int4" and ".conv_3x3." in row.name for row in report.rows) > 10
    recipe = Recipe(model=str(tmp_path / "mobilenet"), method="gptq", format="int4")
    plan = api.prepare(recipe, tmp_path / "never").plan
    kept = {layer.kept_because for layer in plan.layers if layer.ref.conv_groups > 1 and layer.ref.block >= 0}
    assert len(kept) > 3
    assert all(why and "groups read channels of their own; gptq wants statistics" in why for why in kept)


def test_what_cannot_be_done_is_said(tmp_path: Path, digits: Path) -> None:
    with pytest.raises(RecipeError, match="'python-docs' is text, and this model reads images"):
        quantized(tmp_path, Path("python-docs"), method="gptq")
    with pytest.raises(RecipeError, match=r"500 samples are 4000 images, the training set has \d+") as few:
        quantized(tmp_path, digits, method="gptq", n_samples=500)
    assert few.value.hint is not None
    assert few.value.hint.startswith("use --n-samples ")
    with pytest.raises(RecipeError, match="option blend is about tokens of a text"):
        quantized(tmp_path, digits, method="flexround", options={"blend": 0.5})
