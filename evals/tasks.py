"""What can be asked for: built-in tasks, tasks of lm-eval by name or file, minimal pairs, and suites of these."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compressor.errors import CheckpointError, RecipeError, did_you_mean
from compressor.yaml_text import read_yaml

SUITES = Path(__file__).parent / "suites"
PAIRS = "minimal-pairs"
PAIRS_YAML = SUITES / "tasks" / f"{PAIRS}.yaml"
PAIRS_PER_PHENOMENON = 10
"""Pairs taken of each phenomenon of a user's file; the first ones."""

EMBEDDINGS = "embeddings"
SENTENCES = 512
"""Sentences embedded unless `--limit` says otherwise."""

AGAINST_BASELINE = ("kl", "routers", EMBEDDINGS)
"""Tasks that are computed while both models run, and that the original alone has no result of."""

BUILT_IN = {
    "perplexity": "how well each model predicts a text (--text, --max-tokens, --context)",
    "kl": "KL divergence to the baseline and top-1 agreement on the same text; needs a baseline",
    "routers": "choices of experts: agreement with the baseline's, KL, load; for mixtures of experts, with a baseline",
    EMBEDDINGS: "cosine of sentence embeddings with the baseline's, and nearest neighbours kept; for encoders",
    PAIRS: "40 pairs of sentences that come with the package: which one is right?",
    f"{PAIRS}:FILE.jsonl": "the same for your pairs (uid, good, bad), 10 of each uid",
}
"""Built-in tasks for listings."""


class Kind(Enum):
    """Where a task comes from."""

    TEXT = "text"
    FILE = "file"
    REGISTRY = "registry"


@dataclass(frozen=True)
class TaskSpec:
    """One task as it was asked for.

    Attributes:
        name: `perplexity`, `kl`, the name in lm-eval's registry, or what the user wrote for a file.
        kind: Text tasks are computed here, the others by lm-eval.
        path: The task's YAML, of `FILE` tasks.
        pairs: The .jsonl that replaces the data of the minimal-pairs task.
        num_fewshot: Examples in the prompt; None leaves it to the task.
        limit: First documents to use (of each phenomenon for minimal pairs, of each subtask for groups); None for all.
    """

    name: str
    kind: Kind
    path: Path | None = None
    pairs: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None


class _Entry(BaseModel):
    """One line of a suite."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str = Field(min_length=1)
    num_fewshot: int | None = Field(default=None, ge=0)
    limit: int | None = Field(default=None, ge=1)


class Suite(BaseModel):
    """A named list of tasks with settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    description: str = ""
    tasks: tuple[_Entry | str, ...] = Field(min_length=1)


def choose(
    names: Sequence[str] | None,
    suite: str | None,
    *,
    has_baseline: bool,
    has_experts: bool = False,
    headless: bool = False,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> tuple[TaskSpec, ...]:
    """Turn what the user asked for into tasks, in that order: the suite's first, then the named ones.

    Args:
        names: Task names and paths; None means none beside a suite, else perplexity, and KL if there is a baseline, and
            routers if there are experts too; for models without a head the cosine of embeddings.
        suite: Name of a suite or path of its YAML.
        has_baseline: Whether there is a model to compare with.
        has_experts: Whether the models are mixtures of experts.
        headless: Whether the model is one without a head, which predicts no tokens.
        num_fewshot: Overrides that of every lm-eval task.
        limit: Overrides that of every lm-eval task.

    Raises:
        RecipeError: An unknown suite, a suite that is not valid, a task named twice, or KL without a baseline.
        CheckpointError: A file is missing or unreadable.
    """
    chosen = list(_of_suite(read_suite(suite), Path(suite).parent)) if suite else []
    if names is None and not suite:
        names = ("perplexity", "kl") if has_baseline else ("perplexity",)
        names = (*names, "routers") if has_baseline and has_experts else names
        names = (EMBEDDINGS,) if headless else names
    chosen += [_spec(name, Path()) for name in names or ()]
    if not chosen:
        raise RecipeError("no task is named", "give --tasks perplexity, or see compress eval --list")
    for spec in chosen:
        if [other.name for other in chosen].count(spec.name) > 1:
            raise RecipeError(f"task {spec.name} is named twice", "name it once")
    for spec in chosen:
        if spec.name in AGAINST_BASELINE and not has_baseline:
            raise RecipeError(
                f"{spec.name} compares with a baseline and there is none", "name the original with --baseline"
            )
        if spec.name == "routers" and not has_experts:
            raise RecipeError("routers: the model has no experts", "leave the task out")
        if headless != (spec.name == EMBEDDINGS):
            problem = "predicts no tokens" if headless else "has a head: what it predicts is what to compare"
            raise RecipeError(f"{spec.name}: the model {problem}", f"use --tasks {EMBEDDINGS if headless else 'kl'}")
    return tuple(_overridden(spec, num_fewshot, limit) for spec in chosen)


def read_suite(name: str) -> Suite:
    """Read a suite by its name or from a YAML file.

    Raises:
        RecipeError: Unknown, or not a valid suite.
        CheckpointError: The file cannot be read.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = SUITES / f"{name}.yaml"
        if not path.is_file():
            raise did_you_mean("suite", name, (suite.name for suite in suites()))
    try:
        return Suite.model_validate(read_yaml(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}", "check the path") from error
    except ValidationError as error:  # a ValueError, too
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the content"
        raise RecipeError(f"{path}: {where}: {first['msg']}", "a suite has name, description and tasks") from error
    except ValueError as error:
        raise RecipeError(f"{path}: not YAML: {error}", "see docs/evaluation.md") from error


def suites() -> list[Suite]:
    """Return the suites that come with the package."""
    return [Suite.model_validate(read_yaml(path)) for path in sorted(SUITES.glob("*.yaml"))]


def _of_suite(suite: Suite, folder: Path) -> Iterable[TaskSpec]:
    for entry in suite.tasks:
        if isinstance(entry, str):
            yield _spec(entry, folder)
        else:
            yield _overridden(_spec(entry.task, folder), entry.num_fewshot, entry.limit)


def _spec(name: str, folder: Path) -> TaskSpec:
    """Tell by its looks what a task is; paths are relative to `folder`."""
    name = name.strip()
    if name in ("perplexity", *AGAINST_BASELINE):
        return TaskSpec(name, Kind.TEXT)
    if name == PAIRS:
        return TaskSpec(name, Kind.FILE, path=PAIRS_YAML)
    if name.startswith(f"{PAIRS}:"):
        pairs = folder / name.removeprefix(f"{PAIRS}:")
        return TaskSpec(f"{PAIRS}:{pairs.stem}", Kind.FILE, PAIRS_YAML, pairs, limit=PAIRS_PER_PHENOMENON)
    if name.endswith((".yaml", ".yml")):
        return TaskSpec(name, Kind.FILE, path=folder / name)
    if not name:
        raise RecipeError("a task name is empty", "separate tasks by one comma")
    return TaskSpec(name, Kind.REGISTRY)


def _overridden(spec: TaskSpec, num_fewshot: int | None, limit: int | None) -> TaskSpec:
    """Replace settings that are given; text tasks have none of them, but embeddings have so many sentences."""
    if spec.name == EMBEDDINGS:
        return replace(spec, limit=spec.limit if limit is None else limit)
    if spec.kind is Kind.TEXT:
        return spec
    return replace(
        spec,
        num_fewshot=spec.num_fewshot if num_fewshot is None else num_fewshot,
        limit=spec.limit if limit is None else limit,
    )
