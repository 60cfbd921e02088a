"""`compress eval DIR --baseline MODEL`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from compressor.cli.render import STDOUT, RichProgress, duration, print_json, size, table
from compressor.process import peak_rss


def evaluate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Compressed checkpoint.")],
    baseline: Annotated[str | None, typer.Option("--baseline", "-b", help="The original; default: from DIR.")] = None,
    text: Annotated[str, typer.Option(help="Preset, .txt or .jsonl; presets use their held-out half.")] = "python-docs",
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text to score.")] = 8192,
    context: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 1024,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the JSON; default: DIR.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option(help="Run model code that comes with the checkpoints.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Measure a compressed checkpoint against the original: perplexity, KL divergence, agreement."""
    from compressor.measure import evaluate as run

    with RichProgress(quiet) as progress:
        result = run(
            directory,
            baseline,
            text=text,
            max_tokens=max_tokens,
            context=context,
            output=output,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if json_:
        print_json(result)
    else:
        STDOUT.print(evaluation_table(result))
        took = duration(result["timing"]["seconds"])
        STDOUT.print(
            f"{result['n_tokens']} tokens of {result['text']} in windows of {result['context']}, "
            f"{result['candidate']['execution_path']}, {took}, peak RAM {size(peak_rss())}",
            soft_wrap=True,
        )


def evaluation_table(result: dict[str, Any]) -> Any:
    """Return the table of one comparison."""

    def number(entry: dict[str, float | None], digits: int = 4) -> str:
        error = entry["standard_error"]
        return f"{entry['value']:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")

    base, ours = result["baseline"], result["candidate"]
    rows = [
        ["perplexity", number(base["perplexity"], 3), number(ours["perplexity"], 3)],
        ["nll difference, nats per token", "", number(result["nll_difference"])],
        ["KL(original || compressed), mean", "", number(result["kl"])],
        ["KL, 99th percentile", "", f"{result['kl_p99']:.4f}"],
        ["top-1 agreement", "", number(result["agreement"])],
    ]
    return table("± is one standard error", ["", base["name"], ours["name"]], rows)
