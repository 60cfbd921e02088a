"""GGUF files as sources: converted once, weights kept, nothing left out without a word, one line for what is broken."""

import gc
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import compressor
from compressor.api import prepare
from compressor.checkpoint import gguf_source
from compressor.checkpoint.resolve import resolve_model
from compressor.checkpoint.source import Source
from compressor.errors import CheckpointError, CompressorError, ResourceError, UnsupportedError
from compressor.recipe import Recipe
from compressor.testing.gguf_files import as_read, write_gguf
from compressor.testing.models import tiny_llama
from compressor.verify import check


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("compressor.verify.verify", check)
    gc.freeze()  # the engine collects garbage after every block: it need not look at the libraries each time


def every(kind: str) -> Callable[[str], str]:
    return lambda _: kind


def model_for_gguf(tied: bool = True, seed: int = 0) -> PreTrainedModel:
    """A Llama with grouped queries whose matrices divide into GGUF's groups of 32."""
    return tiny_llama(seed, tied=tied, kv_heads=2)


def expected(model: PreTrainedModel, type_of: Callable[[str], str]) -> dict[str, Tensor]:
    """What every tensor must be worth, by its name in memory; rows are quantized one by one, so order plays no role."""
    return {
        name: as_read(value, type_of(name)) if value.ndim > 1 else value.float()
        for name, value in model.state_dict().items()
        if not (model.config.tie_word_embeddings and name == "lm_head.weight")
    }


@pytest.mark.parametrize(("kind", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_plain_floats_keep_every_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_for_gguf(tied=False)
    write_gguf(tmp_path / "model.gguf", model, every(kind))
    folder, revision = resolve_model(str(tmp_path / "model.gguf"))
    assert revision is None
    stored = load_file(folder / "model.safetensors")
    wanted = expected(model, every(kind))
    assert stored.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(stored[name].float(), value), name
        assert stored[name].dtype == (dtype if value.ndim > 1 else torch.float32), name
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert "without changing a value" in Source.open(folder).notes[0]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_blocks_are_dequantized_and_rounded_once(kind: str, tmp_path: Path) -> None:
    model = model_for_gguf()

    def mixed(name: str) -> str:
        return "Q8_0" if "embd" in name or "embed" in name else kind

    write_gguf(tmp_path / "model.gguf", model, mixed)
    folder, _ = resolve_model(str(tmp_path / "model.gguf"))
    stored = load_file(folder / "model.safetensors")
    for name, value in expected(model, mixed).items():
        if value.ndim > 1:
            assert torch.equal(stored[name], value.to(torch.bfloat16)), name
        else:
            assert torch.equal(stored[name], value), name  # gains are exact in the file and stay so
    note = Source.open(folder).notes[0]
    assert f"14 {kind}" in note or kind == "Q8_0"
    assert "bfloat16" in note


def test_same_content_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "a.gguf", model_for_gguf(), every("Q8_0"))
    first, _ = resolve_model(str(tmp_path / "a.gguf"))
    (tmp_path / "b").write_bytes((tmp_path / "a.gguf").read_bytes())  # without the suffix, known by its first bytes
    monkeypatch.setattr(gguf_source, "_build", lambda *_: pytest.fail("converted again"))
    assert resolve_model(str(tmp_path / "b"))[0] == first
    monkeypatch.undo()
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    (first / "model.safetensors").write_bytes(b"damaged")
    again, _ = resolve_model(str(tmp_path / "a.gguf"))
    assert again == first
    assert len((first / "model.safetensors").read_bytes()) > 1000
    write_gguf(tmp_path / "a.gguf", model_for_gguf(seed=1), every("Q8_0"))
    assert resolve_model(str(tmp_path / "a.gguf"))[0] != first


def test_quantizing_a_gguf_file_equals_quantizing_its_dequantized_twin(tmp_path: Path) -> None:
    model = model_for_gguf()
    write_gguf(tmp_path / "model.gguf", model, every("Q8_0"))
    reports = {}
    twin = model_for_gguf()
    twin.load_state_dict(
        {name: value if value.ndim == 1 else as_read(value, "Q8_0") for name, value in model.state_dict().items()}
    )
    twin.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    sources = {"gguf": str(tmp_path / "model.gguf"), "twin": str(tmp_path / "dense")}
    for name, source in sources.items():
        reports[name] = compressor.quantize(source, method="rtn", format="int4", output=tmp_path / name)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in reports)
    packed = [name for name in theirs if ".weight_" in name]
    assert len(packed) == 3 * 14
    assert all(torch.equal(ours[name], theirs[name]) for name in packed)
    events = reports["gguf"].events
    assert any("GGUF file (llama; matrices: 15 Q8_0)" in event for event in events)
    assert not any("GGUF" in event for event in reports["twin"].events)
    assert not (tmp_path / "gguf" / "compress_source.json").exists()
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", output_loading_info=True)
    assert not any(info.values()), info
    assert stock.config.max_position_embeddings == 512


def tiny_qwen3_moe() -> PreTrainedModel:
    """A Qwen3-MoE whose experts have the width transformers assumes, as it does not read it from the file."""
    config = Qwen3MoeConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
        tie_word_embeddings=False, norm_topk_prob=True, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).eval()


def test_experts_come_out_one_by_one(tmp_path: Path) -> None:
    model = tiny_qwen3_moe()
    write_gguf(tmp_path / "moe.gguf", model, every("F16"), splitting="qwen2", architecture="qwen3moe")
    folder, _ = resolve_model(str(tmp_path / "moe.gguf"))
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    for name, value in expected(model, every("F16")).items():
        assert torch.equal(loaded.state_dict()[name].float(), value.half().float()), name
    report = compressor.quantize(str(tmp_path / "moe.gguf"), method="rtn", format="mxfp4", output=tmp_path / "out")
    assert sum(row.action == "mxfp4" for row in report.rows) == 4 + 4 * 3
    model.config.hidden_size = 32  # what the file says no longer fits its tensors
    write_gguf(tmp_path / "bad.gguf", model, every("F16"), splitting="qwen2", architecture="qwen3moe")
    with pytest.raises(CheckpointError, match="transformers reads a config that makes it") as caught:
        resolve_model(str(tmp_path / "bad.gguf"))
    one_line(caught.value)


def test_default_output_is_named_after_the_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny-model.gguf", model_for_gguf(), every("F16"))
    job = prepare(Recipe(model=str(tmp_path / "tiny-model.gguf"), method="rtn", format="int4"))
    assert job.out == Path("tiny-model-rtn-int4")


# --- what must not be lost without a word ---


def test_llama3_frequency_scaling_comes_back(tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = tiny_llama(kv_heads=2, hidden_size=256)  # heads of 64 reach wavelengths that are scaled
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 500000.0}
    scaled = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    plain = 1 / 500000.0 ** (torch.arange(0, 64, 2) / 64)
    target = tiny_llama(kv_heads=2, hidden_size=256).config
    target.rope_parameters = {**model.config.rope_parameters, **scaled, "original_max_position_embeddings": 8192}
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](target, torch.device("cpu"))
    factors = plain / frequencies
    assert factors.max() > 31
    write_gguf(tmp_path / "m.gguf", model, every("F16"), extra={"rope_freqs.weight": factors})
    folder, _ = resolve_model(str(tmp_path / "m.gguf"))
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    assert {key: rope[key] for key in scaled} == scaled
    assert (rope["rope_theta"], rope["original_max_position_embeddings"]) == (500000.0, 8192)
    write_gguf(tmp_path / "m.gguf", model, every("F16"), extra={"rope_freqs.weight": factors * 1.5})
    with pytest.raises(UnsupportedError, match="rotary frequencies"):
        resolve_model(str(tmp_path / "m.gguf"))


def test_tensors_the_reader_would_leave_out_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", model_for_gguf(), every("F16"), extra={"blk.0.surprise.weight": torch.ones(7)})
    with pytest.raises(UnsupportedError, match="but transformers makes") as caught:
        resolve_model(str(tmp_path / "m.gguf"))
    one_line(caught.value)


def test_tensors_the_file_lacks_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", model_for_gguf(), every("F16"), leave_out="blk.1.ffn_up.weight")
    with pytest.raises(CheckpointError, match=r"1 parameters .* model\.layers\.1\.mlp\.up_proj\.weight") as caught:
        resolve_model(str(tmp_path / "m.gguf"))
    one_line(caught.value)


def test_splitting_rules_transformers_knows_are_kept_and_others_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", model_for_gguf(), every("F16"), splitting="llama-bpe")
    folder, _ = resolve_model(str(tmp_path / "m.gguf"))
    rules = json.loads((folder / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"]
    assert "{1,3}" in rules[0]["pattern"]["Regex"]  # digits in threes
    write_gguf(tmp_path / "m.gguf", model_for_gguf(), every("F16"), splitting="klingon")
    with pytest.raises(UnsupportedError, match="rule 'klingon'"):
        resolve_model(str(tmp_path / "m.gguf"))


# --- what is broken ---


def one_line(error: CompressorError) -> None:
    assert error.exit_code == 4
    assert "\n" not in error.message + error.hint
    assert error.hint


def test_unsupported_architecture(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", model_for_gguf(), every("F16"), architecture="rwkv6")
    with pytest.raises(CheckpointError, match=r"architecture.*rwkv6") as caught:
        resolve_model(str(tmp_path / "m.gguf"))
    one_line(caught.value)
    assert not list((tmp_path / "cache" / "models").glob("gguf-*"))


@pytest.mark.parametrize("keep", [0, 3, 10, 300, 3000, 20_000, -1])
def test_truncated(keep: int, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", model_for_gguf(), every("Q8_0"))
    whole = (tmp_path / "m.gguf").read_bytes()
    assert len(whole) > 30_000
    (tmp_path / "m.gguf").write_bytes(whole[:keep])
    with pytest.raises(CheckpointError, match="not readable as GGUF") as caught:
        resolve_model(str(tmp_path / "m.gguf"))
    one_line(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"not a model" * 100,
        b"GGUF" + b"\xff" * 500,
        b"GGUF\x03\0\0\0" + b"\xff" * 16,
        b"GGUF\x03\0\0\0" + b"\0" * 16,
        b"GGUF\x63\0\0\0" + b"\0" * 64,
    ],
    ids=["text", "ones", "counts", "empty", "version"],
)
def test_garbage(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match="not readable as GGUF") as caught:
        resolve_model(str(tmp_path / "m.gguf"))
    one_line(caught.value)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    model = model_for_gguf()
    model.get_parameter("model.layers.0.mlp.up_proj.weight").data[0, 0] = float("inf")
    write_gguf(tmp_path / "m.gguf", model, every("F16"))
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight: 1 of 8192 values are not finite"):
        resolve_model(str(tmp_path / "m.gguf"))


def test_other_files_and_missing_ones(tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("hello")
    with pytest.raises(CheckpointError, match="is a file, but no GGUF file"):
        resolve_model(str(tmp_path / "model.txt"))
    with pytest.raises(CheckpointError, match=r"gone\.gguf: no such file"):
        resolve_model(str(tmp_path / "gone.gguf"))
    with pytest.raises(CheckpointError, match=r"gone\.gguf: no such file"):
        resolve_model("owner/gone.gguf")


def test_too_large_for_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf", model_for_gguf(), every("F16"))
    monkeypatch.setattr(gguf_source.psutil, "virtual_memory", lambda: type("", (), {"available": 100_000})())
    with pytest.raises(ResourceError, match="GB are free"):
        resolve_model(str(tmp_path / "m.gguf"))
