"""Time the packed kernels against cuBLAS and peers; see `docs/kernels.md`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from compressor.errors import RecipeError, did_you_mean
from compressor.kernels.bench.results import Cell, Machine, Report, render
from compressor.kernels.bench.roofline import FORMATS, LAYERS, ROWS, Row

T = TypeVar("T")


def empty_report(formats: Sequence[Row], layers: Sequence[str], rows: Sequence[int]) -> Report:
    """Return the table with nothing measured."""
    cells = [
        Cell(row.name, layer, m, row.weight_bytes(*LAYERS[layer])) for row in formats for layer in layers for m in rows
    ]
    return Report(Machine(versions={"torch": str(torch.__version__)}), tuple(cells))


def measured_report(formats: Sequence[Row], layers: Sequence[str], rows: Sequence[int]) -> Report:
    """Measure the table on the current CUDA device; a line of progress for each layer goes to stdout."""
    from compressor.kernels.bench.measure import machine, measure_layer

    cells: list[Cell] = []
    device = machine()
    for row in formats:
        for layer in layers:
            cells += measure_layer(row, layer, tuple(rows))
            print(
                f"{row.name}, {layer}: " + ", ".join(f"M={c.m} {c.speedup:.2f}x" for c in cells[-len(rows) :]),
                flush=True,
            )
            torch.cuda.empty_cache()
    return Report(device, tuple(cells))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench; without a CUDA device it writes the same table, without numbers, and succeeds too."""
    parser = argparse.ArgumentParser(prog="python -m compressor.kernels.bench", description=__doc__)
    parser.add_argument("--format", nargs="*", default=[row.name for row in FORMATS])
    parser.add_argument("--layer", nargs="*", default=list(LAYERS))
    parser.add_argument("--rows", nargs="*", type=int, default=list(ROWS), help="rows of activations")
    parser.add_argument("--output", type=Path, help="folder for kernels.json and kernels.md")
    options = parser.parse_args(arguments)
    try:
        by_name = {row.name: row for row in FORMATS}
        formats = [_lookup("format", name, by_name) for name in options.format]
        layers = [name for name in options.layer if _lookup("layer", name, LAYERS)]
    except RecipeError as error:
        parser.exit(error.exit_code, f"{error.message}\n{error.hint}\n")
    measure = measured_report if torch.cuda.is_available() else empty_report
    report = measure(formats, layers, options.rows)
    if options.output is not None:
        report.write(options.output)
    print(render(report))
    return 0


def _lookup(kind: str, name: str, known: Mapping[str, T]) -> T:
    if name not in known:
        raise did_you_mean(kind, name, known)
    return known[name]


if __name__ == "__main__":
    raise SystemExit(main())
