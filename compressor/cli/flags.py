"""Arguments and flags that mean the same in more than one command; their defaults stand where they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Embedded model, checkpoint folder, GGUF file, or Hub id[@revision].")]

CalibrationText = Annotated[str, typer.Option(help="Calibration text: preset, .txt, .jsonl, or Hub dataset.")]

SeqLen = Annotated[int, typer.Option(min=2, max=1_048_576, help="Tokens per window.")]

MethodOptions = Annotated[
    list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Option of the method (repeatable).")
]

Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write.", show_default=False)]

Force = Annotated[bool, typer.Option("--force", help="Overwrite an earlier result.")]

Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]

Dtype = Annotated[str, typer.Option(help="auto (as DIR is stored), float32, bfloat16 or float16.")]

TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")
]

AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read pickled weights, as plain tensors; runs no code in them.")
]

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan; read no weights.")]

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
