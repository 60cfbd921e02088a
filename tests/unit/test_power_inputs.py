"""Inputs on grids of powers: nearest values, what is stored, and the product on integers that they are for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.errors import CheckpointError
from compressor.formats.activations import INPUT_FORMATS
from compressor.formats.power import Power, powers
from compressor.inputs import RoundPower, is_static, rebuild, saturated, stored_slots
from compressor.kernels.reference.power import power_products, whole_table


def rounding(name: str, exponent: float, largest: float = 3.0) -> RoundPower:
    return RoundPower.calibrated(INPUT_FORMATS[name], torch.tensor(largest), torch.tensor([exponent]))


def heavy_tailed(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()


@pytest.mark.parametrize("exponent", [1.0, 0.5, 0.37, 0.1])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["token", "tensor"])
def test_values_go_to_the_nearest_power(kind: str, bits: int, exponent: float) -> None:
    x, op = heavy_tailed(5, 3, 40, seed=bits), rounding(f"power{bits}-{kind}", exponent, largest=2.0)
    magnitudes = torch.tensor(powers(bits, float(op.exponent))[: 1 << (bits - 1)], dtype=torch.float64)
    top = x.double().abs().amax(-1, keepdim=True) if kind == "token" else torch.full((5, 3, 1), 2.0).double()
    grid = magnitudes / magnitudes[-1] * top.unsqueeze(-1)  # [5, 3, 1, values]
    best = (x.double().abs().unsqueeze(-1) - grid).abs().amin(-1)
    rounded = op.apply(x)
    off = (x.double() - rounded.double()).abs()
    assert torch.allclose(off, best, rtol=1e-5, atol=1e-6 * float(top.max()))
    assert torch.equal(rounded.sign().abs() * x.sign(), rounded.sign())
    assert op.apply(x.bfloat16()).dtype == torch.bfloat16
    assert op.apply(x[:0]).shape == (0, 3, 40)


def test_exponent_one_is_an_integer_grid_and_small_ones_serve_small_values() -> None:
    x = heavy_tailed(64, 128)
    step = x.abs().amax(-1, keepdim=True) / 7
    assert torch.allclose(rounding("power4-token", 1.0).apply(x), (x / step).round() * step, atol=1e-6)
    errors = [float((rounding("power4-token", a).apply(x) - x).square().sum()) for a in (1.0, 0.5)]
    assert errors[1] < 0.7 * errors[0]


def test_zeros_stay_and_what_is_not_finite_is_not_hidden() -> None:
    x = torch.tensor([[0.0, 0, 0], [torch.nan, 1, 2], [torch.inf, 1, -1]])
    for name in ("power4-token", "power4-tensor"):
        out = rounding(name, 0.5).apply(x)
        assert torch.equal(out[0], torch.zeros(3))
        assert out[1].isnan().any()
        assert not out[2].isfinite().all()
    silent = rounding("power4-tensor", 0.5, largest=0.0)
    assert torch.isfinite(silent.apply(torch.ones(1, 3))).all()


def test_values_beyond_a_static_scale_are_counted() -> None:
    op = rounding("power4-tensor", 0.5, largest=4.0)
    last_step = 4.0 * (49 - 36) / 49
    x = torch.tensor([4.0, 4.0 + 0.49 * last_step, -4.0 - 0.51 * last_step, 100.0])
    assert op.apply(x).abs().max() <= 4.0001
    assert saturated(op, x) == 2
    assert is_static(op)
    dynamic = rounding("power4-token", 0.5)
    assert saturated(dynamic, x) == 0
    assert not is_static(dynamic)


@pytest.mark.parametrize("name", ["power4-token", "power8-tensor"])
def test_what_is_stored_rebuilds_it(name: str) -> None:
    op = rounding(name, 0.437)
    slots = stored_slots([op.describe()], (8, 16), torch.bfloat16)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in op.tensors().items()} == {
        key: (slot.dtype, tuple(slot.shape)) for key, slot in slots.items()
    }
    (again,) = rebuild([op.describe()], op.tensors())
    x = heavy_tailed(4, 16)
    assert torch.equal(again.apply(x), op.apply(x))
    with pytest.raises(CheckpointError, match=r"input_exponent is 7, not from 0\.1 to 1"):
        rebuild([op.describe()], {**op.tensors(), "input_exponent": torch.tensor([7.0])})
    with pytest.raises(CheckpointError, match="input_exponent is nan"):
        rebuild([op.describe()], {**op.tensors(), "input_exponent": torch.tensor([torch.nan])})
    with pytest.raises(CheckpointError, match="lacks 'input_exponent'"):
        rebuild([op.describe()], {})
    given = {key: value for key, value in op.tensors().items() if key != "input_scale"}
    given |= {} if op.format.static else {"input_scale": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"need input_scale|have no input_scale"):
        rebuild([op.describe()], given)


@pytest.mark.parametrize("bits", [4, 5])
def test_with_squares_a_layer_is_an_exact_product_of_integers(bits: int) -> None:
    """Weights and inputs at exponent 1/2: `sum c_x|c_x| c_w|c_w|` in int32, times one factor per token and output."""
    fmt = Power(bits, None, torch.float32, exponent=0.5)
    w, x = heavy_tailed(24, 96, seed=1), heavy_tailed(7, 96, seed=2)
    q = fmt.fit(w)
    codes = fmt.integers(fmt.encode(w, q))
    op = rounding(f"power{bits}-token", 0.5)
    rounded = op.apply(x)
    largest = fmt.largest_code**2
    steps = x.abs().amax(-1, keepdim=True) / largest  # [7, 1]
    squares = (rounded.double() / steps).round()
    input_codes = (squares.abs().sqrt() * squares.sign()).long()
    assert torch.equal(input_codes * input_codes.abs(), squares.long()), "squares times a step"
    integers = power_products(input_codes, codes.long(), whole_table(bits, 0.5))
    product = integers.double() * steps.double() * q.scale.double().reshape(1, -1)
    expected = rounded.double() @ fmt.decode(fmt.encode(w, q), q).double().T
    assert float((product - expected).norm() / expected.norm()) < 1e-6
