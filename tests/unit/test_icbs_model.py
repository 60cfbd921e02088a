"""The quadratic model and its solvers: hand-made blocks, brute force, and what must hold for any block."""

import math

import pytest
import torch

from compressor.pruning.candidates import Choice, TensorState, choose_block, choose_groups, free_weights
from compressor.pruning.mask_file import pack_mask, unpack_mask
from compressor.pruning.masks import Pattern, keep_per_row, keep_per_tensor
from compressor.pruning.quadratic import Problem
from compressor.pruning.solvers import Solution, anneal, descend, exact
from compressor.pruning.step import Settings, accepted, take_step

W0 = torch.tensor([1, -2, 0.5, 1.5, -1, 2], dtype=torch.float64)
GRADS = torch.tensor(
    [[1, 0.5, -1, 0, 2, 0.5], [0, 1, 1, -1, 0.5, 1], [2, -0.5, 0, 1, -1, 0], [1, 1, -2, 0.5, 0, -1]],
    dtype=torch.float64,
)
PRUNED = torch.tensor([False, False, False, True, True, True])


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(n: int, n_samples: int, seed: int, pruned: int | None = None) -> Problem:
    g = rng(seed)
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.randperm(n, generator=g)[: n // 2 if pruned is None else pruned]] = True
    w0 = torch.randn(n, generator=g, dtype=torch.float64)
    grads = torch.randn(n_samples, n, generator=g, dtype=torch.float64) + 0.3
    return Problem.of(w0, mask, grads, 0.75, 0.001)


def pruned_set(solution: Solution) -> list[int]:
    return solution.x.nonzero()[:, 0].tolist()


def mask_of(*indices: int) -> torch.Tensor:
    x = torch.zeros(6, dtype=torch.bool)
    x[list(indices)] = True
    return x


def test_six_weights_by_hand() -> None:
    found = Problem.of(W0, PRUNED, GRADS, 0.75, 0.001)
    q, c = found.matrix()
    assert float(c) == pytest.approx(1.1556875)
    assert q.diagonal().tolist() == pytest.approx([-0.6865, 0.504, -0.06225, -0.2131875, -0.1885, 0.5585])
    assert [float(q[0, 1]), float(q[0, 3]), float(q[3, 5]), float(q[4, 5])] == pytest.approx(
        [-0.125, 0.46875, -0.5625, -0.375]
    )
    for choice, energy in (((0, 4, 5), -0.1608125), ((0, 2, 4), 0.0309375), ((0, 3, 5), 0.377), ((1, 3, 4), 3.5705)):
        assert float(found.energy(mask_of(*choice))) == pytest.approx(energy)
    for solution in (exact(found), anneal(found, 4, 40, rng()), descend(found, 4, rng())):
        assert pruned_set(solution) == [0, 4, 5]
        assert solution.energy == pytest.approx(-0.1608125)
        assert solution.swaps.tolist() == [[3, 0]]


def test_weights_whose_removals_cancel_go_together() -> None:
    """Negative couplings count with their sign: a diagonal model, or a cut-off of negative entries, picks {2, 3}."""
    grads = torch.tensor([[2.0, -2, 1, 0], [-2, 2, 0, 1]], dtype=torch.float64)
    ones = torch.ones(4, dtype=torch.float64)
    # Expansion at the dense model, as the ancestor of the method has it: no gradient, d = 0.
    hessian = grads.T @ grads / 2
    dense = Problem(ones, torch.zeros(4, dtype=torch.bool), torch.zeros(4, dtype=torch.float64), grads, 0.0)
    energies = {
        pair: float(dense.energy(torch.tensor([i in pair for i in range(4)])))
        for pair in [(0, 1), (2, 3), (0, 3), (1, 2), (0, 2), (1, 3)]
    }
    assert energies == pytest.approx({(0, 1): 0.0, (2, 3): 0.5, (0, 3): 1.25, (1, 2): 1.25, (0, 2): 3.25, (1, 3): 3.25})
    assert float(hessian[0, 1]) < 0
    # With the gradient that stands for the same quadratic around {2, 3}, annealing moves there.
    delta = torch.tensor([0, 0, -1.0, -1.0], dtype=torch.float64)
    at = Problem(ones, torch.tensor([False, False, True, True]), hessian @ delta, grads, 0.0)
    assert descend(at, 8, rng()).energy == 0  # it takes two swaps at once, which descent alone does not see
    for solution in (exact(at), anneal(at, 8, 40, rng())):
        assert pruned_set(solution) == [0, 1]
        assert solution.energy == pytest.approx(-0.5)


@pytest.mark.parametrize("seed", range(6))
def test_the_two_forms_agree(seed: int) -> None:
    found = problem(40, 25, seed)
    q, c = found.matrix()
    assert torch.allclose(q, q.T)
    x = torch.rand(50, 40, generator=rng(seed)) < 0.5
    dense = torch.einsum("bi,ij,bj->b", x.double(), q, x.double()) + c
    assert torch.allclose(found.energy(x), dense, rtol=0, atol=1e-9)
    assert float(found.energy(found.pruned)) == 0.0


@pytest.mark.parametrize("seed", range(8))
def test_annealing_finds_the_best_of_small_blocks(seed: int) -> None:
    found = problem(12, 7, seed)
    best = exact(found).energy
    assert anneal(found, 10, 60, rng(seed)).energy == pytest.approx(best, abs=1e-9)
    assert best <= descend(found, 8, rng(seed)).energy <= 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("pruned", [3, 20, 37])
def test_every_decision_is_valid_and_no_worse_than_now(seed: int, pruned: int) -> None:
    found = problem(40, 30, seed, pruned)
    for solution in (anneal(found, 3, 20, rng(seed)), descend(found, 3, rng(seed))):
        assert solution.energy <= 0
        assert int(solution.x.sum()) == pruned
        assert solution.energy == pytest.approx(float(found.energy(solution.x)), abs=1e-9)
        x = found.pruned.clone()
        for restored, gone in solution.swaps.tolist():  # any first few of the swaps keep the count
            assert x[restored]
            assert not x[gone]
            x[restored], x[gone] = False, True
        assert torch.equal(x, solution.x)


def test_without_a_gradient_nothing_moves() -> None:
    found = Problem.of(W0, PRUNED, GRADS, 0.0, 0.001)
    assert exact(found).energy == 0
    for solution in (anneal(found, 4, 30, rng()), descend(found, 4, rng())):
        assert torch.equal(solution.x, PRUNED)
        assert solution.energy == 0
        assert len(solution.swaps) == 0


def test_a_ridge_freezes() -> None:
    loose, tight = (Problem.of(W0, PRUNED, GRADS, 0.75, ridge) for ridge in (0.0, 100.0))
    assert len(descend(loose, 2, rng()).swaps) > 0
    assert len(descend(tight, 2, rng()).swaps) == 0


@pytest.mark.parametrize("seed", range(4))
def test_what_other_blocks_bring_is_part_of_the_energy(seed: int) -> None:
    """Two halves decided one after the other have the energy of the whole."""
    whole = problem(30, 12, seed)
    first = Problem.of(whole.w0[:15], whole.pruned[:15], whole.grads[:, :15], 0.75, 0.001)
    x = torch.rand(30, generator=rng(seed + 50)) < 0.5
    brought = whole.grads[:, :15] @ first.delta(x[:15])
    second = Problem.of(whole.w0[15:], whole.pruned[15:], whole.grads[:, 15:], 0.75, 0.001, brought)
    both = float(first.energy(x[:15]) + second.energy(x[15:]))
    assert both == pytest.approx(float(whole.energy(x)), abs=1e-9)
    assert float(second.energy(second.pruned)) == 0


@pytest.mark.parametrize("solver", [anneal, descend])
def test_groups_are_kept(solver: object) -> None:
    for seed in range(4):
        found = problem(32, 20, seed)
        groups = torch.arange(32) // 4
        keep = Pattern(2, 4).choose(torch.rand(1, 32, generator=rng(seed))).view(-1)
        found = Problem.of(found.w0, ~keep, 0.1 * found.grads, 0.75, 0.0)
        solution = descend(found, 4, rng(), groups) if solver is descend else anneal(found, 4, 30, rng(), groups)
        assert solution.energy < 0
        assert Pattern(2, 4).fits(~solution.x.view(1, -1))
        for restored, gone in solution.swaps.tolist():
            assert groups[restored] == groups[gone]


def test_counts_of_fixed_weights_and_rest() -> None:
    """The published shares at density 0.1 on a 512 x 10 layer."""
    scores = torch.rand(10, 512, generator=rng())
    keep = keep_per_tensor(scores, 0.9)
    assert int(keep.sum()) == 512
    free = free_weights(scores, keep, Choice(1024), per_row=False)
    assert (int((free & keep).sum()), int((free & ~keep).sum())) == (333, 2673)
    assert scores[free & keep].max() <= scores[~free & keep].min()
    assert scores[free & ~keep].min() >= scores[~free & ~keep].max()
    state = TensorState.start(scores, keep, Choice(1024), per_row=False)
    pruned, kept = choose_block(state, scores, Choice(1024))
    assert (len(pruned), len(kept)) == (512, 333)
    state = state.rest(pruned, kept, Choice(1024))
    assert (len(state.rested_pruned), len(state.rested_kept)) == (512, 133)  # 0.4 of 333: no side runs dry
    again, others = choose_block(state, scores, Choice(1024))
    assert len(others) == 333 - 133
    assert not set(again.tolist()) & set(state.rested_pruned.tolist())


def test_shares_are_taken_per_row() -> None:
    scores = torch.rand(6, 40, generator=rng(1))
    keep = keep_per_row(scores, 0.5)
    free = free_weights(scores, keep, Choice(16), per_row=True)
    assert ((free & keep).sum(1) == 20 - round(20 * 0.35)).all()
    assert ((free & ~keep).sum(1) == 20 - round(20 * 0.42)).all()


def test_blocks_take_what_looks_wrong() -> None:
    scores = torch.tensor([[8.0, 1, 7, 2, 6, 3, 5, 4]])
    keep = torch.tensor([[True, True, True, True, False, False, False, False]])
    empty = torch.empty(0, dtype=torch.int32)
    state = TensorState(keep, torch.ones_like(keep), empty, empty)
    pruned, kept = choose_block(state, scores, Choice(4))
    assert (pruned.tolist(), kept.tolist()) == ([4, 6], [1, 3])
    everything = choose_block(state, scores, Choice(8))
    assert (everything[0].tolist(), everything[1].tolist()) == ([4, 5, 6, 7], [0, 1, 2, 3])
    members = choose_groups(
        TensorState(keep[:, [0, 4, 1, 5, 2, 6, 3, 7]], state.free, empty, empty), scores, Choice(4), 4
    )
    assert len(members[0]) == len(members[1]) == 2


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("groups", [None, 4])
def test_a_step_keeps_the_count_and_its_promise(groups: int | None, joint: bool) -> None:
    w0 = torch.randn(24, 32, generator=rng(3), dtype=torch.float64)
    per_sample = 0.05 * torch.randn(20, 24, 32, generator=rng(4), dtype=torch.float64)
    scores = w0.abs()
    keep = Pattern(2, 4).choose(scores) if groups else keep_per_tensor(scores, 0.5)
    choice = Choice(64, fixed_pruned=0.1, fixed_kept=0.1)
    state = TensorState.start(scores, keep, choice, per_row=False)
    expected = torch.randn(20, generator=rng(5), dtype=torch.float64) * 0.01 if joint else None
    settings = Settings(choice, ridge=0.0, groups=groups)
    step = take_step(state, w0, per_sample.mean(0), lambda i: per_sample.flatten(1)[:, i], settings, rng(), expected)
    assert step is not None
    assert step.energy < 0
    for share in (0.0, 0.5, 1.0):
        after = accepted(step, share).keep
        assert int(after.sum()) == int(keep.sum())
        if groups:
            assert Pattern(2, 4).fits(after)
        assert int((after != keep).sum()) == 2 * round(share * len(step.swaps))
    delta = w0 * (accepted(step).keep.double() - keep.double())
    change = (per_sample * delta).sum((1, 2))
    assert torch.allclose(step.expected, change, atol=1e-9)
    brought = torch.zeros(20, dtype=torch.float64) if expected is None else expected
    total = 0.75 * change.mean() + ((brought + change) ** 2 - brought**2).mean() / 2
    assert step.energy == pytest.approx(float(total), abs=1e-9)


def test_gradients_that_are_not_finite_skip_the_step() -> None:
    state = TensorState.start(torch.rand(4, 8), torch.rand(4, 8) < 0.5, Choice(8), per_row=False)
    broken = torch.full((4, 8), math.nan)
    assert (
        take_step(state, torch.ones(4, 8), broken, lambda i: broken.view(1, -1)[:, i], Settings(Choice(8)), rng())
        is None
    )


def test_bits_survive() -> None:
    mask = torch.rand(5, 13, generator=rng()) < 0.4
    assert torch.equal(unpack_mask(pack_mask(mask), (5, 13)), mask)
    row = torch.tensor([[True, False, True, True, False, False, False, True, True, False]])
    assert pack_mask(row).tolist() == [141, 1]
