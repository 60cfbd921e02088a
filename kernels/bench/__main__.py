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
        Cell(row.name, layer, m, row.touched_bytes(*LAYERS[layer], m))
        for row in formats
        for layer in layers
        for m in rows
    ]
    repack: dict[str, float | None] = {row.name: None for row in formats}
    return Report(Machine(versions={"torch": str(torch.__version__)}), tuple(cells), repack)


def measured_report(formats: Sequence[Row], layers: Sequence[str], rows: Sequence[int]) -> Report:
    """Measure the table on the current CUDA device; a line of progress for each layer goes to stdout."""
    from compressor.kernels.bench.measure import machine, measure_layer, repack_seconds

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
    return Report(device, tuple(cells), {row.name: repack_seconds(row, "cuda") for row in formats})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench; without a CUDA device it writes the same table, without numbers, and succeeds too."""
    parser = argparse.ArgumentParser(prog="python -m compressor.kernels.bench", description=__doc__)
    parser.add_argument("--format", nargs="*", default=[row.name for row in FORMATS])
    parser.add_argument("--layer", nargs="*", default=list(LAYERS))
    parser.add_argument("--rows", nargs="*", type=int, default=list(ROWS), help="rows of activations")
    parser.add_argument("--output", type=Path, help="folder for kernels.json and kernels.md, or cpu.json and cpu.md")
    parser.add_argument("--cpu", action="store_true", help="time the CPU kernels, on layers of a CPU's size")
    parser.add_argument("--threads", type=int, default=1, help="with --cpu")
    parser.add_argument("--rounds", type=int, default=7, help="with --cpu: rounds of which medians count")
    options = parser.parse_args(arguments)
    if options.cpu:
        return _cpu(parser, options)
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


def _cpu(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from compressor.kernels.cpu import bench

    chosen = bench.FORMATS if options.format == [row.name for row in FORMATS] else options.format
    rows = bench.ROWS if options.rows == list(ROWS) else options.rows
    try:
        layers = bench.LAYERS if options.layer == list(LAYERS) else [_shape(text) for text in options.layer]
        formats = [name for name in chosen if _lookup("format", name, bench.FORMATS)]
    except RecipeError as error:
        parser.exit(error.exit_code, f"{error.message}\n{error.hint}\n")
    print(bench.run(formats, layers, rows, options.rounds, options.threads, options.output))
    return 0


def _shape(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    if not (n.isdecimal() and k.isdecimal() and int(n) and int(k)):
        raise RecipeError(f"--layer {text!r} is no shape", "give outputs and inputs, as in 1536x576")
    return int(n), int(k)


def _lookup(kind: str, name: str, known: Mapping[str, T]) -> T:
    if name not in known:
        raise did_you_mean(kind, name, known)
    return known[name]


if __name__ == "__main__":
    raise SystemExit(main())
