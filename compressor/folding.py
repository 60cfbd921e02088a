"""Carrying out the folds of one block: weights, norms and statistics before layers are decided.

Whatever is stored is rounded first and the factors are computed from what was stored, so the block's function changes
by float noise only; a check on one sample makes sure of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from compressor.calibration.capture import Capture
from compressor.calibration.stats import Accumulator, Statistic
from compressor.checkpoint.skeleton import Skeleton
from compressor.decision import Outcome
from compressor.errors import NumericalError
from compressor.formats.base import QuantFormat
from compressor.methods.base import Layer
from compressor.methods.scaling import FoldingMethod, FoldSite
from compressor.plan import Fold, FoldKind, LayerPlan, Plan
from compressor.report import Row

TOLERANCE = 1e-4
"""Allowed change of what a block adds to its input, relative; float32 noise is a hundred times smaller."""

_NOISE = 1e-6
"""Allowed change relative to the output itself, which may be much larger than what the block adds."""


@dataclass
class Folding:
    """One block's folds and the means to carry them out.

    Attributes:
        method: Chooses the factors.
        skeleton: Holds the block's weights, float32; rewritten in place.
        layers: Plan of the block's tensors, by name on disk.
        format_of: Gives the format of a compressed layer.
        capture: Statistics of the block's inputs, divided in place.
        tensors: The block's tensors as they are stored.
    """

    method: FoldingMethod
    skeleton: Skeleton
    layers: Mapping[str, LayerPlan]
    format_of: Callable[[LayerPlan], QuantFormat]
    capture: Capture | None
    tensors: Mapping[str, Tensor]
    _rewrites: dict[str, Tensor] = field(default_factory=dict)

    def carry_out(self, folds: tuple[Fold, ...], run: Callable[[], Tensor], entering: Tensor, name: str) -> Outcome:
        """Choose and apply the factors of every fold.

        Args:
            folds: Those of the block, in order.
            run: Runs the block as it now is on one sample.
            entering: That sample; where the output has its shape, it says how much the block adds.
            name: The block's, for messages.

        Returns:
            No decisions, but events and the new values of tensors that stay dense.

        Raises:
            NumericalError: The block's output changed, or statistics are not finite.
        """
        before = run()
        events: list[str] = []
        for fold in folds:
            events += self._one(fold)
        check_unchanged(before, run(), entering, name)
        return Outcome({}, tuple(events), rewrites=self._rewrites)

    def _one(self, fold: Fold) -> tuple[str, ...]:
        readers = [self.layers[reader] for reader in fold.readers]
        dense = tuple(self._layer(name) for name in fold.dense)
        site = FoldSite(
            fold=fold,
            layers=tuple(self._layer(reader) for reader in fold.readers),
            formats=tuple(self.format_of(reader) for reader in readers),
            storable=lambda c: self._producer(fold).storable(c),
            dense=dense,
        )
        # Readers of one tensor share its accumulators, and each is divided once.
        fed = dict.fromkeys(self.layers[name].ref.fed_by for name in (*fold.readers, *fold.dense))
        statistics = [total for name in fed for total in self._statistics(name).values()]
        chosen = self.method.fold(site)
        c, shift = chosen.c, chosen.shift
        assert c.shape == (fold.channels,), f"{fold.name}: {tuple(c.shape)} factors for {fold.channels} channels"
        if not (torch.isfinite(c).all() and (c > 0).all()):
            raise NumericalError(f"{fold.name}: its factors are not positive", "leave its readers out with --skip")
        if (c != 1).any():
            self._divide_producer(fold, c)
            for reader in fold.readers:
                self._values(reader).mul_(c)
            for name in fold.dense:
                self._multiply_dense(name, c)
            for total in statistics:
                total.divide(c)
        if shift is not None:
            self._shift(fold, shift / c, statistics)
        return chosen.events

    def _layer(self, name: str) -> Layer:
        ref = self.layers[name].ref
        return Layer(ref, self._values(name).clone(), stats=self._statistics(ref.fed_by))

    def _statistics(self, fed_by: str) -> Mapping[Statistic, Accumulator]:
        return self.capture.sums.get(fed_by, {}) if self.capture else {}

    def _multiply_dense(self, name: str, c: Tensor) -> None:
        """Multiply the columns of a matrix that stays dense; in memory it is exact, what is stored is rounded."""
        stored = (self._stored(name).float() * c).to(self.tensors[name].dtype)
        self._values(name).mul_(c)
        self._rewrites[name] = stored.to(self.tensors[name].device)

    def _shift(self, fold: Fold, z: Tensor, statistics: Iterable[Accumulator]) -> None:
        """Subtract `z` `[channels]` from what a norm gives; its readers' biases make up for it."""
        assert fold.bias is not None, fold.name
        assert fold.shifted, fold.name
        self._add(fold.bias, -z)
        for reader, bias in zip(fold.readers, fold.shifted, strict=True):
            self._add(bias, (self._values(reader).double() @ z.double()).float())
        for total in statistics:
            total.subtract(z)

    def _add(self, name: str, change: Tensor) -> None:
        stored = (self._stored(name) + change).to(self.tensors[name].dtype)
        self._values(name).copy_(stored)
        self._rewrites[name] = stored.to(self.tensors[name].device)

    def _producer(self, fold: Fold) -> Producer:
        dense = [name for name in (fold.scaled, fold.bias) if name and not self.layers[name].format]
        return Producer(fold, {name: self._stored(name) for name in dense})

    def _divide_producer(self, fold: Fold, c: Tensor) -> None:
        for name, stored in self._producer(fold).divided(c).items():
            self._values(name).copy_(stored)
            self._rewrites[name] = stored.to(self.tensors[name].device)
        if self.layers[fold.scaled].format:
            self._values(fold.scaled).div_(c.unsqueeze(1))

    def _stored(self, name: str) -> Tensor:
        """Return a dense tensor as it will be on disk."""
        return self._rewrites.get(name, self.tensors[name]).to(self.skeleton.device)

    def _values(self, name: str) -> Tensor:
        """Return the resident float32 values of a tensor on disk; writing changes the block."""
        ref = self.layers[name].ref
        return self.skeleton.part(ref.param, ref.where)


@dataclass(frozen=True)
class Producer:
    """What a fold divides, as far as it is stored in floating point.

    Attributes:
        fold: The fold.
        dense: Name on disk -> stored values of its tensors that stay dense.
    """

    fold: Fold
    dense: Mapping[str, Tensor]

    def storable(self, c: Tensor) -> Tensor:
        """Return the factors next to `c` `[channels]` that division leaves exact, or as exact as float32 is.

        Powers of two where the plan says so. A norm's gain is divided and rounded, and its factor is what that really
        divided it by. A channel whose gain is zero, or that would leave the range of its dtype, keeps a factor of one.
        """
        if self.fold.powers_of_two:
            c = c.log2().round().exp2()
        elif self.fold.kind in (FoldKind.NORM, FoldKind.EXPERTS):
            gain = self.dense[self.fold.scaled].float() + self.fold.offset
            rounded = self._quotient(self.fold.scaled, c).float() + self.fold.offset
            exact = gain / rounded
            # Coarse gains (1 + weight, stored in few bits, much below 1) may land anywhere: then the channel stays.
            near = (exact / c > 0.5) & (exact / c < 2)
            c = torch.where(near & torch.isfinite(exact), exact, 1.0)
        return torch.where(self._is_exact(c), c, 1.0)

    def divided(self, c: Tensor) -> dict[str, Tensor]:
        """Return the dense tensors divided by storable factors `c`, as stored."""
        out = {}
        for name, stored in self.dense.items():
            kept = (c == 1).reshape(-1, *[1] * (stored.ndim - 1))
            out[name] = torch.where(kept, stored, self._quotient(name, c))
        return out

    def _quotient(self, name: str, c: Tensor) -> Tensor:
        stored = self.dense[name]
        offset = self.fold.offset if name == self.fold.scaled else 0.0
        wide = (stored.float() + offset) / c.reshape(-1, *[1] * (stored.ndim - 1)) - offset
        return wide.to(stored.dtype)

    def _is_exact(self, c: Tensor) -> Tensor:
        """Return for each channel whether what will be stored times `c` is what was stored, up to float32 noise."""
        exact = torch.ones_like(c, dtype=torch.bool)
        for name, stored in self.dense.items():
            offset = self.fold.offset if name == self.fold.scaled else 0.0
            wanted = (stored.float() + offset).flatten(1) if stored.ndim > 1 else stored.float().unsqueeze(1) + offset
            again = self._quotient(name, c).float().reshape(wanted.shape) + offset
            error = (again * c.unsqueeze(1) - wanted).abs()
            exact &= (error <= 4 * torch.finfo(torch.float32).eps * (wanted.abs() + offset)).all(1)
        return exact


def check_unchanged(before: Tensor, after: Tensor, entering: Tensor, name: str) -> None:
    """Make sure a block computes what it computed before its folds.

    Args:
        before: Its output then.
        after: Its output now.
        entering: Its input.
        name: Of the block.

    Raises:
        NumericalError: It does not.
    """
    size = before.double()
    added = size - entering.double() if before.shape == entering.shape else size
    change = float((after.double() - size).norm())
    allowed = TOLERANCE * float(added.norm()) + _NOISE * float(size.norm())
    if not change <= allowed:
        raise NumericalError(
            f"{name}: moving factors between its layers changed its output by {change:.3g}, allowed is {allowed:.3g}",
            "this architecture cannot be scaled this way: use another method, and please report it with config.json",
        )


def folded_rows(
    rows: list[Row], layers: tuple[LayerPlan, ...], plan: Plan, rewrites: Mapping[str, Tensor]
) -> list[Row]:
    """Return report rows that say which dense tensors were rewritten, and why a compressed layer got no factors.

    Args:
        rows: Of one block.
        layers: The plan of its tensors.
        plan: The whole plan.
        rewrites: What `carry_out` rewrote.
    """
    reasons = {layer.ref.name: layer.rewritten_because for layer in layers}
    out = []
    for row in rows:
        if row.name in rewrites:
            row = replace(row, action="rewritten", reason=reasons[row.name])
        elif row.name in plan.unfolded:
            row = replace(row, reason=f"not scaled: {plan.unfolded[row.name]}")
        out.append(row)
    return out
