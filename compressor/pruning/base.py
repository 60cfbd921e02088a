"""What methods that prune have in common: how much, in which pattern, and the way from scores to a decision."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from compressor.decision import Masked
from compressor.errors import RecipeError
from compressor.formats.base import QuantFormat
from compressor.formats.pruned import PRUNED
from compressor.methods.base import MethodOptions, Scope, Stream
from compressor.plan import Plan, WeightRef
from compressor.pruning.masks import Pattern, keep_per_row, keep_per_tensor


class PruneOptions(MethodOptions):
    """How much goes."""

    sparsity: float = Field(0.5, gt=0, lt=1, description="share of every matrix's weights that become zero")
    pattern: str | None = Field(
        None, description="N:M, to keep N of every M consecutive inputs, e.g. 2:4; the sparsity is then 1 - N/M"
    )

    @field_validator("pattern")
    @classmethod
    def _readable(cls, text: str | None) -> str | None:
        if text is not None:
            try:
                Pattern.parse(text)
            except RecipeError as error:
                raise ValueError(error.message) from error
        return text

    @model_validator(mode="after")
    def _agree(self) -> PruneOptions:
        pattern = self.groups
        if pattern and "sparsity" in self.model_fields_set and not math.isclose(self.sparsity, pattern.sparsity):
            raise ValueError(f"sparsity {self.sparsity:g} and pattern {pattern} disagree: leave the sparsity out")
        return self

    @property
    def groups(self) -> Pattern | None:
        """The pattern, or None for unstructured sparsity."""
        return None if self.pattern is None else Pattern.parse(self.pattern)

    @property
    def share(self) -> float:
        """The sparsity that is meant: the pattern's if there is one."""
        return self.groups.sparsity if self.groups else self.sparsity


class ScoreOptions(PruneOptions):
    """Options of methods that give every weight a score."""

    per: Literal["tensor", "row"] = Field(
        "row", description="among which weights the lowest scores are sought; a pattern has its own groups"
    )


class PruningMethod:
    """Base of methods that prune layers of a language model.

    Args:
        options: The method's options.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    scope = Scope.LAYER
    stream: Stream

    def __init__(self, options: PruneOptions) -> None:
        self.options = options

    def operations(self, plan: Plan, tokens: int) -> float:
        """Return about how many operations a run takes, given the calibration tokens."""
        if self.stream is Stream.NONE:
            return 0.0
        # Samples run through a block twice: statistics are collected, then the pruned block's output.
        return 4.0 * tokens * sum(layer.ref.numel for layer in plan.compressed)

    def refuse(self, ref: WeightRef, fmt: QuantFormat) -> str | None:
        """Refuse formats, and matrices that the sparsity or the pattern does not fit."""
        if fmt.name != PRUNED:
            return (
                f"method {self.name} prunes and does not round: prune first, then quantize the result; or use "
                "--method sparsegpt"
            )
        return refuse_shape(ref, self.options)


class ScorePruningMethod(PruningMethod):
    """Base of methods that prune the weights with the lowest scores.

    Args:
        options: The method's options.
    """

    options: ScoreOptions

    def keep(self, scores: Tensor) -> Tensor:
        """Return the mask that scores `[out, in]` lead to."""
        if self.options.groups:
            return self.options.groups.choose(scores)
        choose = keep_per_row if self.options.per == "row" else keep_per_tensor
        return choose(scores, self.options.sparsity)


def refuse_shape(ref: WeightRef, options: PruneOptions) -> str | None:
    """Return why a matrix cannot be pruned as asked, or None."""
    rows, columns = ref.matrix or ref.shape[:2]
    if options.groups:
        if columns % options.groups.of:
            return f"{ref.name}: {columns} inputs do not divide into groups of {options.groups.of}"
        return None
    if columns - int(columns * options.sparsity) < 1 or rows * columns - round(rows * columns * options.sparsity) < 1:
        return f"{ref.name}: a sparsity of {options.sparsity:g} leaves nothing of {columns} inputs"
    return None


def masked(weight: Tensor, keep: Tensor) -> Masked:
    """Return the decision that keeps `weight` `[out, in]` where `keep` says so, with +0 elsewhere."""
    return Masked(keep, torch.where(keep, weight, torch.zeros_like(weight)))
