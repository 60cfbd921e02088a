"""Checking checkpoints: good ones have nothing to say, those of other programs can be checked too, and the way out."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

import compressor.verify
from compressor.check import CHECKS, check
from compressor.check import reload as reloading
from compressor.cli.app import main
from compressor.errors import CheckpointError, UnsupportedError, VerificationError
from compressor.formats import get_format
from compressor.testing import models
from compressor.testing.broken import BUILDERS, SHARD, Broken, Maker, copy_of, problems, text
from compressor.testing.checkpoints import write_compressed

Q = "model.layers.0.self_attn.q_proj"
O = "model.layers.0.self_attn.o_proj"  # noqa: E741 - the layer's name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Maker]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressor.verify.verify", compressor.verify.check)
        yield Maker(tmp_path_factory.mktemp("check"))


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reload in this process; the fresh one has a test of its own."""
    monkeypatch.setattr("compressor.check.on_reload.reload_fresh", reloading.reload)


def activations(broken: Broken) -> None:
    """Make a weight-only NVFP4 checkpoint one that quantizes its inputs, as other programs write them."""
    inputs = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    broken.group(lambda g: g.update(input_activations={**inputs, "dynamic": "local"}))
    names = [name for name in load_file(broken.folder / SHARD) if name.endswith("weight_global_scale")]
    value = torch.tensor([100.0])
    broken.tensors(lambda t: t.update({n.replace("weight_global", "input_global"): value.clone() for n in names}))


@pytest.mark.parametrize("name", [name for name in BUILDERS if name not in ("int4-asym", "moe-nvfp4")])
def test_good_ones_have_nothing_to_say(name: str, made: Maker, inline: None) -> None:
    report = check(made(name))
    assert problems(report) == set(), text(report)
    reloaded = report.checks[-1]
    assert reloaded.check.id == "reload.output"
    assert "differs from that of the decoded weights by" in str(reloaded.findings[0])
    report.raise_for_errors()


def test_sharded_ones_too(made: Maker, tmp_path: Path, inline: None) -> None:
    broken = copy_of(made("int4"), tmp_path / "copy")
    broken.shard()
    assert problems(check(broken.folder)) == set()


@pytest.mark.parametrize("fmt", ["int4", "nvfp4", "fp8-block"])
def test_checkpoints_of_other_programs(fmt: str, tmp_path: Path, inline: None) -> None:
    """Without report, recipe or tokenizer there is less to compare with, and nothing wrong."""
    write_compressed(models.tiny_mixtral(), tmp_path, get_format(fmt, 32 if fmt == "int4" else None, torch.float32))
    report = check(tmp_path)
    assert report.ok, text(report)
    assert "written by another program" in text(report)
    assert "tokenizer.json" in text(report)


def test_quantized_inputs_can_be_checked(made: Maker, tmp_path: Path) -> None:
    broken = copy_of(made("nvfp4"), tmp_path / "copy")
    activations(broken)
    report = check(broken.folder, quick=True)
    assert problems(report) == set(), text(report)
    assert report.stored == {"nvfp4, inputs nvfp4": 14}
    assert all(row.kernel == "cpu-table" for row in report.kernels)
    other = copy_of(broken.folder, tmp_path / "other")
    other.group(lambda g: g["input_activations"].update(group_size=32))
    report = check(other.folder, quick=True)
    assert report.stored == {"nvfp4, inputs fp4": 14}
    assert all(row.kernel is None and "input_activations" in row.others["compressor.load"] for row in report.kernels)
    broken.drop(f"{Q}.input_global_scale")
    assert problems(check(broken.folder, quick=True)) == {("tensors.layout", "error")}


def test_changed_files_are_noticed(made: Maker, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(made("int4"), folder)
    assert problems(check(folder, quick=True)) == set()
    (folder / "generation_config.json").write_text("{}")
    report = check(folder, quick=True)
    assert problems(report) == {("files.hashes", "warning")}
    Broken(folder).edit("model.norm.weight", lambda tensor: tensor.mul_(2))
    report = check(folder, quick=True)
    assert problems(report) == {("files.hashes", "warning"), ("files.hashes", "error")}
    assert "model.safetensors: changed since it was written" in text(report)


def test_wrong_output_is_an_error(made: Maker, tmp_path: Path, inline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference decodes from disk, so damage that only one of the two readers has shows."""
    real = reloading.load

    def damaged(path: Path, **options: Any) -> PreTrainedModel:
        model = real(path, **options)
        scale = model.get_submodule(O)._buffers["weight_scale"]
        scale.mul_(1.01)
        return model

    monkeypatch.setattr(reloading, "load", damaged)
    report = check(made("int4"))
    assert problems(report) == {("reload.output", "error")}
    assert "this is a bug" in text(report)
    with pytest.raises(VerificationError, match=r"1 error: reload\.output: output: differs"):
        report.raise_for_errors()


def test_reloading_reports_names_that_do_not_fit(made: Maker, tmp_path: Path) -> None:
    broken = copy_of(made("int4"), tmp_path / "copy")
    broken.rename("model.norm.weight", "model.norm.bias")
    found = reloading.reload(reloading.Job(str(broken.folder)))
    assert (found.missing, found.unexpected) == (("model.norm.weight",), ("model.norm.bias",))


def test_errors_come_before_reloading(made: Maker, tmp_path: Path) -> None:
    broken = copy_of(made("int4"), tmp_path / "copy")
    broken.drop("model.norm.weight")
    assert check(broken.folder).checks[-1].skipped == "not tried: 2 errors above come first"


def test_kernels_are_listed_with_reasons(made: Maker) -> None:
    report = check(made("mixed"), quick=True)
    rows = {row.pattern: row for row in report.kernels}
    assert len(rows) == 7
    down = rows["model.layers.*.mlp.down_proj"]
    assert (down.count, down.format, down.shape) == (2, "fp8, per channel", (64, 128))
    assert down.kernel == "reference"
    assert "reference" not in down.others
    assert all(down.others.values())
    assert report.stored == {"int4, groups of 32": 12, "fp8, per channel": 2}


def test_dense_ones_say_so(made: Maker, inline: None) -> None:
    report = check(made("dense"))
    assert report.container == "dense"
    assert "nothing is compressed here" in text(report)
    assert not report.kernels
    assert any(checked.skipped == "nothing is compressed" for checked in report.checks)


def test_what_is_no_checkpoint(made: Maker, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        check(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        check(tmp_path)
    broken = copy_of(made("int4"), tmp_path / "copy")
    broken.section(lambda section: section.update(quant_method="gptq"))
    with pytest.raises(UnsupportedError, match="'gptq'"):
        check(broken.folder)
    (broken.folder / "config.json").rename(broken.folder / "config.json.failed")
    with pytest.raises(VerificationError, match="failed its verification"):
        check(broken.folder)


@pytest.mark.parametrize(
    ("break_it", "options", "code"),
    [
        (False, ["--quick"], 0),
        (True, ["--quick"], 7),
        (False, ["--quick", "--for", "vlm"], 2),
    ],
)
def test_command_line(
    break_it: bool,
    options: list[str],
    code: int,
    made: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = copy_of(made("int4"), tmp_path / "copy")
    if break_it:
        broken.drop("model.norm.weight")

    def run(*more: str) -> tuple[str, str]:
        monkeypatch.setattr("sys.argv", ["compress", "check", str(broken.folder), *options, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code
        return capsys.readouterr()

    out, err = run("--quiet")
    if code == 2:
        assert "did you mean vllm?" in err
        return
    assert "cannot be trusted" in out if break_it else "can be trusted" in out
    assert ("error:" in err) is break_it
    out, _ = run("--json")
    answer = json.loads(out)
    assert answer["ok"] is not break_it
    assert {entry["id"] for entry in answer["checks"]} == {*(entry.id for entry in CHECKS), "reload.output"}
    out, _ = run()
    assert "kernels on cpu" in out
    assert "tensors.names" in out


@pytest.mark.fresh_process
def test_stock_transformers_in_a_fresh_process(made: Maker) -> None:
    report = check(made("nvfp4"), reader="transformers")
    assert problems(report) == set(), text(report)
    said = text(report)
    assert "14 are bit-equal in stock transformers (torch.bfloat16)" in said
    assert "stock transformers differs by" in said


def test_metadata_survives_the_helpers(made: Maker, tmp_path: Path) -> None:
    """What the cases change is what they say they change, and nothing else."""
    broken = copy_of(made("int4"), tmp_path / "copy")
    broken.edit("model.norm.weight", lambda tensor: tensor.mul_(1))
    with safe_open(broken.folder / SHARD, framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}
    assert problems(check(broken.folder, quick=True)) == set()
