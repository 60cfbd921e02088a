"""What a rule is judged on: finding the task and metric it names, and refusing evaluations that cannot be compared."""

from __future__ import annotations

import math
from collections.abc import Mapping

from compressor.errors import RecipeError
from compressor.evals.paired import safe_exp
from compressor.evals.results import Evaluation
from compressor.evals.scores import TaskResult

ALIASES = {"ppl": "perplexity", "nll": "perplexity.nll", "agreement": "kl.agreement"}
"""Short names; a task of that very name in the evaluation comes first."""

MEASURED_AGAINST_BASELINE = ("kl", "routers", "embeddings")
"""The task whose values compare the model with its own baseline."""


def resolve(name: str, tasks: Mapping[str, TaskResult]) -> tuple[str, str]:
    """Find the task and metric that a rule names.

    Raises:
        RecipeError: There is no such task or metric, or several could be meant.
    """
    for full in (name, ALIASES.get(name, name)):
        if task := _task(full, tasks):
            return task, _main_metric(task, tasks[task])
        for dot in (i for i, letter in enumerate(full) if letter == "." and 0 < i < len(full) - 1):
            task, metric = _task(full[:dot], tasks), full[dot + 1 :]
            if task and metric in tasks[task].metrics:
                return task, metric
            if task:
                raise RecipeError(
                    f"task {task!r} has no metric {metric!r}", f"it has: {', '.join(sorted(tasks[task].metrics))}"
                )
    known = ", ".join(sorted(tasks)) or "none"
    raise RecipeError(f"the new evaluation has no task {name!r}", f"its tasks: {known}; evaluate again with --tasks")


def _task(name: str, tasks: Mapping[str, TaskResult]) -> str | None:
    """Return the task of that name; of tasks called `KIND:FILE`, the only one of that file, or of that kind.

    The beginning of the file's name will do: `blimp` is `minimal-pairs:blimp-a`.
    """
    if name in tasks or ALIASES.get(name) in tasks:
        return name if name in tasks else ALIASES[name]
    parts = {task: task.partition(":") for task in tasks if ":" in task}
    for found in (
        [task for task, (_, _, file) in parts.items() if file == name],
        [task for task, (_, _, file) in parts.items() if name and file.startswith(name)],
        [task for task, (kind, _, _) in parts.items() if kind == name],
    ):
        if len(found) > 1:
            raise RecipeError(f"{name!r} could be {' or '.join(sorted(found))}", "write the task's full name")
        if found:
            return found[0]
    return None


def _main_metric(name: str, task: TaskResult) -> str:
    if name in task.metrics:
        return name
    if len(task.metrics) != 1:
        names = sorted(task.metrics)
        raise RecipeError(
            f"task {name!r} has {len(names)} metrics", f"write {' or '.join(f'{name}.{m}' for m in names)}"
        )
    return next(iter(task.metrics))


def check_comparable(task: str, before: TaskResult, after: TaskResult, seeds: tuple[int, int]) -> None:
    """Check that both models were asked the same in the same way.

    Raises:
        RecipeError: Versions, settings, or seeds of few-shot examples differ.
    """
    ours, theirs = ({"version": r.version, **r.settings} for r in (after, before))
    if "text_sha256" in ours:  # what the text is, whatever the file was called
        ours["text"] = theirs["text"] = ""
    if ours.get("num_fewshot"):
        theirs["seed"], ours["seed"] = seeds
    for name in sorted(ours.keys() | theirs.keys()):
        old, now = theirs.get(name), ours.get(name)
        if old != now:
            raise RecipeError(
                f"task {task!r} was run with {name} {old} for the baseline and {now} for the new model",
                "evaluate both with the same settings",
            )


def check_reference(baseline: Evaluation, new: Evaluation) -> None:
    """Check that divergences were measured against the baseline, or against what the baseline's were.

    Raises:
        RecipeError: They were measured against another model.
    """
    known = {model.fingerprint for model in (baseline.model, baseline.baseline) if model is not None}
    if new.baseline is None or new.baseline.fingerprint not in known:
        name = "nothing" if new.baseline is None else new.baseline.name
        raise RecipeError(
            f"the new model was measured against {name}, not against {baseline.model.name} of the baseline's file",
            "give the evaluation of the model that was named with --baseline",
        )


def sample_column(task: str, metric: str, result: TaskResult) -> str:
    """Return the samples a metric is computed from: its own, or log-likelihoods for a perplexity.

    Raises:
        RecipeError: It has none.
    """
    values = result.samples.values
    if metric in values:
        return metric
    if metric.endswith("perplexity") and "nll" in values:
        return "nll"
    raise RecipeError(
        f"{task}.{metric} is kept without samples, so there is no confidence bound to judge by",
        f"judge one of: {', '.join(sorted(f'{task}.{name}' for name in values))}",
    )


def check_mean(task: str, metric: str, result: TaskResult, mean: float, exponential: bool) -> None:
    """Check that the metric is the mean of its samples; only then do their statistics say anything about it.

    Raises:
        RecipeError: It is not.
    """
    value, expected = result.metrics[metric].value, safe_exp(mean) if exponential else mean
    if not math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-9):
        raise RecipeError(
            f"{task}.{metric} is {value:.6g}, but its samples give {expected:.6g}: it is no mean over documents",
            "judge a metric that is one",
        )
