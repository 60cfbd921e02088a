"""LLM-FP4's own search, over splits of the bits and biases of output channels, against brute force."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from compressor.calibration.stats import SecondMoment
from compressor.formats.base import QParams
from compressor.formats.float4 import SPLITS, Float4, Grid
from compressor.methods import fp4_scales
from compressor.methods.base import Layer
from compressor.methods.fp4 import FP4, FP4Options, search_splits
from compressor.methods.fp4_rows import row_errors
from compressor.methods.fp4_scales import search_rows
from compressor.testing.grids import assert_same_params
from compressor.testing.layers import (
    correlated_inputs,
    fused_layers,
    heavy_tailed_weights,
    output_error,
    quantized,
    solve,
)

seeds = pytest.mark.parametrize("seed", range(3))
grids = pytest.mark.parametrize("grid", ["additive", "hybrid", "reference"])


def layer_of(rows: int, width: int, seed: int) -> tuple[Layer, Tensor]:
    """Return one layer and its inputs `[tokens, in]`."""
    x = correlated_inputs(width, seed=seed)
    return fused_layers((SecondMoment(),), Float4(), [heavy_tailed_weights(rows, width, seed)], x)[0], x


def exact_errors(w: Tensor, q: QParams, x: Tensor) -> Tensor:
    """Return the squared output error of every row, `[out]` float64, by way of the codes."""
    fmt = Float4()
    delta = fmt.decode(fmt.encode(w, q), q).double() - w.double()
    return (x.double() @ delta.T).square().sum(0)


@grids
@seeds
def test_every_row_has_the_best_of_all_candidates(grid: Grid, seed: int) -> None:
    """Brute force: each candidate of each split, output errors from the tokens themselves, in float64."""
    fmt = Float4(grid)
    layer, x = layer_of(7, 24, seed)
    for start in fmt.starts(layer.weight):
        candidates = list(fmt.scale_candidates(start))
        best = torch.stack([exact_errors(layer.weight, q, x) for q in candidates]).amin(0)
        found, error = search_rows(layer.weight, fmt, start, layer.second_moment(SecondMoment()))
        assert torch.allclose(exact_errors(layer.weight, found, x), best, rtol=1e-4, atol=0)
        assert error * len(x) == pytest.approx(float(best.sum()), rel=1e-4)
        allowed = torch.stack([q.scale for q in candidates])  # [candidates, out, 1]
        assert (found.scale == allowed).any(0).all(), "a scale that is no candidate"


def test_a_tiny_layer_by_exhaustion() -> None:
    """Two rows, two inputs: no choice of split and two biases, of 3 * 101**2, has a smaller error."""
    fmt = Float4()
    layer, x = layer_of(2, 2, seed=3)
    chosen = exact_errors(layer.weight, search_splits(layer, fmt, layer.second_moment(SecondMoment())), x)
    totals = []
    for start in fmt.starts(layer.weight):
        rows = torch.stack([exact_errors(layer.weight, q, x) for q in fmt.scale_candidates(start)])  # [candidates, 2]
        totals += [float(rows[a, 0] + rows[b, 1]) for a, b in product(range(len(rows)), repeat=2)]
    assert len(totals) == 3 * 101**2
    assert float(chosen.sum()) == pytest.approx(min(totals), rel=1e-4)


@grids
@seeds
def test_the_search_beats_min_max_on_every_split_and_the_layer_takes_the_best(grid: Grid, seed: int) -> None:
    fmt = Float4(grid)
    layer, x = layer_of(16, 96, seed)
    moment = layer.second_moment(SecondMoment())
    searched = []
    for start in fmt.starts(layer.weight):
        plain = exact_errors(layer.weight, start, x)
        found = exact_errors(layer.weight, search_rows(layer.weight, fmt, start, moment)[0], x)
        assert (found <= plain * (1 + 1e-5)).all(), "a row got worse"
        assert found.sum() < 0.95 * plain.sum()
        searched.append(float(found.sum()))
    best = float(exact_errors(layer.weight, search_splits(layer, fmt, moment), x).sum())
    assert best == pytest.approx(min(searched), rel=1e-6)


def test_each_split_wins_where_it_should() -> None:
    """Weights that lie on one split's grid, give or take little, take that split; one row must not decide for all."""
    rng = torch.Generator().manual_seed(4)
    x = torch.randn(200, 64, generator=rng)
    for split, table in SPLITS.items():
        w = torch.tensor(table)[torch.randint(0, 16, (8, 64), generator=rng)]
        w = w * torch.rand(8, 1, generator=rng).add_(0.1) * (1 + 0.01 * torch.randn(8, 64, generator=rng))
        w[0] = torch.randn(64, generator=rng).mul_(0.01)
        layer = fused_layers((SecondMoment(),), Float4(), [w], x)[0]
        chosen = quantized(solve(FP4(), [layer], Float4()).decisions[layer.ref.name]).qparams
        assert chosen.codebook is not None
        assert tuple(chosen.codebook.tolist()) == table, split


@seeds
def test_the_method_is_monotone_and_treats_fused_layers_on_their_own(seed: int) -> None:
    fmt = Float4()
    x = correlated_inputs(48, seed=seed)
    weights = [heavy_tailed_weights(12, 48, seed), heavy_tailed_weights(4, 48, seed + 50, spread=0.1)]
    layers = fused_layers((SecondMoment(),), fmt, weights, x)
    together = solve(FP4(), layers, fmt).decisions
    for layer in layers:
        alone = quantized(solve(FP4(), [layer], fmt).decisions[layer.ref.name])
        decision = quantized(together[layer.ref.name])
        assert torch.equal(alone.codes, decision.codes)
        assert_same_params(alone.qparams, decision.qparams)
        # The paper's sub-steps: min-max E2M1, its biases searched, all splits with theirs.
        start = layer.fit(fmt)
        searched = search_rows(layer.weight, fmt, start, layer.second_moment(SecondMoment()))[0]
        errors = [
            output_error(fmt.decode(fmt.encode(layer.weight, q), q), layer, x)
            for q in (start, searched, decision.qparams)
        ]
        assert errors[2] <= errors[1] * (1 + 1e-6)
        assert errors[1] < 0.95 * errors[0]


def test_sweeps_and_globals_change_nothing() -> None:
    """There is one group per row and no global scale: all of it was searched already."""
    fmt = Float4()
    layer, _ = layer_of(6, 40, seed=5)
    first, second = (
        quantized(solve(FP4(options), [layer], fmt).decisions[layer.ref.name])
        for options in (FP4Options(sweeps=0, globals=1), FP4Options(sweeps=5, globals=8))
    )
    assert_same_params(first.qparams, second.qparams)


def test_a_row_of_zeros_keeps_its_scale() -> None:
    layer, _ = layer_of(4, 32, seed=6)
    layer.weight[2] = 0
    decision = quantized(solve(FP4(), [layer], Float4()).decisions[layer.ref.name])
    assert decision.qparams.scale[2].item() == 1
    assert not decision.codes[2].any()


@pytest.mark.parametrize("width", [1, 5, 96, 97, 250, 1000])
def test_row_errors_are_those_of_the_whole_matrix(width: int) -> None:
    rng = torch.Generator().manual_seed(7)
    delta, x = torch.randn(9, width, generator=rng), torch.randn(50, width, generator=rng)
    moment = x.T @ x
    triangle = 2 * moment.triu(1) + moment.diagonal().diag()
    assert torch.allclose(row_errors(delta, triangle)[:, 0], (x @ delta.T).square().sum(0), rtol=1e-4)


def test_rows_are_searched_in_parts_that_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same choices, whatever the parts; and no tensor larger than a part is rounded."""
    fmt = Float4()
    layer, _ = layer_of(23, 64, seed=8)
    start, moment = layer.fit(fmt), layer.second_moment(SecondMoment())
    whole, error = search_rows(layer.weight, fmt, start, moment)
    rounded: list[int] = []

    class Counting(Float4):
        def round(self, w: Tensor, q: QParams) -> Tensor:
            rounded.append(w.numel())
            return super().round(w, q)

    monkeypatch.setattr(fp4_scales, "_ELEMENTS", 5 * 64)
    parts, error_of_parts = search_rows(layer.weight, Counting(), start, moment)
    assert max(rounded) == 5 * 64
    assert len(rounded) == 5 * 101  # parts of at most five rows out of 23
    assert torch.equal(parts.scale, whole.scale)
    assert error_of_parts == pytest.approx(error)


@seeds
def test_a_search_ends_where_its_error_reaches_the_limit(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = Float4()
    layer, _ = layer_of(30, 48, seed)
    start, moment = layer.fit(fmt), layer.second_moment(SecondMoment())
    monkeypatch.setattr(fp4_scales, "_ROWS", 3)
    found, error = search_rows(layer.weight, fmt, start, moment)
    same, again = search_rows(layer.weight, fmt, start, moment, limit=error * 1.001)
    assert again == error
    assert torch.equal(same.scale, found.scale)
    for limit in (error, error / 2, 0.0):
        assert search_rows(layer.weight, fmt, start, moment, limit) == (start, float("inf"))


@seeds
def test_giving_up_early_changes_no_choice(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = Float4()
    layer, _ = layer_of(30, 48, seed)
    moment = layer.second_moment(SecondMoment())
    monkeypatch.setattr(fp4_scales, "_ROWS", 3)
    whole = [search_rows(layer.weight, fmt, start, moment) for start in fmt.starts(layer.weight)]
    assert_same_params(search_splits(layer, fmt, moment), min(whole, key=lambda entry: entry[1])[0])


def test_the_first_candidate_wins_ties() -> None:
    """Inputs that are always zero make every candidate equally good: min-max and E2M1 stay."""
    fmt = Float4()
    layer, x = layer_of(3, 16, seed=9)
    dead = fused_layers((SecondMoment(),), fmt, [layer.weight], torch.zeros_like(x))[0]
    assert_same_params(search_splits(dead, fmt, dead.second_moment(SecondMoment())), layer.fit(fmt))
    moved = replace(layer.fit(fmt), scale=layer.fit(fmt).scale * 2)
    assert_same_params(search_rows(layer.weight, fmt, moved, torch.zeros(16, 16))[0], moved)
