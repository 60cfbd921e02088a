"""`compress prune MODEL`: one verb for language and vision models; the method says which."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from compressor.cli.flags import (
    AllowPickle,
    Device,
    DryRun,
    Force,
    Json,
    MethodOptions,
    Output,
    Quiet,
    Seed,
    TrustRemoteCode,
)
from compressor.cli.quantize import parse_options
from compressor.cli.render import STDERR
from compressor.errors import RecipeError, did_you_mean
from compressor.ranks import announced


@dataclass(frozen=True)
class PruneFlags:
    """What was typed. `None` and empty mean: not given, the method's runner has its own default.

    Attributes:
        model: The model argument.
        method: A key of `compressor.pruning.PRUNERS`.
        sparsity: Share of weights that become zero.
        pattern: `N:M`, N of every M inputs are kept.
        macs: Share of the multiply-adds to keep.
        finetune: Epochs of training after the cut.
        format: Format the kept weights are rounded to.
        group_size: Inputs per scale of that format.
        output: Folder to write.
        data: Calibration text, or images.
        n_samples: Calibration samples.
        seq_len: Tokens per sample.
        skip: Globs of tensors that are left alone.
        options: Options of the method, parsed.
        seed: Seed of everything random.
        device: `auto`, `cpu`, `cuda`, ...
        force: Overwrite an earlier result.
        trust_remote_code: Run model code that comes with the checkpoint.
        allow_pickle: Read pickled weights, as plain tensors.
        dry_run: Only print the plan.
        json: One JSON object on stdout.
        quiet: No progress.
    """

    model: str
    method: str
    sparsity: float | None = None
    pattern: str | None = None
    macs: float | None = None
    finetune: int | None = None
    format: str | None = None
    group_size: str | None = None
    output: Path | None = None
    data: str | None = None
    n_samples: int | None = None
    seq_len: int | None = None
    skip: tuple[str, ...] = ()
    options: dict[str, Any] | None = None
    seed: int = 0
    device: str = "auto"
    force: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False
    dry_run: bool = False
    json: bool = False
    quiet: bool = False

    def announce(self) -> None:
        """Say what begins, unless only the result is wanted."""
        if not self.quiet and not self.json:
            STDERR.print(f"compress prune {self.model}: method {self.method}", soft_wrap=True, markup=False)

    def calibration(self) -> dict[str, Any]:
        """Return the settings of calibration text that were given, by name."""
        names = ("data", "n_samples", "seq_len")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def refuse(self, *names: str) -> None:
        """Raise if one of these flags was given: the method has no use for it.

        Raises:
            RecipeError: Names the flag.
        """
        empty = {field.name: field.default for field in fields(self)}
        for name in names:
            if getattr(self, name) != empty[name]:
                raise RecipeError(f"--{name.replace('_', '-')} means nothing for method {self.method}", "leave it out")


def prune(
    model: Annotated[str, typer.Argument(help="Embedded model, checkpoint folder, or Hub id[@revision].")],
    method: Annotated[str, typer.Option("--method", "-m", help="See: compress list pruners.")] = "wanda",
    sparsity: Annotated[
        float | None, typer.Option(help="Share of weights that become zero.", show_default=False)
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(metavar="N:M", help="Keep N of every M inputs, e.g. 2:4.", show_default=False)
    ] = None,
    macs: Annotated[
        float | None, typer.Option(help="Share of the multiply-adds to keep (methods that cut).", show_default=False)
    ] = None,
    finetune: Annotated[
        int | None, typer.Option(help="Epochs of training after the cut (vision).", show_default=False)
    ] = None,
    format: Annotated[
        str | None, typer.Option("--format", "-f", help="Round what is kept, too (sparsegpt).", show_default=False)
    ] = None,
    group_size: Annotated[str | None, typer.Option(help="Inputs per scale of --format.", show_default=False)] = None,
    output: Output = None,
    data: Annotated[
        str | None, typer.Option(help="Calibration text: preset, .txt, .jsonl, Hub dataset; or images.")
    ] = None,
    n_samples: Annotated[int | None, typer.Option(min=1, max=65_536, help="Calibration samples.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=2, max=1_048_576, help="Tokens per sample of text.")] = None,
    skip: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Leave tensors alone (repeatable).")] = None,
    option: MethodOptions = None,
    seed: Seed = 0,
    device: Device = "auto",
    force: Force = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make weights zero, or cut them out, and write the checkpoint as safetensors."""
    from compressor.pruning import PRUNERS, RUNNERS

    if method not in PRUNERS:
        raise did_you_mean("pruning method", method, PRUNERS)
    if quiet or json_:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    flags = PruneFlags(
        model=model,
        method=method,
        sparsity=sparsity,
        pattern=pattern,
        macs=macs,
        finetune=finetune,
        format=format,
        group_size=group_size,
        output=output,
        data=data,
        n_samples=n_samples,
        seq_len=seq_len,
        skip=tuple(skip or ()),
        options=parse_options(option or []) or None,
        seed=seed,
        device=device,
        force=force,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        dry_run=dry_run,
        json=json_,
        quiet=quiet,
    )
    kind, (_, n_processes) = PRUNERS[method].kind, announced()
    if kind != "language" and n_processes > 1:
        raise RecipeError(
            f"compress prune --method {method} runs in one process, but WORLD_SIZE is {n_processes}",
            "run it without torchrun, or unset WORLD_SIZE",
        )
    module, _, name = RUNNERS[kind].partition(":")
    run: Callable[[PruneFlags], None] = getattr(importlib.import_module(module), name)
    run(flags)
