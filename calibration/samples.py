"""Some of a layer's inputs themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class InputSample:
    """Asks for some of the inputs themselves: what a search runs the layer on.

    Attributes:
        n_rows: How many rows to keep, chosen evenly over all of them.
    """

    n_rows: int = 256

    def start(self, in_features: int, device: torch.device) -> InputSampleOf:
        """Return an empty accumulator for inputs of width `in_features`."""
        return InputSampleOf(self, in_features, device)

    def size(self, in_features: int) -> int:
        """Return the numbers it holds."""
        return self.n_rows * in_features


class _Rows:
    """Rows of inputs that are kept.

    Attributes:
        n_tokens: Rows seen so far.
        max_abs: Largest input magnitude seen; NaN once a NaN was seen.
    """

    def __init__(self, n_rows: int, in_features: int, device: torch.device) -> None:
        self._n_rows = n_rows
        self._rows = torch.zeros(0, in_features, dtype=torch.float32, device=device)
        self.n_tokens = 0
        self.max_abs = 0.0

    def update(self, x: Tensor) -> None:
        """Let rows `x` `[tokens, in]` take part."""
        if x.shape[0] == 0:
            return
        largest = float(x.abs().max())
        self.max_abs = largest if math.isnan(largest) else max(self.max_abs, largest)
        self.n_tokens += x.shape[0]
        rows = torch.cat([self._rows, x.float()])
        self._rows = rows[self._kept(rows, x.shape[0]).to(x.device)]

    def _kept(self, rows: Tensor, new: int) -> Tensor:
        """Return which of the rows kept so far and the `new` ones behind them stay, in order."""
        raise NotImplementedError

    def close_lane(self) -> None:
        """Do nothing: rows are no sum."""

    def value(self) -> Tensor:
        """Return the rows in the order they came, float32 `[rows, in]`."""
        return self._rows

    def divide(self, c: Tensor) -> None:
        """Turn the rows of `x` into those of `x / c`."""
        self._rows = self._rows / c

    def subtract(self, z: Tensor) -> None:
        """Turn the rows of `x` into those of `x - z`."""
        self._rows = self._rows - z


class InputSampleOf(_Rows):
    """Keeps the rows whose place in the stream draws the smallest numbers: the same ones however rows are batched."""

    def __init__(self, spec: InputSample, in_features: int, device: torch.device) -> None:
        super().__init__(spec.n_rows, in_features, device)
        self._draws = torch.zeros(0, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(0)

    def _kept(self, rows: Tensor, new: int) -> Tensor:
        # One by one: a vectorized draw may depend on how many are drawn at once.
        drawn = torch.cat([torch.rand(1, dtype=torch.float64, generator=self._generator) for _ in range(new)])
        draws = torch.cat([self._draws, drawn])
        kept = draws.argsort()[: self._n_rows].sort().values
        self._draws = draws[kept]
        return kept


@dataclass(frozen=True)
class LoudRows:
    """Asks for the rows with the largest magnitudes, which a sample of all would miss or overrate.

    In language models a first token's inputs may be hundreds of times as large as all others, and decide how far a
    grid must reach.

    Attributes:
        n_rows: How many rows to keep.
    """

    n_rows: int = 32

    def start(self, in_features: int, device: torch.device) -> LoudRowsOf:
        """Return an empty accumulator for inputs of width `in_features`."""
        return LoudRowsOf(self, in_features, device)

    def size(self, in_features: int) -> int:
        """Return the numbers it holds."""
        return self.n_rows * in_features


class LoudRowsOf(_Rows):
    """Keeps the loudest rows; of equally loud ones those that came first."""

    def __init__(self, spec: LoudRows, in_features: int, device: torch.device) -> None:
        super().__init__(spec.n_rows, in_features, device)

    def _kept(self, rows: Tensor, new: int) -> Tensor:
        order = rows.abs().amax(1).argsort(descending=True, stable=True)
        return order[: self._n_rows].sort().values


def strata(sample: Tensor, loud: Tensor, n_tokens: int) -> tuple[Tensor, Tensor]:
    """Return rows that stand for all, `[rows, in]`, and how many each stands for, `[rows]`.

    Args:
        sample: Rows drawn from all of them, `[any, in]`; those as loud as `loud` are left out, as they are in it.
        loud: The loudest rows, each standing for itself.
        n_tokens: How many rows there are.
    """
    quiet = sample[sample.abs().amax(1) < loud.abs().amax(1).min()]
    share = (n_tokens - len(loud)) / max(len(quiet), 1)
    counts = torch.cat((torch.full((len(quiet),), share), torch.ones(len(loud))))
    return torch.cat((quiet, loud)), counts.to(sample.device)
