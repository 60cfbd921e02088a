"""Grids of powers: numbers worked out by hand, tables, bytes, and the same weights as integers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compressor.errors import CheckpointError, NumericalError, RecipeError, UnsupportedError
from compressor.formats import get_format
from compressor.formats.base import PackedTensor, bits_per_weight
from compressor.formats.codebook import nearest
from compressor.formats.ints import IntFormat
from compressor.formats.power import Power, as_integers, largest_integer, powers, stored_exponent, whole_power
from compressor.testing.layers import heavy_tailed_weights

F32 = torch.float32
EIGHT = torch.tensor([[-0.8, -0.22, -0.05, 0, 0.01, 0.1, 0.3, 0.5]])


@pytest.mark.parametrize(
    ("exponent", "codes", "values", "error"),
    [
        (
            0.5,
            [-7, -4, -2, 0, 1, 2, 4, 6],
            [-0.8, -0.26122449, -0.06530612, 0, 0.01632653, 0.06530612, 0.26122449, 0.58775510],
            1.547741e-3,
        ),
        (
            1.0,
            [-7, -2, 0, 0, 0, 1, 3, 4],
            [-0.8, -0.22857143, 0, 0, 0, 0.11428571, 0.34285714, 0.45714286],
            8.188774e-4,
        ),
        (
            2 / 3,
            [-7, -3, -1, 0, 0, 2, 4, 5],
            [-0.8, -0.22445269, -0.04319594, 0, 0, 0.12217657, 0.34556752, 0.48294530],
            3.781479e-4,
        ),
    ],
)
def test_the_papers_quantizer(exponent: float, codes: list[int], values: list[float], error: float) -> None:
    fmt = Power(4, None, F32)
    q = fmt.params(fmt.absmax(EIGHT), exponent)
    found = fmt.encode_powers(EIGHT, q)
    assert fmt.integers(found).tolist() == [codes]
    decoded = fmt.decode(found, q)
    torch.testing.assert_close(decoded, torch.tensor([values]), atol=2e-8, rtol=1e-6)
    assert float((decoded - EIGHT).double().square().mean()) == pytest.approx(error, rel=2e-6)


def test_two_bits_have_one_magnitude() -> None:
    fmt, w = Power(2, None, F32), torch.tensor([[1, 0.3, -0.2, 0.6]])
    for exponent, codes in ((0.5, [1, 1, 0, 1]), (1.0, [1, 0, 0, 1])):
        q = fmt.params(fmt.absmax(w), exponent)
        found = fmt.encode_powers(w, q)
        assert fmt.integers(found).tolist() == [codes]
        assert fmt.decode(found, q).tolist() == [[float(c) for c in codes]]
        assert fmt.integers(fmt.encode(w, q)).tolist() == [[1, 0, 0, 1]]  # the nearest value, whatever the exponent


WAVES = 0.2 * torch.sin(1.1 * torch.arange(16, dtype=torch.float64) + 0.3).pow(3).float().unsqueeze(0)


@pytest.mark.parametrize(
    ("bits", "errors", "codes"),
    [
        (
            4,
            "53.07762 15.10918 10.80540 5.909459 7.823841 8.802105 3.207398 3.479002 5.876119",
            [0, 7, 2, -1, -7, -1, 2, 7, 0, -3, -6, 0, 4, 5, 0, -5],
        ),
        (
            3,
            "122.5371 75.30553 67.65251 57.92354 35.49447 28.00340 20.45433 20.62559 24.59666",
            [0, 3, 1, 0, -3, 0, 1, 3, 0, -1, -3, 0, 2, 2, 0, -2],
        ),
    ],
)
def test_the_error_has_several_minima(bits: int, errors: str, codes: list[int]) -> None:
    fmt = Power(bits, None, F32)
    for tenths, expected in zip(range(2, 11), map(float, errors.split()), strict=True):
        q = fmt.params(fmt.absmax(WAVES), tenths / 10)
        found = fmt.encode_powers(WAVES, q)
        error = float((fmt.decode(found, q).double() - WAVES.double()).square().mean())
        assert 1e5 * error == pytest.approx(expected, rel=2e-5), tenths
        if tenths == 8:
            assert fmt.integers(found).tolist() == [codes]


def test_tables_of_whole_powers_are_integers() -> None:
    assert powers(4, 0.5)[:8] == (0, 1, 4, 9, 16, 25, 36, 49)
    assert powers(4, stored_exponent(1 / 3))[:8] == (0, 1, 8, 27, 64, 125, 216, 343)
    assert powers(4, 1.0)[8:] == (0, -1, -2, -3, -4, -5, -6, -7)
    shares = [value / 49 for value in powers(4, 0.5)[1:4]]
    assert shares == pytest.approx([0.02040816, 0.08163265, 0.18367347], abs=1e-8)
    for exponent, n in ((1.0, 1), (0.5, 2), (0.2, 5), (0.1, 10), (1 / 3, 3), (0.333, None), (0.51, None)):
        assert whole_power(stored_exponent(exponent)) == n, exponent
    for bits, exponent, top in ((4, 0.5, 49), (3, 0.5, 9), (3, 0.25, 81), (8, 1.0, 127), (8, 0.5, 16129), (4, 0.6, 0)):
        assert (largest_integer(bits, exponent) or 0) == top


def test_tables_are_powers_rounded_once() -> None:
    for bits in (2, 3, 5, 8):
        for exponent in (0.1, 0.2, 0.437, 0.613, 0.999):
            stored = stored_exponent(exponent)
            e = whole_power(stored) or 1 / stored
            exact = torch.arange(1 << (bits - 1), dtype=torch.float64).pow(e).float()
            table = torch.tensor(powers(bits, stored), dtype=torch.float32)
            assert torch.equal(table[: len(exact)], exact), (bits, exponent)
            assert torch.equal(table[len(exact) :], -exact)


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_those_a_search_in_the_table_finds(bits: int) -> None:
    """On values, exactly between them, one float32 to either side, and beyond the last."""
    for exponent in (1.0, 0.5, 0.613, 0.2):
        fmt = Power(bits, None, F32)
        q = fmt.params(torch.tensor([[0.3]]), exponent)
        assert q.codebook is not None
        values = q.codebook.unique().double()
        between = ((values[1:] + values[:-1]) / 2).float()
        sides = [torch.nextafter(between, torch.full_like(between, side)) for side in (-torch.inf, torch.inf)]
        z = torch.cat([values.float(), between, *sides, 3 * values.float(), torch.tensor([torch.inf, -torch.inf])])
        found = fmt.snap(z.view(1, 1, -1).clone(), q).flatten()
        assert torch.equal(found, q.codebook[nearest(z, q.codebook).int()])


def test_bytes_on_disk() -> None:
    fmt = Power(4, 8, torch.bfloat16)
    q = fmt.params(fmt.absmax(EIGHT), 0.5)
    packed = fmt.pack(fmt.encode_powers(EIGHT, q), q)
    assert {name: tensor.tolist() for name, tensor in packed.tensors.items()} == {
        # codes 15 12 10 0 1 2 4 6, the first in the lowest four bits
        "weight_packed": [[0x64210ACF]],
        "weight_scale": [[float(torch.tensor(0.8 / 49).bfloat16())]],
        "weight_exponent": [0.5],
        "weight_shape": [1, 8],
    }
    assert bits_per_weight(Power(4, 64), (1024, 1024)) == 4.25 + 8 * (4 + 16) / 1024**2
    assert bits_per_weight(Power(3, None), (1024, 1024)) == 3 + 8 * (2 * 1024 + 4 + 16) / 1024**2


def damaged(fmt: Power, **changes: Tensor) -> PackedTensor:
    w = heavy_tailed_weights(2, 64)
    q = fmt.fit(w)
    packed = fmt.pack(fmt.encode(w, q), q)
    return replace(packed, tensors={**packed.tensors, **changes})


@pytest.mark.parametrize("exponent", [0.0, -1.0, 0.05, 1.5, float("nan"), float("inf")])
def test_damaged_exponents_are_refused(exponent: float) -> None:
    with pytest.raises(CheckpointError, match="weight_exponent") as caught:
        Power(4, 64).unpack(damaged(Power(4, 64), weight_exponent=torch.tensor([exponent])))
    assert caught.value.hint


def test_a_wrong_shape_is_refused() -> None:
    with pytest.raises(CheckpointError, match="weight_shape"):
        Power(4, 64).unpack(damaged(Power(4, 64), weight_shape=torch.tensor([2, 63])))


@pytest.mark.parametrize(
    ("bits", "group", "more"),
    [
        (1, 64, {}),
        (9, 64, {}),
        (4, 0, {}),
        (4, 64, {"per_tensor": True}),
        (4, 64, {"dtype": torch.float16}),
        (4, 64, {"exponent": 0.05}),
        (4, 64, {"exponent": 1.2}),
    ],
)
def test_impossible_formats_are_refused(bits: int, group: int | None, more: dict[str, object]) -> None:
    with pytest.raises(UnsupportedError) as caught:
        Power(bits, group, **more)  # type: ignore[arg-type]
    assert caught.value.hint


def test_names_and_scale_dtypes() -> None:
    assert get_format("power3", None, torch.bfloat16) == Power(3, None, torch.bfloat16)
    assert get_format("power3", 32, torch.float16) == Power(3, 32, F32)  # float16 has no room for small steps
    assert get_format("power8", "tensor", F32) == Power(8, None, F32, per_tensor=True)
    with pytest.raises(RecipeError, match="power9"):
        get_format("power9", 64, F32)


def test_weights_too_large_for_the_scales_are_refused() -> None:
    largest = torch.finfo(F32).max
    with pytest.raises(NumericalError, match="overflow power2"):
        Power(2, None).fit(torch.tensor([[largest, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, F32])
@pytest.mark.parametrize(
    ("bits", "exponent", "wide"), [(4, 0.5, 7), (4, 0.5, 8), (3, 0.25, 8), (4, 1.0, 4), (2, 0.2, 2)]
)
def test_whole_powers_are_integers_with_the_same_scale(
    bits: int, exponent: float, wide: int, dtype: torch.dtype
) -> None:
    for group in (16, None):
        fmt, target = Power(bits, group, dtype), IntFormat(wide, group, dtype)
        w = heavy_tailed_weights(8, 64)
        q = fmt.params(fmt.absmax(w), exponent)
        codes = fmt.encode(w, q)
        integers, scales = as_integers(codes, q, target)
        assert torch.equal(target.decode(integers, scales), fmt.decode(codes, q))
        assert int((integers.int() - target.zero_code).abs().max()) == largest_integer(bits, exponent)
        stored = target.unpack(target.pack(integers, scales))
        assert torch.equal(target.decode(*stored), fmt.decode(codes, q))


@pytest.mark.parametrize(("bits", "exponent", "wide"), [(4, 0.5, 6), (4, 0.6, 8), (8, 0.5, 8), (4, 1 / 3, 8)])
def test_powers_that_integers_do_not_hold_are_refused(bits: int, exponent: float, wide: int) -> None:
    fmt, w = Power(bits, None, F32), heavy_tailed_weights(2, 64)
    q = fmt.params(fmt.absmax(w), exponent)
    with pytest.raises(UnsupportedError, match=f"int{wide} does not store"):
        as_integers(fmt.encode(w, q), q, IntFormat(wide, None, F32))
