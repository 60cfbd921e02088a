"""`python -m compressor.evals.bench.quality_time TABLE`: how the loss of searched masks falls with time, as an SVG.

One line for every search of a table, from what its last finished row recorded of each sweep: the loss on the windows
held back from the search, over the minutes the sweeps took. The loss is that of the text, or what `target` says.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from compressor.errors import CheckpointError, CompressorError
from compressor.evals.bench.record import read_record
from compressor.evals.bench.row import Row
from compressor.evals.bench.steps import save
from compressor.evals.bench.table import Table, find_table, read_table, results_folder

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 240, 40, 50
COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7d5ba6", "#8a6d3b", "#555555")
TICKS = 5


@dataclass(frozen=True)
class Line:
    """One search.

    Attributes:
        name: Its label.
        points: Minutes since the starting mask, and held-back loss; the starting mask first.
    """

    name: str
    points: tuple[tuple[float, float], ...]


def find_lines(table: Table, results: Path) -> list[Line]:
    """Return the searches of a table that have a result, each with as many sweeps as have been run."""
    lines = []
    continued = {row.prune.after for row in table.rows if row.prune is not None}
    for row in table.rows:
        if row.prune is None or row.name in continued or row.prune.method != "icbs":
            continue
        curve, chosen = None, row
        while curve is None:
            record = read_record(results / f"{table.key(chosen)}.json")
            curve = None if record is None else record.curve
            if curve is None:
                before = chosen.prune.after if chosen.prune is not None else None
                if before is None:
                    break
                chosen = next(other for other in table.rows if other.name == before)
        if curve:
            minutes, points = 0.0, []
            for entry in curve:
                minutes += float(entry["seconds"]) / 60
                points.append((minutes, float(entry["held_back"])))
            lines.append(Line(_label(chosen), tuple(points)))
    return lines


def draw(lines: Sequence[Line], title: str) -> str:
    """Return the picture; losses are shown as what is left of each search's own start, so that all share an axis."""
    widest = max(point[0] for line in lines for point in line.points) or 1.0
    shares = [[(x, y / line.points[0][1]) for x, y in line.points] for line in lines]
    low = min(y for points in shares for _, y in points)
    low = min(low - 0.05 * (1 - low), 0.999)

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / widest
        return across, TOP + (HEIGHT - TOP - BOTTOM) * (1 - y) / (1 - low)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="14">{escape(title)}</text>',
    ]
    for index in range(TICKS + 1):
        share = low + (1 - low) * index / TICKS
        _, y = at(0, share)
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{100 * share:.1f} %</text>')
        x, _ = at(widest * index / TICKS, low)
        out.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{widest * index / TICKS:.0f}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(f'<text x="{middle:.0f}" y="{HEIGHT - 12}" text-anchor="middle">minutes of sweeps</text>')
    for number, (line, points) in enumerate(zip(lines, shares, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        places = [at(x, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in places]
        first, last = line.points[0][1], line.points[-1][1]
        label = escape(f"{line.name}: {first:.2f} to {last:.2f} nats")
        key = TOP + 10 + 20 * number
        out.append(f'<rect x="{WIDTH - RIGHT + 12}" y="{key - 8}" width="10" height="10" fill="{colour}"/>')
        out.append(f'<text x="{WIDTH - RIGHT + 28}" y="{key + 1}">{label}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write `TABLE.svg` beside the table and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m compressor.evals.bench.quality_time", description=__doc__)
    parser.add_argument("table", help="YAML file, or the name of one of the project's tables")
    parser.add_argument("--results", type=Path, metavar="DIR", help="folder of the row files")
    given = parser.parse_args(arguments)
    try:
        path = find_table(given.table)
        table = read_table(path)
        lines = find_lines(table, given.results or results_folder(path))
        if not lines:
            raise CheckpointError(f"{path.name}: no search has a result yet", "run the icbs rows first")
        target = path.with_suffix(".svg")
        save(target, draw(lines, "iCBS: held-back loss, share of that of the starting mask"))
    except CompressorError as error:
        print(f"error: {error.message}; {error.hint}", file=sys.stderr)
        return error.exit_code
    print(target)
    return 0


def _label(row: Row) -> str:
    assert row.prune is not None
    share = row.prune.pattern or f"{100 * (row.prune.sparsity or 0):g} %"
    return f"{share}, {row.prune.options['target']}" if "target" in row.prune.options else share


if __name__ == "__main__":
    sys.exit(main())
