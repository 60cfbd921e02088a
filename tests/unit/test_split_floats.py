"""LLM-FP4's 6- and 8-bit floats: the paper's numbers, what lies on disk, damage, and what the search makes of them."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from compressor.calibration.stats import SecondMoment
from compressor.errors import CheckpointError, NumericalError, UnsupportedError
from compressor.formats import get_format
from compressor.formats.base import PackedTensor, QParams, bits_per_weight
from compressor.formats.small_floats import SPLITS, largest_value, round_float
from compressor.formats.split_floats import SplitFloat, WideFloat, float_table, split_name
from compressor.kernels.reference.linear import dequantize
from compressor.methods.fp4 import FP4, FP4Options
from compressor.methods.fp4_inputs import JointSearch
from compressor.testing.layers import correlated_inputs, fused_layers, heavy_tailed_weights, output_error, quantized

SPLIT = [(bits, m) for bits in (6, 8) for m in SPLITS[bits]]
splits = pytest.mark.parametrize(("bits", "mantissa"), SPLIT, ids=[split_name(*split) for split in SPLIT])
widths = pytest.mark.parametrize("bits", [6, 8])


def decoded_by_hand(code: int, bits: int, mantissa: int, alpha: float) -> float:
    """What a code means, from the definition, in Python's floats, which hold all of these exactly."""
    sign, rest = divmod(code, 1 << (bits - 1))
    p, f = divmod(rest, 1 << mantissa)
    magnitude = 2 * f / 2**mantissa if p == 0 else 2.0**p * (1 + f / 2**mantissa)
    return math.copysign(magnitude * alpha, -sign)


def rounded_by_hand(x: float, bits: int, mantissa: int) -> float:
    """Equations 5, 8 and 9 at b = 0."""
    largest = largest_value(bits, mantissa)
    z = min(max(x, -largest), largest)
    if z == 0:
        return 0.0
    step = 2.0 ** (max(math.floor(math.log2(abs(z))), 1) - mantissa)
    return step * round(z / step)  # Python rounds half to even


def params(bits: int, mantissa: int, alpha: float, rows: int = 1) -> QParams:
    return QParams(torch.full((rows, 1), alpha), codebook=torch.tensor(float_table(bits, mantissa)))


@splits
def test_every_code_means_what_the_paper_says(bits: int, mantissa: int) -> None:
    """Through the file and the reference kernel, bit for bit; a scale of 3/8 keeps products exact."""
    fmt = WideFloat(bits)
    codes = torch.arange(1 << bits, dtype=torch.uint8)[None]
    packed = fmt.pack(codes, params(bits, mantissa, 0.375))
    expected = torch.tensor([[decoded_by_hand(code, bits, mantissa, 0.375) for code in range(1 << bits)]])
    assert torch.equal(dequantize(packed, fmt, torch.float32), expected)
    assert int(packed.tensors["weight_mantissa"]) == mantissa


@splits
def test_rounding_is_the_papers(bits: int, mantissa: int) -> None:
    fmt, q = WideFloat(bits), params(bits, mantissa, 1.0)
    positive = float_table(bits, mantissa)[: 1 << (bits - 1)]
    ties = torch.tensor([(a + b) / 2 for a, b in pairwise(positive)])
    near = torch.cat([ties, torch.nextafter(ties, ties * 2), torch.nextafter(ties, ties * 0)])
    spread = torch.randn(500, generator=torch.Generator().manual_seed(bits)).exp() * 3
    x = torch.cat([near, torch.tensor(positive), spread, torch.tensor([3e38])])
    x = torch.cat([x, -x])[None]
    expected = torch.tensor([[rounded_by_hand(value, bits, mantissa) for value in x[0].tolist()]])
    assert torch.equal(fmt.decode(fmt.encode(x, q), q), expected)
    assert torch.equal(fmt.round(x, q), expected)
    assert torch.equal(round_float(x.clone(), bits, mantissa), expected), "weights and inputs round alike"


@widths
def test_six_bits_take_six_bits(bits: int) -> None:
    fmt = WideFloat(bits)
    assert bits_per_weight(fmt, (1024, 1024)) == bits + 8 * (4 * 1024 + 1 + 16) / 1024**2
    w = torch.randn(3, 37, generator=torch.Generator().manual_seed(1))
    packed = fmt.pack(fmt.encode(w, fmt.fit(w)), fmt.fit(w))
    assert packed.tensors["weight_packed"].shape == (3, -(-37 * bits // 32))
    assert get_format(fmt.name, None, torch.bfloat16) == fmt


def test_the_first_split_is_the_papers_start() -> None:
    w = torch.tensor([[0.9, -0.31, 0.07, 0.02, -0.55, 0]])
    for fmt, mantissa in ((WideFloat(6), 2), (WideFloat(8), 3)):
        q = fmt.fit(w)
        assert fmt.mantissa(q) == mantissa
        assert float(q.scale) == pytest.approx(0.9 / largest_value(fmt.bits, mantissa), rel=1e-6)
        found = [fmt.mantissa(start) for start in fmt.starts(w)]
        assert sorted(found) == sorted(SPLITS[fmt.bits])


@widths
def test_extreme_rows_stay_usable(bits: int) -> None:
    """The widest split reaches 2**31 steps: rows too small for it count as zero instead of getting a lame scale."""
    w = torch.tensor([[2e-30, -1e-30], [3e38, 1.0], [1e-3, 2e-3]])
    fmt = WideFloat(bits)
    for start in fmt.starts(w):
        for q in fmt.scale_candidates(start):
            assert (q.scale >= 2.0**-126).all()
            values = fmt.decode(fmt.encode(w, q), q)
            assert torch.isfinite(values).all()


@widths
def test_damage_is_found(bits: int) -> None:
    fmt = WideFloat(bits)
    w = torch.randn(2, 5, generator=torch.Generator().manual_seed(2))
    packed = fmt.pack(fmt.encode(w, fmt.fit(w)), fmt.fit(w))
    wrong = {**packed.tensors, "weight_mantissa": torch.tensor([7], dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match=r"weight_mantissa of .* is 7"):
        fmt.unpack(replace(packed, tensors=wrong))
    with pytest.raises(CheckpointError, match="weight_scale is"):
        fmt.unpack(PackedTensor(fmt.name, (2, 5), {**packed.tensors, "weight_scale": torch.ones(2, 2)}))
    with pytest.raises(NumericalError, match="a table that ends at 5"):
        fmt.round(w, QParams(torch.ones(2, 1), codebook=torch.linspace(-5, 5, 1 << bits).roll(1 << (bits - 1))))
    with pytest.raises(UnsupportedError, match="5 bits"):
        WideFloat(5)


def first_split(fmt: SplitFloat, w: Tensor) -> QParams:
    return next(iter(fmt.starts(w)))


@widths
def test_the_search_beats_min_max(bits: int) -> None:
    """On heavy-tailed weights, by output error; and W6A6 or W8A8 searched together by more than weights alone."""
    fmt = WideFloat(bits)
    w, x = heavy_tailed_weights(24, 48, seed=bits), correlated_inputs(48, seed=bits)
    layer = fused_layers((SecondMoment(),), fmt, [w], x)[0]
    decision = FP4(FP4Options()).solve_group([layer], fmt, torch.Generator()).decisions[layer.ref.name]
    q = quantized(decision).qparams
    found = output_error(fmt.decode(fmt.encode(w, q), q), layer, x)
    plain = output_error(fmt.round(w, fmt.fit(w)), layer, x)
    assert found < 0.9 * plain
    x = x[:64]
    search = JointSearch(w, x, x.abs().amax(0), fmt, bits, True, 25, fmt.fit(w))
    search.run(2)
    assert search.errors[-1] < 0.8 * search.errors[0]
    assert all(b <= a * (1 + 1e-5) for a, b in pairwise(search.errors))
