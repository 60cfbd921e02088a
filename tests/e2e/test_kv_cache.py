"""FP8 key/value caches: scales from data, written as readers expect, computed with by this package's loader."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import compressor
from compressor.calibration.kv_cache import KVRange, round_fp8, simulate
from compressor.errors import CompressorError, UnsupportedError
from compressor.testing import models
from compressor.testing.stock import Case, load_stock
from compressor.testing.tools import save_checkpoint, write_text


def write(model: PreTrainedModel, root: Path, **options: object) -> Path:
    root.mkdir(exist_ok=True)
    text = write_text(root / "text.txt")
    source = save_checkpoint(model, root / "source")
    wanted = {"method": "rtn", "format": "int8", "kv_cache": "fp8", "n_samples": 6, "seq_len": 32, **options}
    report = compressor.quantize(str(source), output=root / "out", data=str(text), **wanted)  # type: ignore[arg-type]
    assert report.verification["ok"]
    return root / "out"


@pytest.mark.parametrize("build", [lambda: models.tiny_llama(kv_heads=2), models.tiny_olmoe], ids=["llama", "olmoe"])
@pytest.mark.parametrize("method", ["rtn", "fp4"])
def test_scales_are_the_largest_cached_values(
    build: Callable[[], PreTrainedModel], method: str, tmp_path: Path
) -> None:
    model = build().to(torch.bfloat16)
    out = write(model, tmp_path, method=method, format="mxfp4")
    stored = load_file(out / "model.safetensors")
    scheme = json.loads((out / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert scheme == {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    # The same by hand: keys and values of the original model on the tokens the run saw.
    from compressor.calibration.dataset import build as build_set
    from compressor.recipe import CalibrationSpec
    from compressor.testing.models import tiny_tokenizer

    spec = CalibrationSpec(data=str(tmp_path / "text.txt"), n_samples=6, seq_len=32)
    tokens = build_set(spec, tiny_tokenizer(), model.config.vocab_size, seed=0).tokens
    model.float()
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    for index, layer in enumerate(cache.layers):
        for suffix, values in (("k_scale", layer.keys), ("v_scale", layer.values)):
            scale = stored[f"model.layers.{index}.self_attn.{suffix}"]
            assert scale.dtype == torch.bfloat16
            torch.testing.assert_close(scale, (values.abs().max() / 448).to(torch.bfloat16).reshape(1))


def test_loader_computes_with_the_rounded_cache(tmp_path: Path) -> None:
    model = models.tiny_llama(kv_heads=2)
    plain = write(model, tmp_path, kv_cache=None)
    with_cache = write(model, tmp_path / "kv")
    tokens = models.sample_tokens(model)
    loaded, reference = compressor.load(with_cache), compressor.load(plain)
    with torch.no_grad():
        got, without = loaded(tokens).logits, reference(tokens).logits
    assert not torch.equal(got, without)
    for index, layer in enumerate(reference.model.layers):
        attention = layer.self_attn
        for suffix in ("k_scale", "v_scale"):
            scale = load_file(with_cache / "model.safetensors")[f"model.layers.{index}.self_attn.{suffix}"]
            attention.register_buffer(suffix, scale)
        simulate(attention)
    with torch.no_grad():
        assert torch.equal(reference(tokens).logits, got)
    # Token by token through a real cache gives what one pass gives.
    with torch.no_grad():
        past, steps = None, []
        for position in range(tokens.shape[1]):
            step = loaded(tokens[:, position : position + 1], past_key_values=past, use_cache=True)
            past = step.past_key_values
            steps.append(step.logits)
    torch.testing.assert_close(torch.cat(steps, 1), got, rtol=1e-4, atol=1e-4)


def test_stock_transformers_takes_the_scales(tmp_path: Path) -> None:
    out = write(models.tiny_llama(kv_heads=2).to(torch.bfloat16), tmp_path)
    loaded = load_stock({"kv": Case(out)}, tmp_path)["kv"]
    assert loaded.error is None
    assert not loaded.wrong_keys


def test_round_fp8() -> None:
    scale = torch.tensor([0.5])
    got = round_fp8(torch.tensor([0.0, 0.5, 0.55, 1e6, -1e6, 224.0]), scale)
    assert got.tolist() == [0.0, 0.5, 0.5625, 224.0, -224.0, 224.0]


def test_models_without_a_cache_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="keeps no cache"):
        write(models.tiny_bert(), tmp_path)
    with pytest.raises(CompressorError, match="cannot say so"):
        write(models.tiny_llama(), tmp_path / "native", format="fp4")
    with pytest.raises(UnsupportedError, match="does not hand its keys"):
        KVRange(torch.nn.Linear(2, 2)).scales("layer", torch.float32)
