"""Products with the inverse of the empirical Fisher matrix of one tensor, from gradients of single samples.

M-FAC, Frantar, Kurtic and Alistarh 2021, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information",
arXiv 2107.03356. With gradients `G` `[m, d]` and

    F = ridge I + G^T G / m,        F^-1 = (I - G^T (m ridge I + G G^T)^-1 G) / ridge

(Woodbury), a product takes `O(d m)` and no `d x d` matrix is built.

Differs from the paper: its recursion over the gradients is replaced by one Cholesky factor of the `m x m` matrix, which
gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compressor.errors import NumericalError
from compressor.pruning.gradients import LayerGradient

CHUNK_BYTES = 128 << 20
"""Bytes of gradients that are held at once."""


class Gradients(Protocol):
    """Gradients of single samples, some rows of the weight at a time."""

    shape: tuple[int, int, int]
    """Samples, rows and columns."""

    def mean_square(self) -> float:
        """Return the mean square of all entries."""
        ...

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield some rows, and the gradients of their weights `[samples, rows, columns]`; always the same rows."""
        ...


class Stacked:
    """Gradients that are there as they are.

    Args:
        values: `[samples, rows, columns]`.
        rows: Rows in a chunk.
    """

    def __init__(self, values: Tensor, rows: int | None = None) -> None:
        self.values, self._rows = values, rows or values.shape[1]
        self.shape = (values.shape[0], values.shape[1], values.shape[2])

    def mean_square(self) -> float:
        """Return the mean square of all entries."""
        return float(self.values.double().square().mean())

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield some rows at a time."""
        for first in range(0, self.shape[1], self._rows):
            part = slice(first, min(first + self._rows, self.shape[1]))
            yield part, self.values[:, part]


class OfLayer:
    """Gradients of a linear layer, made from what its tokens brought.

    Args:
        gradient: Of one layer.
        keep: bool `[out, in]`; the others have no gradient, as they are not there. None for all.
    """

    def __init__(self, gradient: LayerGradient, keep: Tensor | None) -> None:
        self.gradient, self.keep = gradient, keep
        self.shape = (len(gradient.outputs), len(gradient.outputs[0]), len(gradient.inputs[0]))

    def mean_square(self) -> float:
        """Return the mean square of all entries, those that are not there included, from products of tokens."""
        samples = zip(self.gradient.inputs, self.gradient.outputs, strict=True)
        total = sum(float(((a.T @ a) * (d.T @ d)).sum(dtype=torch.float64)) for a, d in samples)
        return total / (self.shape[0] * self.shape[1] * self.shape[2])

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield some rows at a time."""
        samples, rows, columns = self.shape
        step = max(CHUNK_BYTES // (4 * samples * columns), 1)
        for first in range(0, rows, step):
            part = slice(first, min(first + step, rows))
            pairs = zip(self.gradient.inputs, self.gradient.outputs, strict=True)
            values = torch.stack([d[part] @ a.T for a, d in pairs])
            yield part, values if self.keep is None else values * self.keep[part]


@dataclass(frozen=True)
class InverseFisher:
    """The inverse of one tensor's Fisher matrix, or of its blocks along the diagonal.

    Attributes:
        gradients: Of single samples.
        ridge: What is added to the diagonal; above 0.
        block: Consecutive inputs of a row that form a block of their own; None for the whole tensor.
        factor: Lower Cholesky factor of `m ridge I + G G^T`, float64 `[m, m]`, for the whole tensor.
    """

    gradients: Gradients
    ridge: float
    block: int | None
    factor: Tensor | None

    @classmethod
    def of(cls, gradients: Gradients, ridge: float, block: int | None = None) -> InverseFisher:
        """Look at the gradients once, if the whole tensor is meant.

        Raises:
            NumericalError: They are not finite.
        """
        if block is not None:
            return cls(gradients, ridge, block, None)
        gram: Tensor | None = None
        for _, values in gradients.chunks():
            flat = values.flatten(1)
            product = (flat @ flat.T).double()
            gram = product if gram is None else gram + product
        assert gram is not None
        return cls(gradients, ridge, None, _factor(gram, ridge))

    def diagonal(self) -> Tensor:
        """Return the diagonal of the inverse, `[rows, columns]`, positive."""
        out = []
        for _, values in self.gradients.chunks():
            flat, factor = self._blocks(values)
            solved = torch.linalg.solve_triangular(factor.to(flat.dtype), flat, upper=False)
            out.append(self._rows(1 - solved.square().sum(-2), values))
        # Of a weight that few gradients tell all about almost nothing is left, and rounding may take that.
        return torch.cat(out).clamp(min=1e-6) / self.ridge

    def times(self, x: Tensor) -> Tensor:
        """Return the product with `x` `[rows, columns]`, in the same shape."""
        whole: Tensor | None = None
        if self.factor is not None:
            y = sum(values.flatten(1) @ x[part].flatten() for part, values in self.gradients.chunks())
            assert isinstance(y, Tensor)
            whole = torch.cholesky_solve(y.double().unsqueeze(1), self.factor).to(x.dtype)
        out = []
        for part, values in self.gradients.chunks():
            flat, factor = self._blocks(values)
            z = whole
            if z is None:
                mine = self._pad(x[part]).reshape(len(flat), -1, 1)
                z = torch.cholesky_solve(flat @ mine, factor.to(flat.dtype))
            out.append(x[part] - self._rows((flat.transpose(-1, -2) @ z).squeeze(-1), values))
        return torch.cat(out) / self.ridge

    def _blocks(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return gradients `[samples, rows, columns]` as `[blocks, samples, size]`, and factors to go with them.

        The whole tensor is one block without that first dimension.
        """
        if self.factor is not None:
            return values.flatten(1), self.factor
        assert self.block is not None
        padded = self._pad(values).unflatten(-1, (-1, self.block))  # [samples, rows, blocks, size]
        flat = padded.permute(1, 2, 0, 3).flatten(0, 1)
        return flat, _factor((flat @ flat.transpose(-1, -2)).double(), self.ridge)

    def _rows(self, flat: Tensor, values: Tensor) -> Tensor:
        """Put values of blocks into rows and columns again."""
        rows, columns = values.shape[1:]
        return flat.reshape(rows, -1)[:, :columns]

    def _pad(self, values: Tensor) -> Tensor:
        """Add inputs without gradients, so that blocks are of one size."""
        assert self.block is not None
        padded: Tensor = torch.nn.functional.pad(values, (0, -values.shape[-1] % self.block))
        return padded


def _factor(gram: Tensor, ridge: float) -> Tensor:
    """Return the Cholesky factor of `m ridge I + G G^T`, float64 `[..., m, m]`.

    Raises:
        NumericalError: It has none.
    """
    samples = gram.shape[-1]
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(gram + samples * ridge * torch.eye(samples, device=gram.device))
    if int(info.max()) or not torch.isfinite(factor).all():
        raise NumericalError("gradients of samples are not finite", "use other calibration data, or --method wanda")
    return factor
