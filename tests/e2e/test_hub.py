"""Models from the Hub, against a local server: what is fetched, what is refused before fetching, what continues."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from compressor.testing import models
from compressor.testing.hub import SIGNATURE, Hub, Repo, folder_files, serving
from compressor.testing.tools import save_checkpoint

TOKEN = "hf_" + "t0ken" * 6

DRIVER = """
import contextlib, io, json, os, sys, time
wait = time.sleep
time.sleep = lambda seconds: wait(min(seconds, 0.05))  # the client waits a second before it tries again
from compressor.checkpoint.resolve import resolve_model
from compressor.errors import CompressorError
for line in sys.stdin:
    job = json.loads(line)
    os.environ.update(job["env"])
    if "argv" in job:
        import compressor.verify
        from compressor.cli.app import main
        compressor.verify.verify = compressor.verify.check  # the fresh process has tests of its own
        sys.argv, out, err = ["compress", *job["argv"]], io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as end:
                code = end.code
        answer = {"exit": code, "stdout": out.getvalue(), "stderr": err.getvalue()}
    else:
        try:
            path, revision = resolve_model(job["model"], job["trust"])
            answer = {"path": str(path), "revision": revision}
        except CompressorError as error:
            answer = {"error": error.message, "hint": error.hint, "exit": error.exit_code}
    for name in job["env"]:
        del os.environ[name]
    print(json.dumps(answer), flush=True)
"""
"""Answers in a process of its own: the Hub client reads its address and its cache's place when it is imported."""

Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a repository as people upload them: weights, tokenizer, and things nobody should fetch."""
    folder = save_checkpoint(models.tiny_llama(), tmp_path_factory.mktemp("tiny"))
    clutter = {"pytorch_model.bin": b"pickle", "helper.py": b"1 / 0", "README.md": b"# A model", ".gitattributes": b""}
    aside = {"onnx/config.json": b"{}", "original/consolidated.safetensors": b"x", "consolidated.safetensors": b"y"}
    return {**folder_files(folder), **clutter, **aside}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return folder_files(
        save_checkpoint(models.tiny_llama(seed=1), tmp_path_factory.mktemp("sharded"), shard_size="150KB")
    )


@pytest.fixture(scope="module")
def hub(tiny: dict[str, bytes], sharded: dict[str, bytes]) -> Iterator[Hub]:
    config = json.loads(tiny["config.json"])
    references = {"AutoConfig": "conf.DreamConfig", "AutoModelForCausalLM": "model.DreamForCausalLM"}
    custom = {**config, "architectures": ["DreamForCausalLM"], "model_type": "dream", "auto_map": references}
    elsewhere = {**custom, "auto_map": {"AutoModelForCausalLM": "someone/else--model.DreamForCausalLM"}}
    code = {"conf.py": b"1 / 0", "model.py": b"1 / 0"}

    def with_config(changed: dict[str, Any], **files: bytes) -> Repo:
        return Repo({**tiny, "config.json": json.dumps(changed).encode(), **files})

    repos = {
        "tiny/llama": Repo(tiny, branches=("main", "dev")),
        "tiny/sharded": Repo(sharded),
        "tiny/damaged": Repo({**tiny, "model.safetensors": tiny["model.safetensors"][::-1]}),
        "tiny/pickled": Repo({"config.json": tiny["config.json"], "pytorch_model.bin": b"x", "b.pt": b"y"}),
        "tiny/gguf": Repo({"model.Q4_K.gguf": b"GGUF"}),
        "tiny/empty": Repo({"README.md": b"soon"}),
        "tiny/incomplete": Repo({name: data for name, data in sharded.items() if "00002-of" not in name}),
        "tiny/unindexed": Repo({"config.json": b"{}", "weights.safetensors": b"x"}),
        "tiny/gated": Repo(tiny, gated=True),
        "tiny/custom": with_config(custom, **code),
        "tiny/elsewhere": with_config(elsewhere),
        "tiny/awq": with_config({**config, "quantization_config": {"quant_method": "awq"}}),
    }
    with serving(Hub(repos)) as running:
        yield running


def client(hub: Hub, cache: Path, **env: str) -> subprocess.Popen[str]:
    """Start a process that resolves models."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "COMPRESSOR_"))}
    variables |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(cache), "HF_TOKEN": TOKEN, "OMP_NUM_THREADS": "1", **env}
    pipes: Any = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    return subprocess.Popen([sys.executable, "-c", DRIVER], text=True, env=variables, **pipes)


def asking(process: subprocess.Popen[str]) -> Ask:
    def ask(model: str = "", *, trust: bool = False, argv: list[object] | None = None, **env: str) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        job = {"argv": [str(word) for word in argv]} if argv else {"model": model, "trust": trust}
        process.stdin.write(json.dumps({**job, "env": env}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        assert TOKEN not in line
        assert SIGNATURE not in line
        answer: dict[str, Any] = json.loads(line)
        assert "\n" not in answer.get("error", "") + answer.get("hint", "")
        return answer

    return ask


def end(process: subprocess.Popen[str]) -> None:
    """Stop a client and check that nothing secret or noisy went to its terminal."""
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert TOKEN not in err
    assert SIGNATURE not in err
    assert err.strip() == ""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def ask(hub: Hub, cache: Path) -> Iterator[Ask]:
    process = client(hub, cache)
    yield asking(process)
    end(process)


def test_fetches_what_is_needed_pinned_to_the_commit(hub: Hub, ask: Ask, tiny: dict[str, bytes], cache: Path) -> None:
    hub.requests.clear()
    answer = ask("tiny/llama@dev")
    commit = hub.repos["tiny/llama"].commit
    assert answer.get("revision") == commit, answer
    folder = Path(answer["path"])
    assert folder.name == commit
    assert folder.is_relative_to(cache)
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == wanted
    assert all((folder / name).read_bytes() == tiny[name] for name in wanted)
    assert len(hub.asked_for("GET", f"/resolve/{commit}/model.safetensors")) == 1
    files = [r.path for r in hub.requests if "/resolve/" in r.path]
    assert not [path for path in files if path.endswith((".bin", ".py", "README.md"))]
    assert not [path for path in files if "consolidated" in path or "onnx" in path]
    assert {r.token for r in hub.requests if "/resolve/" in r.path} == {f"Bearer {TOKEN}"}
    assert {r.token for r in hub.requests if r.path.startswith("/large/")} == {None}
    assert not list(cache.rglob("*.part"))


def test_what_is_cached_is_not_fetched_again(hub: Hub, ask: Ask) -> None:
    first = ask("tiny/llama")
    hub.requests.clear()
    assert ask("tiny/llama") == first
    assert not hub.asked_for("GET", "model.safetensors")
    hub.requests.clear()
    assert ask(f"tiny/llama@{first['revision']}") == first
    assert hub.requests == []  # a commit cannot change


def test_shards_are_those_of_the_index(hub: Hub, ask: Ask, sharded: dict[str, bytes]) -> None:
    folder = Path(ask("tiny/sharded")["path"])
    shards = [name for name in sharded if name.endswith(".safetensors")]
    assert len(shards) > 2
    assert all((folder / name).read_bytes() == sharded[name] for name in shards)


def test_offline(hub: Hub, ask: Ask) -> None:
    online = ask("tiny/llama")
    assert ask("tiny/llama@dev") == online
    hub.requests.clear()
    for variable in ("COMPRESSOR_OFFLINE", "HF_HUB_OFFLINE"):
        for model in ("tiny/llama", "tiny/llama@dev", f"tiny/llama@{online['revision']}"):
            assert ask(model, **{variable: "1"}) == online
        absent = ask("tiny/gated", **{variable: "1"})
        assert (absent["exit"], f"tiny/gated: not (completely) in the cache, and {variable} is set") == (
            6,
            absent["error"],
        )
    assert hub.requests == []


def test_a_snapshot_with_a_shard_missing_is_not_complete(hub: Hub, ask: Ask) -> None:
    folder = Path(ask("tiny/sharded")["path"])
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.resolve().unlink()
    shard.unlink()
    assert ask("tiny/sharded", COMPRESSOR_OFFLINE="1")["exit"] == 6
    assert Path(ask(f"tiny/sharded@{folder.name}")["path"]) == folder
    assert shard.is_file()


@pytest.mark.parametrize(
    ("model", "code", "words", "hint"),
    [
        ("tiny/pickled", 4, "only pickled weights (b.pt, pytorch_model.bin)", "safetensors"),
        ("tiny/gguf", 4, "holds GGUF files only (model.Q4_K.gguf)", "hf download tiny/gguf"),
        ("tiny/empty", 4, "no safetensors file among its 1 files", "transformers"),
        ("tiny/unindexed", 4, "has weights.safetensors but no model.safetensors.index.json", "transformers"),
        ("tiny/incomplete", 4, "the index names model-00002-of-", "another revision"),
        ("tiny/absent", 6, "no such model on the Hub", "hf auth login"),
        ("tiny/llama@nowhere", 6, "no revision 'nowhere'", "behind @"),
        ("tiny/gated", 6, "gated model", "accept its terms"),
        ("tiny/awq", 4, "quant_method 'awq'", "full-precision"),
        (
            "tiny/custom",
            4,
            "code of the checkpoint's own (conf.py, model.py), which was not run",
            "--trust-remote-code",
        ),
    ],
)
def test_refusals_come_before_any_weights(model: str, code: int, words: str, hint: str, hub: Hub, ask: Ask) -> None:
    hub.requests.clear()
    answer = ask(model)
    assert (answer["exit"], words in answer["error"], hint in answer["hint"]) == (code, True, True), answer
    assert not [r for r in hub.requests if r.path.endswith((".safetensors", ".bin", ".gguf", ".pt", ".py"))]
    assert not hub.asked_for("GET", "/large/")


def test_code_is_fetched_only_when_trusted_and_only_from_the_same_commit(hub: Hub, ask: Ask) -> None:
    folder = Path(ask("tiny/custom", trust=True)["path"])
    assert {path.name for path in folder.glob("*.py")} == {"conf.py", "model.py", "helper.py"}
    elsewhere = ask("tiny/elsewhere", trust=True)
    assert (elsewhere["exit"], "another repository (someone/else)" in elsewhere["error"]) == (4, True)


def test_a_server_that_vanishes_and_comes_back(tmp_path: Path) -> None:
    weights = os.urandom(23 << 20)  # the client hands over what it gets in pieces of 10 MiB
    state = Hub({"tiny/large": Repo({"config.json": b"{}", "model.safetensors": weights})}, vanish_after=21 << 20)
    with serving(state):
        process = client(state, tmp_path)
        ask = asking(process)
        answer = ask("tiny/large")
    assert (answer["exit"], "the connection failed" in answer["error"]) == (6, True), answer
    assert "continues where it was cut off" in answer["hint"]
    assert {r.range for r in state.requests} == {None}
    parts = list(tmp_path.rglob("*.part"))
    assert [part.stat().st_size for part in parts] == [20 << 20]
    state.requests.clear()
    state.gone, state.vanish_after = False, None
    with serving(state):
        folder = Path(ask("tiny/large")["path"])
    end(process)
    assert {r.range for r in state.asked_for("GET", "model.safetensors")} == {f"bytes={20 << 20}-"}
    assert (folder / "model.safetensors").read_bytes() == weights
    assert not list(tmp_path.rglob("*.part"))


def test_a_damaged_part_is_noticed(hub: Hub, ask: Ask, cache: Path) -> None:
    weights = hub.repos["tiny/damaged"].files["model.safetensors"]
    blobs = cache / "hub" / "models--tiny--damaged" / "blobs"
    blobs.mkdir(parents=True)
    part = blobs / f"{hashlib.sha256(weights).hexdigest()}.part"
    part.write_bytes(b"\0" * 1000)
    answer = ask("tiny/damaged")
    assert (answer["exit"], "SHA-256 differs" in answer["error"]) == (6, True), answer
    assert not part.exists()
    assert (Path(ask("tiny/damaged")["path"]) / "model.safetensors").read_bytes() == weights


def test_command_line_records_the_commit(hub: Hub, ask: Ask, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = ask(argv=["quantize", "tiny/llama@dev", "-m", "rtn", "-f", "int4", "-o", out, "--json", "--quiet"])
    assert done["exit"] == 0, done["stderr"]
    commit = hub.repos["tiny/llama"].commit
    assert json.loads(done["stdout"])["recipe"]["source_revision"] == commit
    assert json.loads((out / "compress_recipe.json").read_text())["source_revision"] == commit
    assert not list(out.glob("*.py"))


def test_command_line_names_a_gated_model(ask: Ask, tmp_path: Path) -> None:
    refused = ask(argv=["quantize", "tiny/gated", "-o", tmp_path / "gated"])
    assert refused["exit"] == 6
    assert "error: tiny/gated: gated model" in refused["stderr"]
    assert "Traceback" not in refused["stderr"]
    assert not (tmp_path / "gated").exists()
