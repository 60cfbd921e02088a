"""The steps that write a checkpoint: prune and quantize."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from compressor.errors import RecipeError
from compressor.recipe import Recipe
from compressor.report import Progress
from compressor.ship.finished import check_intact, described, finished
from compressor.ship.step import Done, Head, State


class Quantize:
    """`compress quantize`: everything its recipe can say, and `skip` and `set` as its flags say it."""

    name: ClassVar[str] = "quantize"
    writes: ClassVar[bool] = True

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @classmethod
    def build(cls, settings: Mapping[str, Any], head: Head) -> Quantize:
        """Check settings; see `Step`."""
        return cls(_recipe(settings, head))

    def settings(self) -> dict[str, Any]:
        """Return the recipe without what all steps share."""
        return self.recipe.model_dump(mode="json", exclude={"version", "model", "seed", "trust_remote_code"})

    def preflight(self, state: State) -> None:
        """Refuse unknown names."""
        check_names(self.recipe)

    def run(self, state: State, progress: Progress) -> Done:
        """Write the checkpoint, continue an unfinished one, or find that this very one is there."""
        from compressor import api
        from compressor.plan import digest

        recipe = self.recipe.model_copy(update={"model": state.model})
        job = api.prepare(recipe, state.output, device=state.device, force=True)
        self.recipe = job.recipe.model_copy(update={"model": self.recipe.model})
        state.folder = job.out
        if not state.force and (found := finished(job.out)):
            progress.stage(f"looking whether {job.out} is what this step makes")
            calibration = api.calibrate(job) if api.needs_data(job.method, job.recipe) else None
            if found["digest"] != digest(api.digest_parts(job, calibration)):
                raise RecipeError(
                    f"{job.out}: holds a finished checkpoint of another recipe",
                    "overwrite it with --force, or give another folder with -o",
                )
            check_intact(job.out, found)
            return Done(described(found), {"digest": found["digest"]}, kept=True, shown=found)
        report = api.execute(job, force=state.force, progress=progress).to_json()
        return Done(described(report), {"digest": report["digest"]}, shown=report)


class Prune(Quantize):
    """`compress prune` of a language model: `method`, `sparsity` or `pattern`, and what its flags say otherwise."""

    name: ClassVar[str] = "prune"

    @classmethod
    def build(cls, settings: Mapping[str, Any], head: Head) -> Prune:
        """Check settings; `sparsity` and `pattern` are options of the method, as in `compress prune`."""
        from compressor.formats.pruned import PRUNED

        rest = {key: value for key, value in settings.items() if key not in ("sparsity", "pattern")}
        shares = {key: settings[key] for key in ("sparsity", "pattern") if settings.get(key) is not None}
        options = {**(rest.pop("options", None) or {}), **shares}
        return cls(_recipe({"method": "wanda", "format": PRUNED, **rest, "options": options}, head))


def check_names(recipe: Recipe) -> None:
    """Refuse unknown methods, options and formats before a model is read.

    Raises:
        RecipeError: A name is not known, or a group size is not valid.
    """
    from compressor.formats import BUILDERS, parse_group_size
    from compressor.formats.activations import get_attention_format, get_input_format
    from compressor.pruning import get_method

    get_method(recipe.method, recipe.options)
    if recipe.inputs is not None:
        get_input_format(recipe.inputs)
    if recipe.attention is not None:
        get_attention_format(recipe.attention)
    for name, group_size in [(recipe.format, recipe.group_size), *((o.format, o.group_size) for o in recipe.overrides)]:
        if name in BUILDERS:
            parse_group_size(name, group_size)


def _recipe(settings: Mapping[str, Any], head: Head) -> Recipe:
    """Build the recipe that the same flags would give; `skip` and `set` become overrides, in the flags' order."""
    from compressor.api import make_overrides

    rest = {key: value for key, value in settings.items() if key not in ("skip", "set", "overrides")}
    skip, formats = settings.get("skip") or [], settings.get("set") or {}
    if not isinstance(skip, list | tuple) or not isinstance(formats, dict):
        raise RecipeError("skip is a list of globs, set a mapping of globs to formats", "see docs/recipes.md")
    if clash := sorted({"model", "seed", "trust_remote_code"} & set(rest)):
        raise RecipeError(f"{clash[0]} stands at the top of the recipe, not in a step", "move it there")
    if isinstance(rest.get("group_size"), int):
        rest["group_size"] = str(rest["group_size"])
    written = tuple(settings.get("overrides") or ())
    made = make_overrides({str(k): str(v) for k, v in formats.items()}, [str(glob) for glob in skip])
    overrides = (*written, *(override.model_dump() for override in made))
    shared = {"model": head.model, "seed": head.seed, "trust_remote_code": head.trust_remote_code}
    return Recipe.model_validate({**rest, "overrides": overrides, **shared})
