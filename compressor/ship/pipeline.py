"""What `compress run` reads: a model and the steps it goes through, checked before anything runs.

A recipe is YAML: `model`, and `steps`, each a mapping of one step's name to its settings. Flags change entries of the
same document before it is checked, so that both say the same thing in the same words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from compressor.errors import RecipeError, did_you_mean
from compressor.ship.step import Head, Step
from compressor.ship.steps import STEPS
from compressor.yaml_text import parse_yaml, read_yaml

RECIPES = Path(__file__).parent / "recipes"
"""Recipes that come with the package."""


class Document(BaseModel):
    """The YAML document: `Head` with its steps, in the short form users write."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = Field(1, ge=1, le=1, description="version of this schema")
    description: str = Field("", description="one line for listings")
    model: str | None = Field(None, min_length=1, description="what compress quantize takes as MODEL")
    output: str | None = Field(None, min_length=1, description="folder of the result")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="seed of everything random")
    trust_remote_code: bool = Field(False, description="run model code that comes with the checkpoint")
    steps: tuple[tuple[str, dict[str, Any]], ...] = Field(min_length=1, description="what is done, in order")

    @field_validator("steps", mode="before")
    @classmethod
    def _pairs(cls, value: object) -> object:
        return [_pair(step) for step in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Pipeline:
    """A recipe that was checked.

    Attributes:
        head: What all steps share.
        output: The folder of the result; None: the first step names it as `compress quantize` does.
        steps: In order; those that write a checkpoint come first.
    """

    head: Head
    output: Path | None
    steps: tuple[Step, ...]

    def to_yaml(self) -> str:
        """Return the resolved recipe: every setting with its value, so that running it again does the same."""
        document = {
            "version": 1,
            "model": self.head.model,
            "output": None if self.output is None else str(self.output),
            "seed": self.head.seed,
            "trust_remote_code": self.head.trust_remote_code,
            "steps": [{step.name: step.settings()} for step in self.steps],
        }
        return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)


def read_pipeline(
    source: str | Path, model: str | None = None, output: str | None = None, changes: Sequence[str] = ()
) -> Pipeline:
    """Read a recipe and check every step of it.

    Args:
        source: A YAML file, or the name of a recipe that comes with the package. The `compress_recipe.json` that
            `compress quantize` leaves beside its result is a recipe of one step.
        model: Replaces the recipe's model.
        output: Replaces the recipe's folder.
        changes: `STEP.KEY=VALUE`, as in `quantize.method=gptq`; values are read as YAML. Keys may go deeper.

    Raises:
        RecipeError: Unreadable, no such recipe, or something in it is not valid; the message says where.
    """
    path = find_recipe(str(source))
    document = _load(path)
    for key, value in (("model", model), ("output", output)):
        if value is not None:
            document[key] = value
    for change in changes:
        _change(document, change)
    return build(document, str(path))


def build(document: Mapping[str, Any], where: str = "recipe") -> Pipeline:
    """Check a document and every step of it.

    Args:
        document: What the YAML says.
        where: What errors call it.

    Raises:
        RecipeError: Something in it is not valid.
    """
    try:
        read = Document.model_validate(document)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_explained(error)}", "see docs/recipes.md") from error
    if read.model is None:
        raise RecipeError(f"{where}: it names no model", "give one with --model")
    head = Head(read.model, read.seed, read.trust_remote_code)
    steps: list[Step] = []
    for index, (name, settings) in enumerate(read.steps):
        if name not in STEPS:
            raise did_you_mean("step", name, STEPS)
        try:
            steps.append(STEPS[name].build(settings, head))
        except ValidationError as error:
            raise RecipeError(
                f"{where}: step {index + 1}, {name}: {_explained(error)}", "see docs/recipes.md"
            ) from error
        except RecipeError as error:
            raise RecipeError(f"{where}: step {index + 1}, {name}: {error.message}", error.hint) from error
    _check_order(steps, read.output, where)
    return Pipeline(head, None if read.output is None else Path(read.output), tuple(steps))


def find_recipe(name: str) -> Path:
    """Return the file of a recipe given by path, or by the name of one that comes with the package.

    Raises:
        RecipeError: There is no such file and no such name.
    """
    if Path(name).is_file():
        return Path(name)
    if (RECIPES / f"{name}.yaml").is_file():
        return RECIPES / f"{name}.yaml"
    if Path(name).suffix in (".yaml", ".yml", ".json") or "/" in name:
        raise RecipeError(f"{name}: there is no such file", "see: compress list recipes")
    raise did_you_mean("recipe", name, shipped())


def shipped() -> dict[str, str]:
    """Return name -> description of the recipes that come with the package."""
    return {path.stem: str(_load(path).get("description", "")) for path in sorted(RECIPES.glob("*.yaml"))}


def _load(path: Path) -> dict[str, Any]:
    try:
        data = read_yaml(path)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}", "see: compress list recipes") from error
    except ValueError as error:
        raise RecipeError(f"{path}: not YAML: {error}", "see docs/recipes.md") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: not a recipe: it needs model and steps", "see docs/recipes.md")
    if "method" in data and "steps" not in data:
        return _of_one_step(data)
    return data


def _of_one_step(saved: dict[str, Any]) -> dict[str, Any]:
    """Turn the recipe that lies beside a result into one that makes it again."""
    shared = ("model", "seed", "trust_remote_code")
    settings = {key: value for key, value in saved.items() if key not in (*shared, "version", "source_revision")}
    head = {key: saved[key] for key in shared if key in saved}
    if revision := saved.get("source_revision"):
        head["model"] = f"{str(head.get('model')).partition('@')[0]}@{revision}"
    return {"version": 1, **head, "steps": [{"quantize": settings}]}


def _pair(step: object) -> tuple[str, Any]:
    """Turn `{name: settings}` or a bare name into name and settings."""
    if isinstance(step, str):
        return step, {}
    if isinstance(step, dict) and len(step) == 1:
        name, settings = next(iter(step.items()))
        return str(name), {} if settings is None else settings
    raise ValueError(f"{step!r} is not one step; write `- quantize: {{method: gptq}}`")


def _change(document: dict[str, Any], change: str) -> None:
    """Carry out one `STEP.KEY=VALUE`.

    Raises:
        RecipeError: It is not written like that, or names no step of this recipe, or one that comes twice.
    """
    path, found, text = change.partition("=")
    keys = path.split(".")
    if not found or len(keys) < 2 or not all(keys):
        raise RecipeError(f"--set {change!r} is not STEP.KEY=VALUE", "for example --set quantize.method=gptq")
    try:
        value = parse_yaml(text)
    except ValueError:
        value = text
    steps = list(document.get("steps") or ())
    try:
        names = [_pair(step)[0] for step in steps]
    except ValueError as error:
        raise RecipeError(f"--set {change!r}: {error}", "see docs/recipes.md") from error
    if names.count(keys[0]) != 1:
        many = "comes more than once" if keys[0] in names else "is no step of this recipe"
        raise RecipeError(f"--set {change!r}: {keys[0]!r} {many}", "edit the recipe instead")
    at = names.index(keys[0])
    steps[at] = {keys[0]: _with(_pair(steps[at])[1], keys[1:], value)}
    document["steps"] = steps


def _with(settings: object, keys: Sequence[str], value: object) -> object:
    """Return settings with one value, maybe deep inside, replaced."""
    if not keys:
        return value
    place = dict(settings) if isinstance(settings, dict) else {}
    place[keys[0]] = _with(place.get(keys[0]), keys[1:], value)
    return place


def _check_order(steps: Sequence[Step], output: str | None, where: str) -> None:
    """Refuse steps that could only fail: nothing to evaluate, judge or upload, or a result written over."""
    names = [step.name for step in steps]
    writers = [index for index, step in enumerate(steps) if step.writes]
    if not writers or writers != list(range(len(writers))):
        raise RecipeError(f"{where}: steps that write a checkpoint come first, but it has {', '.join(names)}")
    if len(writers) > 1 and output is None:
        raise RecipeError(
            f"{where}: {len(writers)} steps write a checkpoint, and it names no output", "give one with -o"
        )
    if "gate" in names and "eval" not in names[: names.index("gate")]:
        raise RecipeError(f"{where}: gate judges what eval measured, and there is no eval before it", "add `- eval`")
    for name in ("eval", "gate", "push"):
        if names.count(name) > 1:
            raise RecipeError(f"{where}: {name} comes {names.count(name)} times", "once is enough")
    if "push" in names and names[-1] != "push":
        raise RecipeError(f"{where}: push must be the last step, but it has {', '.join(names)}")


def _explained(error: ValidationError) -> str:
    """Say in one line what the first problem is and where."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    problem = first["msg"].removeprefix("Value error, ")
    return f"{where}: {problem}" if where else problem
