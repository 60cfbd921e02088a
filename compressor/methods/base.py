"""What a compression method is and what it gets to see.

A method never learns the model class, the device map, the file or the command line. It gets layers (or a block), a
format, and a random generator of its own, and returns decisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from compressor.calibration.routing_rule import RoutingRule
from compressor.calibration.stats import Accumulator, SecondMoment, Statistic
from compressor.decision import Outcome
from compressor.errors import NumericalError
from compressor.formats.base import QParams, QuantFormat
from compressor.plan import WeightRef

PRUNED_SHARE = 0.05
"""Share of exact zeros from which on a matrix counts as pruned."""

WEIGHTS_AT_ONCE, ROWS_AT_ONCE = 1 << 18, 512
"""How much of a matrix is compared in one step: weights that stay in a processor's cache, rows worth a product."""

_LARGEST_SQUARED = torch.finfo(torch.float32).max ** 0.5


class Scope(StrEnum):
    """How much a method must see at once."""

    LAYER = "layer"
    GROUP = "group"
    """Layers that a runtime fuses and that must agree on something, e.g. one NVFP4 global scale."""
    BLOCK = "block"
    MODEL = "model"


class Stream(StrEnum):
    """Which inputs a method wants its statistics from."""

    NONE = "none"
    """Data-free."""
    FP = "fp"
    """Full-precision inputs: earlier compressed layers do not feed later ones."""
    COMPRESSED = "compressed"
    """Inputs produced by the already compressed prefix."""
    BOTH = "both"
    """Both are carried through the model; statistics come from the compressed prefix."""


class MethodOptions(BaseModel):
    """Base of a method's options; every field needs a description, which `compress list methods NAME` prints."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Layer:
    """One weight and what is known about its input.

    Attributes:
        ref: Which weight it is.
        weight: `[out, in]` float32; a copy the method may keep but must not change in place.
        global_scale: Min-max global scale of the fused set this layer belongs to, for formats that have one.
        stats: Statistics the method asked for; empty for data-free methods.
        steps: What is planned for its input, in order, as JSON; see `compressor.inputs.rebuild`.
    """

    ref: WeightRef
    weight: Tensor
    global_scale: Tensor | None = None
    stats: Mapping[Statistic, Accumulator] = field(default_factory=dict)
    steps: tuple[dict[str, object], ...] = ()

    @property
    def n_tokens(self) -> int:
        """Calibration tokens this layer saw."""
        return max((total.n_tokens for total in self.stats.values()), default=0)

    def fit(self, fmt: QuantFormat) -> QParams:
        """Return the format's min-max parameters, with the global scale shared by the fused set."""
        return fmt.fit(self.weight, self.global_scale)

    def second_moment(self, spec: SecondMoment) -> Tensor:
        """Return the mean of `x x^T` over tokens, float32.

        Raises:
            NumericalError: It holds NaN or Inf.
        """
        total = self.stats[spec]
        value = total.value() / max(total.n_tokens, 1)
        if not torch.isfinite(value).all():
            raise self._not_finite(total)
        return value

    def magnitude(self, spec: Statistic) -> Tensor:
        """Return a statistic of the inputs' size, float32: the mean or largest `|x|` `[in]`, ranges, or rows.

        Raises:
            NumericalError: It holds NaN or Inf, or squares of inputs overflow float32.
        """
        total = self.stats[spec]
        value = total.value()
        if not torch.isfinite(value).all() or total.max_abs > _LARGEST_SQUARED:
            raise self._not_finite(total)
        return value

    def _not_finite(self, total: Accumulator) -> NumericalError:
        return NumericalError(
            f"{self.ref.name}: its calibration inputs are not finite (largest magnitude {total.max_abs:.3g})",
            "use other calibration data, or leave the layer out with --skip",
        )


def _as_they_are(
    left: float, generator: torch.Generator, exponents: Mapping[str, float]
) -> AbstractContextManager[None]:
    """Return a context in which no inputs are rounded."""
    return nullcontext()


@dataclass(frozen=True)
class Block:
    """One block for BLOCK-scope methods. Weights are addressed by tensor name, as in `layers`.

    Attributes:
        name: Its module name.
        layers: The layers to decide, statistics included, with the format of each.
        n_samples: Samples.
        inputs: Sample -> hidden states `[1, tokens, hidden]` that enter the block behind the compressed prefix.
        fp_inputs: Sample -> the same behind the original prefix.
        targets: Sample -> what leaves the original block on `fp_inputs`, float32.
        forward: Hidden states and weights `[out, in]` that take the place of the block's own -> what leaves it.
            Gradients flow into the weights.
        device: Where all of this lives.
        progress: Told, in words, how far the method is.
        pieces: Samples that were cut from each calibration sample.
        rounding: Context in which `forward` rounds the inputs of layers as the result will; gradients pass as if it did
            not. Takes the share of values that are left as they are all the same, what draws them, and the exponents of
            weights on grids of powers by tensor name, which inputs on such grids take over.
    """

    name: str
    layers: tuple[tuple[Layer, QuantFormat], ...]
    n_samples: int
    inputs: Callable[[int], Tensor]
    fp_inputs: Callable[[int], Tensor]
    targets: Callable[[int], Tensor]
    forward: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    device: torch.device
    progress: Callable[[str], None]
    pieces: int = 1
    rounding: Callable[[float, torch.Generator, Mapping[str, float]], AbstractContextManager[None]] = _as_they_are


@runtime_checkable
class Method(Protocol):
    """What every method states about itself."""

    name: ClassVar[str]
    summary: ClassVar[str]
    Options: ClassVar[type[MethodOptions]]

    @property
    def scope(self) -> Scope:
        """How much it must see at once; options may decide."""
        ...

    @property
    def stream(self) -> Stream:
        """Which inputs it wants; options may decide."""
        ...

    def stats(self, fmt: QuantFormat) -> tuple[Statistic, ...]:
        """Return the statistics to collect; empty for data-free methods."""
        ...

    def refuse(self, ref: WeightRef, fmt: QuantFormat) -> str | None:
        """Return why this pair of weight and format is not possible, or None. Headers only: no values exist yet."""
        ...


@runtime_checkable
class SurveyMethod(Method, Protocol):
    """Looks at all weights before the first block is decided, for what the whole network must agree on."""

    def survey(self, layers: Callable[[], Iterator[tuple[Layer, QuantFormat]]]) -> None:
        """Look at the layers, one at a time and without statistics, if it needs to; every call starts from the first.

        What is found must depend on the weights alone: a resumed run surveys again.
        """
        ...


@runtime_checkable
class RouterMethod(Method, Protocol):
    """Rounds routers too; they stay dense, on a grid of few bits."""

    @property
    def router_bits(self) -> int:
        """Bits of their weights; 0 leaves them alone."""
        ...

    @property
    def balance(self) -> float:
        """Tokens every expert is to be calibrated on, in fair shares of one window; 0 for no such wish."""
        ...

    def solve_router(
        self, router: Layer, top_k: int, dtype: torch.dtype, rule: RoutingRule, bias: Tensor | None
    ) -> Outcome:
        """Return the rewritten router, with statistics of its input.

        Args:
            router: Its weight `[experts, hidden]`.
            top_k: Experts that are chosen per token.
            dtype: What it is stored in.
            rule: How they are chosen from its logits.
            bias: What it adds to logits, `[experts]`, or None.
        """
        ...


class LayerMethod(Method, Protocol):
    """Decides one layer at a time."""

    def solve(self, layer: Layer, fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        """Return a decision for the layer."""
        ...


class GroupMethod(Method, Protocol):
    """Decides the layers of a fused set together."""

    def solve_group(self, layers: Sequence[Layer], fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        """Return a decision for every layer."""
        ...


class BlockMethod(Method, Protocol):
    """Decides all layers of a block together; its stream is `BOTH`."""

    def solve_block(self, block: Block, generator: torch.Generator) -> Outcome:
        """Return a decision for every layer."""
        ...


def is_pruned(weight: Tensor) -> bool:
    """Return whether so many weights are exactly zero that they were pruned: they must stay zero."""
    return weight.numel() - int(torch.count_nonzero(weight)) >= PRUNED_SHARE * weight.numel()


def describe_options(options: type[MethodOptions]) -> list[dict[str, Any]]:
    """Return name, default and description of every option."""
    return [
        {"name": name, "default": info.default, "description": info.description or ""}
        for name, info in options.model_fields.items()
    ]


def relative_error(weight: Tensor, decoded: Tensor, moment: Tensor | None = None) -> float:
    """Return `||W - W'|| / ||W||`, or with a second moment the same for the layer's output on calibration data.

    Args:
        weight: `[out, in]` float32.
        decoded: What replaces it, `[out, in]` float32.
        moment: `[in, in]` mean of `x x^T`, or None for the error of the weights alone.
    """
    error = size = 0.0
    rows = max(ROWS_AT_ONCE if moment is not None else WEIGHTS_AT_ONCE // max(weight.shape[1:].numel(), 1), 1)
    for before, after in zip(weight.split(rows), decoded.split(rows), strict=True):
        error += _energy(after - before, moment)
        size += _energy(before, moment)
    return math.sqrt(max(error, 0.0) / size) if size > 0 else 0.0


def _energy(w: Tensor, moment: Tensor | None) -> float:
    """Return `||w||^2`, or `tr(w moment w^T)`."""
    return float((w.square() if moment is None else (w @ moment).mul_(w)).sum(dtype=torch.float64))
