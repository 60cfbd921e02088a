"""Bad input as a user types it: one line with a hint, the documented exit code, nothing that loads."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from safetensors.torch import save_file
from typer.testing import CliRunner

from compressor.cli import app as cli
from compressor.testing import models
from compressor.testing.tools import run_cli, save_checkpoint, write_text


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str]:
    """Run the command line in this process; returns exit code and stderr."""
    monkeypatch.setattr("sys.argv", ["compress", *(str(argument) for argument in arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    err = capsys.readouterr().err
    return int(caught.value.code or 0), err


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_checkpoint(models.tiny_llama(), tmp_path / "model")


def check(code: int, err: str, expected: int, words: str, out: Path) -> None:
    assert code == expected, err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert words in lines[0]
    assert "hint: " in err
    assert "Traceback" not in err
    assert not (out / "config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--method", "fpq"], 2, "unknown method 'fpq'"),
        (["--frobnicate"], 2, "No such option: --frobnicate"),
        (["--n-samples", "many"], 2, "Invalid value for '--n-samples'"),
        (["--format", "int44"], 2, "unknown format 'int44'"),
        (["--method", "rtn", "--format", "int4", "--group-size", "48"], 2, "do not divide into groups of 48"),
        (["--method", "rtn", "--format", "int4", "--group-size", "row"], 2, "nor 'channel' nor 'tensor'"),
        (["--method", "rtn", "--format", "fp8", "--group-size", "tensor"], 2, "fp8 has one scale per output channel"),
        (["--method", "rtn", "--format", "int4", "--skip", "*.nothing"], 2, "matches no tensor"),
        (["--option", "sweeps"], 2, "is not KEY=VALUE"),
        (["--option", "speed=9"], 2, "unknown option of fp4 'speed'"),
        (["--data", "no-such-file.txt"], 4, "no-such-file.txt"),
        (["--n-samples", "64", "--seq-len", "500"], 2, "the data has"),
        (["--seq-len", "600"], 2, "reads at most 512 tokens"),
        (["--device", "warp"], 2, "--device warp"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_flags(
    arguments: list[str],
    code: int,
    words: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = write_text(tmp_path / "t.txt", words=3000)
    data = [] if "--data" in arguments else ["--data", text]
    got, err = call(capsys, monkeypatch, "quantize", source, "-o", tmp_path / "out", *data, *arguments)
    check(got, err, code, words, tmp_path / "out")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "no such directory"),
        ("truncated", "not a complete safetensors file"),
        ("nan", "values are NaN or Inf"),
        ("pickle", "only pickled weights"),
        ("no-config", "config.json: no such file"),
        ("architecture", "'LlamaForDreaming' is not in transformers"),
        ("width", "do not divide into groups of 64"),
    ],
)
def test_checkpoints(
    damage: str,
    words: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights, config = source / "model.safetensors", source / "config.json"
    if damage == "missing":
        source = tmp_path / "nowhere"
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "nan":
        state = {k: v.clone() for k, v in models.tiny_llama().state_dict().items() if k != "lm_head.weight"}
        state["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
        save_file(state, weights, metadata={"format": "pt"})
    elif damage == "pickle":
        weights.rename(source / "pytorch_model.bin")
    elif damage == "no-config":
        config.unlink()
    elif damage == "architecture":
        config.write_text(config.read_text().replace("LlamaForCausalLM", "LlamaForDreaming"))
    elif damage == "width":
        shrunk = models.tiny_llama()
        shrunk.config.intermediate_size = 72
        type(shrunk)(shrunk.config).save_pretrained(source)
    out = tmp_path / "out"
    code, err = call(capsys, monkeypatch, "quantize", source, "-m", "rtn", "-f", "int4", "-o", out)
    check(code, err, 4, words, out)


def test_did_you_mean(source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _, err = call(capsys, monkeypatch, "quantize", source, "--format", "nvpf4")
    assert "did you mean nvfp4" in err
    _, err = call(capsys, monkeypatch, "quantize", "smollm2-135")
    assert "did you mean smollm2-135m" in err
    _, err = call(capsys, monkeypatch, "list", "method")
    assert "did you mean methods" in err


def test_offline_default_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COMPRESSOR_OFFLINE", "1")
    code, err = call(capsys, monkeypatch, "quantize", "smollm2-135m", "-o", tmp_path / "out")
    check(code, err, 6, "smollm2-135m", tmp_path / "out")


def test_offline_hub_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    code, err = call(capsys, monkeypatch, "quantize", "some-owner/some-model", "-o", tmp_path / "out")
    check(code, err, 6, "some-owner/some-model", tmp_path / "out")


def test_bug_leaves_a_log_and_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("compressor.api.prepare", broken)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code, err = call(capsys, monkeypatch, "quantize", source)
    assert code == 1
    assert "unexpected ZeroDivisionError: division by zero" in err
    assert "Traceback" not in err
    log = Path(err.partition("please report ")[2].strip())
    assert "Traceback" in log.read_text()
    log.unlink()


def test_eval_refuses(source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, err = call(capsys, monkeypatch, "eval", source.parent / "nowhere", "--baseline", source)
    assert (code, "no such directory" in err) == (4, True)
    code, err = call(capsys, monkeypatch, "eval", source, "--tasks", "kl")
    assert (code, "--baseline" in err) == (2, True)


@pytest.mark.parametrize("what", ["methods", "formats", "models"])
def test_list(what: str) -> None:
    result: Result = CliRunner().invoke(cli.app, ["list", what, "--json"])
    assert result.exit_code == 0, result.output
    listed = json.loads(result.stdout)[what]
    assert listed
    for name, summary in listed.items():
        assert summary, name
    if what == "methods":
        for name in listed:
            shown = CliRunner().invoke(cli.app, ["list", "methods", name])
            assert shown.exit_code == 0, shown.output
            assert len(shown.stdout.splitlines()) > 5


def test_formats_that_differ_in_bits_alone_share_a_row() -> None:
    shown = CliRunner().invoke(cli.app, ["list", "formats"]).stdout
    assert "int2 ... int8 " in shown
    assert "int2-asym ... int8-asym " in shown
    assert "int4" not in shown
    assert "int4-asym" in CliRunner().invoke(cli.app, ["list", "formats", "int4-asym"]).stdout


def test_exit_code_of_a_real_process(tmp_path: Path) -> None:
    done = run_cli("quantize", tmp_path / "nowhere", "-o", tmp_path / "out")
    assert done.returncode == 4
    assert done.stdout == ""
    assert done.stderr.splitlines()[-2].startswith("error: ")
