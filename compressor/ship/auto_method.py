"""The method of `compress auto`: the best one that takes the formats chosen and is estimated to be done in time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.allocation import Allocation, Group
from compressor.api import prepare
from compressor.errors import RecipeError, UnsupportedError
from compressor.estimate import estimate_seconds
from compressor.plan import LayerPlan
from compressor.recipe import Recipe

METHODS: dict[str, dict[str, Any]] = {"flexround": {"scaling": "awq"}, "gptq": {"scaling": "awq"}, "rtn": {}}
"""Methods and their options, the best first: their order in the tables of learned rounding, at any number of bits."""

_LAST = tuple(METHODS)[-1]
"""Is taken however long it takes."""

NOWHERE = Path(".compress-auto")
"""Plans are made for this folder, and never carried out."""


def recipe_of(
    base: Recipe,
    layers: Mapping[str, LayerPlan],
    groups: tuple[Group, ...],
    allocation: Allocation,
    method: str | None,
    minutes: float,
    device: str,
) -> tuple[Recipe, str]:
    """Return the recipe that carries an allocation out, and why it has its method.

    Args:
        base: What the recipe is but for formats and method.
        layers: Tensor on disk -> the layer.
        groups: Layers that get one format.
        allocation: Group -> format.
        method: The user's; None to choose.
        minutes: What compressing may take, estimated.
        device: Where the method runs.

    Raises:
        RecipeError, UnsupportedError: The user's method, or the last one there is, does not take a format.
    """
    by_name = {name: allocation.chosen[group.name].format for group in groups for name in group.members}
    common = Counter(by_name.values()).most_common(1)[0][0]
    kind, _, group_size = common.partition(":")
    overrides = []
    for name in layers:
        if by_name[name] != common:
            other, found, size = by_name[name].partition(":")
            overrides.append({"match": name, "format": other, "group_size": size if found else None})
    update = {"format": kind, "group_size": group_size or None, "overrides": overrides}
    left: list[str] = []
    for candidate in (method,) if method else METHODS:
        options = METHODS.get(candidate, {})
        recipe = Recipe.model_validate({**base.model_dump(), **update, "method": candidate, "options": options})
        try:
            job = prepare(recipe, NOWHERE, device=device)
        except (RecipeError, UnsupportedError) as error:  # a format this method does not round to, say
            if method or candidate == _LAST:
                raise
            left.append(str(error))
            continue
        seconds = estimate_seconds(job.plan, job.method, recipe.calibration, job.skeleton.device)
        if method or seconds <= 60 * minutes or candidate == _LAST:
            given = "".join(f" with {name}={value}" for name, value in options.items())
            said = f"method {candidate}{given}, about {seconds / 60:.0f} minutes here"
            return recipe, said + (", as asked for" if method else "".join(f"; {reason}" for reason in left))
        left.append(f"{candidate} would take {seconds / 60:.0f}, more than the {minutes:g} allowed")
    raise AssertionError
