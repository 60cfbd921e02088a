"""The table of a method's options, from what the code declares."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from compressor.methods.base import MethodOptions

HEAD = ("option", "values", "default", "meaning")
_BULLET = re.compile(r"^- `(?P<name>\w+)`(?: \([^)]*\))?: (?P<text>.*)$")
_PLAIN = {bool: "`true`, `false`", int: "whole number", float: "number", str: "text"}


def options_table(options: type[MethodOptions], prose: Mapping[str, str] | None = None) -> list[str]:
    """Return the lines of a Markdown table of options.

    Args:
        options: Model of the options.
        prose: Option -> what the page beside the module says of it; the code's own description where it says nothing.

    Returns:
        No lines if there are no options.
    """
    said = prose or {}
    if not options.model_fields:
        return []
    lines = [line(HEAD), line(["---"] * len(HEAD))]
    for name, info in options.model_fields.items():
        meaning = said.get(name) or info.description or ""
        lines.append(line([f"`{name}`", values(info), default(info), escape(meaning)]))
    return lines


def line(cells: tuple[str, ...] | list[str]) -> str:
    """Return one line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def escape(text: str) -> str:
    """Return text that does not end a cell."""
    return text.replace("|", "\\|")


def default(info: FieldInfo) -> str:
    """Return a default as `--option` would take it."""
    value = info.get_default(call_default_factory=True)
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`" if value not in ((), {}, "") else "empty"


def values(info: FieldInfo) -> str:
    """Return which values an option takes: choices, or kind and range."""
    kinds = _members(info.annotation)
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    low, high = _bound(info, "ge", "gt"), _bound(info, "le", "lt")
    mapping = "mapping" if any(get_origin(kind) is dict for kind in kinds) else ""
    plain = next((_PLAIN[kind] for kind in kinds if kind in _PLAIN), mapping)
    if low is None and high is None:
        return plain
    if low is not None and high is not None:
        strict = [word for word, end in (("above", low), ("below", high)) if not end[1]]
        if not strict:
            return f"{low[0]} to {high[0]}"
    parts = []
    if low is not None:
        parts.append(f"at least {low[0]}" if low[1] else f"above {low[0]}")
    if high is not None:
        parts.append(f"at most {high[0]}" if high[1] else f"below {high[0]}")
    return ", ".join(parts)


def _members(annotation: Any) -> list[Any]:
    """Return the kinds of a union, None left out."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for member in get_args(annotation) for kind in _members(member)]
    return [] if annotation is type(None) else [annotation]


def _bound(info: FieldInfo, inclusive: str, strict: str) -> tuple[str, bool] | None:
    """Return a bound and whether it may be taken."""
    for piece in info.metadata:
        for attribute in (inclusive, strict):
            value = getattr(piece, attribute, None)
            if value is not None:
                return f"{value:g}" if isinstance(value, float) else str(value), attribute == inclusive
    return None


def prose_of(section: str) -> dict[str, str]:
    """Return what an `Options` section of a page says, option by option; bullets that name several are left out."""
    found: dict[str, str] = {}
    name: str | None = None
    for text in section.splitlines():
        match = _BULLET.match(text)
        if match:
            name = match["name"]
            found[name] = match["text"]
        elif text.startswith("  ") and name:
            found[name] = f"{found[name]} {text.strip()}"
        else:
            name = None
    return found
