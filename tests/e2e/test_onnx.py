"""Export to ONNX: one file that ONNX Runtime computes the same logits with, or an error and no file."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import compressor
import compressor.verify
from compressor.cli.app import app
from compressor.errors import RecipeError, UnsupportedError, VerificationError
from compressor.testing.images import rare_digits, tiny_classifier
from compressor.testing.models import tiny_bert
from compressor.vision import onnx_export
from compressor.vision.job import prune
from compressor.vision.onnx_export import decode_packed, export_onnx

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.verify.verify", compressor.verify.check)
    monkeypatch.setattr("compressor.vision.job.latency", lambda model, images: 1e-3)


def saved(kind: str, folder: Path) -> str:
    tiny_classifier(kind).save_pretrained(folder / kind)
    return str(folder / kind)


def test_cut_and_rounded_resnet_runs_elsewhere(tmp_path: Path) -> None:
    data = str(rare_digits(tmp_path / "digits.npz"))
    cut, small, file = tmp_path / "cut", tmp_path / "small", tmp_path / "new" / "small.onnx"
    prune(saved("resnet", tmp_path), data=data, sparsity=0.5, method="l1", output=cut)
    compressor.quantize(str(cut), method="rtn", format="int8", output=small)
    arguments = ["export", str(small), "--onnx", str(file), "--image-size", "32", "--json"]
    found = json.loads(CliRunner().invoke(app, arguments, catch_exceptions=False).stdout)
    assert found["images"] == ["batch", 3, 32, 32]
    assert found["decoded"] == 9
    assert found["bytes"] == file.stat().st_size
    assert "BatchNormalization" not in found["operators"]  # folded into the convolutions before it
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    images = torch.rand(5, 3, 32, 32)
    got = torch.from_numpy(session.run(["logits"], {"pixel_values": images.numpy()})[0])
    with torch.no_grad():
        torch.testing.assert_close(got, compressor.load(small)(images).logits, rtol=1e-3, atol=1e-4)
    assert [path.name for path in file.parent.iterdir()] == ["small.onnx"]
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, RecipeError)
    assert "exists" in again.exception.message


def test_wrong_logits_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = SimpleNamespace(save=lambda path: Path(path).write_bytes(b"model"))
    monkeypatch.setattr(onnx_export, "_exported", lambda *_: program)
    monkeypatch.setattr(onnx_export, "_difference", lambda *_: 0.5)
    with pytest.raises(VerificationError, match=r"differ by 5\.0e-01"):
        export_onnx(saved("resnet", tmp_path), tmp_path / "out" / "a.onnx", image_size=32)
    assert not list((tmp_path / "out").iterdir())


def test_packages_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "onnxscript" else real(name, *rest)

    monkeypatch.setattr("importlib.util.find_spec", without)
    with pytest.raises(UnsupportedError, match="needs onnxscript") as error:
        export_onnx(saved("resnet", tmp_path), tmp_path / "a.onnx")
    assert error.value.hint == "pip install 'compress-hf[onnx]'"


def test_what_cannot_be_exported_is_said(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "bert")
    with pytest.raises(UnsupportedError, match="is no image classifier"):
        export_onnx(str(tmp_path / "bert"), tmp_path / "a.onnx")
    with pytest.raises(RecipeError, match="does not say how large its images are"):
        export_onnx(saved("resnet", tmp_path), tmp_path / "a.onnx")
    out = tmp_path / "rounded"
    rounded = {"method": "rtn", "format": "int8", "inputs": "int8-token", "group_size": "channel"}
    compressor.quantize(saved("convnext", tmp_path), output=out, **rounded)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="rounds its inputs"):
        decode_packed(compressor.load(out))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"size": {"height": 40, "width": 48}, "do_center_crop": False}, (40, 48)),
        ({"size": {"shortest_edge": 36}, "do_center_crop": False}, (36, 36)),
        ({"size": {"shortest_edge": 36}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}, (32, 32)),
    ],
)
def test_sizes_of_image_processors(tmp_path: Path, fields: dict[str, Any], expected: tuple[int, int]) -> None:
    folder = Path(saved("resnet", tmp_path))
    config = {"image_processor_type": "ViTImageProcessor", "do_resize": True, **fields}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    assert onnx_export._size("resnet", folder, compressor.load(folder)) == expected
