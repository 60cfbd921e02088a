"""EAQuant: the worked examples of its description, exact identities, and what its three pieces promise."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compressor.calibration.averages import MovingRange
from compressor.calibration.routing_rule import SOFTMAX, RoutingRule
from compressor.decision import Quantized
from compressor.errors import RecipeError
from compressor.formats.activations import INPUT_FORMATS
from compressor.formats.ints import IntFormat
from compressor.inputs import Permute, Quantize, Rotate, apply_ops, rebuild, stored_slots
from compressor.methods.eaquant import EAQuant, EAQuantOptions, best_ratio
from compressor.methods.eaquant_rotation import (
    base_rotation,
    block_width,
    descriptions,
    fit_rotation,
    fit_transform,
    turned_moment,
    turned_weight,
    unturned_weight,
    zigzag,
)
from compressor.methods.eaquant_router import agreement, align, by_weights, counted, divergence, ratios, round_rows
from compressor.methods.eaquant_smoothing import (
    aggregate,
    outlier_factors,
    outlier_scores,
    own_factors,
    within_reach,
    without_dead,
)
from compressor.methods.rounding import InputSite
from compressor.testing import MethodConformance
from compressor.testing.layers import correlated_inputs, fused_layers, heavy_tailed_weights

A1, W1 = torch.tensor([4, 1, 9, 0.25]), torch.tensor([1, 0.25, 0.04, 1])
A2, W2 = torch.tensor([1, 16, 4, 0.25]), torch.tensor([0.25, 1, 1, 0.25])
ASYM4 = IntFormat(4, None, torch.float32, symmetric=False)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_factors_of_experts_and_their_aggregation() -> None:
    first, second = own_factors(A1, W1, 0.5), own_factors(A2, W2, 0.5)
    torch.testing.assert_close(first, torch.tensor([2, 2, 15, 0.5]))
    torch.testing.assert_close(second, torch.tensor([2, 4, 2, 1.0]))
    both = torch.stack([first, second])
    torch.testing.assert_close(aggregate(both, None, ()), torch.tensor([2, 4, 15, 1.0]))
    router = own_factors(torch.tensor([4, 16, 9, 0.25]), torch.tensor([0.04, 0.02, 0.09, 0.04]), 0.5)
    torch.testing.assert_close(aggregate(both, None, [router]), torch.tensor([10, 28.284271, 15, 2.5]))
    torch.testing.assert_close(aggregate(both, torch.tensor([0.75, 0.25]), ()), torch.tensor([2, 2.5, 11.75, 0.625]))
    usual = torch.stack([own_factors(A1, W1, 0.6), own_factors(A2, W2, 0.6)])
    expected = [[2.297397, 1.741101, 13.543207, 0.435275], [1.741101, 5.278032, 2.297397, 0.757858]]
    torch.testing.assert_close(usual, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_a_dead_column_does_not_speak_for_all() -> None:
    heaviest = torch.tensor([0.0, 1, 1, 2])
    factors = own_factors(torch.ones(4), heaviest, 0.5)
    assert factors[0] > 100
    assert without_dead(factors, heaviest).tolist() == [float(factors[3]), 1, 1, float(factors[3])]
    assert torch.equal(without_dead(factors, torch.zeros(4)), factors)
    reach = within_reach(torch.tensor([1e-6, 1.0, 1.0, 1e6]))
    assert float(reach.max() / reach.min()) == pytest.approx(64 * 64)


def test_factors_of_what_down_reads() -> None:
    high = torch.tensor([1, 1.2, 0.9, 1.1, 10, 1, 0.8, 9, 1.3, 4])
    low = -torch.tensor([1, 0.9, 1.1, 1, 0.5, 1.2, 0.8, 1, 6, 1])
    expected = torch.tensor([1, 1, 1, 1, 1.899145, 1, 1, 1.764119, 3.085169, 1])
    torch.testing.assert_close(outlier_factors(high, low), expected, rtol=1e-5, atol=1e-5)
    even = torch.full((6,), 2.0)
    assert outlier_factors(even, -even).tolist() == [1] * 6
    positive = torch.tensor([1.0, 1, 1, 1, 1, 9])
    assert outlier_factors(positive, torch.zeros(6)).tolist() == pytest.approx([1] * 5 + [9**0.7])
    assert outlier_factors(torch.tensor([3.0]), torch.tensor([-1.0])).tolist() == [1]


def test_outlier_scores() -> None:
    weights = [torch.tensor([[1, -2], [0.5, 0.1], [-3, 0.3]]), torch.tensor([[4.0], [0], [0], [0]]), torch.zeros(2, 2)]
    assert outlier_scores(weights).tolist() == pytest.approx([2.5, 4, 1])
    half_empty = torch.tensor([[1.0, 0], [3.0, 0]])  # a column of zeros does not count
    assert outlier_scores([half_empty]).tolist() == pytest.approx([1.5])


def test_moving_ranges_follow_samples_and_factors() -> None:
    total = MovingRange(0.9).start(2, torch.device("cpu"))
    total.update(torch.tensor([[1.0, -4], [3, 2]]))
    total.update(torch.zeros(0, 2))
    total.update(torch.tensor([[13.0, 2]]))
    total.close_lane()
    torch.testing.assert_close(total.value(), torch.tensor([[4.0, 2], [0.9 * 1 + 1.3, 0.9 * -4 + 0.2]]))
    assert (total.n_tokens, total.max_abs) == (3, 13)
    total.divide(torch.tensor([2.0, 1]))
    assert total.value()[0].tolist() == [2, 2]


def test_the_base_rotation_spreads_its_first_channel_evenly() -> None:
    for size in (1, 2, 4, 64):
        base = base_rotation(size, generator())
        torch.testing.assert_close(base @ base.T, torch.eye(size), atol=1e-5, rtol=0)
        torch.testing.assert_close(base[0], torch.full((size,), size**-0.5), atol=1e-6, rtol=0)
    assert (torch.tensor([8.0, 0, 0, 0]) @ base_rotation(4, generator())).tolist() == pytest.approx([4] * 4)
    assert not torch.equal(base_rotation(8, generator(0)), base_rotation(8, generator(1)))


def test_a_fitted_rotation_is_orthogonal_and_flattens() -> None:
    x = torch.randn(200, 32, generator=generator())
    x[:, 5] *= 30
    base = base_rotation(32, generator(1))
    rotation = fit_rotation(x, base, 64)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(32), atol=1e-4, rtol=0)
    turned = x @ rotation
    assert float(turned.max() - turned.min()) < 0.5 * float(x.max() - x.min())
    flat = torch.ones(4, 32)
    assert torch.equal(fit_rotation(flat, base, 8), torch.eye(32))  # nothing is flatter: the identity stays
    assert torch.equal(fit_rotation(x[:0], base, 8), torch.eye(32))


def test_channels_are_dealt_there_and_back() -> None:
    assert zigzag(torch.tensor([3.0, 9, 1, 7, 5, 8, 2, 6]), 2).tolist() == [1, 7, 4, 2, 5, 3, 0, 6]


def test_block_widths() -> None:
    assert [block_width(width, 128) for width in (128, 192, 4096, 1408, 7)] == [128, 64, 128, 128, 1]
    assert block_width(64, 48) == 32


@pytest.mark.parametrize("width", [32, 96])
def test_transforms_keep_the_product_and_are_stored_as_described(width: int) -> None:
    x = correlated_inputs(width, tokens=64)
    x[:, 3] *= 40
    weight = heavy_tailed_weights(10, width)
    ops = fit_transform(x, 32, 16, generator())
    described = descriptions(width, 32)
    assert tuple(op.describe() for op in ops) == described
    assert len(ops) == (1 if width == 32 else 3)
    expected, got = x @ weight.T, apply_ops(ops, x) @ turned_weight(weight, ops).T
    assert (got - expected).norm() / expected.norm() < 2e-6  # although matrices are stored in half precision
    torch.testing.assert_close(unturned_weight(turned_weight(weight, ops), ops), weight, rtol=1e-5, atol=1e-5)
    turned = apply_ops(ops, x.double())
    torch.testing.assert_close(turned_moment(x.T @ x, ops), (turned.T @ turned).float(), rtol=1e-4, atol=0.1)
    stored = {name: value for op in ops for name, value in op.tensors().items()}
    slots = stored_slots(described, (10, width), torch.bfloat16)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in stored.items()} == {
        name: (slot.dtype, slot.shape) for name, slot in slots.items()
    }
    again = rebuild(described, stored)
    assert torch.equal(apply_ops(again, x), apply_ops(ops, x))


def test_a_rotated_input_is_rounded_with_less_error() -> None:
    x = correlated_inputs(96, tokens=128)
    x[:, 7] *= 60
    quantize = Quantize(INPUT_FORMATS["int4-token-asym"], clip=0.9)
    ops = fit_transform(x, 32, 64, generator())
    turned = apply_ops(ops, x)
    plain_error = (quantize.apply(x) - x).norm() / x.norm()
    turned_error = (quantize.apply(turned) - turned).norm() / turned.norm()
    assert turned_error < 0.7 * plain_error


def test_codes_of_inputs_with_a_zero_point() -> None:
    x = torch.tensor([[0.9, -0.3, 0.05, 2, -1.1, 0.4, 0, -0.6]])
    got = Quantize(INPUT_FORMATS["int4-token-asym"], clip=0.9).apply(x)
    expected = torch.tensor([[0.93, -0.372, 0, 1.86, -0.93, 0.372, 0, -0.558]])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    constant = torch.full((1, 4), 3.0)  # a range without zero is made to hold it
    torch.testing.assert_close(Quantize(INPUT_FORMATS["int4-token-asym"]).apply(constant), constant)
    zeros = torch.zeros(2, 4)
    assert torch.equal(Quantize(INPUT_FORMATS["int8-token-asym"]).apply(zeros), zeros)


def test_the_best_ratio_of_a_row() -> None:
    w = torch.tensor([[-1, -0.1, 0, 0.1, 0.2, 0.3]])
    plain = ASYM4.fit(w)
    assert float((ASYM4.round(w, plain) - w).square().sum()) == pytest.approx(0.0042667, abs=1e-6)
    best = best_ratio(w, ASYM4, plain, 0.35)
    assert float(best.scale / plain.scale) == pytest.approx(0.9805, abs=1e-4)
    expected = torch.tensor([[-1.019720, -0.084977, 0, 0.084977, 0.169953, 0.254930]])
    torch.testing.assert_close(ASYM4.round(w, best), expected, atol=1e-5, rtol=0)
    for bits, error in ((2, 0.0955556), (3, 0.0251020)):
        fmt = IntFormat(bits, None, torch.float32, symmetric=False)
        q = best_ratio(w, fmt, fmt.fit(w), 0.35)
        assert float((fmt.round(w, q) - w).square().sum()) == pytest.approx(error, abs=1e-6)


@pytest.mark.parametrize("fmt", [ASYM4, IntFormat(4, 16, torch.bfloat16), IntFormat(3, None, torch.float16)])
def test_the_best_ratio_is_never_worse_than_the_whole_range(fmt: IntFormat) -> None:
    w = heavy_tailed_weights(12, 48)
    w[3] = 0
    plain = fmt.fit(w)
    best = best_ratio(w, fmt, plain, 0.35)
    groups = fmt.group_size or 48

    def errors(q: object) -> Tensor:
        return (fmt.round(w, q) - w).square().unflatten(1, (-1, groups)).sum(-1)  # type: ignore[arg-type]

    assert (errors(best) <= errors(plain)).all()
    assert (errors(best) < errors(plain)).any()


def test_divergences_of_routers() -> None:
    ours, theirs = torch.tensor([[2.0, 1, 0, -1], [0, 3, 1, 2]]), torch.tensor([[2.5, 1, 0, -1], [0, 2.5, 1, 2.5]])
    for kind, m, expected in (
        ("truncated", 2, 0.0482519),
        ("truncated", 3, 0.0588850),
        ("truncated", 4, 0.0627968),
        ("full", 2, 0.0627968),
        ("renorm", 2, 0.0667833),
        ("renorm", 3, 0.0638540),
    ):
        assert divergence(ours, theirs, m, kind) == pytest.approx(expected, abs=1e-6)  # type: ignore[arg-type]
    assert divergence(ours[:1], theirs[:1], 2, "truncated") == pytest.approx(-0.0145144, abs=1e-6)
    assert divergence(ours, ours, 3, "renorm") == 0
    assert agreement(ours, theirs, 2) == 1
    assert agreement(torch.eye(4), torch.eye(4).roll(1, 0), 1) == 0


def test_how_many_experts_count() -> None:
    shares = (0, 0.25, 0.5, 0.75, 1)
    assert [counted(64, 8, share) for share in shares] == [8, 22, 36, 50, 64]
    assert [counted(8, 2, share) for share in shares] == [2, 3, 5, 6, 8]
    assert [counted(64, 6, share) for share in shares] == [6, 20, 35, 49, 64]


RULES = {
    "softmax": SOFTMAX,
    "sigmoid": RoutingRule(sigmoid=True),
    "groups": RoutingRule(True, torch.linspace(-0.2, 0.2, 16), groups=4, kept_groups=2),
}


def test_divergence_of_sigmoid_routers() -> None:
    """Shares are sigmoids over their sum; who counts is decided with the correction and the groups."""
    ours, theirs = torch.tensor([[2.0, 1, 0, -1]]), torch.tensor([[2.5, 1, 0, -1]])
    s, t = (torch.sigmoid(logits[0].double()) for logits in (ours, theirs))
    p, q = s / s.sum(), t / t.sum()
    full = float((p * (p / q).log()).sum())
    assert divergence(ours, theirs, 2, "full", RULES["sigmoid"]) == pytest.approx(full, abs=1e-9)
    assert divergence(ours, theirs, 2, "truncated", RULES["sigmoid"]) == pytest.approx(
        float((p * (p / q).log())[:2].sum()), abs=1e-9
    )
    last = RoutingRule(sigmoid=True, correction=torch.tensor([0.0, 0, 0, 5]))  # the last expert comes first
    p, q = s[[0, 3]] / s[[0, 3]].sum(), t[[0, 3]] / t[[0, 3]].sum()
    assert divergence(ours, theirs, 2, "renorm", last) == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-9)
    # Two groups of two; the second has the larger sum of corrected scores, so the best expert cannot be chosen.
    groups = RoutingRule(True, torch.tensor([0.0, 0, 2, 2]), groups=2, kept_groups=1)
    p, q = s[2:] / s[2:].sum(), t[2:] / t[2:].sum()
    assert divergence(ours, theirs, 2, "renorm", groups) == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-9)
    assert agreement(ours, theirs, 2, groups) == 1


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_alignment_never_scores_worse_than_the_whole_range(rule: RoutingRule) -> None:
    """And with a softmax it keeps more choices on tokens it has not seen, on average over seeds."""
    better = []
    for seed in range(10):
        weight = torch.randn(16, 64, generator=generator(seed)) ** 3
        x = torch.randn(300, 64, generator=generator(100 + seed))
        x = x if rule is SOFTMAX else x / (x @ weight.T).std()  # sigmoids of loud logits are all one
        seen, held_out = x[:150], x[150:]
        ratio = align(weight, seen, 3, 4, 0.35, "renorm", rule)

        def score(r: float, weight: Tensor = weight, seen: Tensor = seen) -> float:
            return divergence(seen @ weight.T, seen @ round_rows(weight, 3, r).T, 4, "renorm", rule)

        assert 0.35 <= ratio <= 1
        assert score(ratio) <= score(1.0)
        logits = held_out @ weight.T
        kept = [agreement(logits, held_out @ round_rows(weight, 3, r).T, 4, rule) for r in (ratio, 1.0)]
        better.append(kept[0] - kept[1])
    assert rule is not SOFTMAX or sum(better) > 0


def test_rows_of_a_router_by_their_weights() -> None:
    weight = heavy_tailed_weights(6, 32)
    best = by_weights(weight, 3, 0.35)
    assert best.shape == (6, 1)
    plain, chosen = (round_rows(weight, 3, ratio) - weight for ratio in (1.0, best))
    assert (chosen.square().sum(1) <= plain.square().sum(1)).all()
    assert len(ratios(0.35)) == 101
    assert ratios(0.35)[-1] == pytest.approx(1)


def test_a_rounded_router_survives_storage_in_few_bits() -> None:
    weight = torch.randn(8, 64, generator=generator()) * 0.3
    stored = round_rows(weight, 8, 1.0).bfloat16().float()
    assert (stored - weight).abs().max() < 0.02
    again = round_rows(stored, 8, 1.0)
    assert (again - stored).abs().max() < 0.01


def test_what_happens_to_inputs_is_planned() -> None:
    site = InputSite(fused_layers((), ASYM4, [heavy_tailed_weights(4, 96)], correlated_inputs(96))[0].ref, None)
    site = replace(site, ref=replace(site.ref, shape=(4, 96), matrix=(4, 96)))
    fmt = INPUT_FORMATS["int4-token-asym"]
    ops = [step["op"] for step in EAQuant(EAQuantOptions(block=32)).steps(fmt, site)]
    assert ops == ["rotate", "permute", "rotate", "quantize"]
    assert [s["op"] for s in EAQuant(EAQuantOptions(transform="off")).steps(fmt, site)] == ["quantize"]
    method = EAQuant()
    assert method.input_format(None, "int4") is None
    assert method.input_format("int4-token", "int4") == "int4-token"
    with pytest.raises(RecipeError, match="per token, not fp8-tensor"):
        method.input_format("fp8-tensor", "int4")
    with pytest.raises(RecipeError, match="needs rounded inputs"):
        EAQuant(EAQuantOptions(transform="on")).input_format(None, "int4")


@pytest.mark.parametrize("inputs", [None, "int8-token"])
def test_compensated_rounding_adds_less_output_error_on_inputs_not_seen(inputs: str | None) -> None:
    """GPTQ must see the weights and the inputs after the transform: before it, or with one of both, it does harm."""
    x = correlated_inputs(96, tokens=1200)
    seen, fresh = x[:800], x[800:]
    weight, fmt, errors = heavy_tailed_weights(40, 96), IntFormat(3, None, torch.float32, symmetric=False), {}
    for rounding in ("gptq", "nearest"):
        method = EAQuant(EAQuantOptions(block=32, rotations=8, rounding=rounding))  # type: ignore[arg-type]
        layer = fused_layers(method.stats(fmt), fmt, [weight], seen)[0]
        layer = replace(layer, ref=replace(layer.ref, shape=(40, 96), matrix=(40, 96)))
        steps = () if inputs is None else method.steps(INPUT_FORMATS[inputs], InputSite(layer.ref, None))
        decision = method.solve_group([replace(layer, steps=steps)], fmt, generator()).decisions[layer.ref.name]
        assert isinstance(decision, Quantized)
        turned = apply_ops(decision.inputs[:-1], fresh)
        errors[rounding] = (turned @ fmt.decode(decision.codes, decision.qparams).T - fresh @ weight.T).norm()
    assert errors["gptq"] < 0.8 * errors["nearest"]


def test_fused_layers_share_their_transform() -> None:
    method = EAQuant(EAQuantOptions(block=32, rotations=8))
    weights = [heavy_tailed_weights(6, 96), heavy_tailed_weights(4, 96, 1)]
    fmt = IntFormat(8, None, torch.float32)
    layers = fused_layers(method.stats(fmt), fmt, weights, correlated_inputs(96))
    site = InputSite(replace(layers[0].ref, shape=(6, 96), matrix=(6, 96)), None)
    steps = method.steps(INPUT_FORMATS["int8-token"], site)
    layers = [replace(layer, steps=steps) for layer in layers]
    outcome = method.solve_group(layers, fmt, generator())
    decisions = [outcome.decisions[layer.ref.name] for layer in layers]
    assert all(isinstance(decision, Quantized) for decision in decisions)
    first, second = (decision.inputs for decision in decisions if isinstance(decision, Quantized))
    assert tuple(op.describe() for op in first) == steps
    for ours, theirs in zip(first[:3], second[:3], strict=True):
        assert isinstance(ours, Rotate | Permute)
        assert all(torch.equal(value, theirs.tensors()[name]) for name, value in ours.tensors().items())
    x = correlated_inputs(96, seed=3)
    for layer, decision in zip(layers, decisions, strict=True):
        assert isinstance(decision, Quantized)
        got = apply_ops(decision.inputs, x) @ fmt.decode(decision.codes, decision.qparams).T
        expected = x @ layer.weight.T
        assert (got - expected).norm() / expected.norm() < 0.15  # the clip of inputs costs most; 8 bits cost little
        assert math.isfinite(float(got.sum()))


class TestEAQuant(MethodConformance):
    method = EAQuant()
    formats = ("int4", "int3-asym")

    def test_output_error_is_at_most_that_of_rounding(self, fmt: object) -> None:
        """Ranges are clipped by the error of the weights, which promises nothing about one layer's output."""
        for seed in range(3):
            for error, rounding in self._errors(fmt, seed):  # type: ignore[arg-type]
                assert error <= 1.1 * rounding
