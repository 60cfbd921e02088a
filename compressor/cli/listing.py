"""`compress list methods|pruners|formats|inputs|models|recipes [NAME]`."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from compressor.cli.render import STDOUT, print_json, table
from compressor.errors import did_you_mean

WHAT = ("formats", "inputs", "methods", "models", "pruners", "recipes")


def listing(
    what: Annotated[str, typer.Argument(help="methods, pruners, formats, inputs, models or recipes.")],
    name: Annotated[str | None, typer.Argument(help="Show one in full.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """List what can be asked for."""
    if what not in WHAT:
        raise did_you_mean("list", what, WHAT)
    entries = _entries(what)
    if name is not None and name not in entries:
        raise did_you_mean(what.removesuffix("s"), name, entries)
    if name is not None and what in ("methods", "pruners"):
        _method(what, name, json_)
        return
    if name is not None and what == "recipes" and not json_:
        _recipe(name)
        return
    chosen = {name: entries[name]} if name is not None else entries
    if json_:
        print_json({what: chosen})
    else:
        STDOUT.print(table(what, ["name", ""], _rows(chosen), text=True))


def _entries(what: str) -> dict[str, str]:
    if what == "methods":
        from compressor.methods import SUMMARIES

        return SUMMARIES
    if what == "pruners":
        from compressor.pruning import PRUNERS

        return {name: pruner.summary for name, pruner in PRUNERS.items()}
    if what == "formats":
        from compressor.formats import SUMMARIES as FORMATS

        return FORMATS
    if what == "inputs":
        from compressor.formats.activations import INPUT_SUMMARIES

        return INPUT_SUMMARIES
    if what == "recipes":
        from compressor.ship.pipeline import shipped

        return shipped()
    from compressor.checkpoint.default_model import EMBEDDED

    return {key: model.summary for key, model in EMBEDDED.items()}


def _rows(entries: dict[str, str]) -> list[list[str]]:
    """Return names and summaries; neighbours that differ in their bits alone share a row."""
    rows: list[list[str]] = []
    for summary, names in groupby(entries, key=entries.__getitem__):
        first, *others = names
        rows.append([f"{first} ... {others[-1]}" if others else first, summary])
    return rows


def _recipe(name: str) -> None:
    """Print a recipe as it is, so that it can be kept and changed."""
    import sys

    from compressor.ship.pipeline import RECIPES

    sys.stdout.write((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))


def _method(what: str, name: str, json_: bool) -> None:
    """Print a method's page and its options with their defaults."""
    import sys

    from compressor import methods, pruning
    from compressor.methods.base import describe_options

    cls: Any = methods.method_class(name) if what == "methods" else pruning.pruner_class(name)
    options = describe_options(cls.Options)
    page = Path(sys.modules[cls.__module__].__file__ or "").with_suffix(".md").read_text(encoding="utf-8")
    if json_:
        print_json({"name": name, "summary": cls.summary, "options": options, "page": page})
        return
    from rich.markdown import Markdown

    STDOUT.print(Markdown(page))
    if options:
        rows = [[entry["name"], str(entry["default"]), entry["description"]] for entry in options]
        STDOUT.print(table("options (--option KEY=VALUE)", ["option", "default", "meaning"], rows, text=True))
