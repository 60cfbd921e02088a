"""Products of powers on integers alone: what is exact, what is bounded, and what would be wrong."""

from __future__ import annotations

import pytest
import torch

from compressor.errors import NumericalError
from compressor.formats.power import Power
from compressor.kernels.reference.power import fixed_point, n_safe, power_products, sum_bound, whole_table
from compressor.testing.layers import heavy_tailed_weights


def test_the_power_comes_before_the_sum() -> None:
    x, w = torch.tensor([[3, 5, 2]]), torch.tensor([[-2, 7, 4]])
    assert power_products(x, w, whole_table(4, 0.5)).tolist() == [[1253]]  # -36 + 1225 + 64
    assert int((x * w).sum()) ** 2 == 1369  # what squaring the sum would give


def test_tables() -> None:
    assert whole_table(4, 0.5).tolist()[7:] == [0, 1, 4, 9, 16, 25, 36, 49]
    assert whole_table(4, 1 / 3).tolist()[:8] == [-343, -216, -125, -64, -27, -8, -1, 0]
    assert fixed_point(4, 0.5, 49).tolist() == whole_table(4, 0.5).tolist()
    with pytest.raises(NumericalError, match=r"0\.6 are no integers"):
        whole_table(4, 0.6)


def test_squares_multiply_exactly() -> None:
    """The matrix product of decoded weights is an integer product times one scale per row on either side."""
    fmt = Power(4, None, torch.float32)
    x, w = heavy_tailed_weights(5, 96, 1, 1.0), heavy_tailed_weights(7, 96, 2)
    (x_codes, x_q), (w_codes, w_q) = ((fmt.encode(a, fmt.fit(a)), fmt.fit(a)) for a in (x, w))
    sums = power_products(fmt.integers(x_codes), fmt.integers(w_codes), whole_table(4, 0.5))
    assert int(sums.abs().max()) < 2**31
    expected = fmt.decode(x_codes, x_q).double() @ fmt.decode(w_codes, w_q).double().T
    found = sums.double() * (x_q.scale.double() * w_q.scale.double().T)
    # Decoding rounds every weight to float32 once; the integers do not.
    torch.testing.assert_close(found, expected, rtol=0, atol=96 * 2.0**-22 * float(x.abs().max() * w.abs().max()))


def test_how_many_products_int32_holds() -> None:
    assert n_safe(49) == 894_412
    worst = torch.full((1, n_safe(49)), 7)
    assert int(power_products(worst, worst, whole_table(4, 0.5))) == 49 * 49 * n_safe(49) <= 2**31 - 1
    one_more = torch.full((1, n_safe(49) + 1), 7)
    with pytest.raises(NumericalError, match="int32"):
        power_products(one_more, one_more, whole_table(4, 0.5))


@pytest.mark.parametrize(("exponent", "top"), [(0.613, 127), (0.35, 127), (0.8, 1023)])
def test_a_rounded_table_stays_within_its_bound(exponent: float, top: int) -> None:
    rng = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-7, 8, (20, 64), generator=rng) for _ in range(2))
    fmt = Power(4, None, torch.float32)
    q = fmt.params(torch.ones(20, 1), exponent)
    exact = [fmt.decode(fmt.signed_codes(c), q).double() for c in (x, w)]
    found = power_products(x, w, fixed_point(4, exponent, top)).double() / top**2
    worst = float((found - exact[0] @ exact[1].T).abs().max())
    assert 0.001 * sum_bound(64, top) < worst < sum_bound(64, top)
