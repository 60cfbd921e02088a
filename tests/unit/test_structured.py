"""Units of heads and neurons: what they cost, what masking and cutting them does, and which ones stay."""

import itertools
import random

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from compressor.checkpoint.blocks import BlockSequence
from compressor.errors import RecipeError, UnsupportedError
from compressor.structured.budget import check_reach, search, search_equal
from compressor.structured.cutting import cut, masked, relative_difference, try_cuts
from compressor.structured.optin import OPTIN, Dense, balance, divergence, gram_distance, unit_rows
from compressor.structured.options import OptinOptions
from compressor.structured.units import Part, Unit, count_macs, count_weights, find_parts, units_of
from compressor.testing import models

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def build(kind: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A small random model whose outputs are all different, biases included."""
    torch.manual_seed(seed)
    if kind == "bert":
        fields = {**SMALL, "num_attention_heads": 4, **changes}
        fields.pop("num_key_value_heads"), fields.pop("head_dim")
        config = BertConfig(**fields, hidden_dropout_prob=0.0)
        model: PreTrainedModel = BertForMaskedLM(config)
    else:
        cls, config_cls = {
            "llama": (LlamaForCausalLM, LlamaConfig),
            "qwen2": (Qwen2ForCausalLM, Qwen2Config),
            "qwen3": (Qwen3ForCausalLM, Qwen3Config),
        }[kind]
        model = cls(config_cls(**{**SMALL, "hidden_size": 36, **changes}, tie_word_embeddings=True))
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False).eval()


def chain(model: PreTrainedModel) -> BlockSequence:
    blocks = BlockSequence.find(model)
    # What a trace on meta finds out: whether blocks return tuples.
    handles = [
        blocks.block(i).register_forward_hook(
            lambda _, __, out, n=n: blocks._returns_tuple.update({n: isinstance(out, tuple)})
        )
        for i, n in enumerate(blocks.names)
    ]
    model(torch.zeros(1, 2, dtype=torch.long))
    for handle in handles:
        handle.remove()
    return blocks


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "bert"])
def test_cut_model_computes_what_the_masked_one_does(kind: str, tokens: torch.Tensor) -> None:
    model = build(kind)
    blocks = chain(model)
    parts = find_parts(blocks, group=16)
    assert [part.kind for part in parts] == ["heads", "neurons"] * 3
    assert {part.count for part in parts} == {4 if kind == "bert" else 3, 3}
    options = OptinOptions(group=16, rows=20, logit_rows=8)
    dense = Dense.run(blocks, parts, tokens, options, seed=0)
    try_cuts(blocks, parts, dense.entering, dense.recording)
    units = units_of(dense.grouped(parts))
    draw = random.Random(3)
    gone = [unit for unit in units if unit.index and draw.random() < 0.5]
    assert {unit.part.kind for unit in gone} == {"heads", "neurons"}
    costs = sum(unit.macs(12) for unit in gone), sum(unit.weights for unit in gone)
    before = count_macs(blocks, 12), count_weights(blocks)
    original = model(tokens).logits
    with masked(model, gone):
        expected = model(tokens).logits
    assert relative_difference(expected, original) > 1e-2
    kept = cut(model, gone)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert (count_macs(blocks, 12), count_weights(blocks)) == (before[0] - costs[0], before[1] - costs[1])
    for name, rows in kept.items():
        assert model.get_submodule(name).out_features == len(rows) == len(set(rows))
        assert rows == sorted(rows)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_multiply_adds_are_those_torch_counts(kind: str) -> None:
    model = build(kind)
    model.set_attn_implementation("eager")
    blocks = chain(model)
    units = units_of(find_parts(blocks, group=8))
    head = model.get_output_embeddings().weight.numel()
    transform = sum(
        m.weight.numel() for n, m in model.named_modules() if "predictions.transform" in n and isinstance(m, nn.Linear)
    )
    for gone in ([], units[1:3], units[4:]):
        gone = [unit for unit in gone if unit.index]
        narrow = build(kind)
        narrow.set_attn_implementation("eager")
        cut(narrow, gone)
        with FlopCounterMode(display=False) as counter:
            narrow(torch.zeros(1, 20, dtype=torch.long))
        # It counts a multiplication and an addition.
        assert counter.get_total_flops() / 2 - 20 * (head + transform) == count_macs(chain(narrow), 20)


def test_published_numbers() -> None:
    """BERT-base at 64 tokens: per head, per neuron, and in all."""
    with torch.device("meta"):
        model = BertForMaskedLM(BertConfig())
    blocks = BlockSequence.find(model)
    assert count_macs(blocks, 64) == 5_511_315_456
    parts = find_parts(blocks, group=1)
    assert Unit(parts[0], 0).macs(64) == 13_107_200
    assert Unit(parts[1], 0).macs(64) == 98_304
    units = units_of(parts)
    assert sum(unit.macs(64) for unit in units) == count_macs(blocks, 64)


def test_gram_distance_by_hand() -> None:
    dense, after = unit_rows(torch.tensor([[3.0, 4.0], [1.0, 0.0]])), unit_rows(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert gram_distance(dense @ dense.T, after) == pytest.approx(0.32)
    assert gram_distance(dense @ dense.T, dense) == pytest.approx(0.0, abs=1e-12)


def test_divergence_divides_by_the_temperature() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(5, 7, generator=generator), torch.randn(5, 7, generator=generator)
    p, q = (before.double() / 4).softmax(-1), (after.double() / 4).softmax(-1)
    assert divergence(before, after, 4.0) == pytest.approx(16 * float((p * (p / q).log()).sum()), rel=1e-4)
    assert divergence(before, before, 4.0) == 0
    assert divergence(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [2.0]]), 4.0) == 4


def test_balance_is_a_power_of_ten_from_medians() -> None:
    assert balance(torch.tensor([0.0, 300.0, 320.0]), torch.tensor([0.02, 0.0, 0.02]), 10) == 1000
    assert balance(torch.zeros(3), torch.ones(3), 10) == 1


def fake(kinds: str, cost: tuple[int, int], per_part: int | None = None) -> tuple[list[Unit], list[int]]:
    """Units `h` and `n` in the order given, in parts of so many."""
    parts = {
        kind: Part(kind, 0, kind, kind, (), 1, kinds.count(kind[0]), 1.0, int(kind == "heads"))
        for kind in ("heads", "neurons")
    }  # type: ignore[arg-type]
    counters = {"h": itertools.count(), "n": itertools.count()}
    units = [Unit(parts["heads" if c == "h" else "neurons"], next(counters[c])) for c in kinds]
    return units, [cost[0] if c == "h" else cost[1] for c in kinds]


def test_search_by_hand() -> None:
    units, costs = fake("hhhnnnn", (2, 1))
    scores = torch.tensor([5.0, 3.0, 1.0, 2.0, 1.5, 1.0, 0.5])
    kept = search(units, scores, costs, 6)
    assert kept == [units[0], units[1], units[3], units[4]]
    assert search(units, scores, costs, 2) is None  # a head and a neuron cost 3


def test_search_is_the_best_of_its_kind_and_keeps_the_budget() -> None:
    draw = random.Random(0)
    for _ in range(40):
        parts = [Part("heads", b, f"a{b}", f"o{b}", (), 1, 3, 1.0, 1) for b in range(2)]
        parts += [Part("neurons", b, f"f{b}", f"d{b}", (), 1, 4, 1.0) for b in range(2)]
        units = list(units_of(parts))
        scores = torch.tensor([draw.random() for _ in units])
        cost = {"heads": draw.randint(1, 4), "neurons": draw.randint(1, 3)}
        costs = [cost[unit.part.kind] for unit in units]
        limit = draw.randint(sum(cost.values()), sum(costs))
        for find in (search, search_equal):
            found = find(units, scores, costs, limit)
            if found is None:
                assert limit < 2 * sum(cost.values())
                continue
            spent = [costs[units.index(unit)] for unit in found]
            assert sum(spent) <= limit
            assert {unit.part for unit in found} == set(parts)  # no part is emptied
            counts = [sum(unit.part is part for unit in found) for part in parts]
            if find is search_equal:
                assert counts[0] == counts[1]
                assert counts[2] == counts[3]
            worth = sum(float(scores[units.index(unit)]) for unit in found)
            assert worth == pytest.approx(best_by_brute_force(units, scores, costs, limit, find is search_equal))


def best_by_brute_force(units: list[Unit], scores: torch.Tensor, costs: list[int], limit: int, equal: bool) -> float:
    """Largest total over all sets that keep a unit of every part; of one kind all cost the same."""
    best = -1.0
    for mask in range(1 << len(units)):
        chosen = [index for index in range(len(units)) if mask >> index & 1]
        counts: dict[Part, int] = dict.fromkeys({unit.part for unit in units}, 0)
        for index in chosen:
            counts[units[index].part] += 1
        if min(counts.values()) == 0 or sum(costs[index] for index in chosen) > limit:
            continue
        if equal and any(len({n for part, n in counts.items() if part.kind == k}) > 1 for k in ("heads", "neurons")):
            continue
        best = max(best, float(scores[chosen].sum()))
    return best


def test_scores_are_zero_for_what_does_nothing_and_survive_a_stop(tokens: torch.Tensor, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = build("llama")
    blocks = chain(model)
    idle, used = model.model.layers[1], model.model.layers[2]
    idle.self_attn.o_proj.weight.data[:, 16:32] = 0  # the second group of heads
    used.mlp.down_proj.weight.data[:, :16] *= 20
    parts = find_parts(blocks, group=16)
    options = OptinOptions(group=16, rows=24, logit_rows=10)
    dense = Dense.run(blocks, parts, tokens, options, seed=0)
    units, told = units_of(parts), []
    state = tmp_path / "state"
    scores = OPTIN(options).scores(dense, units, 0, state, told.append)
    assert (scores >= 0).all()
    silent = next(n for n, u in enumerate(units) if u.part.block == 1 and u.part.heads and u.index == 1)
    assert scores[silent] == pytest.approx(0, abs=1e-6 * float(scores.max()))
    assert (scores > 1e-4 * scores.max()).sum() >= len(units) - 2
    last = [n for n, u in enumerate(units) if u.part.block == 2 and not u.part.heads]
    assert int(scores[last].argmax()) == 0
    assert len(told) == 3
    again = OPTIN(options).scores(dense, units, 0, state, told.append)
    assert torch.equal(again, scores)
    assert len(told) == 3  # nothing was measured twice


def test_one_unit_by_the_definition(tokens: torch.Tensor) -> None:
    """The importance of one unit from two runs of the whole model, in float64 and without any of the machinery."""
    model = build("qwen2")
    blocks = chain(model)
    parts = find_parts(blocks, group=16)
    options = OptinOptions(group=16, rows=24, logit_rows=24, balance=10)
    dense = Dense.run(blocks, parts, tokens, options, seed=0)
    unit = next(u for u in units_of(parts) if u.part.block == 0 and u.part.heads and u.index == 2)
    found = dense.without(unit, 4.0)
    model.double()

    def run(gone: list[Unit]) -> tuple[list[torch.Tensor], torch.Tensor]:
        seen: list[torch.Tensor] = []
        hooks = [layer.mlp.register_forward_hook(lambda _, __, out: seen.append(out)) for layer in model.model.layers]
        with masked(model, gone):
            logits = model(tokens).logits
        for hook in hooks:
            hook.remove()
        rows = [nn.functional.normalize(out.reshape(24, -1), dim=1) for out in seen]
        return [row @ row.T for row in rows], logits.reshape(24, -1)

    (grams, logits), (after, other) = run([]), run([unit])
    assert found[0] == pytest.approx(
        sum(float((a - b).square().sum()) for a, b in zip(grams[1:], after[1:], strict=True)), rel=1e-3
    )
    p, q = (logits / 4).log_softmax(-1), (other / 4).log_softmax(-1)
    assert found[1] == pytest.approx(16 * float((p.exp() * (p - q)).sum()), rel=1e-3)


def test_what_cannot_be_cut_is_refused(tokens: torch.Tensor) -> None:
    model = build("llama")
    blocks = chain(model)
    parts = find_parts(blocks, group=16)
    with pytest.raises(RecipeError, match="matches nothing"):
        find_parts(blocks, group=16, skip=("*nothing*",))
    assert {part.kind for part in find_parts(blocks, group=16, skip=("*self_attn",))} == {"neurons"}
    units = units_of(parts)
    costs = [unit.weights for unit in units]
    with pytest.raises(RecipeError, match="remain"):
        check_reach(units, costs, 0, sum(costs), 0.1, "--macs 0.1")
    # A norm over all heads: leaving some out changes the others.
    attention = model.model.layers[1].self_attn
    attention.o_proj.register_forward_pre_hook(
        lambda _, args: (args[0] / args[0].square().mean(-1, keepdim=True).sqrt(),), prepend=True
    )
    dense = Dense.run(blocks, parts, tokens, OptinOptions(rows=8), seed=0)
    with pytest.raises(UnsupportedError, match=r"layers\.1\.self_attn: its heads cannot be cut"):
        try_cuts(blocks, parts, dense.entering, dense.recording)
    with torch.device("meta"):
        whole = BlockSequence.whole(models.tiny_bert())
    with pytest.raises(UnsupportedError, match="no blocks"):
        find_parts(whole, group=16)
