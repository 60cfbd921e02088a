"""Products with an inverse Fisher matrix against the matrix itself, and pruning by them against the published rules."""

import pytest
import torch
from torch import Tensor

from compressor.errors import NumericalError, RecipeError
from compressor.pruning import get_method, pruner_class
from compressor.pruning.fisher import InverseFisher, OfLayer, Stacked
from compressor.pruning.gradients import LayerGradient
from compressor.pruning.masks import keep_per_tensor

MFAC = pruner_class("m-fac")
BY_HAND = torch.tensor([[1.0, 0.0, 1.0], [0.0, 2.0, 1.0]], dtype=torch.float64)  # two gradients of three weights


def explicit(gradients: Tensor, ridge: float) -> Tensor:
    """The inverse of the Fisher matrix of gradients `[samples, weights]`, float64."""
    d = gradients.double()
    return torch.linalg.inv(ridge * torch.eye(d.shape[1], dtype=torch.float64) + d.T @ d / len(d))


def recursion(gradients: Tensor, ridge: float) -> Tensor:
    """The same by the paper's recursion over the gradients, applied to every unit vector."""
    m, d = gradients.shape
    found: list[tuple[Tensor, float]] = []
    for g in gradients.double():
        v = g / ridge
        for other, denominator in found:
            v = v - other * float(other @ g) / denominator
        found.append((v, m + float(g @ v)))
    inverse = torch.eye(d, dtype=torch.float64) / ridge
    for v, denominator in found:
        inverse -= torch.outer(v, v) / denominator
    return inverse


def layer_of(gradients: Tensor) -> LayerGradient:
    """A layer with one output whose samples of one token have these gradients."""
    return LayerGradient([g.float().unsqueeze(1) for g in gradients], [torch.ones(1, 1) for _ in gradients])


def test_by_hand() -> None:
    fisher = InverseFisher.of(Stacked(BY_HAND.unsqueeze(1)), 0.5)
    expected = torch.tensor(
        [[1.294118, 0.235294, -0.588235], [0.235294, 0.588235, -0.470588], [-0.588235, -0.470588, 1.176471]]
    )
    for index in range(3):
        unit = torch.eye(3, dtype=torch.float64)[index].unsqueeze(0)
        torch.testing.assert_close(fisher.times(unit)[0].float(), expected[index], atol=1e-6, rtol=0)
    torch.testing.assert_close(fisher.diagonal()[0].float(), expected.diagonal(), atol=1e-6, rtol=0)
    torch.testing.assert_close(recursion(BY_HAND, 0.5).float(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_whole_tensor_is_the_explicit_inverse(seed: int, chunk: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    gradients = torch.randn(6, 5, 7, generator=rng, dtype=torch.float64) * 10.0 ** (seed - 2)
    ridge = 0.3 * float(gradients.square().mean())
    inverse = explicit(gradients.flatten(1), ridge)
    torch.testing.assert_close(recursion(gradients.flatten(1), ridge), inverse)
    fisher = InverseFisher.of(Stacked(gradients, chunk), ridge)
    x = torch.randn(5, 7, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(fisher.times(x), (inverse @ x.flatten()).view(5, 7))
    torch.testing.assert_close(fisher.diagonal(), inverse.diagonal().view(5, 7))


@pytest.mark.parametrize("block", [1, 3, 4, 16])
def test_blocks_are_inverses_of_their_own(block: int) -> None:
    rng = torch.Generator().manual_seed(block)
    gradients = torch.randn(6, 4, 7, generator=rng, dtype=torch.float64)  # 7 inputs: the last block is narrower
    x = torch.randn(4, 7, generator=rng, dtype=torch.float64)
    fisher = InverseFisher.of(Stacked(gradients, 2), 0.2, block)
    product, diagonal = fisher.times(x), fisher.diagonal()
    for row in range(4):
        for first in range(0, 7, block):
            part = slice(first, min(first + block, 7))
            inverse = explicit(gradients[:, row, part], 0.2)
            torch.testing.assert_close(product[row, part], inverse @ x[row, part])
            torch.testing.assert_close(diagonal[row, part], inverse.diagonal())


def test_gradients_of_a_layer_are_made_from_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(0)
    counts = (4, 0, 3)  # the second sample sent no token here
    layer = LayerGradient(
        [torch.randn(6, n, generator=rng) for n in counts], [torch.randn(5, n, generator=rng) for n in counts]
    )
    whole = torch.stack([d @ a.T for a, d in zip(layer.inputs, layer.outputs, strict=True)])
    monkeypatch.setattr("compressor.pruning.fisher.CHUNK_BYTES", 4 * 3 * 6 * 2)  # two rows at a time
    gradients = OfLayer(layer, None)
    assert gradients.mean_square() == pytest.approx(float(whole.square().mean()), rel=1e-5)
    parts = list(gradients.chunks())
    assert [part.stop - part.start for part, _ in parts] == [2, 2, 1]
    torch.testing.assert_close(torch.cat([values for _, values in parts], 1), whole)
    keep = torch.rand(5, 6, generator=rng) < 0.5
    masked = torch.cat([values for _, values in OfLayer(layer, keep).chunks()], 1)
    torch.testing.assert_close(masked, whole * keep)


@pytest.mark.parametrize(("sparsity", "expected"), [(0.34, [1.3, -0.56, 0.0]), (0.67, [0.0, -0.741818, 0.0])])
def test_pruning_by_hand(sparsity: float, expected: list[float]) -> None:
    damping = 0.5 / float(BY_HAND.square().mean())
    method = MFAC(MFAC.Options(sparsity=sparsity, damping=damping))
    weight = torch.tensor([[1.0, -0.8, 0.6]])
    if sparsity > 0.5:  # costs 0.386, 0.544 and 0.153: the first and the last go at once
        weight = torch.tensor([[1.0, -0.8, 0.6]])
    keep, values = method.decide("w", weight, torch.ones(1, 3, dtype=torch.bool), layer_of(BY_HAND), sparsity)
    torch.testing.assert_close(values, torch.tensor([expected]), atol=1e-5, rtol=0)
    assert torch.equal(keep, values != 0)


def test_scores_and_steps_against_the_explicit_matrix() -> None:
    rng = torch.Generator().manual_seed(5)
    gradients, weight = torch.randn(8, 12, generator=rng), torch.randn(1, 12, generator=rng)
    before = torch.ones(1, 12, dtype=torch.bool)
    before[0, [2, 7]] = False  # gone in an earlier step
    method = MFAC(MFAC.Options(sparsity=0.5, damping=0.2))
    keep, values = method.decide("w", weight * before, before, layer_of(gradients), 0.5)
    assert int(keep.sum()) == 6
    assert not (keep & ~before).any()
    alive = before[0].nonzero()[:, 0]
    ridge = 0.2 * float((gradients.double().square()).mean())
    inverse = explicit(gradients[:, alive], ridge)
    w = weight[0, alive].double()
    gone = ~keep[0, alive]
    cost = w.square() / (2 * inverse.diagonal())
    assert cost[gone].max() <= cost[~gone].min()
    u = torch.where(gone, -w / inverse.diagonal(), 0.0)
    moved = torch.where(gone, 0.0, w + inverse @ u)
    torch.testing.assert_close(values[0, alive].double(), moved, rtol=1e-3, atol=1e-5)
    plain = MFAC(MFAC.Options(sparsity=0.5, damping=0.2, compensate=False))
    _, stayed = plain.decide("w", weight * before, before, layer_of(gradients), 0.5)
    assert torch.equal(stayed, torch.where(keep, weight, 0.0))


def test_making_up_for_it_lowers_what_samples_expect() -> None:
    """The quadratic model of the loss rises less than without, and weights nobody looks at are pruned by size."""
    rng = torch.Generator().manual_seed(2)
    gradients, weight = torch.randn(4, 64, generator=rng), torch.randn(1, 64, generator=rng)
    everything = torch.ones(1, 64, dtype=torch.bool)
    rises = []
    for compensate in (True, False):
        method = MFAC(MFAC.Options(sparsity=0.25, damping=0.05, compensate=compensate))
        _, values = method.decide("w", weight, everything, layer_of(gradients), 0.25)
        rises.append(float((gradients @ (values - weight)[0]).square().mean()))
    assert rises[0] < 0.5 * rises[1]
    silent = LayerGradient([torch.zeros(64, 0)] * 4, [torch.zeros(1, 0)] * 4)
    keep, values = MFAC(MFAC.Options(sparsity=0.25)).decide("w", weight, everything, silent, 0.25)
    assert torch.equal(keep, keep_per_tensor(weight.abs(), 0.25))
    assert torch.equal(values, torch.where(keep, weight, 0.0))


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(RecipeError, match="one step"):
        get_method("m-fac", {"pattern": "2:4", "steps": 2})
    with pytest.raises(RecipeError, match="damping"):
        get_method("m-fac", {"damping": 0})
    broken = LayerGradient([torch.full((3, 1), torch.nan)], [torch.ones(1, 1)])
    with pytest.raises(NumericalError, match=r"some\.weight: gradients"):
        MFAC().decide("some.weight", torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool), broken, 0.5)
