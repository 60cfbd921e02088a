"""Searched scales against brute force in float64, and against an example worked by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest
import torch
from torch import Tensor

from compressor.formats.base import QParams, ScaledFormat, SearchableFormat, grouped
from compressor.formats.codebook import Codebook
from compressor.formats.float4 import Float4
from compressor.formats.fp8 import FP8
from compressor.formats.ints import IntFormat
from compressor.formats.mxfp4 import MXFP4
from compressor.formats.nvfp4 import NVFP4
from compressor.methods.grids import best_start, mse_clip, turned
from compressor.methods.rtn import RTN, RTNOptions
from compressor.testing.formats import describe
from compressor.testing.grids import assert_same_params
from compressor.testing.layers import correlated_inputs, fused_layers, heavy_tailed_weights, quantized, solve

FORMATS: tuple[ScaledFormat, ...] = (
    IntFormat(2, 16, torch.bfloat16),
    IntFormat(4, None, torch.float32),
    IntFormat(3, 16, torch.bfloat16, symmetric=False),
    IntFormat(4, None, torch.bfloat16, per_tensor=True),
    IntFormat(4, None, torch.float32, symmetric=False, per_tensor=True),
    NVFP4(),
    MXFP4(),
    Float4(),
    Codebook(3, 8, (0.0, 0.5, 1.0, 2.5, -0.5, -1.0, -2.0, -3.0)),
)
SEARCHABLE: tuple[SearchableFormat, ...] = (NVFP4(), MXFP4(), Float4())
each = pytest.mark.parametrize("fmt", FORMATS, ids=describe)


def errors(w: Tensor, fmt: ScaledFormat, q: QParams, norm: float, weight: Tensor | None = None) -> Tensor:
    """Return the error of everything that has a scale of its own, by way of the codes, float64 in the scales' shape."""
    delta = (fmt.decode(fmt.encode(w, q), q).double() - w.double()).abs() ** norm
    if weight is not None:
        delta = delta * weight.double()
    return delta.sum().reshape(1) if q.scale.dim() == 1 else grouped(delta, fmt.group_size).sum(-1)


@each
@pytest.mark.parametrize(("norm", "weighted"), [(2.4, False), (2.0, True)])
def test_no_range_on_the_list_has_a_smaller_error(fmt: ScaledFormat, norm: float, weighted: bool) -> None:
    w = heavy_tailed_weights(40, 96, seed=1)
    weight = torch.rand(96, generator=torch.Generator().manual_seed(2)) ** 4 if weighted else None
    start = fmt.fit(w)
    found = mse_clip(w, fmt, start, norm, weight)
    shares = [(100 - i) / 100 for i in range(80)]
    sides = (1, -1) if fmt.mirrors else (1,)
    ranges = [fmt.with_steps(start, fmt.steps(start) * (side * share)) for side in sides for share in shares]
    least = torch.stack([errors(w, fmt, q, norm, weight) for q in ranges]).amin(0)
    reached = errors(w, fmt, found, norm, weight)
    assert torch.allclose(reached, least, rtol=1e-5, atol=0)
    assert (reached < 0.99 * errors(w, fmt, start, norm, weight)).any(), "nothing to gain: the example shows nothing"
    assert_same_params(replace(found, scale=start.scale), start)  # zero points, tables and global scales stay


def test_the_worked_example() -> None:
    """Asymmetric 3 bits: the best of 80 ranges is the fourth, 0.97 of the whole."""
    w = torch.tensor([[0.02, -0.31, 0.27, 0.11, -0.08, 1.40]])
    fmt = IntFormat(3, None, torch.float32, symmetric=False)
    start = fmt.fit(w)
    assert float(start.scale) == pytest.approx(0.2442857, rel=1e-6)
    assert float(errors(w, fmt, start, 2.4)) == pytest.approx(0.0104780, rel=1e-5)
    found = mse_clip(w, fmt, start)
    assert float(found.scale) == pytest.approx(0.2369571, rel=1e-6)
    assert fmt.encode(w, found).tolist() == [[1, 0, 2, 1, 1, 7]]
    assert float(errors(w, fmt, found, 2.4)) == pytest.approx(0.0096728, rel=1e-5)


def test_a_grid_is_mirrored_where_the_largest_weight_is_positive() -> None:
    """Two bits hold -2, -1, 0 and 1 steps: with a step of -0.2 the 0.4 has a code."""
    fmt = IntFormat(2, 4, torch.float32)
    w = torch.tensor([[0.4, 0.2, 0.0, -0.2], [-0.4, -0.2, 0.0, 0.2]])
    found = mse_clip(w, fmt, fmt.fit(w))
    assert found.scale.flatten().tolist() == pytest.approx([-0.2, 0.2])
    assert fmt.encode(w, found).tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert torch.allclose(fmt.round(w, found), w)
    eight = IntFormat(8, 4, torch.float32)
    assert (mse_clip(w, eight, eight.fit(w)).scale > 0).all()


def test_the_largest_weight_gets_the_last_code_of_the_longer_side() -> None:
    fmt = IntFormat(4, 4, torch.float32)
    w = torch.tensor([[0.8, -0.7, 0.3, 0.0, -1.6, 0.1, 1.5, 0.4, 0.0, 0.0, 0.0, 0.0]])
    q = turned(w, fmt, fmt.fit(w))
    assert q.scale[0, :2].tolist() == pytest.approx([-0.1, 0.2])
    assert fmt.encode(w, q).tolist() == [[0, 15, 5, 8, 0, 8, 15, 10, 8, 8, 8, 8]]  # 7.5 steps meet 7, the last one
    assert not fmt.decode(fmt.encode(w, q), q)[0, 8:].any()
    whole = replace(fmt, group_size=None, per_tensor=True)
    assert float(turned(w, whole, whole.fit(w)).scale) == pytest.approx(0.2)
    assert float(turned(-w, whole, whole.fit(w)).scale) == pytest.approx(-0.2)


@each
def test_turned_grids_clip_only_what_lies_beyond_the_shorter_side(fmt: ScaledFormat) -> None:
    w = heavy_tailed_weights(40, 96, seed=3)
    start = fmt.fit(w)
    q = turned(w, fmt, start)
    if not fmt.mirrors:
        assert_same_params(q, start)
        return
    assert errors(w, fmt, q, 2.0).sum() < 0.97 * errors(w, fmt, start, 2.0).sum()
    assert (q.scale < 0).any() or q.scale.numel() == 1
    units = grouped(w, fmt.group_size) / fmt.steps(q)  # of the grid's own step, the longer side below zero
    rounded = grouped(fmt.decode(fmt.encode(w, q), q), fmt.group_size) / fmt.steps(q)
    inside = units < 2 ** (fmt.bits - 1) - 0.5
    assert ((rounded - units).abs() <= 0.505)[inside].all()


@each
def test_weights_on_the_grid_keep_their_scales(fmt: ScaledFormat) -> None:
    """No error to lower: the first, widest range wins."""
    w = heavy_tailed_weights(5, 96, seed=3)
    start = fmt.fit(w)
    assert_same_params(mse_clip(fmt.round(w, start), fmt, start), start)
    assert_same_params(mse_clip(torch.zeros(5, 96), fmt, fmt.fit(torch.zeros(5, 96))), fmt.fit(torch.zeros(5, 96)))


@each
def test_tiny_and_huge_weights_are_searched_alike(fmt: ScaledFormat) -> None:
    """Errors to a power of 2.4 leave float32's range long before weights do."""
    w = heavy_tailed_weights(5, 96, seed=4)
    plain = fmt.steps(mse_clip(w, fmt, fmt.fit(w)))
    for factor in (2.0**-60, 2.0**60):
        scaled = fmt.steps(mse_clip(w * factor, fmt, fmt.fit(w * factor)))
        assert torch.allclose(scaled / factor, plain, rtol=1e-6, atol=0)


def test_inputs_of_no_importance_are_clipped() -> None:
    w = torch.full((1, 16), 0.1)
    w[0, 3] = 0.4
    fmt = IntFormat(2, 16, torch.float32)  # steps of 0.4 / 1.5 at first
    weight = torch.ones(16)
    weight[3] = 0
    found = mse_clip(w, fmt, fmt.fit(w), 2.0, weight)
    assert abs(float(found.scale)) == pytest.approx(0.1, rel=0.05)
    assert abs(float(mse_clip(w, fmt, fmt.fit(w), 2.0).scale)) > 0.11


def test_rows_do_not_depend_on_each_other() -> None:
    """Rows are searched a few thousand at a time."""
    w = heavy_tailed_weights(3000, 96, seed=5)
    fmt = IntFormat(3, 32, torch.bfloat16, symmetric=False)
    whole = mse_clip(w, fmt, fmt.fit(w))
    for rows in (slice(0, 10), slice(1360, 1370), slice(2990, 3000)):
        part = mse_clip(w[rows], fmt, fmt.fit(w[rows]))
        assert torch.equal(part.scale, whole.scale[rows])


@pytest.mark.parametrize("fmt", SEARCHABLE, ids=describe)
def test_best_start_is_the_best_of_all_candidates(fmt: SearchableFormat) -> None:
    w = heavy_tailed_weights(6, 64, seed=6)
    weight = torch.rand(64, generator=torch.Generator().manual_seed(7)) ** 4
    found = best_start(w, fmt, fmt.fit(w), weight)
    starts = [fmt.fit(w)] if fmt.group_size else list(fmt.starts(w))
    least = [
        torch.stack([errors(w, fmt, q, 2.0, weight) for q in fmt.scale_candidates(start)]).amin(0) for start in starts
    ]
    best = min(least, key=lambda error: float(error.sum()))
    assert torch.allclose(errors(w, fmt, found, 2.0, weight), best, rtol=1e-5, atol=0)
    assert float(best.sum()) < 0.995 * float(errors(w, fmt, fmt.fit(w), 2.0, weight).sum())


@each
def test_clipped_rounding_is_the_nearest_on_the_clipped_grid(fmt: ScaledFormat) -> None:
    w = heavy_tailed_weights(6, 96, seed=8)
    layers = fused_layers((), fmt, [w], correlated_inputs(96))
    decision = quantized(next(iter(solve(RTN(RTNOptions(clip="mse")), layers, fmt).decisions.values())))
    q = mse_clip(w, fmt, layers[0].fit(fmt))
    assert_same_params(decision.qparams, q)
    assert torch.equal(decision.codes, fmt.encode(w, q))


def test_formats_without_steps_are_refused() -> None:
    fmts = [FP8(granularity, torch.bfloat16) for granularity in ("channel", "tensor", "block")]
    layers = fused_layers((), FORMATS[0], [heavy_tailed_weights(2, 64)], correlated_inputs(64))
    for fmt in fmts:
        assert fmt.name in str(RTN(RTNOptions(clip="mse")).refuse(layers[0].ref, fmt))
        assert RTN().refuse(layers[0].ref, fmt) is None
    for scaled in chain(FORMATS, SEARCHABLE):
        assert RTN(RTNOptions(clip="mse")).refuse(layers[0].ref, scaled) is None
