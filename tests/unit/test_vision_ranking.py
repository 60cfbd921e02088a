"""Ranking values against hand-computed ones, and what they must be invariant to."""

import math

import pytest
import torch
from torch import nn

from compressor.errors import CoverageError, RecipeError
from compressor.vision.clusters import Cluster, Producer
from compressor.vision.ranking import beta_rank, l1_norms, normalised, rank_beta, rank_l1, rank_random
from compressor.vision.selection import choose, kept_count, uniform
from compressor.vision.statistics import Spread, measure_spread


def one_by_one() -> tuple[nn.Conv2d, torch.Tensor]:
    conv = nn.Conv2d(2, 3, 1, bias=False).double().requires_grad_(False)
    conv.weight.copy_(torch.tensor([[1, 0], [0.5, 0.5], [1, -1]])[:, :, None, None])
    return conv, torch.tensor([[1.0, 2], [3, -2]]).double()[:, :, None, None]


def test_one_by_one_by_hand() -> None:
    conv, images = one_by_one()
    spread = measure_spread(conv, {"conv": conv}, [images])["conv"]
    inputs_over = beta_rank(l1_norms(conv), spread, "in_over_out")
    torch.testing.assert_close(inputs_over, torch.tensor([1.8708287, 3.7416574, 1.2472191]))
    torch.testing.assert_close(normalised(inputs_over), torch.tensor([0.25, 1, 0]))
    outputs_over = beta_rank(l1_norms(conv), spread, "out_over_in")
    torch.testing.assert_close(outputs_over, torch.tensor([0.5345225, 0.2672612, 3.2071350]))
    torch.testing.assert_close(normalised(outputs_over), torch.tensor([0.0909091, 0, 1]))


def test_published_ratio_ignores_the_scale_of_a_filter_and_the_other_does_not() -> None:
    conv, images = one_by_one()
    before = beta_rank(l1_norms(conv), measure_spread(conv, {"c": conv}, [images])["c"], "in_over_out")
    conv.weight[1] *= 10
    spread = measure_spread(conv, {"c": conv}, [images])["c"]
    torch.testing.assert_close(beta_rank(l1_norms(conv), spread, "in_over_out"), before)
    assert float(beta_rank(l1_norms(conv), spread, "out_over_in")[1]) == pytest.approx(26.726124)


@pytest.mark.parametrize("parts", [[2], [1, 1]])
def test_padded_window_by_hand_whatever_the_batches(parts: list[int]) -> None:
    conv = nn.Conv2d(1, 2, 3, padding=1, bias=False).double().requires_grad_(False)
    conv.weight.zero_()
    conv.weight[0, 0, 1, 1] = 1
    conv.weight[1, 0, 1, 1], conv.weight[1, 0, 1, 2], conv.weight[1, 0, 0, 1] = 0.5, -0.5, 0.25
    images = torch.tensor([[[1.0, 0], [2, 1]], [[0, 1], [1, 3]]]).double()[:, None]
    spread = measure_spread(conv, {"c": conv}, images.split(parts))["c"]
    torch.testing.assert_close(spread.inputs, torch.full((1, 4), 0.8333333))
    torch.testing.assert_close(
        4 * beta_rank(l1_norms(conv), spread, "in_over_out"), torch.tensor([5.8333333, 9.1071429])
    )
    torch.testing.assert_close(4 * beta_rank(l1_norms(conv), spread, "out_over_in"), torch.tensor([3.0, 3.375]))


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (3, 2), "padding": (0, 1), "dilation": 2},
        {"kernel_size": 3, "groups": 2, "padding": "same"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    ],
)
def test_spread_is_that_of_unfolded_patches(settings: dict) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, **settings).double().requires_grad_(False)
    images = 5 + torch.randn(7, 4, 9, 8).double()
    spread = measure_spread(conv, {"c": conv}, images.split([3, 4]))["c"]
    padding = conv._reversed_padding_repeated_twice
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = nn.functional.pad(images, padding, mode=mode)
    patches = nn.functional.unfold(padded, conv.kernel_size, conv.dilation, 0, conv.stride)
    patches = patches.unflatten(1, (conv.groups, -1))  # [images, groups, values, positions]
    expected = patches.permute(1, 3, 0, 2).flatten(2).std(-1, correction=0)
    torch.testing.assert_close(spread.inputs, expected.float())
    torch.testing.assert_close(spread.outputs, conv(images).flatten(2).std(0, correction=0).float())


def test_linear_layer_is_a_one_by_one_convolution() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(5, 3).requires_grad_(False)
    conv = nn.Conv2d(5, 3, 1).requires_grad_(False)
    conv.weight.copy_(linear.weight[:, :, None, None])
    conv.bias.copy_(linear.bias)
    images = torch.randn(6, 4, 4, 5)
    a = rank_beta(linear, {"x": linear}, [images], "in_over_out")["x"]
    b = rank_beta(conv, {"x": conv}, [images.permute(0, 3, 1, 2)], "in_over_out")["x"]
    torch.testing.assert_close(a, b)


def test_permuting_filters_permutes_scores() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3).requires_grad_(False)
    images, order = torch.randn(5, 3, 8, 8), torch.randperm(8)
    before = rank_beta(conv, {"c": conv}, [images], "out_over_in")["c"]
    for parameter in (conv.weight, conv.bias):
        parameter.copy_(parameter[order].clone())
    torch.testing.assert_close(rank_beta(conv, {"c": conv}, [images], "out_over_in")["c"], before[order])


def test_dead_filters_score_nothing_and_nearly_dead_ones_are_tamed() -> None:
    spread = Spread(torch.ones(1, 4), torch.tensor([[1.0] * 4, [0.0] * 4, [1e-6] * 4]))
    norms = torch.ones(3)
    plain, robust = (beta_rank(norms, spread, "in_over_out", robust) for robust in (False, True))
    assert plain[1] == robust[1] == 0
    assert float(plain[2]) == pytest.approx(1e6)
    assert 0 < float(robust[2]) <= 1e3 / 1e-3


def test_equal_scores_become_a_half_and_chance_depends_on_the_seed() -> None:
    assert normalised(torch.full((4,), 3.0)).tolist() == [0.5] * 4
    conv = nn.Conv2d(1, 16, 1)
    assert torch.equal(rank_random({"c": conv}, 1)["c"], rank_random({"c": conv}, 1)["c"])
    assert not torch.equal(rank_random({"c": conv}, 1)["c"], rank_random({"c": conv}, 2)["c"])
    largest = int(conv.weight.detach().abs().flatten().argmax())
    assert int(rank_l1({"c": conv})["c"].argmax()) == largest


def test_one_image_has_no_spread() -> None:
    conv = nn.Conv2d(1, 2, 1)
    with pytest.raises(CoverageError, match="1 ranking images"):
        measure_spread(conv, {"c": conv}, [torch.zeros(1, 1, 4, 4)])


@pytest.mark.parametrize(
    ("size", "ratio", "kept"), [(64, 0.65, 22), (128, 0.65, 44), (256, 0.65, 89), (512, 0.8, 102), (16, 0.18, 13)]
)
def test_kept_counts_are_those_of_the_reference(size: int, ratio: float, kept: int) -> None:
    assert kept_count(size, ratio) == kept


def test_kept_counts_are_guarded() -> None:
    assert kept_count(8, 0.999) == 1
    assert kept_count(64, 0.65, round_to=8) == 24
    assert kept_count(4, 0.5, round_to=8) == 4
    assert kept_count(16, 0.6, groups=4) == 4


def test_choice_keeps_the_best_and_ties_lose_their_lower_index() -> None:
    assert choose(torch.tensor([3.0, 1, 2, 4]), 2).tolist() == [0, 3]
    assert choose(torch.ones(4), 2).tolist() == [2, 3]
    # Two groups of three: the same places of both stay, by their mean.
    assert choose(torch.tensor([1.0, 5, 0, 1, 0, 2]), 4, groups=2).tolist() == [1, 2, 4, 5]


def cluster(*layers: str, size: int = 3) -> Cluster:
    producers = tuple(Producer(layer, torch.arange(size)) for layer in layers)
    return Cluster(layers[0], size, 1, producers, layers)


def test_shared_channels_get_the_mean_or_the_largest_score() -> None:
    scores = {"a": torch.tensor([0.0, 0.5, 1]), "b": torch.tensor([1.0, 0.5, 0.2])}
    assert cluster("a", "b").score(scores).tolist() == pytest.approx([0.5, 0.5, 0.6])
    assert cluster("a", "b").score(scores, "max").tolist() == pytest.approx([1, 0.5, 1])
    turned = Cluster("a", 3, 1, (Producer("a", torch.arange(3)), Producer("b", torch.tensor([2, 1, 0]))), ("a", "b"))
    assert turned.score(scores).tolist() == pytest.approx([0.1, 0.5, 1])


def test_ratios_by_glob() -> None:
    clusters = [cluster("stem"), cluster("body.0"), cluster("body.1")]
    assert uniform(clusters, 0.5, {"body.*": 0.2, "*.1": 0}) == {"stem": 0.5, "body.0": 0.2, "body.1": 0}
    with pytest.raises(RecipeError, match="matches no layer"):
        uniform(clusters, 0.5, {"head": 0.2})
    with pytest.raises(RecipeError, match="cannot remove"):
        uniform(clusters, 0.5, {"stem": 1.0})
    assert math.isclose(sum(uniform(clusters, 0.25).values()), 0.75)
