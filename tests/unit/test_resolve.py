"""From a name to a checkpoint: what a name can be, and code that comes with a checkpoint runs only when trusted."""

import gc
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import compressor
from compressor import verify
from compressor.api import prepare
from compressor.checkpoint.config import read_config
from compressor.checkpoint.custom_code import needs_code
from compressor.checkpoint.hub import refuse_names, side_files
from compressor.checkpoint.resolve import HUB_ID, resolve_model
from compressor.cli import app as cli
from compressor.environment import load_tokenizer
from compressor.errors import CheckpointError, CompressorError, UnsupportedError
from compressor.measure import original_of
from compressor.recipe import Recipe
from compressor.testing import models
from compressor.testing.tools import save_checkpoint

CONFIGURATION = """
import os, pathlib
from transformers import LlamaConfig
pathlib.Path(os.environ["DREAM_MARKER"]).write_text("ran")
class DreamConfig(LlamaConfig):
    model_type = "dream"
"""
MODEL = """
from transformers import LlamaForCausalLM
from .configuration_dream import DreamConfig
class DreamForCausalLM(LlamaForCausalLM):
    config_class = DreamConfig
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.5  # tells it from a plain Llama
        return output
"""


@pytest.fixture(autouse=True)
def _setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.verify.verify", verify.check)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("DREAM_MARKER", str(tmp_path / "marker"))
    gc.freeze()  # the engine collects garbage after every block: it need not look at the libraries each time


@pytest.fixture
def dream(tmp_path: Path) -> Path:
    """A Llama whose class and config are code beside the weights."""
    folder = save_checkpoint(models.tiny_llama(kv_heads=2), tmp_path / "dream")
    (folder / "configuration_dream.py").write_text(CONFIGURATION)
    (folder / "modeling_dream.py").write_text(MODEL)
    references = {
        "AutoConfig": "configuration_dream.DreamConfig",
        "AutoModelForCausalLM": "modeling_dream.DreamForCausalLM",
    }
    edit(folder, architectures=["DreamForCausalLM"], model_type="dream", auto_map=references)
    return folder


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def one_line(error: CompressorError) -> None:
    assert error.exit_code == 4
    assert "\n" not in error.message + error.hint
    assert error.hint


# --- code of the checkpoint's own ---


def test_code_is_refused_and_not_run_by_default(dream: Path, tmp_path: Path) -> None:
    for attempt in (
        lambda: prepare(Recipe(model=str(dream), method="rtn")),
        lambda: read_config(dream),
        lambda: compressor.load(dream),
    ):
        with pytest.raises(
            UnsupportedError, match=r"'DreamForCausalLM' is not in .*\(configuration_dream\.py, modeling"
        ) as caught:
            attempt()
        one_line(caught.value)
        assert "--trust-remote-code" in caught.value.hint
    load_tokenizer(dream)
    assert not (tmp_path / "marker").exists()
    assert not (tmp_path / "modules").exists()


def test_trusted_code_is_planned_quantized_and_reloaded(
    dream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    report = compressor.quantize(str(dream), method="rtn", format="int8", output=out, trust_remote_code=True)
    assert (tmp_path / "marker").read_text() == "ran"
    assert report.recipe["trust_remote_code"] is True
    assert sum(row.action == "int8" for row in report.rows) == 14
    assert {path.name for path in out.glob("*.py")} == {"configuration_dream.py", "modeling_dream.py"}
    ours = compressor.load(out, trust_remote_code=True)
    assert type(ours).__name__ == "DreamForCausalLM"
    tokens = models.sample_tokens(ours)
    plain = models.tiny_llama(kv_heads=2)
    stock = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        logits, expected = ours(tokens).logits, plain(tokens).logits * 0.5
        assert (logits - expected).norm() < 0.05 * expected.norm()
        torch.testing.assert_close(stock(tokens).logits, logits)
    with pytest.raises(UnsupportedError, match="which was not run"):
        compressor.load(out)
    save_file({"inputs": tokens, "logits": logits}, tmp_path / "probe")
    assert verify.main([str(out), str(tmp_path / "probe"), "--trust-remote-code"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]
    assert verify.main([str(out), str(tmp_path / "probe")]) == 7
    assert "which was not run" in json.loads(capsys.readouterr().out)["error"]


def test_command_line_flag(
    dream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = []
    for flags in ([], ["--trust-remote-code"]):
        monkeypatch.setattr("sys.argv", ["compress", "quantize", str(dream), "-m", "rtn", "--dry-run", *flags])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        codes.append(caught.value.code)
        assert (tmp_path / "marker").exists() == bool(flags)
    assert codes == [4, 0], capsys.readouterr().err


def test_a_native_architecture_never_runs_code_beside_it(dream: Path, tmp_path: Path) -> None:
    edit(dream, architectures=["LlamaForCausalLM"], model_type="llama")
    out = tmp_path / "out"
    compressor.quantize(str(dream), method="rtn", format="int4", output=out, trust_remote_code=True)
    assert not (tmp_path / "marker").exists()


def test_code_that_cannot_be_imported(dream: Path) -> None:
    (dream / "modeling_dream.py").write_text("raise RuntimeError('first line\\nsecond line')")
    with pytest.raises(CheckpointError, match=r"modeling_dream\.DreamForCausalLM: first line") as caught:
        compressor.load(dream, trust_remote_code=True)
    one_line(caught.value)
    edit(dream, auto_map={"AutoConfig": "configuration_dream.DreamConfig"})
    with pytest.raises(CheckpointError, match="names no file for 'DreamForCausalLM'") as caught:
        compressor.load(dream, trust_remote_code=True)
    one_line(caught.value)


def test_code_in_another_repository_is_refused_even_if_trusted() -> None:
    config = {"architectures": ["DreamModel"], "auto_map": {"AutoModel": "someone/else--file.DreamModel"}}
    with pytest.raises(UnsupportedError, match=r"another repository \(someone/else\)") as caught:
        needs_code(config, "here", trust_remote_code=True)
    one_line(caught.value)
    assert not needs_code({"architectures": ["DreamModel"]}, "here", trust_remote_code=False)


# --- names ---


@pytest.mark.parametrize("name", ["owner/name", "owner/name@main", "o-w.n_er/na.me-2@refs/pr/7", "a/b@" + "0" * 40])
def test_hub_ids(name: str) -> None:
    assert HUB_ID.fullmatch(name)


@pytest.mark.parametrize("name", ["owner", "a/b/c", "./a/b", "/a/b", "../b", "a/b@", "a /b", "a/b@x y"])
def test_what_is_no_hub_id_is_a_missing_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such directory") as caught:
        resolve_model(name)
    one_line(caught.value)


def test_a_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve_model("owner/name") == (Path("owner/name"), None)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["model.safetensors"], "has model.safetensors but no config.json"),
        (["config.json", "sub/model.safetensors", "a.ckpt"], r"only pickled weights \(a\.ckpt\)"),
        (["config.json", "1.bin", "2.bin", "3.pt", "4.pth"], r"\(1\.bin, 2\.bin, 3\.pt and 1 more\)"),
        (["config.json", "a.gguf", "pytorch_model.bin"], "GGUF files only"),
        (["flax_model.msgpack", "config.json"], "no safetensors file among its 2 files"),
    ],
)
def test_repositories_are_refused_by_their_file_names(names: list[str], words: str) -> None:
    with pytest.raises(CompressorError, match=words) as caught:
        refuse_names("owner/name", names)
    one_line(caught.value)


def test_side_files() -> None:
    names = ["config.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "LICENSE", "LICENSE.md", "x.py",
             "pytorch_model.bin", "model.safetensors", "onnx/config.json", "README.md", "img.png"]  # fmt: skip
    assert side_files(names, trust_remote_code=False) == names[:6]
    assert side_files(names, trust_remote_code=True) == names[:7]


def test_the_original_is_the_commit_not_the_branch(tmp_path: Path) -> None:
    saved = {"model": "owner/name@main", "source_revision": "c" * 40}
    (tmp_path / "compress_recipe.json").write_text(json.dumps(saved))
    assert original_of(tmp_path) == "owner/name@" + "c" * 40
    (tmp_path / "compress_recipe.json").write_text(json.dumps({"model": "here/a@b", "source_revision": None}))
    assert original_of(tmp_path) == "here/a@b"
