"""Rounded operands of attention, and LLM-FP4 on an encoder: stored, loaded, and computed with as the formulas say."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import compressor
from compressor.calibration.operands import OperandWatch
from compressor.check import check
from compressor.checkpoint import operands
from compressor.cli.app import app
from compressor.errors import CheckpointError, NumericalError, RecipeError
from compressor.formats.activations import INPUT_FORMATS
from compressor.formats.float4 import Float4
from compressor.formats.small_floats import SPLITS
from compressor.inputs import OPERANDS, Quantize, RoundFloat
from compressor.inputs.operands import RotateHead
from compressor.methods.operands import covering, product_error, require_finite, search_operands
from compressor.report import RunReport
from compressor.testing import models
from compressor.testing.checkpoints import edit_tensors
from compressor.testing.tools import save_checkpoint, write_text

FAST = {"points": 5, "rounds": 1, "tokens": 64}


def run(model: PreTrainedModel, root: Path, **options: Any) -> RunReport:
    if not (root / "source").exists():
        save_checkpoint(model, root / "source")
    text = write_text(root / "text.txt")
    wanted = {"method": "rtn", "output": root / "out", "data": str(text), "n_samples": 4, "seq_len": 32}
    return compressor.quantize(str(root / "source"), **{**wanted, **options})


def states(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(tokens)
    found: Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return found


def operands_of(folder: Path) -> dict[str, Tensor]:
    stored = load_file(folder / "model.safetensors")
    return {name.removesuffix(f".{operands.SUFFIX}"): t for name, t in stored.items() if name.endswith(operands.SUFFIX)}


@pytest.mark.parametrize("method", ["rtn", "fp4"])
def test_an_encoder_with_everything_rounded(method: str, tmp_path: Path) -> None:
    """W4A4 with attention: written, verified in a fresh process, loaded here and by transformers, and checked."""
    model = models.tiny_bert()
    options = FAST if method == "fp4" else {}
    report = run(model, tmp_path, method=method, format="fp4", inputs="fpq4", attention="fpq4", options=options)
    assert report.verification["ok"]
    assert sum(1 for row in report.rows if row.action == "fp4") == 12
    assert {row.inputs for row in report.rows if row.action == "fp4"} == {"fpq4"}
    found = operands_of(tmp_path / "out")
    assert sorted(found) == [f"encoder.layer.{index}.attention.self" for index in range(2)]
    for values in found.values():
        assert (values.shape, values.dtype) == ((4, 2), torch.float32)
        assert (values[:, 0] > 0).all()
        assert set(values[:, 1].tolist()) <= ({1.0} if method == "rtn" else {0.0, 1.0, 2.0})
    tokens = models.sample_tokens(model)
    loaded = states(compressor.load(tmp_path / "out"), tokens)
    assert torch.equal(loaded, states(AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32), tokens))
    assert check(tmp_path / "out", quick=True).ok
    edit_tensors(tmp_path / "out", lambda tensors: tensors.pop(f"encoder.layer.1.attention.self.{operands.SUFFIX}"))
    said = [finding.message for _, finding in check(tmp_path / "out", quick=True).findings()]
    assert any("the config rounds what it multiplies" in line for line in said)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "compressor_bert"
    assert config["quantization_config"]["attention"]["format"] == "fpq4"


def test_a_loaded_module_computes_the_formula(tmp_path: Path) -> None:
    """Grouped queries, a causal mask: the model in plain products, each operand rounded by its definition."""
    model = models.tiny_llama(kv_heads=2)
    run(model, tmp_path, format="int8", attention="fpq4")
    loaded: Any = compressor.load(tmp_path / "out")
    attention = loaded.model.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 7, 16, generator=generator) for heads in (4, 2, 2))
    got, _ = operands.attend(attention, q, k, v, None)
    ops = operands.rebuilt("x", operands_of(tmp_path / "out")["model.layers.0.self_attn"], 4)
    rounded = {name: ops[name].apply(x) for name, x in zip(("query", "key", "value"), (q, k, v), strict=True)}
    expected = torch.zeros(2, 4, 7, 16)
    for head in range(4):
        scores = rounded["query"][:, head] @ rounded["key"][:, head // 2].mT / 4
        scores = scores.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -torch.inf)
        expected[:, head] = ops["probability"].apply(scores.softmax(-1)) @ rounded["value"][:, head // 2]
    torch.testing.assert_close(got, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)
    wide_k, wide_v = (x.repeat_interleave(2, 1) for x in (k, v))
    plain, _ = operands.attend(torch.nn.Module(), q, wide_k, wide_v, None, is_causal=True)
    assert float((got - plain).norm() / plain.norm()) > 0.01


def test_integers_per_token_compute_the_formula(tmp_path: Path) -> None:
    """Queries and keys turned by a Hadamard matrix, then rounded per token and head; values rounded, shares not."""
    model = models.tiny_llama(kv_heads=2)
    report = run(model, tmp_path, format="int8", attention="int4-token-asym")
    assert report.verification["ok"]
    assert not operands_of(tmp_path / "out")
    assert check(tmp_path / "out", quick=True).ok
    loaded: Any = compressor.load(tmp_path / "out")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 7, 16, generator=generator) for heads in (4, 2, 2))
    k[..., 5] *= 20
    got, _ = operands.attend(loaded.model.layers[0].self_attn, q, k, v, None)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    turn = torch.kron(torch.kron(two, two), torch.kron(two, two)) / 4
    rounding = Quantize(INPUT_FORMATS["int4-token-asym"])
    expected = torch.zeros(2, 4, 7, 16)
    for head in range(4):
        query, key = rounding.apply(q[:, head] @ turn), rounding.apply(k[:, head // 2] @ turn)
        scores = (query @ key.mT / 4).masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -torch.inf)
        expected[:, head] = scores.softmax(-1) @ rounding.apply(v[:, head // 2])
    torch.testing.assert_close(got, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 24, 64, 192, 256])
def test_rotating_heads_changes_no_product(size: int) -> None:
    """Also where the size is no power of two, as in heads with a part for rotary embeddings."""
    q, k = torch.randn(2, 3, 5, size, generator=torch.Generator().manual_seed(size)).double()
    turned = RotateHead().apply(q), RotateHead().apply(k)
    torch.testing.assert_close(turned[0] @ turned[1].mT, q @ k.mT, rtol=1e-4, atol=1e-4)
    spike = torch.zeros(size)
    spike[0] = 1.0
    assert int((RotateHead().apply(spike) != 0).sum()) == {1: 1, 24: 8, 64: 64, 192: 64, 256: 128}[size]
    matrix = RotateHead().apply(torch.eye(size))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size))
    assert torch.equal(matrix, matrix.T)


def test_a_rotated_head_has_the_same_bits_however_it_lies_and_whatever_is_beside_it() -> None:
    """A cache hands keys over in another layout than a projection does; a last bit would tip their rounding."""
    x = torch.randn(2, 33, 4, 48).transpose(1, 2)  # [batch, heads, tokens, size], as a projection gives it
    turned = RotateHead().apply(x)
    assert torch.equal(turned, RotateHead().apply(x.contiguous()))
    assert torch.equal(turned[:, :, -1:], RotateHead().apply(x[:, :, -1:]))


@pytest.mark.parametrize("kind", ["fpq{}", "int{}-token-asym"])
def test_more_bits_of_operands_are_closer(kind: str, tmp_path: Path) -> None:
    """Against the model with nothing but its weights in int8; and step by step through a cache as in one go."""
    model = models.tiny_llama(kv_heads=2)
    tokens = models.sample_tokens(model)
    outputs = {}
    few, many = kind.format(4), kind.format(8)
    for attention in (None, few, many):
        out = tmp_path / str(attention)
        run(model, tmp_path, format="int8", attention=attention, output=out)
        outputs[attention] = states(compressor.load(out), tokens)
    errors = [float((outputs[name] - outputs[None]).norm()) for name in (many, few)]
    assert 0 < errors[0] < 0.5 * errors[1]
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / few, dtype=torch.float32)
    past, steps = None, []
    with torch.no_grad():
        for position in range(tokens.shape[1]):
            step = loaded(tokens[:, position : position + 1], past_key_values=past, use_cache=True)
            past = step.past_key_values
            steps.append(step.logits)
    # A few roundings of operands may tip over between one product and another.
    assert float((torch.cat(steps, 1) - outputs[few]).norm() / outputs[few].norm()) < 0.02


def test_a_second_run_writes_the_same_operands(tmp_path: Path) -> None:
    model = models.tiny_bert()
    run(model, tmp_path, format="int8", attention="fpq6")
    run(model, tmp_path, format="int8", attention="fpq6", output=tmp_path / "again")
    first, second = operands_of(tmp_path / "out"), operands_of(tmp_path / "again")
    assert first
    assert all(torch.equal(first[name], second[name]) for name in first)


def watched(seed: int) -> OperandWatch:
    generator = torch.Generator().manual_seed(seed)
    watch = OperandWatch()
    for _ in range(2):
        q, k, v = (torch.randn(1, heads, 24, 8, generator=generator) for heads in (4, 2, 2))
        k[..., 3] *= 12
        shares = (q @ k.repeat_interleave(2, 1).mT / 3).softmax(-1)
        for name, x in zip(OPERANDS, (q, k, shares, v), strict=True):
            assert watch(name, x) is x
    return watch


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_search_never_does_worse_and_mostly_better(bits: int) -> None:
    for seed in range(2):
        watch = watched(seed)
        start = covering(watch, bits)
        found = search_operands(watch, start, Float4(), points=20, rounds=2)
        for (left, right), columns in ((OPERANDS[:2], True), (OPERANDS[2:], False)):
            pairs = []
            for sample in watch.kept:
                y = sample[right].repeat_interleave(2, 0)
                pairs.append((sample[left], y.mT if columns else y))
            index = OPERANDS.index(left)
            before, after = (product_error(pairs, ops[index], ops[index + 1]) for ops in (start, found))
            assert after < 0.95 * before
    sums = [product_error(pairs, *search_operands(watch, start, Float4(), 20, rounds)[2:]) for rounds in (1, 2, 3)]
    assert all(later <= earlier for earlier, later in pairwise(sums))


def test_operands_of_no_float_and_damage(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"operands of attention are rounded to int4-token, .*, fpq8"):
        run(models.tiny_bert(), tmp_path, format="int8", attention="fp8-token")
    with pytest.raises(RecipeError, match=r"format of operands of attention .fpq7.") as refused:
        run(models.tiny_bert(), tmp_path, format="int8", attention="fpq7")
    assert "power" not in str(refused.value.hint)  # only what operands can be rounded to is suggested
    with pytest.raises(CheckpointError, match="scale 0 and 1 mantissa bits of query"):
        operands.rebuilt("here", torch.tensor([[0.0, 1], [1, 1], [1, 1], [1, 1]]), 4)
    with pytest.raises(CheckpointError, match="5 mantissa bits of value"):
        operands.rebuilt("here", torch.tensor([[1.0, 1], [1, 1], [1, 1], [1, 5]]), 4)
    watch = watched(0)
    watch("key", torch.full((1, 2, 3, 8), torch.inf))
    with pytest.raises(NumericalError, match="here: its key operand is not finite"):
        require_finite(watch, "here")
    ops = [RoundFloat.covering(8, m, torch.tensor([3.0]), False) for m in SPLITS[8][:4]]
    again = operands.rebuilt("here", operands.stored(ops), 8)
    x = torch.randn(5, generator=torch.Generator().manual_seed(0))
    for op, name in zip(ops, OPERANDS, strict=True):
        assert torch.equal(op.apply(x), again[name].apply(x))


def test_the_command_line_plans_it(tmp_path: Path) -> None:
    source = save_checkpoint(models.tiny_bert(), tmp_path / "source")
    asked = ["quantize", str(source), "--method", "rtn", "--inputs", "fpq6", "--set", "*word_embeddings=fp4"]
    planned = CliRunner().invoke(app, [*asked, "--attention", "fpq8", "--dry-run", "--json"])
    assert planned.exit_code == 0, planned.output
    plan = json.loads(planned.stdout)
    formats = {layer["ref"]["name"]: layer["format"] for layer in plan["layers"] if layer["format"]}
    assert formats.pop("embeddings.word_embeddings.weight") == "fp4"
    assert set(formats.values()) == {"fp6"}
    assert {site["operand"]: site["format"] for site in plan["sites"]} == {
        "query_key": "fpq8",
        "probability_value": "fpq8",
        "kv_cache": None,
    }
    with pytest.raises(RecipeError, match="unknown format of operands of attention 'fpq5'"):
        CliRunner().invoke(app, [*asked, "--attention", "fpq5"], catch_exceptions=False)
