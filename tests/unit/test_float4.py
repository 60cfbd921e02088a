"""LLM-FP4's 4-bit floats and the codebooks they are stored in: the paper's numbers, ties, grids, bytes."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from compressor.errors import CheckpointError, NumericalError, UnsupportedError
from compressor.formats.base import PackedTensor, QParams, bits_per_weight
from compressor.formats.codebook import Codebook, nearest
from compressor.formats.float4 import SPLITS, Float4, Grid

MANTISSA = {"e3m0": 0, "e2m1": 1, "e1m2": 2}
splits = pytest.mark.parametrize("split", SPLITS)


def params(split: str, alpha: float, rows: int = 1) -> QParams:
    return QParams(torch.full((rows, 1), alpha), codebook=torch.tensor(SPLITS[split]))


def by_the_paper(x: float, split: str) -> float:
    """Equations 5, 8 and 9 in Python's floats, at b = 0."""
    m = MANTISSA[split]
    largest = (2 - 2.0**-m) * 2.0 ** (2 ** (3 - m) - 1)
    z = min(max(x, -largest), largest)
    if z == 0:
        return 0.0
    step = 2.0 ** (max(math.floor(math.log2(abs(z))), 1) - m)
    return step * round(z / step)  # Python rounds half to even


def test_tables() -> None:
    assert SPLITS["e3m0"][:8] == (0, 2, 4, 8, 16, 32, 64, 128)
    assert SPLITS["e2m1"][:8] == (0, 1, 2, 3, 4, 6, 8, 12)
    assert SPLITS["e1m2"][:8] == (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5)
    for table in SPLITS.values():
        assert table[8:] == tuple(-value for value in table[:8])
        assert math.copysign(1, table[8]) == -1
    assert next(iter(SPLITS)) == "e2m1"


X = (0, 0.1, 0.25, 0.26, 0.75, 0.76, 1.25, 1.75, 2.5, 2.6, 3.5, 5, 5.1, 7, -0.74, -100)
FIXED_BIAS = {
    "e2m1": (0, 0, 0, 0.5, 1, 1, 1, 2, 2, 3, 4, 4, 6, 6, -0.5, -6),
    "e1m2": (0, 0, 0.25, 0.25, 0.75, 0.75, 1.25, 1.75, 1.75, 1.75, 1.75, 1.75, 1.75, 1.75, -0.75, -1.75),
    "e3m0": (0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 4, 4, 4, 8, -1, -64),
}


@splits
def test_fixed_bias_by_hand(split: str) -> None:
    """b = 1."""
    fmt, q = Float4(), params(split, 0.5)
    codes = fmt.encode(torch.tensor([X]), q)
    assert fmt.decode(codes, q).tolist() == [list(FIXED_BIAS[split])]


# split -> bias, alpha, values, sum of squared errors
MIN_MAX: dict[str, tuple[float, float, tuple[float, ...], float]] = {
    "e2m1": (3.736966, 0.075, (0.9, -0.3, 0.075, 0, -0.6, 0), 0.003025),
    "e1m2": (1.959358, 0.2571429, (0.9, -0.2571429, 0.1285714, 0, -0.5142857, 0), 0.0079),
    "e3m0": (7.152003, 0.00703125, (0.9, -0.225, 0.05625, 0.0140625, -0.45, 0), 0.0174493),
}


def test_min_max_by_hand() -> None:
    fmt, w = Float4(), torch.tensor([[0.9, -0.31, 0.07, 0.02, -0.55, 0]])
    starts = dict(zip(SPLITS, fmt.starts(w), strict=True))
    for split, (bias, alpha, values, error) in MIN_MAX.items():
        q = starts[split]
        decoded = fmt.decode(fmt.encode(w, q), q)
        assert q.scale.item() == pytest.approx(alpha, rel=1e-6)
        assert -math.log2(q.scale.item()) == pytest.approx(bias, rel=1e-6)
        assert decoded[0].tolist() == pytest.approx(values, rel=1e-6)
        assert (decoded - w).square().sum().item() == pytest.approx(error, rel=1e-3)
    assert torch.equal(fmt.fit(w).scale, starts["e2m1"].scale)
    assert torch.equal(fmt.fit(w).codebook, starts["e2m1"].codebook)


def test_bytes_by_hand() -> None:
    fmt, w = Float4(), torch.tensor([[0.5, -0.25, 0.75, 1], [-0.1, 0.3, 0.2, -0.6]])
    q = fmt.fit(w)
    codes = fmt.encode(w, q)
    packed = fmt.pack(codes, q)
    assert q.scale.flatten().tolist() == pytest.approx([1 / 12, 0.05])
    assert codes.tolist() == [[5, 11, 6, 7], [10, 5, 4, 15]]
    assert packed.tensors["weight_packed"].tolist() == [[181, 118], [90, 244]]
    assert packed.tensors["weight_codebook"].tolist() == list(SPLITS["e2m1"])
    assert fmt.decode(codes, q).flatten().tolist() == pytest.approx([0.5, -0.25, 2 / 3, 1, -0.1, 0.3, 0.2, -0.6])


@splits
def test_the_quantizer_is_the_papers(split: str) -> None:
    """On random values, on every tie, and next to both."""
    positive = SPLITS[split][:8]
    ties = torch.tensor([(a + b) / 2 for a, b in pairwise(positive)])
    near = torch.cat([ties, torch.nextafter(ties, ties * 2), torch.nextafter(ties, ties * 0)])
    spread = torch.randn(2000, generator=torch.Generator().manual_seed(3)).exp() * positive[7] / 4
    x = torch.cat([near, torch.tensor(positive), spread, torch.tensor([1e9])])
    x = torch.cat([x, -x])[None]
    fmt, q = Float4(), params(split, 1.0)
    codes = fmt.encode(x, q)
    expected = [by_the_paper(value, split) for value in x[0].tolist()]
    assert fmt.decode(codes, q)[0].tolist() == expected
    assert fmt.round(x, q)[0].tolist() == expected
    values = torch.tensor(expected)
    magnitudes = torch.tensor([positive.index(abs(value)) for value in expected])
    assert torch.equal(codes[0].int(), (magnitudes | ((values < 0).int() << 3)).int()), "sign << 3 | index, 0 for zero"


def test_e1m2_is_the_symmetric_integer_grid() -> None:
    w = torch.randn(5, 40, generator=torch.Generator().manual_seed(4))
    fmt = Float4()
    q = list(fmt.starts(w))[1]
    step = w.abs().amax(1, keepdim=True) / 7
    assert torch.allclose(fmt.round(w, q), (w / step).round().clamp(-7, 7) * step, rtol=1e-6, atol=0)


def test_gaussian_weights_prefer_e2m1_then_e1m2_then_e3m0() -> None:
    """The known relative squared errors of min-max fitting are .0110, .0117 and .0351; rows of 64 reproduce them."""
    w = torch.randn(1024, 64, generator=torch.Generator().manual_seed(5))
    fmt = Float4()
    errors = [float((fmt.round(w, q) - w).square().sum() / w.square().sum()) for q in fmt.starts(w)]
    assert errors == pytest.approx([0.0110, 0.0117, 0.0351], rel=0.03)
    assert errors[0] < errors[1] < errors[2]


@splits
def test_rows_of_zeros_get_scale_one_and_codes_zero(split: str) -> None:
    w = torch.zeros(3, 6)
    w[1] = torch.linspace(-1, 1, 6)
    w[2] = 1e-31  # as good as zero
    fmt = Float4()
    q = dict(zip(SPLITS, fmt.starts(w), strict=True))[split]
    assert q.scale[[0, 2], 0].tolist() == [1, 1]
    for candidate in fmt.scale_candidates(q):
        assert not fmt.encode(w, candidate)[[0, 2]].any()


def biases(grid: Grid, bias: float) -> list[float]:
    """The candidate biases of a row whose min-max bias is given."""
    q = params("e2m1", 2.0**-bias)
    return [-math.log2(candidate.scale.item()) for candidate in Float4(grid).scale_candidates(q)]


@pytest.mark.parametrize("bias", [3.7, 0.25, -2.5])
def test_candidate_biases_follow_the_grids(bias: float) -> None:
    gammas = [0.01 + n * (1.2 - 0.01) / 100 for n in range(100)]
    away = math.copysign(max(abs(bias), 1), bias)
    expected: dict[Grid, list[float]] = {
        "reference": [gamma * bias for gamma in gammas],
        "hybrid": [bias + (gamma - 1) * away for gamma in gammas],
        "additive": [bias - 0.6 + n * 2.6 / 99 for n in range(100)],
    }
    for grid, points in expected.items():
        found = biases(grid, bias)
        assert found[0] == pytest.approx(bias, rel=1e-6), "min-max comes first"
        assert found[1:] == pytest.approx(points, rel=1e-6, abs=1e-6)


def test_the_papers_grid_has_nothing_to_search_at_bias_zero() -> None:
    assert set(biases("reference", 0.0)) == {0.0}
    assert len(set(biases("hybrid", 0.0))) == len(set(biases("additive", 0.0))) == 101
    assert biases("hybrid", 0.0)[1] == pytest.approx(-0.99)


@pytest.mark.parametrize("grid", ["reference", "hybrid", "additive"])
def test_candidates_of_extreme_rows_stay_usable(grid: Grid) -> None:
    w = torch.tensor([[1e-29, -2e-30], [3e38, 1.0]])
    fmt = Float4(grid)
    for start in fmt.starts(w):
        for q in fmt.scale_candidates(start):
            assert (q.scale > 0).all()
            assert torch.isfinite(q.scale * 128).all() or torch.equal(q.scale, start.scale)
            assert torch.isfinite(fmt.round(w, q)).all()


def test_bits_per_weight() -> None:
    assert bits_per_weight(Float4(), (1024, 1024)) == 4 + 8 * (4 * 1024 + 64) / 1024**2


def test_an_odd_number_of_inputs_fills_half_a_byte() -> None:
    fmt, w = Float4(), torch.tensor([[1.0], [-0.5]])
    q = fmt.fit(w)
    packed = fmt.pack(fmt.encode(w, q), q)
    assert packed.tensors["weight_packed"].tolist() == [[7], [15]]
    assert fmt.unpack(packed)[0].tolist() == [[7], [15]]


def damaged(fmt: Codebook, **changes: Tensor) -> PackedTensor:
    w = torch.randn(2, 6, generator=torch.Generator().manual_seed(6))
    q = fmt.fit(w)
    packed = fmt.pack(fmt.encode(w, q), q)
    return replace(packed, tensors={**packed.tensors, **changes})


def test_tables_that_are_none_are_refused() -> None:
    table = torch.tensor(SPLITS["e2m1"])
    with pytest.raises(CheckpointError, match="NaN"):
        Codebook(4, None).unpack(damaged(Codebook(4, None), weight_codebook=table * float("nan")))
    with pytest.raises(CheckpointError, match="negative"):
        Codebook(4, None).unpack(damaged(Codebook(4, None), weight_codebook=table.abs()))
    with pytest.raises(CheckpointError, match="not a table of fp4"):
        Float4().unpack(damaged(Float4(), weight_codebook=table * 1.01))
    assert torch.equal(Codebook(4, None).unpack(damaged(Codebook(4, None), weight_codebook=table))[1].codebook, table)
    with pytest.raises(CheckpointError, match="code 15 lies outside"):
        Codebook(3, None).unpack(damaged(Codebook(3, None), weight_packed=torch.full((2, 3), 0xF0, dtype=torch.uint8)))
    with pytest.raises(NumericalError, match="ends at 5"):
        Float4().round(torch.ones(1, 2), QParams(torch.ones(1, 1), codebook=torch.linspace(-5, 5, 16).roll(8)))


@pytest.mark.parametrize(
    ("bits", "group", "table", "reason"),
    [
        (5, None, (), "5 bits"),
        (1, None, (), "1 bits"),
        (4, 0, (), "group size 0"),
        (2, None, (0.0, 1.0, -1.0), "3 values instead of 4"),
        (2, None, (0.1, 1.0, -1.0, 2.0), "zero"),
        (2, None, (0.0, 1.0, 2.0, math.inf), "Inf"),
    ],
)
def test_impossible_codebooks_are_refused(bits: int, group: int | None, table: tuple[float, ...], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason) as error:
        Codebook(bits, group, table)
    assert error.value.hint


def test_codes_too_wide_for_the_codebook_are_not_packed() -> None:
    fmt = Codebook(3, None)
    with pytest.raises(NumericalError, match="code 8 does not fit in 3 bits"):
        fmt.pack(torch.full((1, 2), 8, dtype=torch.uint8), fmt.fit(torch.ones(1, 2)))


def test_ties_go_to_the_even_code() -> None:
    table = torch.tensor([0.0, 1.0, 3.0, -1.0])
    z = torch.tensor([0.5, 2.0, -0.5, 2.0001, 1.9999, -7.0, 7.0])
    assert nearest(z, table).tolist() == [0, 2, 0, 2, 1, 3, 2]


def test_scales_belong_to_their_groups() -> None:
    fmt = Codebook(4, 4)
    w = torch.tensor([[7.0, -3, 1, 0, 0.7, -0.3, 0.1, 0]])
    q = fmt.fit(w)
    assert q.scale.flatten().tolist() == pytest.approx([1, 0.1])
    assert fmt.encode(w, q).tolist() == [[7, 11, 1, 0, 7, 11, 1, 0]]
