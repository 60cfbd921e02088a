"""Texts from strangers: recipes, YAML bombs, calibration files, results given to the gate, pickles and code."""

import functools
import json
import os
import pickle
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file

import compressor
import compressor.verify
from compressor.calibration.sources import MAX_LINE_BYTES, read
from compressor.checkpoint.cache import CACHE_VARIABLE
from compressor.checkpoint.pickled import read_pickle, resolve_pickled
from compressor.errors import CheckpointError, CompressorError
from compressor.evals.rules import parse_rule
from compressor.ship.pipeline import read_pipeline
from compressor.testing import models
from compressor.testing.evaluations import document_task, evaluation, perplexity_task
from compressor.testing.fuzzing import changed, command, fuzz, outcome, paths
from compressor.testing.tools import save_checkpoint
from compressor.yaml_text import MAX_VALUES, parse_yaml

HUGE = 10**12
NUMBERS = (HUGE, 10**400, 2**63, -1, 0, 1, 1e308, 1e200, -1e-300, 5e-324)
NAMES = (
    "../x",
    "/etc/passwd",
    "a\x00b",
    "\x1b[31m",
    "x" * 5000,
    "",
    ".",
    "\ud800",
    "!!python/object/apply:os.system [id]",
)
ODD = (None, True, [], {}, [[]], {"a": {"b": 1}}, [HUGE] * 3, *NUMBERS, *NAMES)
FEW, MANY = 30, pytest.param(3000, marks=pytest.mark.slow)


def places(folder: Path) -> list[Path]:
    return [folder, Path(tempfile.gettempdir())]


RECIPE: dict[str, Any] = {
    "version": 1,
    "model": "smollm2-135m",
    "output": "out",
    "seed": 0,
    "steps": [
        {
            "quantize": {
                "method": "gptq",
                "format": "int4",
                "group_size": 32,
                "options": {"damp": 0.01},
                "skip": ["*.x"],
            }
        },
        {"eval": {"tasks": ["perplexity"]}},
        {"gate": {"rules": ["ppl <= +2%"]}},
    ],
}


@pytest.mark.reliability("Hostile input", "recipes with any value replaced by an odd one")
@pytest.mark.parametrize("examples", [FEW, MANY])
def test_recipes(tmp_path: Path, tally: Counter[str], examples: int) -> None:
    file = tmp_path / "recipe.yaml"

    def attempt(how: tuple[tuple[Any, ...], Any]) -> str:
        file.write_text(json.dumps(changed(RECIPE, *how)))
        return outcome(lambda: read_pipeline(file))

    strategy = st.tuples(st.sampled_from(paths(RECIPE)), st.sampled_from(ODD))
    tally.update(fuzz(strategy, attempt, examples=examples, seconds=300, writes=places(tmp_path)))


@pytest.mark.reliability("Hostile input", "recipes of random text in YAML's own characters")
@pytest.mark.parametrize("examples", [FEW, MANY])
def test_yaml_text(tmp_path: Path, tally: Counter[str], examples: int) -> None:
    file = tmp_path / "recipe.yaml"
    words = [
        "model: ",
        "steps:",
        "- ",
        "&a ",
        "*a",
        "<<: ",
        "!!",
        "!!int ",
        "!!bool ",
        "!!timestamp ",
        "[",
        "]",
        "{",
        "}",
        "|",
        "\t",
    ]
    words += [
        "\n",
        "  ",
        ": ",
        "quantize",
        "2024-99-99",
        ".nan",
        "0x",
        "1_0",
        "%YAML 9.9\n",
        "---\n",
        "? ",
        "'",
        '"',
        "\x00",
        "\ufeff",
    ]

    def attempt(parts: list[str]) -> str:
        file.write_text("".join(parts), encoding="utf-8", errors="surrogatepass")
        return outcome(lambda: read_pipeline(file))

    strategy = st.lists(st.one_of(st.sampled_from(words), st.text(max_size=3)), max_size=12)
    tally.update(fuzz(strategy, attempt, examples=examples, seconds=300, writes=places(tmp_path)))


def _bombs() -> dict[str, str]:
    laughs = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    laughs += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    merges = ["a0: &a0 {" + ", ".join(f"k{i}: 1" for i in range(10)) + "}"]
    merges += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 10)]
    return {
        "10^12 values behind aliases": "\n".join(laughs) + "\nmodel: *a11\nsteps: *a11\n",
        "10^9 merged keys": "\n".join(merges) + "\n<<: *a9\n",
        "an alias of what it lies in": "model: m\nsteps: &a [*a, *a]\n",
        "nested 10^5 deep": "model: " + "[" * 100_000,
        "Python objects": "model: !!python/object/apply:os.system ['touch canary']\nsteps: []\n",
        "a megabyte": "model: m\nsteps:\n" + "- quantize\n" * 100_000,
        "a name with terminal codes": 'model: m\n"\\e[2J": 1\nsteps: [quantize]\n',
    }


@pytest.mark.reliability(
    "Hostile input", "YAML bombs (aliases, merges, depth, Python objects, size), through `compress run`"
)
def test_yaml_bombs(tmp_path: Path, tally: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def attempt(what: str) -> str:
        (tmp_path / "recipe.yaml").write_text(_bombs()[what])
        return command("run", tmp_path / "recipe.yaml", "-o", tmp_path / "out")

    seen = fuzz(list(_bombs()), attempt, seconds=300, writes=places(tmp_path))
    assert set(seen) == {"refused"}
    assert not (tmp_path / "canary").exists()
    tally.update(seen)


def test_aliases_that_are_no_bomb_still_work() -> None:
    assert parse_yaml("a: &x {b: [1, 2]}\nc: *x\nd: {<<: *x, e: 3}") == {
        "a": {"b": [1, 2]},
        "c": {"b": [1, 2]},
        "d": {"b": [1, 2], "e": 3},
    }
    assert len(parse_yaml("[" + "1," * (MAX_VALUES - 2) + "]")) == MAX_VALUES - 2  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"at most {MAX_VALUES}"):
        parse_yaml("[" + "1," * MAX_VALUES + "]")


@pytest.mark.reliability("Hostile input", "calibration files: NULs, half characters, odd rows, broken JSON")
@pytest.mark.parametrize("examples", [FEW, MANY])
def test_calibration(tmp_path: Path, tally: Counter[str], examples: int) -> None:
    rows = st.one_of(
        st.fixed_dictionaries({"text": st.one_of(st.text(max_size=20), st.sampled_from(ODD))}),
        st.fixed_dictionaries(
            {"messages": st.sampled_from([*ODD, [{"role": "user", "content": "\ud800"}], [{"role": 1}]])}
        ),
        st.fixed_dictionaries({"prompt": st.sampled_from(ODD), "completion": st.sampled_from(ODD)}),
        st.sampled_from(ODD),
    ).map(lambda row: json.dumps(row).encode())
    pieces = st.one_of(
        rows, st.binary(max_size=12), st.sampled_from([b"\n", b"\r\n", b"\0", b"\xff\xfe", b"[" * 5000, b"1" * 5000])
    )

    def attempt(how: tuple[str, list[bytes]]) -> str:
        file = tmp_path / f"data.{how[0]}"
        file.write_bytes(b"\n".join(how[1]))
        what = {"preset_split": "calibration", "hub_split": "train", "text_column": "text", "max_chars": 4096}
        return outcome(lambda: [d.n_chars for d in read(str(file), **what).documents])  # type: ignore[arg-type]

    strategy = st.tuples(st.sampled_from(["jsonl", "jsonl", "txt"]), st.lists(pieces, max_size=4))
    tally.update(fuzz(strategy, attempt, examples=examples, seconds=300, writes=places(tmp_path)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(models.tiny_llama(), tmp_path_factory.mktemp("texts") / "model")


@pytest.mark.reliability("Hostile input", "calibration files: lines of 100 MB, through `compress quantize`")
@pytest.mark.parametrize("kind", ["jsonl", "jsonl-nul", "txt"])
def test_long_lines(tmp_path: Path, model: Path, tally: Counter[str], kind: str) -> None:
    file = tmp_path / f"data.{kind.partition('-')[0]}"
    with file.open("wb") as handle:  # one line; holes in the file are NULs
        handle.write(b'{"text": "' if kind.startswith("jsonl") else b"")
        if kind == "jsonl-nul":
            handle.truncate(100_000_000)
        else:
            for _ in range(100):
                handle.write(b"word " * 200_000)

    def attempt(name: str) -> str:
        flags = ("-m", "gptq", "-f", "int4", "--group-size", 32, "--n-samples", 2, "--seq-len", 8, "-q")
        return command("quantize", model, "-o", tmp_path / "out", "--data", tmp_path / name, *flags)

    # A text file is read up to what is needed; a row is refused beyond so many bytes.
    memory = 6 * MAX_LINE_BYTES + (512 << 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressor.verify.verify", compressor.verify.check)
        tally.update(fuzz([file.name], attempt, seconds=300, writes=places(tmp_path), memory=memory))


def _results() -> tuple[dict[str, Any], dict[str, Any]]:
    scores = [1.0, 0.0, 1.0, 1.0]
    tasks = {"perplexity": perplexity_task([3.0, 3.1, 2.9, 3.2]), "qa": document_task(["a", "a", "b", "b"], acc=scores)}
    return evaluation("original", tasks).to_json(), evaluation("compressed", tasks, "original").to_json()


@pytest.mark.reliability(
    "Hostile input", "result files given to `compress gate`, any value replaced by an odd one, or cut"
)
@pytest.mark.parametrize("examples", [FEW, MANY])
def test_results(tmp_path: Path, tally: Counter[str], examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    good, other = _results()
    base, new = tmp_path / "base.json", tmp_path / "new.json"
    rules = ("--rule", "ppl <= +2%", "--rule", "qa >= -1pt", "--rule", "qa >= 0.1")

    def attempt(how: tuple[tuple[Any, ...], Any, int, bool]) -> str:
        where, value, cut, by_group = how
        text = json.dumps(changed(other, where, value))
        base.write_text(json.dumps(good))
        new.write_text(text[:cut] if cut else text)
        return command("gate", base, new, *rules, *(["--by-group"] if by_group else []), also=(3,))

    cut = st.one_of(*[st.just(0)] * 4, st.integers(1, 400))
    strategy = st.tuples(st.sampled_from(paths(other)), st.sampled_from(ODD), cut, st.booleans())
    tally.update(fuzz(strategy, attempt, examples=examples, seconds=300, writes=places(tmp_path)))


@pytest.mark.reliability("Hostile input", "result files nested 10^5 deep, of 100 MB, or pipes")
@pytest.mark.parametrize("what", ["deep", "large", "pipe"])
def test_result_bombs(tmp_path: Path, tally: Counter[str], what: str) -> None:
    file = tmp_path / "new.json"
    (tmp_path / "base.json").write_text(json.dumps(_results()[0]))
    if what == "pipe":
        os.mkfifo(file)
    else:
        file.write_text("[" * 100_000)
        os.truncate(file, 100_000_000 if what == "large" else 100_000)

    def attempt(name: str) -> str:
        return command("gate", tmp_path / "base.json", tmp_path / name, "--rule", "ppl <= +2%")

    seen = fuzz([file.name], attempt, seconds=200, writes=places(tmp_path))
    assert seen == {"refused": 1}
    tally.update(seen)


@pytest.mark.reliability("Hostile input", "rules of random text")
@pytest.mark.parametrize("examples", [FEW, MANY])
def test_rules(tmp_path: Path, tally: Counter[str], examples: int) -> None:
    words = st.sampled_from(
        ["ppl", "qa.acc", " ", ">=", "<=", "<", "≥", "+", "-", "%", "pt", "1e999", "9" * 400, "0.5", "٣", "#"]
    )
    strategy = st.lists(st.one_of(words, words, st.text(max_size=3)), max_size=8).map("".join)
    tally.update(
        fuzz(
            strategy,
            lambda text: outcome(lambda: parse_rule(text)),
            examples=examples,
            seconds=120,
            writes=places(tmp_path),
        )
    )


class Run:
    """Pickles into a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def _pickles(canary: str) -> dict[str, Any]:
    tensor, large = torch.arange(6.0), torch.arange(20_000.0)
    return {
        "os.system": Run(os.system, f"touch {canary}"),
        "eval": {"w": Run(eval, f"open({canary!r}, 'w')")},
        "a partial": {"w": functools.partial(os.mkdir, canary)},
        "a module": {"w": torch.nn.Linear(2, 2)},
        "no tensors": {"w": [1, 2, 3]},
        "no names": {3: tensor},
        "a list": [tensor],
        "10^12 rows of one": {"w": torch.zeros(1).expand(10**12)},
        "a thousand names for one": {f"w{i}": large for i in range(1000)},
        "10^12 zeros of a bytearray": {"w": Run(bytearray, 10**12)},
    }


@pytest.mark.reliability("Hostile input", "pickles that run code or promise more than they hold, with --allow-pickle")
def test_pickles(tmp_path: Path, tally: Counter[str]) -> None:
    file, canary = tmp_path / "pytorch_model.bin", tmp_path / "canary"

    def attempt(how: tuple[str, bool]) -> str:
        torch.save(_pickles(str(canary))[how[0]], file, _use_new_zipfile_serialization=how[1])
        said = outcome(lambda: read_pickle(file))
        assert not canary.exists(), "code in the pickle was run"
        return said

    cases = [(what, zipped) for what in _pickles("") for zipped in (True, False)]
    seen = fuzz(cases, attempt, seconds=300, writes=places(tmp_path))
    assert set(seen) == {"refused"}
    tally.update(seen)


@pytest.mark.reliability(
    "Hostile input", "pickles of random bytes, and good ones with bytes changed, with --allow-pickle"
)
@pytest.mark.parametrize("examples", [FEW, pytest.param(800, marks=pytest.mark.slow)])
def test_pickle_bytes(tmp_path: Path, tally: Counter[str], examples: int) -> None:
    file = tmp_path / "pytorch_model.bin"
    good = []
    for zipped in (True, False):
        torch.save({"a": torch.arange(6.0), "b": torch.ones(2, 2)}, file, _use_new_zipfile_serialization=zipped)
        good.append(file.read_bytes())

    def attempt(how: tuple[int, list[tuple[int, int]]]) -> str:
        data = bytearray(good[how[0]])
        for at, value in how[1]:
            data[at % len(data)] = value
        file.write_bytes(data)
        return outcome(lambda: read_pickle(file))

    changes = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4)
    strategy = st.tuples(st.integers(0, 1), changes)
    tally.update(fuzz(strategy, attempt, examples=examples, seconds=300, writes=places(tmp_path)))


def pickled(folder: Path, shards: int = 1) -> Path:
    """Save a tiny Llama as pickles, as old checkpoints are."""
    save_checkpoint(models.tiny_llama(), folder)
    (folder / "model.safetensors").unlink()
    state = models.tiny_llama().state_dict()  # the head is tied to the embedding: two names, one storage
    names = [list(state)[i::shards] for i in range(shards)]
    files = ["pytorch_model.bin"] if shards == 1 else [f"pytorch_model-{i}.bin" for i in range(shards)]
    for file, part in zip(files, names, strict=True):
        torch.save({name: state[name] for name in part}, folder / file)
    if shards > 1:
        weight_map = {name: file for file, part in zip(files, names, strict=True) for name in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.reliability("Hostile input", "honest pickled checkpoints: refused, and with --allow-pickle read")
@pytest.mark.parametrize("shards", [1, 2])
def test_allow_pickle(tmp_path: Path, tally: Counter[str], shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    folder = pickled(tmp_path / "old", shards)
    with pytest.raises(CheckpointError, match="only pickled weights") as caught:
        compressor.quantize(str(folder), method="rtn", format="int4", output=tmp_path / "out")
    assert "--allow-pickle" in caught.value.hint
    said = command("quantize", folder, "-m", "rtn", "-f", "int4", "--allow-pickle", "-o", tmp_path / "a", "-q")
    assert said == "read"
    whole = save_checkpoint(models.tiny_llama(), tmp_path / "new")
    compressor.quantize(str(whole), method="rtn", format="int4", output=tmp_path / "b")
    report = json.loads((tmp_path / "a" / "compress_report.json").read_text())
    assert any("no code was run" in event for event in report["events"])
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert set(ours) - set(theirs) == {"lm_head.weight"}  # pickles keep both names of tied weights
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert resolve_pickled(folder) == resolve_pickled(folder)  # converted once
    tally.update(["refused", "with the flag: the tensors that safetensors give"])


@pytest.mark.reliability("Hostile input", "pickle index JSON that points elsewhere, with --allow-pickle")
@pytest.mark.parametrize("name", ["../secret.bin", "/etc/passwd", "gone.bin", "model.py", ""])
def test_pickle_index(tmp_path: Path, tally: Counter[str], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    folder = tmp_path / "old"
    folder.mkdir()
    torch.save({"w": torch.ones(2)}, tmp_path / "secret.bin")
    torch.save({"w": torch.ones(2)}, folder / "pytorch_model.bin")
    (folder / "model.py").write_text("")
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    assert outcome(lambda: resolve_pickled(folder)) == "refused"
    tally["refused"] += 1


REMOTE = """
import pathlib
pathlib.Path({canary!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "strange"
class Model(LlamaForCausalLM):
    config_class = Config
"""
COMMANDS = {
    "quantize": ("-m", "rtn", "-f", "int4", "-o", "{out}", "-q"),
    "prune": ("-m", "magnitude", "-o", "{out}", "-q"),
    "eval": ("--tasks", "perplexity", "-o", "{out}", "-q"),
    "check": ("--quick", "-q"),
    "generate": ("--prompt", "x"),
}


@pytest.mark.reliability("Hostile input", "code in a checkpoint, by command, without --trust-remote-code")
@pytest.mark.parametrize("verb", list(COMMANDS))
@pytest.mark.parametrize("also", ["", "_tokenizer"])
def test_remote_code(tmp_path: Path, tally: Counter[str], verb: str, also: str) -> None:
    folder, canary = save_checkpoint(models.tiny_llama(), tmp_path / "model"), tmp_path / "canary"
    (folder / "strange.py").write_text(REMOTE.format(canary=str(canary)))
    config = json.loads((folder / "config.json").read_text())
    if also:  # a class transformers has, and a tokenizer it has not
        path = folder / "tokenizer_config.json"
        mapping = {"auto_map": {"AutoTokenizer": ["strange.Model", None]}, "tokenizer_class": "Strange"}
        path.write_text(json.dumps({**json.loads(path.read_text()), **mapping}))
    else:
        mapping = {"auto_map": {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"}}
        config |= {**mapping, "model_type": "strange", "architectures": ["Model"]}
        (folder / "config.json").write_text(json.dumps(config))
    flags = [flag.format(out=tmp_path / "out") for flag in COMMANDS[verb]]

    def attempt(name: str) -> str:
        said = command(verb, tmp_path / name, *flags, also=(7,))
        assert not canary.exists(), "code of the checkpoint was run"
        return said

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressor.verify.verify", compressor.verify.check)
        seen = fuzz(["model"], attempt, seconds=300, writes=places(tmp_path), memory=3 << 30)
    assert also or set(seen) <= {"refused", "exit code 7"}  # check says it as a finding
    tally.update({"not run": 1})


@pytest.mark.reliability("Hostile input", "output folder that is, or holds, the model that is read")
@pytest.mark.parametrize("where", ["same", "parent", "link"])
def test_output_over_the_source(tmp_path: Path, tally: Counter[str], where: str) -> None:
    source = save_checkpoint(models.tiny_llama(), tmp_path / "models" / "a")
    (tmp_path / "link").symlink_to(source)
    for folder in (source, source.parent):  # as if compress had written it, so that --force would clear it
        (folder / "compress_report.json").write_text("{}")
    before = (source / "model.safetensors").read_bytes()
    out = {"same": source, "parent": source.parent, "link": tmp_path / "link"}[where]
    with pytest.raises(CompressorError, match="lies there") as caught:
        compressor.quantize(str(source), method="rtn", format="int4", output=out, force=True)
    assert caught.value.exit_code == 2
    assert (source / "model.safetensors").read_bytes() == before
    tally["refused"] += 1


def test_a_pickle_is_a_program(tmp_path: Path) -> None:
    """That the pickles above would do harm if they were simply opened."""
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(Run(os.mkdir, str(canary))))
    assert canary.exists()
    with zipfile.ZipFile(tmp_path / "bomb.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    with pytest.raises(CheckpointError, match="larger inside than outside"):
        read_pickle(tmp_path / "bomb.bin")
