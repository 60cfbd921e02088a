"""AWQ's and SmoothQuant's arithmetic: hand numbers, the search against running the layers, statistics per channel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.calibration.channels import MaxAbs, MeanAbs
from compressor.calibration.stats import LANES, SecondMoment, Statistic
from compressor.formats.base import ScaledFormat, grouped
from compressor.formats.float4 import Float4
from compressor.formats.ints import IntFormat
from compressor.formats.nvfp4 import NVFP4
from compressor.methods.awq import AWQ, AWQOptions, candidate, clip
from compressor.methods.grids import turned
from compressor.methods.scaling import FoldSite
from compressor.methods.smoothquant import SmoothQuant, SmoothQuantOptions, factors
from compressor.plan import Fold, FoldKind
from compressor.testing.layers import (
    collect,
    correlated_inputs,
    fold,
    fused_layers,
    heavy_tailed_weights,
    quantized,
    solve,
)

INT4, INT3 = IntFormat(4, 32, torch.bfloat16), IntFormat(3, 32, torch.bfloat16)


def test_awq_factors_by_hand() -> None:
    c = candidate(torch.tensor([0.1, 0.9, 2.5]), 0.5)
    assert torch.allclose(c, torch.tensor([0.447214, 1.341641, 2.236068]), rtol=1e-5)
    assert torch.equal(candidate(torch.tensor([0.1, 0.9, 2.5]), 0.0), torch.ones(3))


def test_duo_factors_by_hand() -> None:
    loud, quiet = torch.tensor([1.0, 4.0]), torch.tensor([0.25, 0.5])
    raw = loud.pow(0.5) / (quiet.pow(0.5) + 1e-4)  # 1.9996, 2.82803
    assert torch.allclose(candidate(loud, 0.5, quiet), raw / (raw[0] * raw[1]).sqrt())


def test_smoothquant_factors_by_hand() -> None:
    c = factors(torch.tensor([0.5, 8.0, 2.0]), torch.tensor([0.25, 0.5, 0.02]), 0.5)
    assert torch.allclose(c, torch.tensor([1.414214, 4.0, 10.0]), rtol=1e-6)
    assert torch.allclose(factors(torch.tensor([0.5, 8.0]), torch.tensor([0.25, 0.5]), 1.0), torch.tensor([0.5, 8.0]))


def test_silent_channels_stay() -> None:
    loud = torch.tensor([0.0, 0.9, 2.5])
    assert candidate(loud, 0.7)[0] == 1
    assert factors(loud, torch.ones(3), 0.5)[0] == 1
    alive = candidate(loud, 0.7)[1:]
    assert torch.allclose(alive.max() * alive.min(), torch.ones(()))


def site(fmt: ScaledFormat, weights: list[Tensor], x: Tensor, specs: tuple[Statistic, ...]) -> FoldSite:
    layers = tuple(fused_layers(specs, fmt, weights, x))
    names = tuple(layer.ref.name for layer in layers)
    return FoldSite(
        Fold("n", FoldKind.NORM, 0, "g", None, names, x.shape[1]), layers, (fmt,) * len(layers), storable=lambda c: c
    )


@pytest.mark.parametrize("fmt", [INT3, NVFP4(), Float4()])
@pytest.mark.parametrize(("duo", "clip_after"), [(False, True), (True, True), (True, False)])
def test_awq_takes_the_candidate_with_the_least_error_of_the_readers(
    fmt: ScaledFormat, duo: bool, clip_after: bool
) -> None:
    x = correlated_inputs(96, 200, seed=3)
    weights = [heavy_tailed_weights(rows, 96, rows) for rows in (24, 9)]
    method = AWQ(AWQOptions(n_grid=10, duo=duo, clip=clip_after))
    place = site(fmt, weights, x, method.stats(fmt))
    chosen = method.fold(place).c

    def error(c: Tensor) -> float:
        """Run the readers, in float64, instead of looking at the second moment."""
        shared = fmt.fit_global([w * c for w in weights]) if fmt.has_global_scale else None
        total = 0.0
        for w in weights:
            q = fmt.fit(w * c, shared)
            if clip_after and fmt.mirrors:
                # The larger side of every group gets the longer side of the grid: -4 steps of 3 bits, which min-max
                # scales count as 3.5.
                largest = grouped(w * c, fmt.group_size)
                side = torch.where(largest.amax(-1, keepdim=True) > -largest.amin(-1, keepdim=True), -1, 1)
                q = fmt.with_steps(q, fmt.steps(q) * side * (3.5 / 4))
            substitute = fmt.decode(fmt.encode(w * c, q), q) / c
            total += float((x.double() @ (substitute - w).double().T).square().sum())
        return total

    loud = x.abs().mean(0)
    parts = [(w.abs().unflatten(1, (-1, fmt.group_size or 96))) for w in weights]
    quiet = torch.cat([(p / (p.amax(-1, keepdim=True) + 1e-6)).flatten(1) for p in parts]).mean(0) if duo else None
    tried = [torch.ones(96)] + [candidate(loud, step / 10, quiet) for step in range(10)]
    errors = [error(c) for c in tried]
    assert error(chosen) <= min(errors) * (1 + 1e-4)
    assert min(errors) < 0.9 * errors[0], "the search has nothing to find here"


def test_awq_judges_factors_as_they_can_be_stored() -> None:
    x, w = correlated_inputs(64), heavy_tailed_weights(16, 64)
    method = AWQ()
    place = site(INT4, [w], x, method.stats(INT4))
    rough = FoldSite(place.fold, place.layers, place.formats, storable=lambda c: c.log2().round().exp2())
    c = method.fold(rough).c
    assert torch.equal(c, c.log2().round().exp2())
    assert not torch.equal(c, torch.ones(64))


@pytest.mark.parametrize(
    "fmt", [INT4, IntFormat(2, None, torch.float32), NVFP4(), IntFormat(3, 32, torch.bfloat16, False)]
)
def test_clipping_is_the_best_range_of_every_group(fmt: ScaledFormat) -> None:
    w, x = heavy_tailed_weights(7, 64, 5), correlated_inputs(64, 150, seed=1)
    # No correlation between groups, so that each may be judged alone and no row has to go back.
    width = fmt.group_size or 64
    moment = torch.block_diag(*[(part.T @ part) / 150 for part in x.split(width, 1)])
    q = fmt.fit(w)
    got = clip(w, fmt, q, moment)
    expected = torch.full((7, 64 // width), torch.inf, dtype=torch.float64)
    shares = [side * (1 - step / 20) for side in ((1, -1) if fmt.mirrors else (1,)) for step in range(10)]
    for share in shares:
        p = fmt.with_steps(q, fmt.steps(q) * share)
        delta = (fmt.round(w, p) - w).double()
        slope = (delta @ moment.double()).mul(delta)
        expected = torch.minimum(expected, slope.unflatten(1, (-1, width)).sum(-1))
    delta = (fmt.round(w, got) - w).double()
    found = (delta @ moment.double()).mul(delta).unflatten(1, (-1, width)).sum(-1)
    assert torch.allclose(found, expected, rtol=1e-4)
    assert (fmt.steps(got) != fmt.steps(q)).any()


def test_rows_that_all_of_the_moment_shows_to_be_worse_are_not_clipped() -> None:
    for seed in range(4):
        w, x = heavy_tailed_weights(40, 128, seed), correlated_inputs(128, 30, seed)
        moment = x.T @ x / 30
        q = INT3.fit(w)
        before, after = (
            ((x @ (INT3.round(w, p) - w).T).double().square().sum(0)) for p in (q, clip(w, INT3, q, moment))
        )
        assert (after <= before * (1 + 1e-4)).all()
        assert after.sum() < 0.95 * before.sum()


def test_queries_and_keys_are_not_clipped() -> None:
    x, w = correlated_inputs(64), heavy_tailed_weights(8, 64)
    layer = fused_layers(AWQ().stats(INT4), INT4, [w], x)[0]
    for last, clipped in (("q_proj", False), ("k_proj", False), ("query", False), ("v_proj", True), ("up_proj", True)):
        object.__setattr__(layer.ref, "name", f"model.layers.0.x.{last}.weight")
        decision = quantized(AWQ().solve(layer, INT4, torch.Generator()).decisions[layer.ref.name])
        assert (not torch.equal(decision.qparams.scale, turned(w, INT4, INT4.fit(w)).scale)) == clipped, last
        plain = AWQ(AWQOptions(clip=False)).solve(layer, INT4, torch.Generator())
        assert torch.equal(quantized(plain.decisions[layer.ref.name]).qparams.scale, INT4.fit(w).scale)


def test_awq_beats_rounding_by_far_on_loud_channels() -> None:
    x, w = correlated_inputs(128, 400), heavy_tailed_weights(64, 128)
    layers = fused_layers(AWQ().stats(INT3), INT3, [w], x)
    outcome = solve(AWQ(), layers, INT3)
    decision = quantized(outcome.decisions[layers[0].ref.name])
    gain = next(iter(outcome.rewrites.values()))
    substitute = INT3.decode(decision.codes, decision.qparams) * gain
    error, rounding = ((x @ (v - w).T).square().sum() for v in (substitute, INT3.round(w, INT3.fit(w))))
    assert error < 0.5 * rounding


def test_smoothquant_with_alpha_zero_evens_out_the_weights() -> None:
    x, w = correlated_inputs(64), heavy_tailed_weights(16, 64)
    method = SmoothQuant(SmoothQuantOptions(alpha=0.0))
    layers, chosen = fold(method, fused_layers(method.stats(INT4), INT4, [w], x), INT4)
    assert torch.allclose(layers[0].weight.abs().amax(0), torch.ones(64), rtol=1e-5)
    assert torch.allclose(layers[0].magnitude(MaxAbs()), (x / chosen.c).abs().amax(0), rtol=1e-5)


@pytest.mark.parametrize("spec", [MeanAbs(), MaxAbs(), SecondMoment(), SecondMoment(8)])
def test_dividing_a_statistic_is_that_of_divided_inputs(spec: Statistic) -> None:
    x = correlated_inputs(32, 60)
    c = torch.exp(torch.randn(32, generator=torch.Generator().manual_seed(2)))
    total = collect((spec,), x)[spec]
    total.divide(c)
    assert torch.allclose(total.value(), collect((spec,), x / c)[spec].value(), rtol=1e-4, atol=1e-5)
    assert total.n_tokens == 60


def test_magnitudes_of_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(7, 12, generator=generator) for _ in range(3 * LANES)]
    for spec, expected in (
        (MeanAbs(), torch.cat(samples).double().abs().mean(0).float()),
        (MaxAbs(), torch.cat(samples).abs().amax(0)),
    ):
        whole, parts = spec.start(12, torch.device("cpu")), spec.start(12, torch.device("cpu"))
        assert spec.size(12) in (12, 24)
        for index, sample in enumerate(samples):
            whole.update(sample)
            for rows in sample.split(2):
                parts.update(rows)
            if index % 3 == 2:
                whole.close_lane()
                parts.close_lane()
        whole.update(samples[0][:0])
        assert torch.allclose(whole.value(), expected, rtol=1e-6)
        assert torch.equal(whole.value(), parts.value())
        assert whole.value().dtype == torch.float32
        assert whole.n_tokens == parts.n_tokens == 7 * len(samples)
        assert whole.max_abs == float(torch.cat(samples).abs().max())


@pytest.mark.parametrize("spec", [MeanAbs(), MaxAbs()])
@pytest.mark.parametrize("first", [True, False])
def test_magnitudes_remember_a_nan(spec: MeanAbs | MaxAbs, first: bool) -> None:
    total = spec.start(4, torch.device("cpu"))
    rows = [torch.full((2, 4), float("nan")), torch.ones(2, 4)]
    for part in rows if first else rows[::-1]:
        total.update(part)
    total.close_lane()
    assert total.max_abs != total.max_abs
    assert not torch.isfinite(total.value()).any()
