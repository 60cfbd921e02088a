"""LLM-FP4's products as integers: exact, equal to the packed path where nothing rounds, and what they need."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.errors import NumericalError
from compressor.formats import get_format
from compressor.formats.base import QParams
from compressor.formats.small_floats import SPLITS, exponent_codes
from compressor.formats.split_floats import SplitFloat, float_table
from compressor.inputs import RoundFloat
from compressor.kernels.reference.linear import packed_linear
from compressor.kernels.reference.small_floats import (
    exact_in_float32,
    float_linear,
    input_integers,
    tops,
    unit,
    weight_integers,
    whole_table,
)
from compressor.runtime import PackedLinear

NAMES = {4: "fp4", 6: "fp6", 8: "fp8-searched"}


def wide_of(bits: int) -> SplitFloat:
    fmt = get_format(NAMES[bits], None, torch.bfloat16)
    assert isinstance(fmt, SplitFloat)
    return fmt


def layer(bits: int, m_w: int, m_x: int, whole: bool, seed: int = 0) -> tuple[Tensor, Tensor, SplitFloat, RoundFloat]:
    """Return inputs with channels of very different size, a weight, its format, and covering inputs with offsets.

    Args:
        bits: Of both.
        m_w: Mantissa bits of the weights.
        m_x: Mantissa bits of the inputs.
        whole: Make all scales powers of two.
        seed: Of the values.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 24, generator=generator) * torch.randn(24, generator=generator).mul(2).exp()
    w = torch.randn(7, 24, generator=generator)
    op = RoundFloat.covering(bits, m_x, x.abs().amax(0), offsets=True)
    if whole:
        op = op.with_scale(torch.exp2(op.scale.log2().round()), x.abs().amax(0))
    return x, w, wide_of(bits), op


def fitted(fmt: SplitFloat, w: Tensor, mantissa: int, whole: bool) -> QParams:
    q = fmt.fit_table(w, float_table(fmt.bits, mantissa))
    return QParams(torch.exp2(q.scale.log2().round()) if whole else q.scale, codebook=q.codebook)


@pytest.mark.parametrize(("bits", "m"), [(bits, m) for bits, splits in SPLITS.items() for m in splits])
def test_tables_are_the_values_in_units(bits: int, m: int) -> None:
    values = torch.tensor(float_table(bits, m), dtype=torch.float64)
    assert torch.equal(whole_table(bits, m).double() * unit(m), values)
    assert tops(bits, m) == int(values.max() / unit(m))


def test_the_examples_of_the_paper_fit_int8() -> None:
    assert whole_table(4, 1).tolist()[:8] == [0, 1, 2, 3, 4, 6, 8, 12]
    assert whole_table(4, 2).tolist()[:8] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert whole_table(4, 0).tolist()[:8] == [0, 1, 2, 4, 8, 16, 32, 64]
    for m_x in (1, 2):
        for m_w in (1, 2):
            assert tops(4, m_w, exponent_codes(4, m_x) - 1) <= 96 <= 127
    assert exact_in_float32(12, 96, 2**24 // 1152)
    assert not exact_in_float32(12, 96, 2**24 // 1152 + 1)


def test_sums_of_the_spec() -> None:
    """Three tokens and two rows, worked out by hand: sums in whole multiples of 1/8 of a product."""
    x = torch.tensor([[12, -5.2, 3.4, 0.9], [-7.4, 2.2, -0.3, 0.12], [0.8, -6, 1.1, -1]])
    w = torch.tensor([[0.5, -0.25, 0.75, 1], [-0.1, 0.3, 0.2, -0.6]])
    op, fmt = RoundFloat.covering(4, 1, torch.tensor([12, 6, 3.5, 1]), offsets=True), wide_of(4)
    packed = fmt.pack(fmt.encode(w, fmt.fit(w)), fmt.fit(w))
    weights, _, most = weight_integers(packed, fmt, op.k)
    assert most == 3
    sums = input_integers(x, op) @ weights.T
    assert (sums.double() / 8).tolist() == [[126, -60], [-54.5, 25.5], [20, -22]]
    expected = torch.tensor([[10.5, -3], [-4.5416667, 1.275], [1.6666667, -1.1]])
    torch.testing.assert_close(float_linear(x, packed, fmt, op), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("m_w", "m_x"), [(w, x) for w in SPLITS[4] for x in SPLITS[4]])
def test_the_packed_path_is_the_same_bit_for_bit_where_scales_are_powers_of_two(m_w: int, m_x: int) -> None:
    """Nothing rounds then: codes times offsets as integers, and the packed layer that `compressor.load` makes."""
    x, w, fmt, op = layer(4, m_w, m_x, whole=True)
    q = fitted(fmt, w, m_w, whole=True)
    packed = fmt.pack(fmt.encode(w, q), q)
    found = float_linear(x, packed, fmt, op)
    assert int(op.k.max()) > 0
    assert torch.equal(found, PackedLinear(packed, fmt, inputs=(op,))(x))
    assert torch.equal(found, packed_linear(op.apply(x), packed, fmt, None, torch.float32))
    assert found.abs().max() > 0


@pytest.mark.parametrize(("bits", "m_w", "m_x"), [(4, 1, 1), (4, 0, 2), (6, 2, 3), (6, 3, 2), (8, 4, 4), (8, 3, 5)])
def test_with_real_scales_only_three_factors_round(bits: int, m_w: int, m_x: int) -> None:
    x, w, fmt, op = layer(bits, m_w, m_x, whole=False, seed=bits)
    q = fitted(fmt, w, m_w, whole=False)
    packed = fmt.pack(fmt.encode(w, q), q)
    weights, worth, most = weight_integers(packed, fmt, op.k)
    sums = input_integers(x, op) @ weights.T
    exact = sums.double() * (op.scale.double() * worth.double().T * unit(m_x) * 2.0**-most)
    torch.testing.assert_close(float_linear(x, packed, fmt, op).double(), exact, rtol=4 * 2.0**-24, atol=0)
    simulated = op.apply(x).double() @ fmt.decode(*fmt.unpack(packed)).double().T
    size = op.apply(x).double().abs() @ fmt.decode(*fmt.unpack(packed)).double().abs().T
    assert ((simulated - exact).abs() <= 3 * 2.0**-24 * size).all()
    assert not torch.equal(sums, torch.zeros_like(sums))


def test_sums_do_not_depend_on_their_order() -> None:
    x, w, fmt, op = layer(4, 1, 1, whole=False)
    q = fitted(fmt, w, 1, whole=False)
    found = float_linear(x, fmt.pack(fmt.encode(w, q), q), fmt, op)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    shuffled = RoundFloat(op.bits, op.scale, op.mantissa, op.k[order])
    other = float_linear(x[:, order], fmt.pack(fmt.encode(w, q)[:, order], q), fmt, shuffled)
    assert torch.equal(found, other)


def test_integers_too_wide_are_refused() -> None:
    x, w, fmt, op = layer(8, 2, 2, whole=False)
    op = RoundFloat(8, op.scale, op.mantissa, torch.full_like(op.k, 31))
    q = fitted(fmt, w, 2, whole=False)
    with pytest.raises(NumericalError, match="overflow 64 bits"):
        float_linear(x, fmt.pack(fmt.encode(w, q), q), fmt, op)
