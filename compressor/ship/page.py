"""One self-contained HTML page about a compressed checkpoint: no script, no network, charts as SVG inside it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from compressor import __version__
from compressor.checkpoint.source import read_json
from compressor.inspection import Inspection, LayerView
from compressor.output import REPORT
from compressor.ship import charts
from compressor.ship.look import Inputs, Run, Size

STYLE = """
:root { --bg: #fff; --ink: #1d2330; --soft: #697386; --rule: #e4e7ee; --card: #f7f8fb;
  --c0: #3b6fd4; --c1: #d9480f; --c2: #2b8a3e; --c3: #9c36b5; --c4: #e0a100; --c5: #0b7285; --c6: #c2255c;
  --c7: #5c677d }
@media (prefers-color-scheme: dark) { :root { --bg: #14171f; --ink: #e6e9f0; --soft: #98a2b5; --rule: #2c3240;
  --card: #1b1f2a; --c0: #7aa2f7; --c1: #ff8a4c; --c2: #69db7c; --c3: #d0a2f7; --c4: #ffd43b; --c5: #66d9e8;
  --c6: #faa2c1; --c7: #adb5bd } }
* { box-sizing: border-box }
body { margin: 0; background: var(--bg); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 960px; margin: 0 auto; padding: 32px 20px 64px }
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere }
h2 { font-size: 17px; margin: 36px 0 8px }
h3 { font-size: 13px; font-weight: 600; margin: 12px 0 2px; overflow-wrap: anywhere }
p { color: var(--soft); margin: 4px 0 12px }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; margin: 20px 0 }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 12px 14px }
.tile b { display: block; font-size: 20px; font-variant-numeric: tabular-nums }
.tile span { color: var(--soft); font-size: 13px }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 8px 24px }
svg { width: 100%; height: auto; display: block }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft) }
svg text.label { paint-order: stroke; stroke: var(--bg); stroke-width: 3px }
svg text.name { fill: var(--ink) }
svg text.cell { fill: var(--ink); font-size: 10px }
svg text.strong { fill: var(--c1); font-weight: 700 }
svg text.inside { fill: var(--bg); font-weight: 600 }
svg .grid { stroke: var(--rule) }
svg .axis { stroke: var(--soft) }
svg .mark { stroke: var(--c1); stroke-width: 1; opacity: .75 }
.scroll { overflow-x: auto; max-height: 560px; border: 1px solid var(--rule); border-radius: 10px }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums }
th { position: sticky; top: 0; background: var(--card); text-align: right }
td { text-align: right; white-space: nowrap }
th, td { padding: 5px 10px; border-bottom: 1px solid var(--rule) }
th:first-child, td:first-child { text-align: left }
td .bar { display: inline-block; height: 8px; border-radius: 2px; background: var(--c0); margin-right: 6px }
footer { margin-top: 40px; color: var(--soft); font-size: 13px }
"""


def page(
    found: Inspection,
    against: Inspection | None = None,
    inputs: Sequence[Inputs] = (),
    sizes: Sequence[Size] = (),
    runs: Sequence[Run] = (),
) -> str:
    """Return the page.

    Args:
        found: The checkpoint.
        against: Another one, to compare with.
        inputs: What flows into the layers that are drawn.
        sizes: Bytes by component.
        runs: Results in a folder, this one among them.
    """
    folder = Path(found.path)
    report = read_json(folder / REPORT) if (folder / REPORT).is_file() else {}
    others = against.layers if against else ()
    sections = [
        _head(folder, found, report),
        _section(
            "Error per layer",
            "How far each layer's output (or, without data, its weight) is from the original's, relative."
            + (f" Dashed: {escape(against.path)}." if against else ""),
            charts.error_chart(found.layers, others),
        ),
        _section(
            "Bits per layer",
            "The number is stored bits per weight, scales included; the deeper the colour, the larger the error.",
            charts.format_map(found.layers),
        ),
        _distributions(found, inputs),
        _section("Size by component", "", charts.sizes_chart(sizes) if sizes else ""),
        _section(
            "Runs in the folder",
            "Every evaluated result beside this one. Dashed: no other run is both smaller and better than these.",
            charts.pareto_chart(runs, folder.resolve().name),
        ),
        f"<h2>Layers</h2>{_table(found.layers, others)}",
        f"<footer>Made by compress {escape(__version__)}. Point at a mark to see its number.</footer>",
    ]
    title = escape(folder.resolve().name)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def _head(folder: Path, found: Inspection, report: dict[str, Any]) -> str:
    recipe = report.get("recipe", {})
    weights = sum(layer.shape[0] * layer.shape[1] for layer in found.layers)
    bits = sum(layer.bits * layer.shape[0] * layer.shape[1] for layer in found.layers) / weights
    tiles = [(f"{bits:.3f}", "bits per compressed weight"), (str(len(found.layers)), "compressed layers")]
    if report:
        before, after = report["bytes_before"], report["bytes_after"]
        tiles += [(f"{after / 1e6:.1f} MB", f"weights, from {before / 1e6:.1f} MB")]
        if report.get("mean_error") is not None:
            tiles.append((f"{report['mean_error']:.4f}", "mean layer error"))
        error = (report.get("verification") or {}).get("relative_error")
        if error is not None:
            tiles.append((f"{error:.0e}", "logit difference after reloading"))
    sparsity = sum(layer.sparsity * layer.shape[0] * layer.shape[1] for layer in found.layers) / weights
    tiles.append((f"{sparsity:.1%}", "stored weights that are zero"))
    said = f"{recipe.get('model')}, {recipe.get('method')}, {recipe.get('format')}" if recipe else "no report beside it"
    shown = "".join(f'<div class="tile"><b>{escape(b)}</b><span>{escape(name)}</span></div>' for b, name in tiles)
    return f'<h1>{escape(folder.resolve().name)}</h1><p>{escape(said)}</p><div class="tiles">{shown}</div>'


def _section(title: str, text: str, chart: str) -> str:
    return f"<h2>{title}</h2>{f'<p>{text}</p>' if text else ''}{chart}" if chart else ""


def _distributions(found: Inspection, inputs: Sequence[Inputs]) -> str:
    by_name = {entry.name: entry for entry in inputs}
    cells = []
    for drawing in found.drawings:
        name = escape(drawing.name)
        cells.append(f"<div><h3>{name}, {escape(drawing.format)}</h3>{charts.weights_chart(drawing)}</div>")
        if seen := by_name.get(drawing.name):
            how = "" if seen.grid else ", not rounded"
            about = f"inputs of {name}{how}; loudest channel {seen.outlier:.0f} times the median one"
            cells.append(f"<div><h3>{about}</h3>{charts.inputs_chart(seen)}</div>")
    if not cells:
        return ""
    text = "Bars are counts (their square root, so that tails show); vertical lines are the values of the grid."
    return f'<h2>Weights, inputs and grids</h2><p>{text}</p><div class="pair">{"".join(cells)}</div>'


def _table(layers: Sequence[LayerView], against: Sequence[LayerView]) -> str:
    other = {layer.name: layer for layer in against}
    heads = ["layer", "stored as", "shape", "bits", "weight error", "output error", "outlier", "zeros", "inputs"]
    heads += ["other's bits", "other's error"] if against else []
    top = max((layer.weight_error or 0 for layer in layers), default=0) or 1.0
    rows = []
    for layer in layers:
        bar = (
            ""
            if layer.weight_error is None
            else f'<i class="bar" style="width:{40 * layer.weight_error / top:.0f}px"></i>'
        )
        cells = [
            escape(layer.name),
            escape(layer.format),
            f"{layer.shape[0]} x {layer.shape[1]}",
            f"{layer.bits:.3f}",
            bar + _number(layer.weight_error),
            _number(layer.output_error),
            f"{layer.outlier:.1f}",
            f"{layer.sparsity:.1%}",
            escape(layer.inputs or ""),
        ]
        if against:
            twin = other.get(layer.name)
            cells += ["", ""] if twin is None else [f"{twin.bits:.3f}", _number(charts.error_of(twin))]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
