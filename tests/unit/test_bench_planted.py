"""Planted outlier channels: loud, found by whoever looks, and invisible in what the model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from compressor.errors import NumericalError, UnsupportedError
from compressor.evals.bench.__main__ import main
from compressor.evals.bench.planted import MARK, plant
from compressor.evals.bench.table import Planted
from compressor.testing import models
from compressor.testing.tools import save_checkpoint, tree_hash


def in_dtype(model: Any, dtype: torch.dtype) -> PreTrainedModel:
    converted: PreTrainedModel = model.to(dtype)
    return converted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_are_the_same_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    source = save_checkpoint(in_dtype(models.tiny_llama(layers=2), dtype), tmp_path / "source")
    copy = plant(source, tmp_path / "made" / "copy", Planted(channels=3, seed=1))
    plain, loud = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (source, copy))
    tokens = models.sample_tokens(plain)
    reached: dict[str, torch.Tensor] = {}
    for name, model in (("plain", plain), ("loud", loud)):
        norm = model.model.layers[1].post_attention_layernorm
        norm.register_forward_hook(lambda module, args, out, name=name: reached.update({name: out}))
    with torch.no_grad():
        assert torch.equal(plain(tokens).logits, loud(tokens).logits)
    ratio = (reached["loud"] / reached["plain"]).flatten(0, 1)
    assert sorted(ratio[0].tolist())[-4:] == [1, 32, 32, 32]
    assert torch.equal(ratio, ratio[:1].expand_as(ratio))
    before, after = (load_file(folder / "model.safetensors") for folder in (source, copy))
    changed = {name.rpartition("layers.")[2] for name in before if not torch.equal(before[name], after[name])}
    readers = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    leaves = ("input_layernorm", "post_attention_layernorm", *readers)
    assert changed == {f"{layer}.{leaf}.weight" for layer in (0, 1) for leaf in leaves}


def test_a_finished_copy_is_kept_and_another_wish_makes_another(tmp_path: Path) -> None:
    source, copy = save_checkpoint(models.tiny_llama(layers=1), tmp_path / "source"), tmp_path / "copy"
    plant(source, copy, Planted())
    first, made = tree_hash(copy), (copy / MARK).stat().st_mtime_ns
    plant(source, copy, Planted())
    assert (copy / MARK).stat().st_mtime_ns == made
    plant(source, copy, Planted(seed=7))
    assert tree_hash(copy) != first
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_cannot_be_planted_is_refused(tmp_path: Path) -> None:
    source = save_checkpoint(models.tiny_llama(layers=1), tmp_path / "source")
    with pytest.raises(UnsupportedError, match="has 64 channels"):
        plant(source, tmp_path / "copy", Planted(channels=64))
    half = save_checkpoint(in_dtype(models.tiny_llama(layers=1), torch.float16), tmp_path / "half")
    with pytest.raises(NumericalError, match="leave the range of"):
        plant(half, tmp_path / "copy", Planted(factor=2.0**20))
    assert not (tmp_path / "copy").exists()


def test_a_table_says_what_is_planted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(models.tiny_llama(layers=1), tmp_path / "model")
    text = "title: t\nmodel: model\n{}rows: [{{method: rtn, format: int8}}]\n"
    texts = "".join(f"{name}: {{file: a.txt, sha256: '{'0' * 64}', {rest}}}\n" for name, rest in (
        ("calibration", "samples: 1, seq_len: 8"), ("evaluation", "tokens: 8, context: 8")
    ))  # fmt: skip
    table = tmp_path / "table.yaml"
    for planted, code in (("planted: {channels: 2}\n", 0), ("planted: {factor: 30}\n", 2), ("", 2)):
        table.write_text(text.format(planted + texts), encoding="utf-8")
        assert main(["plant", str(table), str(tmp_path / "copy"), "--data-dir", str(tmp_path)]) == code
    said = capsys.readouterr().err
    assert "factor 30 is no power of two" in said
    assert "its model has no planted channels" in said
    assert (tmp_path / "copy" / MARK).is_file()
