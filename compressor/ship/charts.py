"""The charts of the page that `compress inspect --html` writes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from compressor.inspection import Drawing, LayerView
from compressor.ship.look import REACH, Inputs, Run, Size, frontier
from compressor.ship.svg import COLOURS, Chart

_NUMBERED = re.compile(r"\.(\d+)\.")


def place_of(name: str) -> tuple[int, str]:
    """Return the block a module lies in (-1 for none) and its name inside it, experts' numbers left out."""
    found = _NUMBERED.search(name)
    if found is None:
        return -1, name
    return int(found[1]), re.sub(r"experts\.\d+\.", "experts.", name[found.end() :])


def error_of(layer: LayerView) -> float | None:
    """Return the output error where there is one, else the weight error."""
    return layer.weight_error if layer.output_error is None else layer.output_error


def roles_of(layers: Sequence[LayerView]) -> list[str]:
    """Return the names inside blocks, in order of first use."""
    return list(dict.fromkeys(place_of(layer.name)[1] for layer in layers))


def by_place(layers: Sequence[LayerView]) -> dict[tuple[int, str], float]:
    """Return the mean error of every place: of experts, over all of a block."""
    sums: dict[tuple[int, str], list[float]] = {}
    for layer in layers:
        if (error := error_of(layer)) is not None:
            sums.setdefault(place_of(layer.name), []).append(error)
    return {place: sum(errors) / len(errors) for place, errors in sums.items()}


def error_chart(layers: Sequence[LayerView], against: Sequence[LayerView] = ()) -> str:
    """Draw the error over the blocks, a line per kind of layer; `against`, another checkpoint, is dashed."""
    errors, others = by_place(layers), by_place(against)
    if not errors:
        return ""
    chart = Chart(880, 300, "error of every layer over the blocks", right=150)
    top = max([*errors.values(), *others.values()]) * 1.08
    last = max(block for block, _ in errors)
    x, y = chart.x(0, max(last, 1)), chart.y(0, top or 1)
    kind = "output error" if any(layer.output_error is not None for layer in layers) else "weight error"
    chart.axes(x, y, "block", kind)
    for index, role in enumerate(roles_of(layers)[: len(COLOURS)]):
        colour = COLOURS[index]
        for values, dashed in ((others, True), (errors, False)):
            points = sorted((block, error) for (block, name), error in values.items() if name == role)
            if len(points) > 1:
                chart.line([(x(block), y(error)) for block, error in points], colour, dashed)
            for block, error in () if dashed else points:
                title = f"{role}, block {block}: {error:.4f}"
                chart.add("circle", title=title, cx=x(block), cy=y(error), r=2.6, fill=colour)
        at = 22 + 17 * index
        chart.add("rect", x=chart.width - 140, y=at - 8, width=10, height=10, rx=2, fill=colour)
        chart.text(chart.width - 125, at + 1, role.rpartition(".")[2])
    if against:
        chart.text(chart.width - 140, 22 + 17 * min(len(roles_of(layers)), len(COLOURS)) + 8, "dashed: the other")
    return chart.svg()


def format_map(layers: Sequence[LayerView]) -> str:
    """Draw a cell per block and kind of layer: its bits as a number, its error as depth of colour."""
    roles = roles_of(layers)
    blocks = sorted({place_of(layer.name)[0] for layer in layers})
    errors = by_place(layers)
    bits = {place_of(layer.name): layer.bits for layer in layers}
    titles = {place_of(layer.name): f"{layer.name}: {layer.format}, {layer.bits:.3f} bits" for layer in layers}
    top = max(errors.values(), default=0) or 1.0
    cell = min(max(720 // max(len(blocks), 1), 16), 44)
    chart = Chart(130 + cell * len(blocks) + 10, 24 * len(roles) + 40, "bits and error of every layer", left=130, top=6)
    for row, role in enumerate(roles):
        chart.text(124, 6 + 24 * row + 16, role.rpartition(".")[2], "end")
        for column, block in enumerate(blocks):
            place = (block, role)
            if place not in bits:
                continue
            error = errors.get(place)
            share = 0.08 if error is None else 0.08 + 0.72 * error / top
            title = titles[place] + ("" if error is None else f", error {error:.4f}")
            spot: dict[str, Any] = {
                "x": 130 + cell * column,
                "y": 6 + 24 * row,
                "width": cell - 2,
                "height": 22,
                "rx": 3,
            }
            chart.add("rect", title=title, fill="var(--c0)", fill_opacity=f"{share:.2f}", **spot)
            if cell >= 22:
                chart.text(
                    130 + cell * column + cell / 2 - 1, 6 + 24 * row + 15, f"{bits[place]:.3g}", "middle", "cell"
                )
    for column, block in enumerate(blocks):
        if column % max(1, math.ceil(len(blocks) / 24)) == 0:
            at = 130 + cell * column + cell / 2 - 1
            chart.text(at, 6 + 24 * len(roles) + 14, str(block) if block >= 0 else "-", "middle")
    chart.text(130 + cell * len(blocks) / 2, 24 * len(roles) + 36, "block", "middle", "name")
    return chart.svg()


def histogram(counts: Sequence[float], grid: Sequence[float], label: str, x_label: str, colour: str) -> str:
    """Draw counts as bars over shares of the largest value, square-rooted so that tails show, with the grid on top."""
    chart = Chart(430, 190, label, left=16, top=18)
    x, top = chart.x(-REACH, REACH), max(counts) or 1.0
    floor = chart.height - chart.bottom
    wide = (chart.width - chart.left - chart.right) / len(counts)
    total = sum(counts) or 1.0
    for index, count in enumerate(counts):
        if count <= 0:
            continue
        tall = max((floor - chart.top) * math.sqrt(count / top), 0.6)
        at = chart.left + wide * index
        centre = -REACH + 2 * REACH * (index + 0.5) / len(counts)
        title = f"around {centre:+.2f}: {count / total:.3%}"
        chart.add("rect", title=title, x=at, y=floor - tall, width=max(wide - 0.6, 0.5), height=tall, fill=colour)
    for value in grid:
        chart.add("line", x1=x(value), x2=x(value), y1=chart.top - 8, y2=floor, class_="mark")
    for value in (-1, -0.5, 0, 0.5, 1):
        chart.text(x(value), floor + 16, f"{value:g}", "middle")
    chart.add("line", x1=chart.left, x2=chart.width - chart.right, y1=floor, y2=floor, class_="axis")
    chart.text(chart.width / 2, chart.height - 4, x_label, "middle", "name")
    return chart.svg()


def weights_chart(drawing: Drawing) -> str:
    """Draw a layer's weights under the grid they are rounded to."""
    source = "of the original" if drawing.original else "as stored"
    label = f"weights of {drawing.name} {source} and the values of {drawing.format}"
    return histogram(drawing.counts, drawing.grid, label, f"weights {source} / largest of the group", "var(--c0)")


def inputs_chart(inputs: Inputs) -> str:
    """Draw what flows into a layer, and the grid it is rounded to, if it is."""
    label = f"inputs of {inputs.name}"
    return histogram(inputs.counts, inputs.grid, label, "inputs / largest of the token", "var(--c2)")


def sizes_chart(sizes: Sequence[Size]) -> str:
    """Draw two bars, before and after, made of components."""
    tall = 106 + 22 * math.ceil(len(sizes) / 3)
    chart = Chart(880, tall, "bytes of every component before and after", left=64)
    x = chart.x(0, max(sum(size.before for size in sizes), sum(size.after for size in sizes)) or 1)
    for row, (name, of) in enumerate((("before", [s.before for s in sizes]), ("after", [s.after for s in sizes]))):
        at, start = chart.top + row * 38, 0
        chart.text(58, at + 18, name, "end")
        for index, (size, nbytes) in enumerate(zip(sizes, of, strict=True)):
            if nbytes:
                title = f"{size.component}, {name}: {nbytes / 1e6:.1f} MB"
                spot: dict[str, Any] = {
                    "x": x(start),
                    "y": at,
                    "width": max(x(start + nbytes) - x(start), 0.5),
                    "height": 28,
                }
                chart.add("rect", title=title, fill=COLOURS[index % len(COLOURS)], **spot)
            start += nbytes
        chart.text(x(start) + 6 if x(start) < 800 else x(start) - 6, at + 18, f"{start / 1e6:.1f} MB",
                   "start" if x(start) < 800 else "end", "inside" if x(start) >= 800 else "label")  # fmt: skip
    for index, size in enumerate(sizes):
        left, at = 64 + 272 * (index % 3), 112 + 22 * (index // 3)
        chart.add("rect", x=left, y=at - 9, width=10, height=10, rx=2, fill=COLOURS[index % len(COLOURS)])
        chart.text(left + 16, at, f"{size.component}: {size.before / 1e6:.1f} → {size.after / 1e6:.1f} MB")
    return chart.svg()


def pareto_chart(runs: Sequence[Run], here: str) -> str:
    """Draw results by size and cost, the undominated ones joined, the one of this page marked."""
    if len(runs) < 2:
        return ""
    chart = Chart(880, 360, "size and cost of the runs in the folder", right=30)
    sizes, values = [run.nbytes / 1e6 for run in runs], [run.value for run in runs]
    log = min(values) > 0 and max(values) / min(values) > 8
    pad = (max(sizes) - min(sizes)) * 0.08 or 1.0
    x = chart.x(min(sizes) - pad, max(sizes) + 2.5 * pad)
    y = chart.y(min(values) / 1.4, max(values) * 1.4, True) if log else chart.y(0, max(values) * 1.12)
    metric = "KL divergence (nats per token)" if runs[0].metric == "kl" else "perplexity"
    chart.axes(x, y, "weights on disk (MB)", metric)
    chart.line([(x(run.nbytes / 1e6), y(run.value)) for run in frontier(runs)], "var(--c1)", dashed=True)
    named = {run.name for run in frontier(runs)} | {here}  # the others tell their names when pointed at
    spots = [(x(run.nbytes / 1e6), y(run.value)) for run in runs]
    taken = [(at - 5, at + 5, tall) for at, tall in spots]  # left, right and middle of what no label may cover
    for run, (at, tall) in zip(runs, spots, strict=True):
        if run.error is not None:
            ends = y(run.value + run.error), y(max(run.value - run.error, y.low))
            chart.add("line", x1=at, x2=at, y1=ends[0], y2=ends[1], class_="axis")
        error = "" if run.error is None else f" ± {run.error:.2g}"
        title = f"{run.name}: {run.what}, {run.nbytes / 1e6:.1f} MB, {run.value:.4g}{error}"
        colour = "var(--c1)" if run.name == here else "var(--c0)"
        chart.add("circle", title=title, cx=at, cy=tall, r=6 if run.name == here else 4.5, fill=colour)
    for run, (at, tall) in zip(runs, spots, strict=True):
        if run.name in named:
            left, right, middle = free_place(at, tall, 6.6 * len(run.name), taken, chart.width - 4)
            taken.append((left, right, middle))
            chart.text(left, middle + 4, run.name, kind="label strong" if run.name == here else "label")
    return chart.svg()


def free_place(
    at: float, tall: float, wide: float, taken: Sequence[tuple[float, float, float]], edge: float
) -> tuple[float, float, float]:
    """Return left, right and middle of a label near a point that covers nothing: beside it, else higher or lower."""
    spots = [
        (left, left + wide, tall + shift)
        for shift in (0, -13, 13, -26, 26, -39, 39)
        for left in (at + 10, at - 10 - wide)
        if left > 50 and left + wide < edge
    ]
    clear = (
        spot
        for spot in spots
        if not any(spot[0] < right and left < spot[1] and abs(spot[2] - middle) < 11 for left, right, middle in taken)
    )
    return next(clear, (at + 10, at + 10 + wide, tall))
