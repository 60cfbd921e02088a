"""What methods that decide how inputs are rounded state beforehand; others leave it to the recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from compressor.calibration.stats import Statistic
from compressor.formats.activations import InputFormat
from compressor.methods.base import Method
from compressor.plan import Fold, WeightRef


@dataclass(frozen=True)
class InputSite:
    """A layer whose inputs are to be rounded.

    Attributes:
        ref: Its weight.
        fold: The place in front of it where factors per channel can go, or None.
        norm: Name of the norm that gives its input where that norm cannot be touched, as its output also goes on along
            the residual (blocks that normalize after adding); else None.
    """

    ref: WeightRef
    fold: Fold | None
    norm: str | None = None


@runtime_checkable
class InputMethod(Method, Protocol):
    """A method that treats inputs in its own way, at some layers at least."""

    def input_format(self, wanted: str | None, weights: str | None) -> str | None:
        """Return the name of the format of inputs.

        Args:
            wanted: What the recipe asks for, or None.
            weights: The format of weights it asks for, or None.

        Raises:
            RecipeError: The method cannot work with that.
        """
        ...

    def input_stats(self, fmt: InputFormat) -> tuple[Statistic, ...]:
        """Return the statistics to collect for inputs of this format, beside those for weights."""
        ...

    def steps(self, fmt: InputFormat, site: InputSite) -> tuple[dict[str, object], ...]:
        """Return what will happen to the layer's input, in order, as JSON; empty leaves it to the recipe's format.

        The method's decision for the layer then carries operations of exactly this description.
        """
        ...
