"""Products of power-coded weights and inputs on integers alone: what is exact, what is bounded, and by how much.

Two numbers `x = s_x sign(c_x) |c_x|**e` and `w = s_w sign(c_w) |c_w|**e` on grids with one exponent multiply to
`s_x s_w sign(c_x c_w) |c_x c_w|**e`: powers turn products into products, which is why NUPES (arXiv 2308.05600) uses
them. They do not turn sums into sums. The power must be taken of every product before it is added up:
`sum |c_x c_w|**e`, never `|sum c_x c_w|**e`.

So a matrix product needs a table in front of its multiplications, and what remains is an ordinary integer product:

- `e` a whole number: the table holds integers and nothing is rounded. With `e = 2` and 4 bits they are at most 49, so
  they fit int8 and sums of `n_safe(49)` products fit int32.
- any `e`: the table is rounded to multiples of `1 / top` (`fixed_point`); what that may do to a sum is `sum_bound`.

Inputs are on the grid of their weights with `--inputs power8-token`, for example. No kernel uses this yet; it is the
oracle for one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import NumericalError
from compressor.formats.power import largest_integer, powers, stored_exponent

_INT32 = 2**31 - 1


def whole_table(bits: int, exponent: float) -> Tensor:
    """Return what the codes from -Q to Q mean at scale 1, int64 `[2 Q + 1]`, where these are integers.

    Raises:
        NumericalError: The exponent is not one over a whole number.
    """
    if largest_integer(bits, exponent) is None:
        raise NumericalError(
            f"powers with exponent {exponent:g} are no integers", "use exponent 0.5, or a fixed-point table"
        )
    magnitudes = torch.tensor(powers(bits, stored_exponent(exponent)), dtype=torch.float64)[: 1 << (bits - 1)]
    return _both_signs(magnitudes.long())


def fixed_point(bits: int, exponent: float, top: int) -> Tensor:
    """Return `round(top * (|c| / Q)**e)` with its sign for the codes from -Q to Q, int64 `[2 Q + 1]`.

    Args:
        bits: Bits of a code.
        exponent: Of the grid, `a = 1 / e`.
        top: What the largest code becomes; 127 for int8.
    """
    magnitudes = torch.tensor(powers(bits, stored_exponent(exponent)), dtype=torch.float64)[: 1 << (bits - 1)]
    return _both_signs((magnitudes / magnitudes[-1] * top).round().long())


def power_products(x: Tensor, w: Tensor, table: Tensor) -> Tensor:
    """Return `sum_k table[x_mk] * table[w_nk]`, int64 `[m, n]`, computed as an int32 accumulator would.

    Args:
        x: Integers from -Q to Q, `[m, k]`.
        w: The same, `[n, k]`.
        table: `whole_table` or `fixed_point`.

    Raises:
        NumericalError: Sums of that many products may overflow int32.
    """
    top = int(table.max())
    if x.shape[1] > n_safe(top):
        raise NumericalError(
            f"{x.shape[1]} products of up to {top} x {top} may overflow int32", f"split the sum at {n_safe(top)}"
        )
    middle = len(table) // 2
    return table[x.long() + middle] @ table[w.long() + middle].T


def n_safe(top: int) -> int:
    """Return how many products of integers up to `top` an int32 sum holds whatever their signs."""
    return _INT32 // (top * top)


def sum_bound(k: int, top: int) -> float:
    """Return by how much `power_products` with a `fixed_point` table, over `top**2`, may be off for `k` products.

    Every table entry is off by at most `d = 1 / (2 top)` of the largest, so that a product is by `2 d + d**2`. In units
    of the largest weight times the largest input.
    """
    d = 0.5 / top
    return k * (2 * d + d * d)


def _both_signs(magnitudes: Tensor) -> Tensor:
    return torch.cat([magnitudes[1:].flip(0).neg(), magnitudes])
