"""`compress inspect DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compressor.cli.render import STDOUT, print_json, table

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
    trust_remote_code: Annotated[bool, typer.Option(help="Run model code that comes with the baseline.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Show what every layer became, and draw the grids of up to three over their weights."""
    from compressor.checkpoint.resolve import resolve_model
    from compressor.inspection import inspect_checkpoint

    original = None
    if baseline is not None:
        original = Path(baseline) if Path(baseline).is_dir() else resolve_model(baseline, trust_remote_code)[0]
    bins = min(max(STDOUT.width - 4, 40), 100)
    found = inspect_checkpoint(directory, layer or (), original, bins)
    if json_:
        print_json(found.to_json())
    else:
        show(found)


def show(found: Inspection) -> None:
    """Print the table of layers, then the drawings."""
    rows = [
        [
            view.name,
            f"{view.shape[0]}x{view.shape[1]} {view.format}",
            f"{view.bits:.3f}",
            "" if view.weight_error is None else f"{view.weight_error:.4f}",
            "" if view.output_error is None else f"{view.output_error:.4f}",
        ]
        for view in found.layers
    ]
    STDOUT.print(table(found.path, ["layer", "stored as", "bits", "weight error", "output error"], rows))
    for drawing in found.drawings:
        weights = "weights of the original" if drawing.original else "stored weights"
        STDOUT.print(f"\n{drawing.name}: {drawing.format}, {weights}", soft_wrap=True, markup=False)
        for line in drawing.lines():
            STDOUT.print(f"  {line}", soft_wrap=True, markup=False)
    if found.drawings:
        STDOUT.print("  (shares of each group's largest value; ┼ are the values of the grid)", soft_wrap=True)
