"""`compress bench DIR --baseline MODEL`."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compressor.cli.flags import Device, Dtype, Json, Quiet, TrustRemoteCode
from compressor.cli.render import STDOUT, RichProgress, print_json, size, table

if TYPE_CHECKING:
    from compressor.evals.speed import Speed, Spread
    from compressor.measure.speed import Benched


def bench(
    model: Annotated[str, typer.Argument(metavar="DIR", help="Checkpoint, or a model by its name.")],
    baseline: Annotated[str | None, typer.Option("--baseline", "-b", help="The original.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated after it.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 1,
    dtype: Dtype = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of each model in turn; medians count.")] = 5,
    device: Device = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Processor threads.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for compress_bench.json.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure tokens per second and memory of a compressed model next to its original, on this machine."""
    from compressor.measure.speed import bench as run

    with RichProgress(quiet) as progress:
        result = run(
            model,
            baseline,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch=batch,
            dtype=dtype,
            repeats=repeats,
            device=device,
            threads=threads,
            output=output,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if json_:
        print_json(result.to_json())
        return
    STDOUT.print(bench_table(result))
    for line in _footer(result):
        STDOUT.print(line, soft_wrap=True, markup=False)


def bench_table(result: Benched) -> Any:
    """Return the table: the original's column, the model's, and how many times faster or smaller that is."""
    sides = [side for side in (result.baseline, result.model) if side]
    names = [Path(name).name for name in (result.baseline_name, result.name) if name]
    ratios = result.ratios
    rows = [
        ["prompt, tokens/s", *(_rate(side.prompt) for side in sides)],
        ["generated, tokens/s", *(_rate(side.decode) for side in sides)],
        ["weights in memory", *(size(side.weight_bytes) for side in sides)],
        ["process before loading", *(size(side.rss_before) for side in sides)],
        ["process after loading", *(size(side.rss_loaded) for side in sides)],
        ["process at most", *(size(side.rss_peak) for side in sides)],
    ]
    if all(side.cuda_peak is not None for side in sides):
        rows.append(["GPU at most", *(size(side.cuda_peak or 0) for side in sides)])
    if ratios:
        marks = [
            f"{ratios['prompt']:.2f}x speed",
            f"{ratios['decode']:.2f}x speed",
            f"{ratios['weights']:.2f}x smaller",
        ]
        rows = [[*row, mark] for row, mark in zip_longest(rows, marks, fillvalue="")]
    return table("medians (slowest-fastest round)", ["", *names, *([""] if ratios else [])], rows)


def _rate(spread: Spread) -> str:
    return f"{spread.median:.1f} ({spread.slowest:.1f}-{spread.fastest:.1f})"


def _footer(result: Benched) -> list[str]:
    """Say what was run, with what, and where."""
    from compressor.evals.bench.machine import sentence

    settings = result.settings
    lines = [
        f"{settings.prompt_tokens} prompt tokens, {settings.new_tokens} new ones, batch {settings.batch}, "
        f"{settings.dtype}, {settings.repeats} rounds",
        _paths(result.name, result.model),
    ]
    if result.baseline and result.baseline_name:
        lines.append(_paths(result.baseline_name, result.baseline))
    lines.append(sentence(result.machine))
    return [*lines, *([f"written: {result.written}"] if result.written else [])]


def _paths(name: str, side: Speed) -> str:
    paths = (
        side.decode_path if side.decode_path == side.prompt_path else f"{side.decode_path}, prompt {side.prompt_path}"
    )
    return f"{Path(name).name}: {paths}, loaded in {side.load_seconds:.1f}s"
