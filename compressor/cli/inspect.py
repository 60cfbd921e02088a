"""`compress inspect DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compressor.cli.flags import Json, TrustRemoteCode
from compressor.cli.render import STDERR, STDOUT, print_json, table

if TYPE_CHECKING:
    from compressor.inspection import Inspection


def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Compressed checkpoint.")],
    layer: Annotated[
        list[str] | None, typer.Option("--layer", metavar="GLOB", help="Layers to show; may be repeated.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", "-b", help="The original: draw the histogram of its weights.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", metavar="OTHER", help="Another checkpoint of the same model.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page with charts.")] = None,
    runs: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where the page looks for other runs.")] = None,
    inputs: Annotated[
        bool, typer.Option("--inputs/--no-inputs", help="Run the model for the page's charts of inputs.")
    ] = True,
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Show what every layer became, and draw the grids of up to three over their weights."""
    from compressor.checkpoint.resolve import resolve_model
    from compressor.inspection import inspect_checkpoint

    original = None
    if baseline is not None:
        original = Path(baseline) if Path(baseline).is_dir() else resolve_model(baseline, trust_remote_code)[0]
    bins = min(max(STDOUT.width - 4, 40), 100) if html is None else 84
    found = inspect_checkpoint(directory, layer or (), original, bins)
    other = None if against is None else inspect_checkpoint(against, layer or (), None, bins)
    if html is not None:
        write_page(html, found, other, runs or directory.resolve().parent, inputs)
    if json_:
        print_json({**found.to_json(), **({"against": other.to_json()} if other else {})})
    elif html is None:
        show(found, other)
    else:
        STDOUT.print(f"written: {html}", soft_wrap=True, markup=False)


def show(found: Inspection, other: Inspection | None = None) -> None:
    """Print the table of layers, then the drawings."""
    twins = {view.name: view for view in other.layers} if other else {}
    rows = []
    for view in found.layers:
        row = [
            view.name,
            f"{view.shape[0]}x{view.shape[1]} {view.format}",
            f"{view.bits:.3f}",
            _number(view.weight_error),
            _number(view.output_error),
            f"{view.outlier:.1f}",
            f"{view.sparsity:.1%}",
        ]
        if other:
            twin = twins.get(view.name)
            row += ["", "", ""] if twin is None else [f"{twin.bits:.3f}", _number(twin.weight_error)]
            row += [] if twin is None else [_number(twin.output_error)]
        rows.append(row)
    columns = ["layer", "stored as", "bits", "weight error", "output error", "outlier", "zeros"]
    columns += ["its bits", "its weight error", "its output error"] if other else []
    STDOUT.print(table(found.path if other is None else f"{found.path} against {other.path}", columns, rows))
    for drawing in found.drawings:
        weights = "weights of the original" if drawing.original else "stored weights"
        STDOUT.print(f"\n{drawing.name}: {drawing.format}, {weights}", soft_wrap=True, markup=False)
        for line in drawing.lines():
            STDOUT.print(f"  {line}", soft_wrap=True, markup=False)
    if found.drawings:
        STDOUT.print("  (shares of each group's largest value; ┼ are the values of the grid)", soft_wrap=True)


def write_page(path: Path, found: Inspection, other: Inspection | None, runs: Path, inputs: bool) -> None:
    """Write the HTML page."""
    from compressor.cli.gate import write
    from compressor.ship.look import look_at_inputs, runs_in, sizes_of
    from compressor.ship.page import page

    folder = Path(found.path)
    seen = look_at_inputs(folder, [drawing.name for drawing in found.drawings]) if inputs else ()
    others, notes = runs_in(runs)
    for note in notes:
        STDERR.print(f"note: {note}", soft_wrap=True, markup=False)
    write(path, page(found, other, seen, sizes_of(folder), others))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
