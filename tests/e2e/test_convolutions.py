"""Quantized convolutions: what is stored is what runs, in both loaders, in cut models too."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification

import compressor
import compressor.verify
from compressor.check.model import build_model
from compressor.check.reload import decoded_source
from compressor.checkpoint.skeleton import Skeleton
from compressor.errors import CompressorError
from compressor.formats import get_format
from compressor.runtime import execution_path
from compressor.runtime.convolution import PackedConv2d
from compressor.testing.images import rare_digits, tiny_classifier
from compressor.vision.job import prune

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((got - expected).norm() / expected.norm()) < 0.05


def saved(kind: str, folder: Path) -> str:
    tiny_classifier(kind).save_pretrained(folder / kind)
    return str(folder / kind)


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": (3, 1), "dilation": 2, "bias": False},
        {"kernel_size": 3, "groups": 4, "padding": "same"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    ],
)
def test_packed_convolution_is_the_decoded_one(settings: dict) -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(4, 8, **settings).requires_grad_(False)
    fmt = get_format("int4", None, torch.float32)
    matrix = dense.weight.flatten(1)
    parameters = fmt.fit(matrix)
    codes = fmt.encode(matrix, parameters)
    packed = PackedConv2d(fmt.pack(codes, parameters), fmt, dense)
    images = torch.rand(2, 4, 9, 9)
    dense.weight.copy_(fmt.decode(codes, parameters).view_as(dense.weight))
    assert torch.equal(packed.weight, dense.weight)
    torch.testing.assert_close(packed(images), dense(images))


@pytest.mark.parametrize(("kind", "format"), [("resnet", "int8"), ("mobilenet", "int4"), ("convnext", "int8")])
def test_both_loaders_run_what_was_stored(kind: str, format: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    group = {"group_size": "channel"} if kind == "convnext" else {}  # its linear layers are narrower than a group
    report = compressor.quantize(saved(kind, tmp_path), method="rtn", format=format, output=out, **group)  # type: ignore[arg-type]
    assert report.verification["ok"]
    ours = compressor.load(out)
    theirs, info = AutoModelForImageClassification.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    dense = tiny_classifier(kind)
    convolutions = {name: m for name, m in ours.named_modules() if isinstance(m, PackedConv2d)}
    assert convolutions
    assert "reference-float32 (packed" in execution_path(ours)
    for name, module in convolutions.items():
        weight = dense.get_submodule(name).weight
        assert module.weight.shape == weight.shape
        step = weight.flatten(1).abs().amax(1) / (2 ** (int(format[3:]) - 1) - 1)
        assert ((module.weight - weight).flatten(1).abs().amax(1) <= 0.51 * step).all(), name
        assert torch.equal(theirs.get_submodule(name).weight, module.weight)
    with torch.no_grad():
        torch.testing.assert_close(theirs(IMAGES).logits, ours(IMAGES).logits)
        if format == "int8":
            assert close(ours(IMAGES).logits, dense(IMAGES).logits)


def test_cut_then_quantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.verify.verify", compressor.verify.check)
    monkeypatch.setattr("compressor.vision.job.latency", lambda model, images: 1e-3)
    data = str(rare_digits(tmp_path / "digits.npz"))
    cut, out = tmp_path / "cut", tmp_path / "out"
    prune(saved("resnet", tmp_path), data=data, sparsity=0.5, output=cut)
    report = compressor.quantize(str(cut), method="rtn", format="int8", output=out)
    assert report.verification["ok"]
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "compressor_resnet"
    assert config["quantization_config"]["cuts"]["modules"]
    assert config["quantization_config"]["modules"]
    ours, theirs = compressor.load(out), AutoModelForImageClassification.from_pretrained(out)
    with torch.no_grad():
        torch.testing.assert_close(theirs(IMAGES).logits, ours(IMAGES).logits)
        assert close(ours(IMAGES).logits, compressor.load(cut)(IMAGES).logits)
    with pytest.raises(CompressorError, match="quantized already"):
        prune(str(out), data=data, sparsity=0.5, output=tmp_path / "again")


def test_check_reads_them_too(tmp_path: Path) -> None:
    out = tmp_path / "out"
    compressor.quantize(saved("mobilenet", tmp_path), method="rtn", format="int8", output=out)
    skeleton = Skeleton.build(out)
    source = decoded_source(out, skeleton)
    skeleton.load(source.read(source.tensors))
    ours = compressor.load(out)
    for name, module in ours.named_modules():
        if isinstance(module, PackedConv2d):
            assert torch.equal(skeleton.model.get_submodule(name).weight, module.weight), name
    model = build_model(out, {name: info.shape for name, info in source.tensors.items()}, False)
    assert model.shape_of("mobilenet_v2.layer.0.conv_3x3.convolution.weight") == (48, 9)
