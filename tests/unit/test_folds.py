"""Where factors per channel may move: found by structure, refused with a reason, and the function stays the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from compressor.checkpoint.blocks import BlockSequence
from compressor.checkpoint.folds import NOTHING_IN_FRONT, Found, find_folds
from compressor.checkpoint.probing import gate_is_linear, norm_offset
from compressor.checkpoint.skeleton import Skeleton
from compressor.checkpoint.source import Source
from compressor.errors import NumericalError
from compressor.folding import Producer, check_unchanged
from compressor.plan import Fold, FoldKind, Plan
from compressor.planner import make_plan
from compressor.recipe import Override, Recipe
from compressor.testing import models
from compressor.testing.models import random_model
from compressor.testing.tools import save_checkpoint

SMALL = {"vocab_size": 320, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
BUILDS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: models.tiny_llama(layers=1),
    "grouped": lambda: models.tiny_llama(layers=1, kv_heads=2),
    "opt": lambda: random_model(
        lambda: OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=128, max_position_embeddings=64, word_embed_proj_dim=64)), 0
    ),
    "gemma": lambda: random_model(
        lambda: Gemma2ForCausalLM(
            Gemma2Config(**SMALL, intermediate_size=128, num_key_value_heads=4, head_dim=16, initializer_range=0.12)
        ),
        0,
    ),
    "moe": models.tiny_qwen2_moe,
    "mixtral": models.tiny_mixtral,
    "bert": models.tiny_bert,
}
"""Built by name; OPT has layer norms with biases and a ReLU, Gemma gains of one plus the weight."""


def planned(
    model: PreTrainedModel, folder: Path, method: str = "awq", **options: Any
) -> tuple[Plan, Skeleton, BlockSequence]:
    save_checkpoint(model, folder)
    source, skeleton = Source.open(folder, str(folder), None), Skeleton.build(folder)
    blocks = BlockSequence.find(skeleton.model)
    recipe = Recipe(model=str(folder), method=method, format="int4", group_size="16", **options)
    return make_plan(recipe, source, skeleton, blocks), skeleton, blocks


def found_in(skeleton: Skeleton, plan: Plan) -> Found:
    return find_folds(BlockSequence.find(skeleton.model), plan.layers, tuple(FoldKind))


def short(fold: Fold) -> tuple[str, str, tuple[str, ...]]:
    last = [name.removesuffix(".weight").rpartition(".")[2] for name in (fold.name, *fold.readers)]
    return fold.kind.value, last[0], tuple(last[1:])


QKV = ("q_proj", "k_proj", "v_proj")
GATED = [("norm", "post_attention_layernorm", ("gate_proj", "up_proj")), ("product", "up_proj", ("down_proj",))]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", [("norm", "input_layernorm", QKV), ("value", "v_proj", ("o_proj",)), *GATED]),
        ("grouped", [("norm", "input_layernorm", QKV), *GATED]),
        (
            "opt",
            [
                ("norm", "self_attn_layer_norm", QKV),
                ("value", "v_proj", ("out_proj",)),
                ("norm", "final_layer_norm", ("fc1",)),
                ("product", "fc1", ("fc2",)),
            ],
        ),
        (
            "gemma",
            [
                ("norm", "input_layernorm", QKV),
                ("value", "v_proj", ("o_proj",)),
                ("norm", "pre_feedforward_layernorm", ("gate_proj", "up_proj")),
                ("product", "up_proj", ("down_proj",)),
            ],
        ),
        (
            "moe",
            [
                *(("norm", "input_layernorm", QKV), *GATED),
                *(("norm", "input_layernorm", QKV), ("product", "up_proj", ("down_proj",))),
                *[("product", "up_proj", ("down_proj",))] * 4,
            ],
        ),
        ("mixtral", 2 * [("norm", "input_layernorm", QKV)] + 8 * [("product", "w3", ("w2",))]),
        ("bert", 2 * [("value", "value", ("dense",))]),
    ],
)
def test_folds_of_an_architecture(name: str, expected: list[object], tmp_path: Path) -> None:
    plan, skeleton, _ = planned(BUILDS[name]().bfloat16(), tmp_path)
    assert [short(fold) for fold in plan.folds] == expected
    assert all(parameter.is_meta for parameter in skeleton.model.parameters()), "folds are found without weights"
    for fold in plan.folds:
        assert fold.offset == (1.0 if name == "gemma" and fold.kind is FoldKind.NORM else 0.0)
        assert fold.powers_of_two == (fold.bias is not None)
    readers = [reader for fold in plan.folds for reader in fold.readers]
    assert len(readers) == len(set(readers))
    assert set(readers) | set(plan.unfolded) == {layer.ref.name for layer in plan.compressed}
    assert not set(readers) & set(plan.unfolded)
    rewritten = {layer.ref.name for layer in plan.layers if layer.rewritten_because}
    norms = {fold.scaled for fold in plan.folds if fold.kind is FoldKind.NORM}
    assert rewritten == norms | {fold.bias for fold in plan.folds if fold.bias}


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        ("grouped", "self_attn.o_proj", "its 32 channels feed the 64 inputs of self_attn.o_proj"),
        ("moe", "layers.1.mlp.experts.2.gate_proj", "the router reads the same inputs and stays dense"),
        ("moe", "layers.1.mlp.shared_expert.up_proj", "post_attention_layernorm: mlp.gate (mm) reads it too"),
        ("bert", "layer.0.intermediate.dense", "attention.output.LayerNorm: output (add) reads it too"),
        ("bert", "layer.1.attention.self.key", "output.LayerNorm: it leaves its block"),
        ("bert", "layer.0.output.dense", NOTHING_IN_FRONT),
    ],
)
def test_layers_without_a_fold_have_a_reason(name: str, layer: str, reason: str, tmp_path: Path) -> None:
    plan, _, _ = planned(BUILDS[name](), tmp_path)
    mine = [why for tensor, why in plan.unfolded.items() if layer in tensor]
    assert mine, f"{layer} is folded"
    assert all(reason in why for why in mine), mine
    assert any(reason in note and note.startswith("awq does not scale") for note in plan.notes)


@pytest.mark.parametrize("name", BUILDS)
def test_the_function_stays_the_same(name: str, tmp_path: Path) -> None:
    model = BUILDS[name]()
    plan, _, _ = planned(model, tmp_path)
    model = model.double()
    if name in ("moe", "mixtral"):
        model.set_experts_implementation("eager")  # the default one has no float64
    tokens = models.sample_tokens(model, 24)
    with torch.no_grad():
        before = model(tokens)[0]
        generator = torch.Generator().manual_seed(1)
        for fold in plan.folds:
            divide(model, plan, fold, torch.exp(torch.randn(fold.channels, generator=generator).double()))
        after = model(tokens)[0]
    assert float((after - before).norm() / before.norm()) < 1e-6


def divide(model: PreTrainedModel, plan: Plan, fold: Fold, c: Tensor) -> None:
    """Move `c` as the fold says, straight from its definition."""
    refs = {layer.ref.name: layer.ref for layer in plan.layers}

    def values(name: str) -> Tensor:
        part: Tensor = refs[name].where.of(model.get_parameter(refs[name].param).data)
        return part

    gain = values(fold.scaled)
    gain.copy_((fold.offset + gain) / c - fold.offset if gain.ndim == 1 else gain / c[:, None])
    if fold.bias:
        values(fold.bias).div_(c)
    for reader in fold.readers:
        values(reader).mul_(c)


MLPS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str | None]] = {
    "relu": (lambda m, x: m.down_proj(m.up_proj(x).relu()), None),
    "twice": (lambda m, x: m.down_proj(2 * m.up_proj(x) / 3), None),
    "product with itself": (lambda m, x: m.down_proj(m.up_proj(x) * m.up_proj(x)), "up_proj: runs 2 times"),
    "square": (lambda m, x: (lambda y: m.down_proj(y * y))(m.up_proj(x)), NOTHING_IN_FRONT),
    "meets itself": (lambda m, x: (lambda y: m.down_proj(y * y.relu()))(m.up_proj(x)), "two ways from it meet again"),
    "silu": (lambda m, x: m.down_proj(nn.functional.silu(m.up_proj(x))), NOTHING_IN_FRONT),
    "shift": (lambda m, x: m.down_proj(m.up_proj(x) + 1), NOTHING_IN_FRONT),
    "in place": (lambda m, x: m.down_proj(m.up_proj(x).mul_(2)), "cannot pass"),
    "shuffle": (
        lambda m, x: m.down_proj(m.up_proj(x).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)),
        "reads its channels in another order",
    ),
    "reverse": (lambda m, x: m.down_proj(m.up_proj(x).flip(-1)), NOTHING_IN_FRONT),
    "second reader": (lambda m, x: (lambda y: m.down_proj(y) + y[..., :64])(m.up_proj(x)), "reads it too"),
    "weights as numbers": (lambda m, x: m.up_proj(x) @ m.down_proj.weight.T, NOTHING_IN_FRONT),
    "divisor": (lambda m, x: m.down_proj(x.mean(-1, True) / m.up_proj(x)), NOTHING_IN_FRONT),
}


@pytest.mark.parametrize("name", MLPS)
def test_what_lies_between_two_layers_decides(name: str, tmp_path: Path) -> None:
    plan, skeleton, _ = planned(models.tiny_llama(layers=1), tmp_path)
    forward, reason = MLPS[name]
    mlp: Any = skeleton.model.get_submodule("model.layers.0.mlp")
    mlp.forward = lambda x: forward(mlp, x)
    found = found_in(skeleton, plan)
    down = "model.layers.0.mlp.down_proj.weight"
    if reason is None:
        assert [fold.name for fold in found.folds if down in fold.readers] == ["model.layers.0.mlp.up_proj"]
    else:
        assert not any(down in fold.readers for fold in found.folds)
        assert reason in found.unfolded[down]


def test_a_shared_norm_is_refused(tmp_path: Path) -> None:
    plan, skeleton, _ = planned(models.tiny_llama(layers=1), tmp_path)
    block: Any = skeleton.model.get_submodule("model.layers.0")
    block.post_attention_layernorm.weight = block.input_layernorm.weight
    found = found_in(skeleton, plan)
    assert not any(fold.kind is FoldKind.NORM for fold in found.folds)
    assert "parameters are shared" in found.unfolded["model.layers.0.self_attn.q_proj.weight"]
    block.post_attention_layernorm = block.input_layernorm
    assert "runs 2 times" in found_in(skeleton, plan).unfolded["model.layers.0.self_attn.q_proj.weight"]


def test_a_dense_reader_refuses_the_fold_and_a_dense_producer_makes_powers_of_two(tmp_path: Path) -> None:
    skips = tuple(Override(match=match, keep="by hand") for match in ("*.q_proj", "*.k_proj", "*.v_proj"))
    plan, _, _ = planned(models.tiny_llama(layers=1).bfloat16(), tmp_path, overrides=skips)
    value = next(fold for fold in plan.folds if fold.kind is FoldKind.VALUE)
    assert value.powers_of_two
    assert {layer.ref.name for layer in plan.layers if layer.rewritten_because} >= {value.scaled}
    assert not any(fold.name.endswith("input_layernorm") for fold in plan.folds)


def test_a_method_gets_only_the_kinds_it_asks_for(tmp_path: Path) -> None:
    smooth, _, _ = planned(models.tiny_llama(layers=1), tmp_path / "a", method="smoothquant")
    assert {fold.kind for fold in smooth.folds} == {FoldKind.NORM}
    assert "does not move factors past attention" in smooth.unfolded["model.layers.0.self_attn.o_proj.weight"]
    rounded, _, _ = planned(models.tiny_llama(layers=1), tmp_path / "b", method="rtn")
    assert (rounded.folds, rounded.unfolded) == ((), {})
    cached, _, _ = planned(models.tiny_llama(layers=1), tmp_path / "c", kv_cache="fp8")
    assert FoldKind.VALUE not in {fold.kind for fold in cached.folds}


class Odd(nn.Module):
    """A norm-like module whose output is `make(weight, normalised)`."""

    def __init__(self, make: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.make = nn.Parameter(torch.ones(8)), make

    def forward(self, x: Tensor) -> Tensor:
        return self.make(self.weight, x / x.square().mean(-1, True).sqrt())


@pytest.mark.parametrize(
    ("make", "offset"),
    [
        (lambda w, x: w * x, 0.0),
        (lambda w, x: (1 + w) * x, 1.0),
        (lambda w, x: (w - 2) * x, -2.0),
        (lambda w, x: w.square() * x, None),
        (lambda w, x: (w * x).flip(-1), None),
        (lambda w, x: w * x + w, 0.0),
        (lambda w, x: w * x + w[0], None),
        (lambda w, x: (w * x).relu(), None),
        (lambda w, x: x, None),
    ],
)
def test_a_norm_is_known_by_what_it_does(make: Callable[[Tensor, Tensor], Tensor], offset: float | None) -> None:
    with torch.device("meta"):
        module = Odd(make)
    assert norm_offset(module) == offset


def test_norms_of_torch() -> None:
    assert norm_offset(nn.LayerNorm(16, device="meta")) == 0.0
    assert norm_offset(nn.RMSNorm(16, device="meta")) == 0.0
    assert norm_offset(nn.Linear(16, 16, device="meta")) is None
    assert norm_offset(nn.Bilinear(4, 4, 4, device="meta")) is None


def test_a_gate_is_known_by_what_it_does() -> None:
    class Stack(nn.Module):
        has_gate, has_bias, is_transposed, has_post_expert_norm = True, False, False, False

        def __init__(self, gate: Callable[[Tensor], Tensor], concatenated: bool = True, has_bias: bool = False) -> None:
            super().__init__()
            self._apply_gate, self.is_concatenated, self.has_bias = gate, concatenated, has_bias

    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., :8], x[..., 8:]

    assert gate_is_linear(Stack(lambda x: nn.functional.silu(halves(x)[0]) * halves(x)[1]))
    assert not gate_is_linear(Stack(lambda x: nn.functional.silu(halves(x)[0]) * (halves(x)[1] + 1)))
    assert not gate_is_linear(Stack(lambda x: halves(x)[0] * halves(x)[1].clamp(max=1)))
    assert not gate_is_linear(Stack(lambda x: x.reshape(3, 7)))
    assert not gate_is_linear(nn.Identity())


def test_a_gate_whose_halves_alternate_and_one_behind_biases() -> None:
    class Stack(nn.Module):
        has_gate, is_transposed, has_post_expert_norm = True, True, False

        def __init__(self, is_concatenated: bool, has_bias: bool) -> None:
            super().__init__()
            self.is_concatenated, self.has_bias = is_concatenated, has_bias

        def _apply_gate(self, x: Tensor) -> Tensor:
            return nn.functional.silu(x[..., ::2]) * x[..., 1::2]

    assert gate_is_linear(Stack(is_concatenated=False, has_bias=False))
    assert not gate_is_linear(Stack(is_concatenated=True, has_bias=False))  # it would mix gate and up
    assert not gate_is_linear(Stack(is_concatenated=False, has_bias=True))


def producer(offset: float = 0.0, powers_of_two: bool = False, **dense: Tensor) -> Producer:
    fold = Fold("n", FoldKind.NORM, 0, "weight", "bias" if "bias" in dense else None, (), 256, offset, powers_of_two)
    return Producer(fold, dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_stored_gains_times_factors_are_the_gains(dtype: torch.dtype, offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    gain = (torch.randn(256, generator=generator) * 0.3 + 1 - offset).to(dtype)
    gain[7] = -offset  # a channel that is switched off
    wanted = torch.exp(torch.randn(256, generator=generator) * 2)
    mine = producer(offset, weight=gain)
    c = mine.storable(wanted)
    stored = mine.divided(c)["weight"]
    assert stored.dtype == dtype
    product = (stored.double() + offset) * c.double()
    assert torch.allclose(product, gain.double() + offset, rtol=1e-6, atol=0)
    assert c[7] == 1
    assert stored[7] == gain[7]
    moved = c != 1
    assert moved.float().mean() > (0.9 if offset == 0 or dtype is torch.float32 else 0.5)
    step = 2 * torch.finfo(dtype).eps * (1 + offset * wanted / (gain.float() + offset).abs())
    assert (((c - wanted).abs() <= step * wanted) | ~moved).all()


def test_biases_in_few_bits_get_powers_of_two_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    dense = {name: torch.randn(256, generator=generator).bfloat16() for name in ("weight", "bias")}
    wanted = torch.exp(torch.randn(256, generator=generator) * 2)
    mine = producer(powers_of_two=True, **dense)
    c = mine.storable(wanted)
    assert torch.equal(c, c.log2().round().exp2())
    assert ((c / wanted).log2().abs() <= 0.5 + 1e-6).all()
    for name, stored in mine.divided(c).items():
        assert torch.equal(stored.double() * c, dense[name].double())


def test_factors_that_leave_the_range_of_a_dtype_become_one() -> None:
    mine = producer(weight=torch.tensor([60000.0, 1.0, 6e-8], dtype=torch.float16))
    assert mine.storable(torch.tensor([1e-3, 1e-3, 1e3])).tolist()[::2] == [1.0, 1.0]


def test_a_block_that_changed_is_refused() -> None:
    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    y = x + 0.1 * x.flip(0, 1, 2)
    check_unchanged(y, y * (1 + 1e-7), x, "block")
    with pytest.raises(NumericalError, match="block: moving factors") as error:
        check_unchanged(y, y + 1e-3 * (y - x), x, "block")
    assert error.value.exit_code == 7
    with pytest.raises(NumericalError):
        check_unchanged(y, y * float("nan"), x, "block")
