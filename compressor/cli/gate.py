"""`compress gate BASE.json NEW.json --rule "ppl <= +2%"`."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.text import Text

from compressor.cli.flags import Json
from compressor.cli.render import STDOUT, print_json, table
from compressor.errors import disk_error
from compressor.files import REPORT, replace_text

if TYPE_CHECKING:
    from rich.table import Table

    from compressor.evals.gate import GateResult

GATE_FAILED = 3
"""Exit code of a gate that failed: a verdict, not an error."""

STYLES = {"pass": "green", "fail": "bold red", "inconclusive": "yellow"}


def gate(
    base: Annotated[Path, typer.Argument(metavar="BASE.json", help="Evaluation of the baseline.")],
    new: Annotated[Path, typer.Argument(metavar="NEW.json", help="Evaluation of the model to judge.")],
    rule: Annotated[
        list[str] | None, typer.Option(metavar="RULE", help="Such as 'ppl <= +2%' (repeatable; see docs/gate.md).")
    ] = None,
    rules: Annotated[Path | None, typer.Option(metavar="FILE", help="Text file with one rule per line.")] = None,
    confidence: Annotated[float, typer.Option(help="Of each one-sided bound.")] = 0.95,
    strict: Annotated[bool, typer.Option("--strict", help="Inconclusive rules fail the gate.")] = False,
    by_group: Annotated[
        bool, typer.Option("--by-group", help="Independent units are groups (subtasks), not documents.")
    ] = False,
    junit: Annotated[Path | None, typer.Option(metavar="PATH", help="Write JUnit XML.")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="PATH", help="Write a Markdown summary.")] = None,
    json_: Json = False,
) -> None:
    """Judge an evaluation against a baseline's: exit 0 if it passes, 3 if it does not."""
    from compressor.evals import gate_report
    from compressor.evals.gate import gate as judge
    from compressor.evals.results import Evaluation
    from compressor.evals.rules import parse_rule, read_rules
    from compressor.evals.verdict import write_verdict

    wanted = [*(parse_rule(text) for text in rule or ()), *(read_rules(rules) if rules else ())]
    result = judge(
        Evaluation.read(base), Evaluation.read(new), wanted, confidence=confidence, strict=strict, by_group=by_group
    )
    if (new.parent / REPORT).is_file():
        write_verdict(new.parent, result)
    if json_:
        print_json(result.to_json())
    else:
        show(result)
    if junit:
        write(junit, gate_report.junit(result))
    summary = gate_report.markdown(result)
    if markdown:
        write(markdown, summary)
    if step_summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        append(Path(step_summary), summary)
    if not result.passed:
        raise typer.Exit(GATE_FAILED)


def show(result: GateResult) -> None:
    """Print the table, what is special about the data, and the outcome."""
    from compressor.evals.gate_report import headline

    STDOUT.print(gate_table(result))
    for judgement in result.judgements:
        if judgement.note:
            STDOUT.print(f"{judgement.metric}: {judgement.note}", soft_wrap=True, markup=False)
    for note in result.notes:
        STDOUT.print(f"note: {note}", soft_wrap=True, markup=False)
    STDOUT.print(Text(headline(result), style="green" if result.passed else "bold red"), soft_wrap=True)


def gate_table(result: GateResult) -> Table:
    """Return one row per rule."""
    from compressor.evals.gate_report import interval

    rows = []
    for judgement in result.judgements:
        verdict = judgement.verdict.value
        rows.append(
            [
                escape(judgement.rule.text),
                judgement.rule.show(judgement.measured),
                judgement.rule.show(judgement.rule.limit),
                interval(judgement),
                f"[{STYLES[verdict]}]{verdict}[/]",
                f"{judgement.units} {judgement.unit}",
            ]
        )
    title = f"{result.model.name} against {result.baseline.name}, one-sided bounds at {result.confidence:.4g}"
    return table(escape(title), ["rule", "measured", "limit", "bounds", "verdict", "n"], rows)


def write(path: Path, text: str) -> None:
    """Write a report atomically, its folders first.

    Raises:
        ResourceError: The path cannot be written.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    except OSError as error:
        raise disk_error(error, path) from error


def append(path: Path, text: str) -> None:
    """Append to a file that other steps write to as well.

    Raises:
        ResourceError: The path cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise disk_error(error, path) from error
