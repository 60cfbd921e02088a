"""Checkpoint files from strangers: refused in one line, or read; nothing hangs, is executed or eats memory."""

import json
import struct
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from compressor.checkpoint.gguf_header import check_header
from compressor.checkpoint.gguf_source import read_contents
from compressor.checkpoint.source import Source, read_headers
from compressor.testing import models
from compressor.testing.fuzzing import changed, command, fuzz, outcome, paths
from compressor.testing.gguf_files import write_gguf
from compressor.testing.tools import save_checkpoint

HUGE = 10**12
NUMBERS = (HUGE, 10**20, 2**63, 2**31, -1, 0, 1, 7, 1e308, -1e-300, float("nan"))
NAMES = ("../x", "../../etc/passwd", "/etc/passwd", "a\x00b", "\x1b[31m", "x" * 5000, "", ".", "..", "con/x", "\ud800")
ODD = (None, True, [], {}, [[]], {"a": {"b": 1}}, [HUGE] * 3, *NUMBERS, *NAMES)
FEW, MANY = 25, pytest.param(1500, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(models.tiny_llama(), tmp_path_factory.mktemp("hostile") / "model")


@pytest.fixture
def folder(tmp_path: Path, model: Path) -> Path:
    """A copy to break."""
    copy = tmp_path / "model"
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def places(*folders: Path) -> list[Path]:
    return [*folders, Path(tempfile.gettempdir())]


def entries() -> st.SearchStrategy[dict[str, Any]]:
    """Headers of few tensors: offsets overlap, leave holes, or are right; shapes are absurd, or are right."""
    size = st.one_of(st.integers(0, 64), st.sampled_from(NUMBERS))
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "I8", "F4", "F8_E4M3", "C64", "x", None]),
            "shape": st.lists(size, max_size=4),
            "data_offsets": st.one_of(st.lists(size, max_size=3), st.tuples(size, size)),
        }
    )
    return st.dictionaries(
        st.one_of(st.sampled_from(NAMES[:-1]), st.text(max_size=4)), st.one_of(entry, st.none()), max_size=5
    )


@pytest.mark.reliability("Hostile input", "safetensors: headers of random tensors (overlaps, holes, shapes of 10^12)")
@pytest.mark.parametrize("examples", [FEW, MANY])
def test_safetensors_headers(folder: Path, tmp_path: Path, tally: Counter[str], examples: int) -> None:
    def attempt(header: dict[str, Any]) -> str:
        text = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
        return outcome(lambda: list(Source.open(folder).read(read_headers(folder))))

    tally.update(fuzz(entries(), attempt, examples=examples, seconds=300, writes=places(tmp_path)))


@pytest.mark.reliability("Hostile input", "safetensors: a good file with bytes changed, or its length word")
@pytest.mark.parametrize("examples", [FEW, MANY])
def test_safetensors_bytes(folder: Path, tmp_path: Path, tally: Counter[str], examples: int) -> None:
    good = (folder / "model.safetensors").read_bytes()
    length = 8 + struct.unpack("<Q", good[:8])[0]
    change = st.tuples(st.integers(0, length - 1), st.integers(0, 255))

    def attempt(how: tuple[list[tuple[int, int]], int, int]) -> str:
        data = bytearray(good)
        for at, value in how[0]:
            data[at] = value
        data[:8] = struct.pack("<Q", (how[1] or struct.unpack("<Q", data[:8])[0]) % 2**64)
        (folder / "model.safetensors").write_bytes(data[: how[2]] if how[2] else data)
        return outcome(lambda: list(Source.open(folder).read(read_headers(folder))))

    lengths = st.one_of(st.just(0), st.just(0), st.sampled_from([1, 8, 10**8, HUGE, 2**63, 2**64 - 1]))
    cut = st.one_of(st.just(0), st.integers(1, len(good)))
    strategy = st.tuples(st.lists(change, max_size=4), lengths, cut)
    tally.update(fuzz(strategy, attempt, examples=examples, seconds=300, writes=places(tmp_path)))


def _duplicates() -> dict[str, bytes]:
    entry = b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    shard = b'"a":' + entry
    return {
        "a name twice in a header": b"{" + shard + b"," + shard + b"}",
        "two names on the same bytes": b"{" + shard + b',"b":' + entry + b"}",
        "half an overlap": b"{" + shard + b',"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
        "a shape of 10^12": b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,8]}}',
        "a product that overflows": b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}',
        "no bytes, 10^12 rows": b'{"a":{"dtype":"F32","shape":[1000000000000,0],"data_offsets":[0,0]}}',
        "deep nesting": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "a million names": b"{" + b",".join(b'"%d":%s' % (i, entry) for i in range(20_000)) + b"}",
    }


@pytest.mark.reliability("Hostile input", "safetensors: duplicate and overlapping tensors, absurd shapes, by hand")
def test_duplicates(folder: Path, tmp_path: Path, tally: Counter[str]) -> None:
    def attempt(what: str) -> str:
        header = _duplicates()[what]
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
        return command("quantize", folder, "-m", "rtn", "-f", "int4", "-o", tmp_path / "out", "-q")

    seen = fuzz(list(_duplicates()), attempt, seconds=300, writes=places(tmp_path))
    assert set(seen) == {"refused"}
    assert not (tmp_path / "out" / "config.json").exists()
    tally.update(seen)


@pytest.mark.reliability("Hostile input", "index JSON: `../`, absolute and odd names, odd values, cut text")
@pytest.mark.parametrize("examples", [FEW, MANY])
def test_index(folder: Path, tmp_path: Path, tally: Counter[str], examples: int) -> None:
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes((folder / "model.safetensors").read_bytes())
    names = (
        *ODD,
        "../secret.safetensors",
        str(secret),
        "model.safetensors",
        "./model.safetensors",
        "x" * 300 + ".safetensors",
    )
    weight_map = st.one_of(
        st.dictionaries(st.text(max_size=3), st.sampled_from(names), max_size=3), st.sampled_from(ODD)
    )
    whole = st.one_of(
        st.fixed_dictionaries({"weight_map": weight_map, "metadata": st.sampled_from(ODD)}), st.sampled_from(ODD)
    )
    inside = {"model.safetensors"}

    def attempt(how: tuple[Any, int]) -> str:
        text = json.dumps(how[0])
        (folder / "model.safetensors.index.json").write_text(text[: how[1]] if how[1] else text)
        opened: list[Source] = []
        said = outcome(lambda: opened.append(Source.open(folder)))
        assert all({info.file for info in source.tensors.values()} <= inside for source in opened), opened
        return said

    strategy = st.tuples(whole, st.one_of(st.just(0), st.integers(1, 40)))
    tally.update(fuzz(strategy, attempt, examples=examples, seconds=300, writes=places(tmp_path)))


@pytest.mark.reliability("Hostile input", "files that are pipes, devices, folders or links to them")
def test_no_regular_files(folder: Path, tmp_path: Path, tally: Counter[str]) -> None:
    import os

    def attempt(how: tuple[str, str]) -> str:
        name, kind = how
        path, saved = folder / name, folder / "saved"
        if path.exists():
            path.rename(saved)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to({"device": "/dev/zero", "loop": str(path), "nothing": "/nowhere/at/all"}[kind])
        try:
            return command("quantize", folder, "-m", "rtn", "-f", "int4", "-o", tmp_path / "out", "-q", "--dry-run")
        finally:
            path.rmdir() if kind == "folder" else path.unlink()
            if saved.exists():
                saved.rename(path)

    names = ["config.json", "model.safetensors", "model.safetensors.index.json", "compress_source.json"]
    strategy = st.tuples(st.sampled_from(names), st.sampled_from(["pipe", "device", "folder", "loop", "nothing"]))
    tally.update(fuzz(strategy, attempt, examples=20, seconds=120, writes=places(tmp_path)))


CONFIG_KEYS = (
    *("num_labels", "auto_map", "quantization_config", "torch_dtype", "attn_implementation", "experts_implementation"),
    *("text_config", "layer_types", "rope_scaling", "is_encoder_decoder", "id2label", "pruned_heads", "_name_or_path"),
    *("transformers_weights", "sliding_window", "base_model_tp_plan", "tokenizer_class", "base_model_type", "cuts"),
)
MALICE = (
    {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    {"AutoModelForCausalLM": "someone/else--evil.Model"},
    "someone/kernels",
    {"": "someone/kernels"},
    {
        "quant_method": "compressed-tensors",
        "config_groups": {"g": {"targets": ["re:(a+)+$"], "weights": {"num_bits": HUGE}}},
    },
    {
        "quant_method": "compressor",
        "version": 1,
        "formats": [{"name": "__import__('os').system('id')"}],
        "modules": {"../x": 0},
    },
    {"quant_method": "fp8", "weight_block_size": [HUGE, 0]},
    {"rope_type": "__class__", "factor": HUGE},
    ["LlamaForCausalLM", "os.system"],
    ["pipeline"],
    ["__builtins__"],
    "eval",
)
EVIL = "import pathlib\npathlib.Path({canary!r}).write_text('ran')\nraise SystemExit(0)\n"


@pytest.mark.reliability(
    "Hostile input", "config.json: unknown, malicious and absurd fields, through `compress quantize`"
)
@pytest.mark.parametrize("examples", [FEW, pytest.param(600, marks=pytest.mark.slow)])
def test_config(folder: Path, tmp_path: Path, tally: Counter[str], examples: int) -> None:
    good = json.loads((folder / "config.json").read_text())
    (folder / "evil.py").write_text(EVIL.format(canary=str(tmp_path / "canary")))

    def attempt(change: tuple[list[tuple[str, Any]], str]) -> str:
        fields, kind = change
        data = {**good, **dict(fields)}
        (folder / "config.json").write_text(
            json.dumps(data if kind == "object" else [data] if kind == "list" else kind)
        )
        said = command("quantize", folder, "-m", "rtn", "-f", "int4", "-o", tmp_path / "out", "-q", "--dry-run")
        assert not (tmp_path / "canary").exists(), "code of the checkpoint was run"
        return said

    field = st.tuples(
        st.sampled_from([*good, *CONFIG_KEYS]), st.one_of(st.sampled_from(ODD[:-1]), st.sampled_from(MALICE))
    )
    kinds = st.sampled_from(["object"] * 9 + ["list", "word"])
    strategy = st.tuples(st.lists(field, min_size=1, max_size=2), kinds)
    tally.update(fuzz(strategy, attempt, examples=examples, seconds=500, writes=places(tmp_path), memory=3 << 30))


@pytest.mark.reliability("Hostile input", "config.json: numbers of 10^9 and more where models are built from them")
def test_absurd_sizes(folder: Path, tmp_path: Path, tally: Counter[str]) -> None:
    good = json.loads((folder / "config.json").read_text())
    keys = [key for key, value in good.items() if isinstance(value, int) and not isinstance(value, bool)]

    def attempt(change: tuple[str, int]) -> str:
        (folder / "config.json").write_text(json.dumps({**good, change[0]: change[1]}))
        return command("quantize", folder, "-m", "rtn", "-f", "int4", "-o", tmp_path / "out", "-q", "--dry-run")

    strategy = st.tuples(st.sampled_from([*keys, "num_labels"]), st.sampled_from([10**5, 10**9, HUGE, 10**30]))
    tally.update(fuzz(strategy, attempt, examples=25, seconds=300, writes=places(tmp_path), memory=3 << 30))


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=288,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, models.random_model(lambda: LlamaForCausalLM(config), 0), lambda _: "F16")
    check_header(path)
    return path.read_bytes()


@pytest.mark.reliability("Hostile input", "GGUF: a good file with numbers in its header replaced, or cut")
@pytest.mark.parametrize("examples", [FEW, MANY])
def test_gguf(gguf: bytes, tmp_path: Path, tally: Counter[str], examples: int) -> None:
    path = tmp_path / "m.gguf"
    header = len(gguf) - 40_000  # the rest is weights, mostly
    numbers = st.sampled_from([0, 1, 3, 8, 9, 13, 255, 2**16, 2**31, 2**32 - 1, HUGE, 2**63, 2**64 - 1])

    def attempt(how: tuple[list[tuple[int, int, str]], int]) -> str:
        data = bytearray(gguf)
        for at, value, code in how[0]:
            struct.pack_into("<" + code, data, at, value % (1 << 8 * struct.calcsize(code)))
        path.write_bytes(data[: how[1]] if how[1] else data)
        return outcome(lambda: read_contents(path))

    early = st.one_of(st.integers(0, 400), st.integers(0, header))
    changes = st.lists(st.tuples(early, numbers, st.sampled_from("IQ")), min_size=1, max_size=2)
    strategy = st.tuples(changes, st.one_of(st.just(0), st.just(0), st.integers(1, len(gguf))))
    tally.update(fuzz(strategy, attempt, examples=examples, seconds=500, writes=places(tmp_path)))


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _gguf_bombs() -> dict[str, bytes]:
    start = b"GGUF" + struct.pack("<I", 3)
    array = _text(b"general.architecture") + struct.pack("<IIQ", 9, 4, HUGE)
    strings = array.replace(struct.pack("<I", 4), struct.pack("<I", 8))
    nested = _text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000
    tensor = _text(b"t") + struct.pack("<I", 2) + struct.pack("<QQ", HUGE, HUGE) + struct.pack("<IQ", 0, 0)
    small = b"".join(_text(b"t%d" % i) + struct.pack("<IQIQ", 1, 4096, 0, 0) for i in range(3000))
    return {
        "an array of 10^12 numbers": start + struct.pack("<QQ", 0, 1) + array + bytes(64),
        "an array of 10^12 strings": start + struct.pack("<QQ", 0, 1) + strings + bytes(64),
        "10^12 values": start + struct.pack("<QQ", 0, HUGE) + bytes(64),
        "10^12 tensors": start + struct.pack("<QQ", HUGE, 0) + bytes(64),
        "a string of 10^12 bytes": start + struct.pack("<QQ", 0, 1) + struct.pack("<Q", HUGE) + bytes(64),
        "a tensor of 10^24 weights": start + struct.pack("<QQ", 1, 0) + tensor + bytes(64),
        "3,000 tensors on the same bytes": start + struct.pack("<QQ", 3000, 0) + small + bytes(1 << 14),
        "arrays in arrays": start + struct.pack("<QQ", 0, 1) + nested,
        "nothing behind the magic": b"GGUF",
    }  # fmt: skip


@pytest.mark.reliability("Hostile input", "GGUF: headers that promise 10^12 of something, by hand")
def test_gguf_bombs(tmp_path: Path, tally: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "bomb.gguf"

    def attempt(what: str) -> str:
        path.write_bytes(_gguf_bombs()[what])
        return command("quantize", path, "-m", "rtn", "-f", "int4", "-o", tmp_path / "out", "-q")

    seen = fuzz(list(_gguf_bombs()), attempt, seconds=300, writes=places(tmp_path))
    assert set(seen) == {"refused"}
    tally.update(seen)


def test_helpers_change_what_they_say() -> None:
    data = {"a": [1, {"b": 2}]}
    assert paths(data) == [(), ("a",), ("a", 0), ("a", 1), ("a", 1, "b")]
    assert changed(data, ("a", 1, "b"), 3) == {"a": [1, {"b": 3}]}
    assert data == {"a": [1, {"b": 2}]}
