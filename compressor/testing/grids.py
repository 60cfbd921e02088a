"""What checks of weight formats are made of: random weights and codes, all values of a grid, comparisons."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from compressor.errors import NumericalError
from compressor.formats.base import QParams, QuantFormat, ScaledFormat


def mirrored(fmt: QuantFormat, q: QParams) -> QParams:
    """Return `q` with every second scale negative, or as it is if the format does not mirror grids."""
    if not isinstance(fmt, ScaledFormat) or not fmt.mirrors:
        return q
    signs = 1 - 2 * (torch.arange(q.scale.numel()) % 2)
    return replace(q, scale=q.scale * signs.view(q.scale.shape).to(q.scale.dtype))


def valid_codes(fmt: QuantFormat) -> Tensor:
    """Return every code that means a number, uint8: all of them, less those a format lists in `nan_codes`."""
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8)
    for code in getattr(fmt, "nan_codes", ()):
        codes = codes[codes != code]
    return codes


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors agree in dtype, shape and every bit (FP8 and NaN included)."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def assert_same_params(a: QParams, b: QParams) -> None:
    """Fail unless all parameters agree bit for bit."""
    for slot in fields(QParams):
        left, right = getattr(a, slot.name), getattr(b, slot.name)
        if left is None or right is None:
            assert left is right, f"{slot.name} is present on one side only"
        else:
            assert (left.dtype, left.shape) == (right.dtype, right.shape), (
                f"{slot.name}: {left.dtype} {tuple(left.shape)} against {right.dtype} {tuple(right.shape)}"
            )
            assert same_bits(left, right), f"{slot.name} differs"


def assert_usable(fmt: QuantFormat, q: QParams, shape: tuple[int, ...]) -> None:
    """Fail unless every group's grid is finite and reaches to both sides of zero, or of its zero point."""
    grid = grid_values(fmt, q, shape)
    assert torch.isfinite(grid).all(), "a code decodes to NaN or Inf"
    assert (grid.amax(0) > grid.amin(0)).all(), "a group's scale is zero"
    if q.zero_point is None:  # else it may be at either end of the grid: weights of a group can have one sign
        assert (grid.amax(0) > 0).all(), "a group cannot hold positive weights"
        assert (grid.amin(0) < 0).all(), "a group cannot hold negative weights"


def grid_values(fmt: QuantFormat, q: QParams, shape: tuple[int, ...]) -> Tensor:
    """Return what every code means at every place, float64 `[codes, out, in]`."""
    codes = (torch.full(shape, code, dtype=torch.uint8) for code in valid_codes(fmt).tolist())
    return torch.stack([fmt.decode(same, q).double() for same in codes])


def refusal_of(fmt: QuantFormat, w: Tensor) -> NumericalError | None:
    """Return the error `fit` raises for `w`, or None if it accepts it."""
    try:
        fmt.fit(w)
    except NumericalError as error:
        return error
    return None


def group_width(fmt: QuantFormat) -> int:
    """Return one group's inputs; for one scale per row an odd width, so that rows end inside a word."""
    return fmt.group_size or 37


def rows_per_scale(fmt: QuantFormat) -> int | None:
    """Return how many rows share a scale, judged by what is stored for a large matrix; None for all of them."""
    rows = 1024
    slot = fmt.layout((rows, 4 * group_width(fmt)))["weight_scale"]
    return None if len(slot.shape) == 1 else rows // slot.shape[0]


def random_codes(fmt: QuantFormat, shape: tuple[int, int], seed: int) -> Tensor:
    """Return random codes, uint8, among all that mean a number."""
    valid = valid_codes(fmt)
    return valid[torch.randint(0, len(valid), shape, generator=torch.Generator().manual_seed(seed))]


def random_weights(fmt: QuantFormat, rows: int, groups: int, seed: int = 0) -> Tensor:
    """Return Gaussian weights `[rows, groups * width]` whose groups differ in size by up to some hundred times."""
    rng = torch.Generator().manual_seed(seed + 1000 * rows + groups)
    size = torch.exp(1.5 * torch.randn(rows, groups, 1, generator=rng))
    return (0.02 * size * torch.randn(rows, groups, group_width(fmt), generator=rng)).flatten(1)
