"""`compress check` without a folder: what the machine and the installation are."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from compressor import __version__
from compressor.check import doctor
from compressor.cli.app import app
from compressor.errors import RecipeError
from compressor.kernels import dispatch


def call(*flags: str) -> Result:
    return CliRunner().invoke(app, ["check", *flags], catch_exceptions=False)


def test_markdown_has_what_a_bug_report_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    done = call("--device", "cpu")
    assert done.exit_code == 0
    text = done.stdout
    assert text.startswith(f"### compress {__version__}\n")
    assert f"| torch | {version('torch')} | >=2.13 | ok |" in text
    assert "Kernels on cpu, activations bfloat16" in text
    assert "- OMP_NUM_THREADS=3\n" in text
    for words in ("- triton: ", "- cpu: ", " GB free, ", "- disk, this folder: ", "| nvfp4 | "):
        assert words in text
    assert "hf_secret" not in text
    assert str(Path.home()) not in text.replace("- disk, this folder", "")
    assert "\x1b" not in text


def test_json_says_the_same() -> None:
    data = json.loads(call("--json", "--device", "cpu").stdout)
    assert {package["name"] for package in data["packages"]} >= {"torch", "transformers", "safetensors", "typer"}
    assert data["untested"] == []
    assert data["devices"][0]["kind"] == "cpu"
    assert 0 < data["devices"][0]["free"] <= data["devices"][0]["memory"]
    assert all(free >= 0 for free in data["disks"].values())
    names = {kernel.name for kernel in dispatch.KERNELS}
    assert {choice["format"] for choice in data["kernels"]} == set(doctor.FORMATS)
    assert all(set(choice["rows"].values()) <= names for choice in data["kernels"])


def test_an_untested_or_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "importlib.metadata.requires", lambda _: ["torch>=99", "not-there>=1", "pillow; extra == 'vision'"]
    )
    environment = doctor.examine(torch.device("cpu"))
    assert [package.name for package in environment.untested] == ["torch", "not-there"]
    assert "| not-there | missing | >=1 | NOT TESTED |" in environment.to_markdown()


def test_a_forced_kernel_that_cannot_run_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_KERNEL", "triton")
    environment = doctor.examine(torch.device("cpu"))
    assert environment.variables["COMPRESS_KERNEL"] == "triton"
    assert any(text.startswith("none: ") for choice in environment.kernels for text in choice.rows.values())


def test_flags_that_need_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags in (["--for", "vllm"], ["--quick"]):
        with pytest.raises(RecipeError, match="needs a checkpoint folder"):
            CliRunner().invoke(app, ["check", *flags], catch_exceptions=False, standalone_mode=False)
