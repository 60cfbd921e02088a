"""Starting masks of a search, each the one-shot mask of a simpler method, with the weights that may change later."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from compressor.calibration.stats import Statistic
from compressor.decision import Outcome
from compressor.formats.base import QuantFormat
from compressor.methods.base import Layer, MethodOptions, Scope, Stream
from compressor.plan import WeightRef
from compressor.pruning.base import PruneOptions, masked
from compressor.pruning.candidates import Choice, TensorState
from compressor.pruning.magnitude import Magnitude, MagnitudeOptions
from compressor.pruning.masks import keep_per_tensor
from compressor.pruning.wanda import Wanda

STARTS = ("wanda", "magnitude", "random")


class Start:
    """Scores layers, masks them, and remembers both.

    Args:
        name: One of `STARTS`.
        options: How much goes.
        choice: Which shares of the mask are final.

    Attributes:
        found: Tensor name -> state of its mask.
    """

    name: ClassVar[str] = "start"
    summary: ClassVar[str] = "starting masks"
    scope = Scope.LAYER
    Options: ClassVar[type[MethodOptions]] = PruneOptions

    def __init__(self, name: str, options: PruneOptions, choice: Choice) -> None:
        assert name in STARTS, name
        given = options.model_dump(include={"sparsity", "pattern"} & options.model_fields_set)
        self._method: Wanda | Magnitude | None = None
        if name == "wanda":
            self._method = Wanda(Wanda.Options(**given))
        elif name == "magnitude":
            self._method = Magnitude(MagnitudeOptions(**given))
        self.options, self.choice = options, choice
        self.found: dict[str, TensorState] = {}

    @property
    def stream(self) -> Stream:
        """That of the method it stands for."""
        return Stream.NONE if self._method is None else self._method.stream

    def stats(self, fmt: QuantFormat) -> tuple[Statistic, ...]:
        """Return those of the method it stands for."""
        return () if self._method is None else self._method.stats(fmt)

    def refuse(self, ref: WeightRef, fmt: QuantFormat) -> str | None:
        """Refuse nothing: planning has been done."""
        return None

    def solve(self, layer: Layer, fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        """Mask one layer."""
        scores, keep = self._scored(layer, generator)
        # In patterns every weight may change: groups are small, and each is decided as a whole.
        choice = Choice(self.choice.block, self.choice.tabu, 0.0, 0.0) if self.options.groups else self.choice
        per_row = isinstance(self._method, Wanda) and not self.options.groups
        state = TensorState.start(scores, keep, choice, per_row)
        self.found[layer.ref.name] = state
        return Outcome({layer.ref.name: masked(layer.weight, keep)})

    def _scored(self, layer: Layer, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if isinstance(self._method, Wanda):
            scores = self._method.scores(layer)
            return scores, self._method.keep(scores)
        if isinstance(self._method, Magnitude):
            scores = layer.weight.abs()
            return scores, self._method.keep(scores)
        scores = torch.rand(layer.weight.shape, generator=generator).to(layer.weight.device)
        groups = self.options.groups
        return scores, groups.choose(scores) if groups else keep_per_tensor(scores, self.options.sparsity)
