"""`compress auto MODEL --size 4.5bpw --for vllm`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compressor.cli.flags import (
    CalibrationText,
    Device,
    Force,
    Json,
    Model,
    Output,
    Quiet,
    Seed,
    SeqLen,
    TrustRemoteCode,
)
from compressor.cli.render import STDOUT, RichProgress, print_json, size, table
from compressor.cli.run import as_json, draw

if TYPE_CHECKING:
    from compressor.ship.auto import Found

SHOWN = 8
"""Single formats in the table of alternatives."""


def auto(
    model: Model,
    size_: Annotated[str, typer.Option("--size", help="4.5bpw: bits per compressed weight; 2GB: of all weights.")],
    reader: Annotated[str, typer.Option("--for", help="Who loads the result: vllm or transformers.")] = "vllm",
    method: Annotated[str | None, typer.Option("--method", "-m", help="Instead of the one it would choose.")] = None,
    minutes: Annotated[float, typer.Option(min=0, help="What compressing may take here, estimated.")] = 60.0,
    output: Output = None,
    data: CalibrationText = "python-docs",
    n_samples: Annotated[int, typer.Option(min=1, max=65_536, help="Windows of calibration text.")] = 32,
    seq_len: SeqLen = 512,
    seed: Seed = 0,
    device: Device = "auto",
    force: Force = False,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and choose, but write nothing.")] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose method, format and bits per layer for a size, say why, then do it and measure the result."""
    if quiet or json_:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from compressor.ship.auto import find, parse_size
    from compressor.ship.compressing import Quantize
    from compressor.ship.pipeline import build
    from compressor.ship.run import Runner

    parse_size(size_)
    from compressor.recipe import CalibrationSpec

    spec = CalibrationSpec(data=data, n_samples=n_samples, seq_len=seq_len)
    with RichProgress(quiet or json_) as progress:
        found = find(
            model,
            size_,
            reader=reader,
            method=method,
            minutes=minutes,
            calibration=spec,
            seed=seed,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if not json_:
        show(found)
    if dry_run:
        if json_:
            print_json(found.to_json())
        return
    name = Path(model.partition("@")[0]).name.removesuffix(".gguf")
    out = output or Path(f"{name}-auto-{size_.lower().replace(' ', '')}")
    document = {
        "model": model,
        "output": str(out),
        "seed": seed,
        "trust_remote_code": trust_remote_code,
        "steps": [{"quantize": Quantize(found.recipe).settings()}, {"eval": {"context": found.context}}],
    }
    runner = Runner(build(document), device=device, force=force)
    runner.preflight()
    results = []
    for index, step in runner.steps():
        with RichProgress(quiet or json_) as progress:
            results.append(runner.run(index, step, progress))
        if not json_:
            draw(results[-1])
    if json_:
        print_json({**found.to_json(), "output": str(out), "steps": [as_json(result) for result in results]})


def show(found: Found) -> None:
    """Print what was chosen, what else there was, and why."""
    rows = [["chosen: " + ", ".join(f"{n} x {name}" for name, n in found.counts().items()), *_row(found, None)]]
    cheapest = sorted(found.alternatives, key=lambda name: found.alternatives[name][1])
    rows += [[f"all {name}", *_row(found, name)] for name in cheapest[:SHOWN]]
    title = f"{found.recipe.model}: {size(found.budget)} for compressed weights, {size(found.dense)} stay as they are"
    STDOUT.print(table(title, ["formats", "bits", "weights", "expected KL, rounded to nearest"], rows))
    for reason in found.reasons:
        STDOUT.print(f"- {reason}", soft_wrap=True, markup=False)


def _row(found: Found, name: str | None) -> list[str]:
    chosen = found.allocation
    nbytes, cost = (chosen.nbytes, chosen.cost) if name is None else found.alternatives[name]
    return [f"{8 * nbytes / found.weights:.3f}", size(nbytes + found.dense), f"{cost:.4f}"]
