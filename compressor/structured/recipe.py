"""What the user asked for when heads and neurons are to be removed, validated."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compressor.errors import RecipeError, did_you_mean
from compressor.methods import build
from compressor.pruning import PRUNERS, pruner_class
from compressor.recipe import CalibrationSpec


class StructuredRecipe(BaseModel):
    """One run of structured pruning.

    Attributes:
        model: Folder, embedded name or Hub id of a language model.
        method: A pruner of kind `structured`.
        sparsity: Share of the weights of the blocks' linear layers to remove; None with `macs`.
        macs: Share of the blocks' multiply-adds to keep; None with `sparsity`.
        skip: Globs of modules that stay whole.
        options: Of the method.
        calibration: The text that is looked at.
        seed: Of everything random.
        trust_remote_code: Run model code that comes with the checkpoint.
        allow_pickle: Read pickled weights, as plain tensors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    method: str = "optin"
    sparsity: float | None = Field(None, ge=0, lt=1)
    macs: float | None = Field(None, gt=0, le=1)
    skip: tuple[str, ...] = ()
    options: dict[str, Any] = Field(default_factory=dict)
    calibration: CalibrationSpec = Field(default_factory=CalibrationSpec)
    seed: int = Field(0, ge=0)
    trust_remote_code: bool = False
    allow_pickle: bool = False


def make_recipe(**fields: Any) -> StructuredRecipe:
    """Validate a recipe.

    Raises:
        RecipeError: A value is out of range, or both or neither of `sparsity` and `macs` are given.
    """
    try:
        recipe = StructuredRecipe(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "recipe"
        raise RecipeError(f"{name} {first['input']!r}: {first['msg']}", "see compress prune --help") from error
    if (recipe.sparsity is None) == (recipe.macs is None):
        raise RecipeError(
            f"{'both' if recipe.macs is not None else 'neither'} of --sparsity and --macs given",
            "say how much goes: --macs 0.7 keeps 70 % of the multiply-adds, --sparsity 0.3 removes 30 % of the weights",
        )
    return recipe


def build_method(recipe: StructuredRecipe) -> Any:
    """Build a recipe's method with validated options.

    Raises:
        RecipeError: Unknown name or option, or a value out of range.
    """
    known = {name: pruner for name, pruner in PRUNERS.items() if pruner.kind == "structured"}
    if recipe.method not in known:
        raise did_you_mean("method that removes heads and neurons", recipe.method, known)
    return build(recipe.method, pruner_class(recipe.method), recipe.options)
