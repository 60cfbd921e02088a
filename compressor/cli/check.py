"""`compress check DIR [--for READER]`, and without `DIR` what this machine is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from compressor.cli.flags import Json, TrustRemoteCode
from compressor.cli.render import STDOUT, RichProgress, duration, print_json, table
from compressor.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from compressor.check import CheckReport, Finding
    from compressor.check.run import Checked

READERS = ("transformers", "vllm")
SHOWN = 5
"""Findings of one check that are shown; `--json` has all of them."""
_STYLES = {"ok": "green", "error": "bold red", "warning": "yellow", "info": "cyan", "skipped": "dim"}
_MARKS = {"ok": "ok", "error": "ERROR", "warning": "warn", "skipped": "-"}


def check(
    directory: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR]", help="Checkpoint folder; without one: this machine, for bug reports."),
    ] = None,
    reader: Annotated[
        str | None,
        typer.Option("--for", metavar="READER", help="transformers or vllm: what it cannot load is an error."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Do not load it in fresh processes.")] = False,
    device: Annotated[str, typer.Option(help="Where kernels would run: auto, cpu, cuda, ...")] = "auto",
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; show only what is wrong.")] = False,
) -> None:
    """Check a finished checkpoint: can it be trusted, and who can load it. Ends with 7 if it cannot be trusted.

    Without a folder it reports versions, devices, kernels and free space, as Markdown.
    """
    if directory is None:
        if reader is not None or quick:
            raise RecipeError(f"{'--for' if reader else '--quick'} needs a checkpoint folder", "compress check DIR")
        doctor(device, json_)
        return
    if reader not in (None, *READERS):
        raise did_you_mean("reader", str(reader), READERS)
    from compressor.check import check as run
    from compressor.environment import pick_device

    with RichProgress(quiet) as progress:
        report = run(
            directory,
            reader=reader,  # type: ignore[arg-type]
            quick=quick,
            device=pick_device(device),
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if json_:
        print_json(report.to_json())
    else:
        show(report, quiet)
    report.raise_for_errors()


def doctor(device: str, json_: bool) -> None:
    """Print what this machine and installation are."""
    from compressor.check.doctor import examine
    from compressor.environment import pick_device

    environment = examine(pick_device(device))
    if json_:
        print_json(environment.to_json())
    else:
        sys.stdout.write(environment.to_markdown() + "\n")  # not drawn: it is to be pasted


def show(report: CheckReport, quiet: bool) -> None:
    """Print checks by group, then the kernels, then the verdict."""
    stored = ", ".join(f"{count} modules {text}" for text, count in report.stored.items()) or "nothing compressed"
    STDOUT.print(f"{report.path}: {report.container}, {stored}", soft_wrap=True, markup=False)
    group = ""
    for checked in report.checks:
        if quiet and checked.status in ("ok", "skipped"):
            continue
        if checked.check.group != group:
            group = checked.check.group
            STDOUT.print(Text(group, style="bold"))
        _show_check(checked, quiet)
    if report.kernels and not quiet:
        STDOUT.print(kernel_table(report))
    counts = report.to_json()["counts"]
    reader = f" for {report.reader}" if report.reader else ""
    verdict = "can be trusted" if report.ok else "cannot be trusted"
    STDOUT.print(
        Text(
            f"{verdict}{reader}: {counts['error']} errors, {counts['warning']} warnings, {duration(report.seconds)}",
            style="bold green" if report.ok else "bold red",
        ),
        soft_wrap=True,
    )


def kernel_table(report: CheckReport) -> object:
    """Return the table of layers and the kernels that would run them."""
    rows = [
        [
            row.pattern,
            f"{row.count} x {row.shape[0]}x{row.shape[1]} {row.format}",
            ", ".join(map(str, row.m)),
            row.kernel or "none",
            "\n".join(f"{name}: {why}" for name, why in row.others.items()) or "there is no other",
        ]
        for row in report.kernels
    ]
    title = f"kernels on {report.device}, activations {report.dtype}"
    return table(title, ["layers", "stored as", "rows", "kernel", "why not the others"], rows, text=True)


def _show_check(checked: Checked, quiet: bool) -> None:
    line = Text.assemble(
        "  ",
        (f"{_MARKS[checked.status]:<5} ", _STYLES[checked.status]),
        (f"{checked.check.id}  ", ""),
        (checked.skipped or checked.check.title, "dim"),
    )
    STDOUT.print(line, soft_wrap=True)
    found = [finding for finding in checked.findings if not quiet or finding.severity != "info"]
    for finding in found[:SHOWN]:
        _show_finding(finding)
    if len(found) > SHOWN:
        STDOUT.print(f"        ... and {len(found) - SHOWN} more (--json lists all)")


def _show_finding(finding: Finding) -> None:
    style = _STYLES[finding.severity]
    STDOUT.print(Text.assemble("        ", (f"{finding.severity}: ", style), str(finding)), soft_wrap=True)
    if finding.hint:
        STDOUT.print(Text(f"          {finding.hint}", style="dim"), soft_wrap=True)
