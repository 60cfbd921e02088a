"""Counts, ties and patterns of masks; magnitude and Wanda against float64 written out here."""

import math

import pytest
import torch

from compressor.calibration.channels import SquareSum
from compressor.decision import Masked
from compressor.errors import NumericalError, RecipeError
from compressor.formats import get_format
from compressor.formats.pruned import PRUNED
from compressor.methods.base import Layer
from compressor.pruning import PRUNERS, get_method, pruner_class
from compressor.pruning.masks import Pattern, keep_per_row, keep_per_tensor
from compressor.testing.layers import collect, correlated_inputs, fused_layers, heavy_tailed_weights, solve

DENSE = get_format(PRUNED, None, torch.bfloat16)


def masked(name: str, weight: torch.Tensor, x: torch.Tensor, **options: object) -> Masked:
    """What a method decides about one layer."""
    method = get_method(name, options)
    (layer,) = fused_layers(method.stats(DENSE), DENSE, [weight], x)
    before = layer.weight.clone()
    decision = solve(method, [layer], DENSE).decisions[layer.ref.name]
    assert isinstance(decision, Masked)
    assert torch.equal(layer.weight, before), "the weight changed in place"
    assert not torch.signbit(decision.values[~decision.keep]).any(), "pruned weights are -0"
    return decision


def test_wanda_by_hand() -> None:
    w = torch.tensor([[4, -1, 0.5, 2], [-0.2, 3, 1, -1.5]])
    x = torch.tensor([[1.0, 0, 2, 0], [0, 2, 2, 1], [2, 0, 1, 0]])
    keep = masked("wanda", w, x, sparsity=0.5).keep
    assert keep.tolist() == [[True, False, False, True], [False, True, True, False]]  # a tie goes to the lower index
    error = ((x @ torch.where(keep, 0, w).T) ** 2).sum()
    assert float(error) == pytest.approx(4.7)
    by_size = masked("magnitude", w, x, sparsity=0.5, per="row").keep
    assert float(((x @ torch.where(by_size, 0, w).T) ** 2).sum()) == pytest.approx(9.85)


def test_pattern_by_hand() -> None:
    w = torch.tensor([[0.3, -0.9, 0.1, 0.4, -0.2, 0.8, 0.7, -0.6]])
    decision = masked("magnitude", w, torch.ones(1, 8), pattern="2:4")
    assert decision.keep.int().tolist() == [[0, 1, 0, 1, 0, 1, 1, 0]]
    assert torch.equal(Pattern(2, 4).choose(torch.ones(1, 4)), torch.tensor([[True, True, False, False]]))


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.77])
def test_counts_are_exact_and_survivors_are_the_best(sparsity: float) -> None:
    w, x = heavy_tailed_weights(13, 37), correlated_inputs(37)
    whole = masked("magnitude", w, x, sparsity=sparsity)
    assert int((~whole.keep).sum()) == round(w.numel() * sparsity)
    assert w[~whole.keep].abs().max() <= w[whole.keep].abs().min()
    assert torch.equal(whole.values[whole.keep], w[whole.keep])
    rows = masked("wanda", w, x, sparsity=sparsity)
    assert ((~rows.keep).sum(1) == int(37 * sparsity)).all()
    scores = w.double().abs() * x.double().square().sum(0).sqrt()
    for row in range(13):
        assert scores[row][~rows.keep[row]].max() <= scores[row][rows.keep[row]].min() * (1 + 1e-6)


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4"])
@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
def test_patterns_hold_in_every_group(name: str, text: str) -> None:
    pattern = Pattern.parse(text)
    w, x = heavy_tailed_weights(6, 64), correlated_inputs(64)
    decision = masked(name, w, x, pattern=text)
    groups = decision.keep.view(6, -1, pattern.of)
    assert (groups.sum(-1) == pattern.keep).all()
    assert pattern.fits(decision.keep)


def test_squares_are_taken_in_float32_and_add_up_over_lanes() -> None:
    x = correlated_inputs(16).half()
    x[:, 3] = 400  # its square does not fit float16
    stats = collect([SquareSum()], x)
    expected = x.double().square().sum(0)
    assert torch.allclose(stats[SquareSum()].value().double(), expected, rtol=1e-6)


def test_unseen_layers_are_pruned_by_size_and_named() -> None:
    method = get_method("wanda", {"sparsity": 0.5})
    (layer,) = fused_layers(method.stats(DENSE), DENSE, [heavy_tailed_weights(4, 16)], torch.empty(0, 16))
    outcome = solve(method, [layer], DENSE)
    decision = outcome.decisions[layer.ref.name]
    assert isinstance(decision, Masked)
    assert torch.equal(decision.keep, keep_per_row(layer.weight.abs(), 0.5))
    assert layer.ref.name in outcome.events[0]


def test_inputs_that_are_not_finite_are_refused() -> None:
    method = get_method("wanda", {"sparsity": 0.5})
    x = correlated_inputs(16)
    x[3, 2] = math.inf
    (layer,) = fused_layers(method.stats(DENSE), DENSE, [heavy_tailed_weights(4, 16)], x)
    with pytest.raises(NumericalError, match=layer.ref.name):
        solve(method, [layer], DENSE)


def test_nan_scores_go_first_and_equal_scores_in_order() -> None:
    scores = torch.tensor([[2.0, math.nan, 1.0, 1.0]])
    assert keep_per_row(scores, 0.5).tolist() == [[True, False, False, True]]
    assert keep_per_tensor(torch.ones(2, 3), 0.5).tolist() == [[False, False, False], [True, True, True]]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("wanda", {"sparsity": 0.0}, "sparsity"),
        ("wanda", {"sparsity": 1.0}, "sparsity"),
        ("wanda", {"pattern": "2-4"}, "N:M"),
        ("wanda", {"pattern": "4:4"}, "1 <= N < M"),
        ("wanda", {"pattern": "3:7"}, "divides"),
        ("wanda", {"pattern": "2:4", "sparsity": 0.4}, "disagree"),
        ("wanda", {"nothing": 1}, "nothing"),
        ("icbs", {"solver": "anneal", "block": 4096}, "anneal"),
    ],
)
def test_options_that_make_no_sense_are_refused(name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        get_method(name, options)


def test_shapes_that_do_not_fit_are_refused() -> None:
    (layer,) = fused_layers((), DENSE, [heavy_tailed_weights(4, 18)], correlated_inputs(18))
    assert "do not divide" in str(get_method("wanda", {"pattern": "2:4"}).refuse(layer.ref, DENSE))
    assert get_method("wanda", {"sparsity": 0.5}).refuse(layer.ref, DENSE) is None
    narrow: Layer = fused_layers((), DENSE, [heavy_tailed_weights(1, 2)], correlated_inputs(2))[0]
    assert "leaves nothing" in str(get_method("wanda", {"sparsity": 0.999}).refuse(narrow.ref, DENSE)) or (
        int(2 * 0.999) == 1
    )
    int4 = get_format("int4", 16, torch.bfloat16)
    assert "prune first" in str(get_method("wanda", {}).refuse(layer.ref, int4))
    assert "prune first" in str(get_method("magnitude", {}).refuse(layer.ref, int4))


@pytest.mark.parametrize("name", [name for name, pruner in PRUNERS.items() if pruner.kind == "language"])
def test_every_method_is_described(name: str) -> None:
    cls = pruner_class(name)
    assert cls.name == name
    assert all(field.description for field in cls.Options.model_fields.values())
