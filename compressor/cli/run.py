"""`compress run RECIPE.yaml`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compressor.cli.flags import Device, Json, Quiet
from compressor.cli.gate import GATE_FAILED, show
from compressor.cli.render import STDERR, STDOUT, RichProgress, duration, print_json, report_table

if TYPE_CHECKING:
    from compressor.ship.run import StepResult


def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file, or a name of: compress list recipes.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Replaces the recipe's model.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Replaces the recipe's folder.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="STEP.KEY=VALUE", help="Changes a setting of a step (repeatable)."),
    ] = None,
    device: Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Overwrite earlier results.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every step, print the resolved recipe.")] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Go through a recipe's steps: prune, quantize, eval, gate, push. Run again, it continues where it was."""
    if quiet or json_:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from compressor.ship.pipeline import read_pipeline
    from compressor.ship.run import Runner

    pipeline = read_pipeline(recipe, model, None if output is None else str(output), set_ or ())
    runner = Runner(pipeline, device=device, force=force)
    runner.preflight()
    if dry_run:
        sys.stdout.write(pipeline.to_yaml())
        return
    results = []
    for index, step in runner.steps():
        if not quiet and not json_:
            STDERR.print(f"step {index + 1} of {len(pipeline.steps)}: {step.name}", soft_wrap=True, markup=False)
        with RichProgress(quiet or json_) as progress:
            results.append(runner.run(index, step, progress))
        if not json_:
            draw(results[-1])
    if json_:
        print_json({"output": str(runner.folder), "steps": [as_json(result) for result in results]})
    if not all(result.done.passed for result in results):
        raise typer.Exit(GATE_FAILED)


def draw(result: StepResult) -> None:
    """Print what a step came to: its table where it has one, and one line."""
    shown: Any = result.done.shown
    if result.name in ("quantize", "prune") and not result.done.kept:
        STDOUT.print(report_table(shown))
    elif result.name == "eval" and not result.done.kept:
        from compressor.cli.evaluate import evaluation_table

        STDOUT.print(evaluation_table(shown))
    elif result.name == "gate":
        show(shown)
        return
    how = "was done already" if result.done.kept else duration(result.seconds)
    STDOUT.print(f"{result.name}: {result.done.summary} ({how})", soft_wrap=True, markup=False)


def as_json(result: StepResult) -> dict[str, Any]:
    """Return a step's result as plain data."""
    done = result.done
    return {"step": result.name, "summary": done.summary, "kept": done.kept, "passed": done.passed, **done.record}
