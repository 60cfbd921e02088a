"""From the page beside a module to the page under `docs/methods`: what the code and the tables know is put in.

A page of `docs/methods` may go on by hand behind the end mark; what lies before it is made again.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from compressor.errors import RecipeError
from compressor.methods import METHODS, method_class
from compressor.methods.facts import FACTS
from compressor.pages.measured import Measured, cost, measured_rows, original_perplexity
from compressor.pages.options import line, options_table, prose_of
from compressor.pruning import PRUNERS, pruner_class

ROOT = Path(__file__).resolve().parents[2]
"""The repository; an installed package has no docs to make."""

FOLDER = "docs/methods"
BEGIN = "<!-- made by `python -m compressor.pages`, up to the end mark; do not edit -->"
END = "<!-- end -->"

SHARED = {"masks": ("magnitude", "wanda", "sparsegpt"), "filters": ("l1", "taylor", "random")}
"""Pages with several methods."""

TITLES = {
    "masks": "Pruning weight by weight: magnitude, Wanda, SparseGPT",
    "filters": "Pruning filters: L1, Taylor, random",
}
SCOPES = {
    "layer": "one layer at a time",
    "group": "layers that runtimes fuse, together",
    "block": "one block at a time, by its output",
}
KINDS = {
    "language": "language models: weights become zero",
    "structured": "language models: heads and neurons are cut out",
    "vision": "image classifiers: filters are cut out",
}
BASELINES = ("rtn", "magnitude")
MEASURED_HEAD = ("row", "bits", "perplexity", "KL", "baseline's KL", "best on this grid", "processor time", "table")


def pages() -> dict[str, tuple[str, ...]]:
    """Return page -> the methods on it; a method without a page beside its module has none here."""
    together = {name for names in SHARED.values() for name in names}
    alone = [name for name in (*METHODS, *PRUNERS) if name not in together and beside(name).is_file()]
    return {**{name: (name,) for name in alone}, **SHARED}


def beside(method: str) -> Path:
    """Return where the page beside a method's module is."""
    target = METHODS[method] if method in METHODS else PRUNERS[method].target
    module = target.partition(":")[0].split(".")
    return ROOT.joinpath(*module).with_suffix(".md")


def page(name: str, folder: Path) -> str:
    """Return a page of `docs/methods` in full, what was added by hand included.

    Args:
        name: A key of `pages()`.
        folder: Where the pages lie.

    Raises:
        RecipeError: The page that is there has no end mark.
    """
    lines: list[str] = []
    methods = pages()[name]
    if name in TITLES:
        lines += [f"# {TITLES[name]}", ""]
    for method in methods:
        lines += method_lines(method, 1 if len(methods) == 1 else 2)
    return marked("\n".join(lines), folder / f"{name}.md")


def marked(text: str, path: Path) -> str:
    """Return a made page between its marks, and what the file goes on with by hand.

    Raises:
        RecipeError: The page that is there has no end mark.
    """
    return f"{BEGIN}\n" + text.rstrip("\n") + f"\n\n{END}\n" + by_hand(path)


def by_hand(path: Path) -> str:
    """Return what a page goes on with behind its end mark."""
    if not path.is_file():
        return ""
    _, found, rest = path.read_text(encoding="utf-8").partition(f"\n{END}\n")
    if not found:
        raise RecipeError(f"{path}: no line {END!r}", "put it before the part that is written by hand")
    return rest


def method_lines(method: str, level: int) -> list[str]:
    """Return one method's part of a page, its title a heading of this level."""
    cls: Any = method_class(method) if method in METHODS else pruner_class(method)
    source = beside(method)
    title, parts = sections(moved_links(source.read_text(encoding="utf-8"), source.parent))
    table = options_table(cls.Options, prose_of(parts.get("Options", "")))
    before = list(parts).index("Limits") if "Limits" in parts else len(parts)
    names = list(parts)
    names[before:before] = [name for name in ("Options", "Evidence") if name not in parts]
    body = {name: [parts.get(name, "")] for name in names}
    body["Options"] = ["With `--option KEY=VALUE`:", "", *table] if table else ["None."]
    body["Evidence"] += ["", *measured_lines(method)]
    intro = body.pop("")
    lines = [f"{'#' * level} {title}", "", *([*intro, ""] if intro[0] else []), *facts_lines(method)]
    for name, text in body.items():
        lines += [f"{'#' * (level + 1)} {name}", "", *(text if text[0] else text[2:]), ""]
    return lines


def facts_lines(method: str) -> list[str]:
    """Return what a method needs and what it costs, as a table."""
    if method not in FACTS:
        rows = [["prunes", KINDS[PRUNERS[method].kind]]]
    else:
        facts = FACTS[method]
        rows = [
            ["decides", SCOPES[facts.scope]],
            ["calibration data", facts.data],
            ["bits", facts.bits.replace("-", " to ")],
            ["formats", ", ".join(f"[{name}](../formats.md#{name})" for name in facts.families)],
        ]
    rows.append(["processor time, `smollm2-135m`, one thread", cost(method) or "not measured"])
    return [line(["at a glance", ""]), line(["---", "---"]), *(line(row) for row in rows), ""]


def measured_lines(method: str) -> list[str]:
    """Return the measured rows of a method beside the baseline and the best of the same grid."""
    rows = [one for one in measured_rows() if one.method == method]
    if not rows:
        return ["Measured: no row of the committed tables yet."]
    lines = [line(MEASURED_HEAD), line(["---", *["---:"] * 4, "---", "---:", "---"])]
    for one in rows:
        rivals = [other for other in measured_rows() if other.grid == one.grid]
        base = next((r for r in rivals if r.method in BASELINES and not r.row.options and r.name != one.name), None)
        best = min(rivals, key=lambda other: other.kl)
        lines.append(
            line(
                [
                    one.name,
                    one.cells["bits per weight"],
                    bare(one.cells["perplexity"]),
                    one.cells["KL"],
                    "-" if base is None else bare(base.cells["KL"]),
                    best_cell(best, one, len(rivals)),
                    one.cells.get("CPU time", "-"),
                    f"[{one.table}](../../evals/bench/tables/{one.table}.md)",
                ]
            )
        )
    models = dict.fromkeys((one.model, original_perplexity(one.table)) for one in rows)
    said = "; ".join(f"`{model}` has perplexity {bare(perplexity)} as it is" for model, perplexity in models)
    return [*lines, "", f"KL is to the original, in nats per token, ± one standard error: lower is better. {said}."]


def best_cell(best: Measured, one: Measured, rivals: int) -> str:
    """Return who is best on a row's grid."""
    if rivals == 1:
        return "no other row"
    return "this row" if best is one else f"{best.name}, {bare(best.cells['KL'])}"


def bare(cell: str) -> str:
    """Return a number without its error."""
    return cell.split(" ±")[0]


def sections(text: str) -> tuple[str, dict[str, str]]:
    """Split a page into its title and its parts by heading; what stands before the first heading is called ``."""
    title, _, rest = text.partition("\n")
    pieces = re.split(r"^## (.+)$", rest, flags=re.MULTILINE)
    parts = {"": pieces[0].strip("\n")}
    parts.update({name.strip(): body.strip("\n") for name, body in zip(pieces[1::2], pieces[2::2], strict=True)})
    return title.removeprefix("# ").strip(), parts


def moved_links(text: str, folder: Path) -> str:
    """Return a page's text with its relative links as they are from `docs/methods`."""
    to = ROOT / FOLDER

    def moved(match: re.Match[str]) -> str:
        path, mark, anchor = match[1].partition("#")
        if not path or ":" in path:
            return match[0]
        target = (folder / path).resolve()
        home = {ROOT / "compressor" / "methods" / f"{name}.md": to / f"{name}.md" for name in METHODS}
        return f"]({os.path.relpath(home.get(target, target), to)}{mark}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", moved, text)
