"""AWQ's factors in front of other methods: the option `scaling` of those that round or learn by themselves."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compressor.calibration.stats import Statistic
from compressor.formats.base import QuantFormat
from compressor.methods.awq import AWQ
from compressor.methods.base import MethodOptions
from compressor.methods.scaling import Factors, FoldSite
from compressor.plan import FoldKind


class ScalingOptions(MethodOptions):
    """Whether factors move before weights are rounded."""

    scaling: Literal["off", "awq"] = Field(
        "off",
        description="awq: before rounding, move AWQ's factors per channel out of the weights into the operation before",
    )


class Scaled:
    """A method that moves AWQ's factors first if its options say so.

    Derived classes return what they need themselves through `with_factor_stats`.
    """

    options: ScalingOptions

    @property
    def folds(self) -> tuple[FoldKind, ...]:
        """Where factors move: where AWQ moves them, or nowhere."""
        return AWQ.folds if self.options.scaling == "awq" else ()

    def fold(self, site: FoldSite) -> Factors:
        """Choose the factors of one fold as AWQ does."""
        return AWQ().fold(site)

    def with_factor_stats(self, own: tuple[Statistic, ...], fmt: QuantFormat) -> tuple[Statistic, ...]:
        """Return a method's own statistics and those that factors are chosen by, if any are; each once."""
        return tuple(dict.fromkeys((*own, *(AWQ().stats(fmt) if self.folds else ()))))
