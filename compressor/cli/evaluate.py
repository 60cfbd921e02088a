"""`compress eval DIR --baseline MODEL`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compressor.cli.flags import Device, Json, Quiet, TrustRemoteCode
from compressor.cli.render import STDOUT, RichProgress, duration, print_json, size, table
from compressor.errors import RecipeError
from compressor.process import peak_rss

if TYPE_CHECKING:
    from compressor.evals.results import Evaluation
    from compressor.evals.scores import Estimate
    from compressor.measure import Evaluated

TEXT_TASKS = ("perplexity", "kl", "routers")
"""Tasks on the text; the names of their metrics say enough."""


def evaluate(
    model: Annotated[str | None, typer.Argument(metavar="DIR", help="Checkpoint, or a model by its name.")] = None,
    baseline: Annotated[str | None, typer.Option("--baseline", "-b", help="The original.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Names separated by commas, see --list."),
    ] = None,
    suite: Annotated[str | None, typer.Option(help="Suite of tasks: its name, or a YAML file.")] = None,
    text: Annotated[str, typer.Option(help="Preset, .txt or .jsonl; presets use their held-out half.")] = "python-docs",
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text to score.")] = 8192,
    context: Annotated[int, typer.Option(min=2, help="Tokens per window, or of a sentence.")] = 1024,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples in lm-eval prompts.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Documents per lm-eval task, or sentences, the first ones.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of few-shot choices.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests per forward pass of lm-eval tasks.")] = 8,
    cache: Annotated[bool, typer.Option("--cache/--no-cache", help="Keep and reuse the original's results.")] = True,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the JSON.")] = None,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    list_: Annotated[bool, typer.Option("--list", help="List tasks and suites, and do nothing else.")] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model, and a compressed one against its original: perplexity, KL divergence, lm-eval tasks."""
    if list_:
        _list(json_)
        return
    if model is None:
        raise RecipeError("no checkpoint is named", "give the folder that compress quantize wrote")
    from compressor.measure import evaluate as run

    with RichProgress(quiet) as progress:
        result = run(
            model,
            baseline,
            tasks=None if tasks is None else tasks.split(","),
            suite=suite,
            text=text,
            max_tokens=max_tokens,
            context=context,
            num_fewshot=num_fewshot,
            limit=limit,
            seed=seed,
            batch_size=batch_size,
            cache=cache,
            output=output,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if json_:
        print_json(result.model.to_json())
        return
    STDOUT.print(evaluation_table(result))
    for line in _footer(result):
        STDOUT.print(line, soft_wrap=True)


def evaluation_table(result: Evaluated) -> Any:
    """Return the table: each metric of both models with its standard error, and the paired difference with its own."""
    from compressor.evals.compare import difference, is_perplexity

    ours, theirs = result.model, result.baseline
    rows = []
    for name, task in ours.tasks.items():
        reference = theirs.tasks.get(name) if theirs else None
        for metric, estimate in task.metrics.items():
            row = [metric if name in TEXT_TASKS else f"{name} {metric}"]
            if theirs:
                known = reference.metrics.get(metric) if reference else None
                change = difference(task, reference, metric) if reference else None
                row += [_number(known), _number(estimate), _change(change, relative=is_perplexity(task, metric))]
            else:
                row.append(_number(estimate))
            rows.append(row)
    names = [Path(side.model.name).name for side in (theirs, ours) if side]
    columns = ["", *names, *(["paired difference"] if theirs else [])]
    return table("± is one standard error", columns, rows)


def _number(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    digits = 3 if abs(estimate.value) >= 10 else 4
    error = "" if estimate.standard_error is None else f" ± {estimate.standard_error:.{digits}f}"
    return f"{estimate.value:.{digits}f}{error}"


def _change(estimate: Estimate | None, relative: bool) -> str:
    if estimate is None:
        return ""
    factor, digits, unit = (100, 2, " %") if relative else (1, 4, "")
    error = "" if estimate.standard_error is None else f" ± {factor * estimate.standard_error:.{digits}f}"
    return f"{factor * estimate.value:+.{digits}f}{error}{unit}"


def _footer(result: Evaluated) -> list[str]:
    """Say what was scored, how, and where the numbers lie."""
    tasks = result.model.tasks
    first = next((name for name in tasks if name in TEXT_TASKS), None)  # the text is the same for all of them
    lines = [_described(name, result.model) for name in tasks if name == first or name not in TEXT_TASKS]
    cached = (result.baseline.timing if result.baseline else {}).get("cached") or []
    if cached:
        lines.append(f"of the original, from the cache: {', '.join(cached)}")
    if (cut := result.model.saturation) is not None:
        most = f", most in {cut['worst']} ({100 * cut['worst_share']:.2g} %)" if cut["worst"] else ""
        lines.append(
            f"{100 * cut['share']:.2g} % of the inputs of {cut['layers']} layers lie beyond their static scales{most}"
        )
    took = duration(result.model.timing["seconds"])
    lines.append(f"{result.model.model.execution_path}, {took}, peak RAM {size(peak_rss())}")
    return [*lines, *(f"written: {path}" for path in result.written)]


def _described(name: str, evaluation: Evaluation) -> str:
    task = evaluation.tasks[name]
    settings = task.settings
    if name in TEXT_TASKS:
        return f"{settings['n_tokens']} predicted tokens of {settings['text']} in windows of {settings['context']}"
    if name == "embeddings":
        return f"{settings['sentences']} sentences of {settings['text']}, mean of up to {settings['max_tokens']} tokens"
    return f"{name}: {len(task.samples)} documents, {settings['num_fewshot']} examples in the prompt"


def _list(as_json: bool) -> None:
    from compressor.evals.tasks import BUILT_IN, suites

    found = {suite.name: suite for suite in suites()}
    if as_json:
        print_json({"tasks": BUILT_IN, "suites": {name: suite.model_dump() for name, suite in found.items()}})
        return
    rows = [[name, summary] for name, summary in BUILT_IN.items()]
    rows += [["FILE.yaml", "a task in lm-eval's format"], ["any other name", "a task of lm-eval (lm-eval ls tasks)"]]
    STDOUT.print(table("tasks (--tasks a,b,c)", ["name", ""], rows, text=True))
    listed = [
        [name, suite.description, ", ".join(entry if isinstance(entry, str) else entry.task for entry in suite.tasks)]
        for name, suite in found.items()
    ]
    STDOUT.print(table("suites (--suite NAME)", ["name", "", "tasks"], listed, text=True))
