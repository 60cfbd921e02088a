"""`compress list methods|pruners|formats|inputs|models|recipes [NAME]`."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from compressor.cli.complete import LISTS
from compressor.cli.flags import Json
from compressor.cli.render import STDOUT, print_json, table
from compressor.errors import did_you_mean


def listing(
    what: Annotated[str, typer.Argument(help="methods, pruners, formats, inputs, models or recipes.")],
    name: Annotated[str | None, typer.Argument(help="Show one in full.")] = None,
    json_: Json = False,
) -> None:
    """List what can be asked for."""
    if what not in LISTS:
        raise did_you_mean("list", what, LISTS)
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
        print_json({what: chosen, **({"facts": _facts()} if what == "methods" else {})})
    elif what == "methods":
        _show_methods(chosen)
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


def _facts() -> dict[str, dict[str, str | None]]:
    """Return method -> what it looks at, which grids it takes, and what it took where that was measured."""
    from compressor.methods.facts import FACTS
    from compressor.pages.measured import cost

    return {
        name: {
            "scope": facts.scope,
            "data": facts.data,
            "bits": facts.bits,
            "formats": ", ".join(facts.families),
            "cost": cost(name),
        }
        for name, facts in FACTS.items()
    }


def _show_methods(entries: dict[str, str]) -> None:
    """Print what each method needs and costs, then what it does."""
    rows = [
        [name, *(facts[key] or "not measured" for key in ("scope", "data", "bits", "formats", "cost"))]
        for name, facts in _facts().items()
    ]
    STDOUT.print(table("methods", ["name", "scope", "data", "bits", "formats", "time"], rows, text=True))
    STDOUT.print(
        "time: processor time of one thread for smollm2-135m (135 M weights), over the measured rows; scope: what is "
        "decided together; formats: see compress list formats",
        soft_wrap=False,
    )
    STDOUT.print(table("what they do", ["name", "what it does"], _rows(entries), text=True))


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
