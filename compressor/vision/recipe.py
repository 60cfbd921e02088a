"""What the user asked for when filters are to be removed, validated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compressor.errors import RecipeError, did_you_mean
from compressor.pruning import PRUNERS, pruner_class


class CutRecipe(BaseModel):
    """One run of filter pruning.

    Attributes:
        model: Folder or Hub id of an image classifier.
        method: A pruner of kind `vision`.
        data: Labelled images: folder, `.npz`, or Hub dataset.
        sparsity: Share of the filters to remove; None with `macs`.
        macs: Share of the multiply-adds to keep; None with `sparsity`.
        finetune: Epochs of training after the cut.
        skip: Globs of layers whose filters stay.
        options: Of the method.
        seed: Of everything random.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    method: str
    data: str
    sparsity: float | None = Field(None, ge=0, lt=1)
    macs: float | None = Field(None, gt=0, le=1)
    finetune: int = Field(0, ge=0, le=10_000)
    skip: tuple[str, ...] = ()
    options: dict[str, Any] = Field(default_factory=dict)
    seed: int = Field(0, ge=0)


def make_recipe(**fields: Any) -> CutRecipe:
    """Validate a recipe.

    Raises:
        RecipeError: A value is out of range, or both or neither of `sparsity` and `macs` are given.
    """
    try:
        recipe = CutRecipe(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "recipe"
        raise RecipeError(f"{name} {first['input']!r}: {first['msg']}", "see compress prune --help") from error
    if (recipe.sparsity is None) == (recipe.macs is None):
        raise RecipeError(
            f"{'both' if recipe.macs is not None else 'neither'} of --sparsity and --macs given",
            "say how much goes: --sparsity 0.5 removes half of the filters, --macs 0.5 half of the multiply-adds",
        )
    return recipe


def build_method(name: str, options: Mapping[str, Any]) -> Any:
    """Build a method with validated options.

    Raises:
        RecipeError: Unknown name or option, or a value out of range.
    """
    known = {key: pruner for key, pruner in PRUNERS.items() if pruner.kind == "vision"}
    if name not in known:
        raise did_you_mean("method for vision models", name, known)
    cls = pruner_class(name)
    fields = sorted(cls.Options.model_fields)
    for option in options:
        if option not in fields:
            raise did_you_mean(f"option of {name}", option, fields)
    try:
        return cls(cls.Options(**options))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"option {where} of {name}: {first['msg']}", f"see: compress list pruners {name}") from error
