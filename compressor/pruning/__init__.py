"""Pruning: methods that choose which weights become zero, by the names users type.

Add one: a file with the class, its `.md` page beside it and a line here. Methods of kind `language` decide the layers
of a transformer's blocks and run on the engine that quantizes; those of kind `structured`, which remove whole heads and
neurons, and of kind `vision` have runners of their own.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from compressor.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from compressor.methods.base import Method

RUNNERS = {
    "language": "compressor.cli.prune_language:run",
    "structured": "compressor.cli.prune_structured:run",
    "vision": "compressor.cli.prune_vision:run",
}
"""Kind -> the function that carries out `compress prune` for it; it gets the flags."""


@dataclass(frozen=True)
class Pruner:
    """A way to prune.

    Attributes:
        kind: Which runner it has.
        target: `module:Class`.
        summary: One line for `compress list pruners`.
    """

    kind: Literal["language", "structured", "vision"]
    target: str
    summary: str


PRUNERS: dict[str, Pruner] = {
    "beta-rank": Pruner(
        "vision",
        "compressor.vision.beta_rank:BetaRank",
        "Beta-Rank: remove filters by L1 norm times the spread of input over output; image classifiers",
    ),
    "icbs": Pruner(
        "language",
        "compressor.pruning.icbs:ICBS",
        "iCBS: improve a mask by swaps that a second-order model of the loss chooses; any time, any budget",
    ),
    "l1": Pruner(
        "vision", "compressor.vision.l1:L1", "remove the filters with the smallest weights; image classifiers, baseline"
    ),
    "m-fac": Pruner(
        "language",
        "compressor.pruning.mfac:MFAC",
        "M-FAC: the inverse of the empirical Fisher matrix says what a weight costs and how others make up for it",
    ),
    "magnitude": Pruner(
        "language", "compressor.pruning.magnitude:Magnitude", "the smallest weights go; no data, the baseline"
    ),
    "optin": Pruner(
        "structured",
        "compressor.structured.optin:OPTIN",
        "OPTIN: remove whole heads and groups of neurons, to a budget of multiply-adds; the model becomes smaller",
    ),
    "random": Pruner("vision", "compressor.vision.chance:Chance", "remove filters by chance; image classifiers"),
    "sparsegpt": Pruner(
        "language",
        "compressor.pruning.sparsegpt:SparseGPT",
        "SparseGPT: prune input by input and let the weights still to come make up for it; also with a format",
    ),
    "taylor": Pruner(
        "vision",
        "compressor.vision.taylor:Taylor",
        "remove channels whose closing changes the loss least, every class counting the same; image classifiers",
    ),
    "wanda": Pruner(
        "language", "compressor.pruning.wanda:Wanda", "Wanda: weight times the norm of its input, compared per output"
    ),
}


def pruner_class(name: str) -> Any:
    """Return the class of a pruning method; importing it is what makes torch load.

    Raises:
        RecipeError: Unknown name.
    """
    if name not in PRUNERS:
        raise did_you_mean("pruning method", name, PRUNERS)
    module, _, attribute = PRUNERS[name].target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def get_method(name: str, options: Mapping[str, Any]) -> Method:
    """Build a method that quantizes, or one of kind `language` that prunes, with validated options.

    Raises:
        RecipeError: Unknown name, unknown option, or a value out of range.
    """
    from compressor import methods

    if name not in PRUNERS:
        return methods.get_method(name, options)
    if PRUNERS[name].kind != "language":
        what = "prunes vision models" if PRUNERS[name].kind == "vision" else "removes heads and neurons"
        raise RecipeError(f"{name} {what}: it is no step of this kind", "see: compress list pruners")
    return methods.build(name, pruner_class(name), options)
