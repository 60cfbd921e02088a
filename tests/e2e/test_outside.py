"""Embeddings and output heads that a user names: rounded, shared where they are tied, and computed with packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import compressor
from compressor.check import check
from compressor.errors import RecipeError
from compressor.formats import get_format, parse_group_size
from compressor.formats.split_floats import SplitFloat
from compressor.kernels.reference.linear import dequantize
from compressor.methods.tables import round_table, search_table
from compressor.report import RunReport
from compressor.runtime import dequantized
from compressor.runtime.embedding import PackedEmbedding, TiedHead, some_rows
from compressor.testing import models
from compressor.testing.layers import heavy_tailed_weights
from compressor.testing.tools import save_checkpoint, write_text


def run(model: PreTrainedModel, root: Path, **options: Any) -> RunReport:
    if not (root / "source").exists():
        save_checkpoint(model, root / "source")
    text = write_text(root / "text.txt")
    wanted = {"method": "rtn", "output": root / "out", "data": str(text), "n_samples": 4, "seq_len": 32}
    return compressor.quantize(str(root / "source"), **{**wanted, **options})


def by_decoded_weights(root: Path, cls: Any, tokens: Tensor) -> Tensor:
    """Return what the source's model computes with the decoded tensors in the place of its own."""
    model = cls.from_pretrained(root / "source", dtype=torch.float32)
    missing, unexpected = model.load_state_dict(dict(dequantized(root / "out")), strict=False)
    assert not unexpected
    assert all(name == "lm_head.weight" for name in missing)
    with torch.no_grad():
        out = model(tokens)
    found: Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return found


@pytest.mark.parametrize("fmt", ["fp4", "int8", "int4-asym"])
def test_a_table_that_the_head_shares(fmt: str, tmp_path: Path) -> None:
    model = models.tiny_llama()
    report = run(model, tmp_path, format="int8", overrides={"model.embed_tokens": fmt})
    assert report.verification["ok"]
    (row,) = [row for row in report.rows if row.name == "model.embed_tokens.weight"]
    assert row.action == fmt
    assert 0 < (row.weight_error or 0) < 0.2
    assert any("lm_head.weight shares: rounded by itself" in event for event in report.events)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.embed_tokens.weight_packed" in stored
    assert not any(name.startswith("lm_head") or name == "model.embed_tokens.weight" for name in stored)
    tokens = models.sample_tokens(model)
    loaded: Any = compressor.load(tmp_path / "out")
    assert isinstance(loaded.model.embed_tokens, PackedEmbedding)
    assert isinstance(loaded.lm_head, TiedHead)
    with torch.no_grad():
        got = loaded(tokens).logits
        other = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(tokens).logits
        plain = model(tokens).logits
    assert torch.equal(got, other)
    torch.testing.assert_close(got, by_decoded_weights(tmp_path, AutoModelForCausalLM, tokens), rtol=1e-4, atol=1e-5)
    assert float((got - plain).norm() / plain.norm()) > 1e-3
    assert check(tmp_path / "out", quick=True).ok


def test_a_head_of_its_own_stays_in_the_common_container(tmp_path: Path) -> None:
    """Other readers know a packed head; the search of `fp4` looks at blocks alone."""
    model = models.tiny_llama(tied=False)
    report = run(model, tmp_path, method="fp4", format="nvfp4", overrides={"lm_head": "nvfp4"})
    assert report.verification["ok"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert "lm_head" not in config["ignore"]
    tokens = models.sample_tokens(model)
    with torch.no_grad():
        got = compressor.load(tmp_path / "out")(tokens).logits
    torch.testing.assert_close(got, by_decoded_weights(tmp_path, AutoModelForCausalLM, tokens), rtol=1e-4, atol=1e-5)
    assert check(tmp_path / "out", quick=True).ok


def test_embeddings_of_an_encoder_in_e_w_a_4(tmp_path: Path) -> None:
    model = models.tiny_bert()
    options = {"points": 5, "rounds": 1, "tokens": 64}
    overrides = {"*word_embeddings": "fp4", "pooler.dense": "fp6"}
    report = run(model, tmp_path, method="fp4", inputs="fpq4", options=options, overrides=overrides)
    assert report.verification["ok"]
    done = {row.name: row for row in report.rows if row.action.startswith("fp")}
    assert {row.inputs for row in done.values()} == {"fpq4", None}
    assert done["embeddings.word_embeddings.weight"].inputs is None
    assert done["pooler.dense.weight"].action == "fp6"
    tokens = models.sample_tokens(model)
    with torch.no_grad():
        got = compressor.load(tmp_path / "out")(tokens).last_hidden_state
        other = AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32)(tokens).last_hidden_state
    assert torch.equal(got, other)


def test_what_cannot_be_chosen(tmp_path: Path) -> None:
    model = models.tiny_llama()
    with pytest.raises(RecipeError, match=r"lm_head\.weight, which is tied to model\.embed_tokens\.weight") as caught:
        run(model, tmp_path, format="int8", overrides={"lm_head": "int8"})
    assert "--set model.embed_tokens=int8" in caught.value.hint
    with pytest.raises(RecipeError, match=r"matches model\.norm\.weight, which stays dense"):
        run(model, tmp_path, format="int8", overrides={"model.norm": "int8"})
    with pytest.raises(RecipeError, match=r"do not divide into groups of 48"):
        run(model, tmp_path, format="int8", overrides={"model.embed_tokens": "int8:48"})


@pytest.mark.parametrize("name", ["fp4", "fp6", "fp8-searched"])
def test_a_table_takes_the_best_scale_of_each_row(name: str) -> None:
    fmt = get_format(name, None, torch.float32)
    assert isinstance(fmt, SplitFloat)
    w = heavy_tailed_weights(40, 64, seed=1)
    w[3] = 0
    found, plain = search_table(w, fmt), fmt.fit(w)
    errors = [(fmt.round(w, q) - w).square().sum(-1) for q in (found, plain)]
    assert float(errors[0].sum()) < 0.95 * float(errors[1].sum())
    if fmt.mantissa(found) == fmt.mantissa(plain):
        assert (errors[0] <= errors[1]).all()
    assert not fmt.round(w, found)[3].any()


@pytest.mark.parametrize("name", ["fp4", "fp8-searched", "int3", "int4-asym", "nvfp4", "fp8-block", "fp8-tensor"])
def test_rows_of_a_packed_table_are_its_rows(name: str) -> None:
    fmt = get_format(name, parse_group_size(name, None), torch.bfloat16)
    w = heavy_tailed_weights(130, 128, seed=2)
    decided = round_table(w, fmt)
    packed = fmt.pack(decided.codes, decided.qparams)
    rows = torch.tensor([0, 7, 64, 129])
    whole = dequantize(packed, fmt, torch.float32)
    part = some_rows(packed, fmt, rows)
    assert (part is None) == (name in ("int4-asym", "fp8-block"))
    if part is not None:
        assert torch.equal(dequantize(part, fmt, torch.float32), whole[rows])
    table = PackedEmbedding(packed, fmt, torch.nn.Embedding(130, 128))
    ids = torch.tensor([[5, 129, 5], [0, 1, 2]])
    assert torch.equal(table(ids), whole[ids])
