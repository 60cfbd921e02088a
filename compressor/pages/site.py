"""`python -m compressor.pages.site FOLDER`: the source of the site, for generators that read `mkdocs.yml`.

Pages are those of `docs`, with the tables of results and their pictures beside them. Links to files that the site does
not hold (sources, tests) become plain names; a page that the navigation does not name is put into it.
"""

from __future__ import annotations

import argparse
import posixpath
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from compressor.errors import CompressorError, RecipeError
from compressor.pages.assemble import ROOT

TABLES = "evals/bench/tables"
NAVIGATION = "mkdocs.yml"
SUFFIXES = (".md", ".svg", ".yml")
"""What is taken from `docs`."""

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])+)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^(```|~~~)")


def make_site(folder: Path, root: Path = ROOT) -> list[str]:
    """Write `mkdocs.yml` and the pages below `docs` into a folder; what was there before goes.

    Args:
        folder: Where to write; made if it is not there.
        root: The repository.

    Returns:
        The pages, relative to `docs`.

    Raises:
        RecipeError: The repository has no navigation file.
    """
    source = root / NAVIGATION
    if not source.is_file():
        raise RecipeError(f"{source} is not there", "the site is made in a clone of the repository")
    shutil.rmtree(folder / "docs", ignore_errors=True)
    pages = []
    for path in sorted((root / "docs").rglob("*")):
        if path.suffix in SUFFIXES and path.is_file():
            inside = path.relative_to(root / "docs").as_posix()
            _put(folder / "docs" / inside, path, _mover(root, f"docs/{inside}"))
            pages += [inside] if path.suffix == ".md" else []
    for path in sorted((root / TABLES).iterdir()):
        if home(f"{TABLES}/{path.name}"):
            _put(folder / "docs" / "tables" / path.name, path, _mover(root, f"{TABLES}/{path.name}"))
            pages += [f"tables/{path.name}"] if path.suffix == ".md" else []
    text = source.read_text(encoding="utf-8")
    named = set(re.findall(r": ([\w/-]+\.md)$", text, re.MULTILINE))
    tables = [page for page in pages if page.startswith("tables/")]
    others = [page for page in pages if page not in named and page not in tables]
    for heading, members in (("More", others), ("Measured", tables)):
        if members:
            text += "".join([f"  - {heading}:\n", *(f"      - {page}\n" for page in members)])
    (folder / NAVIGATION).write_text(text, encoding="utf-8")
    return pages


def home(inside: str) -> str:
    """Return where a file of the repository lies in the site, or nothing if the site does not hold it."""
    if inside.startswith("docs/"):
        return inside.removeprefix("docs/")
    if posixpath.dirname(inside) == TABLES and inside.endswith((".md", ".svg")):
        return f"tables/{posixpath.basename(inside)}"
    return ""


def moved(text: str, inside: str, exists: Callable[[str], bool]) -> str:
    """Return a page's text with its links as the site needs them; code stays as it is.

    Args:
        text: Markdown.
        inside: The page's path in the repository.
        exists: Whether the repository has a path. Links to what it has not are left for the generator to complain of.
    """
    start = posixpath.dirname(home(inside))

    def link(match: re.Match[str]) -> str:
        image, words = match[1], match[2]
        path, mark, anchor = match[3].partition("#")
        if not path or ":" in path:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(inside), path))
        if not exists(target):
            return match[0]
        place = home(target)
        return f"{image}[{words}]({posixpath.relpath(place, start or '.')}{mark}{anchor})" if place else words

    lines, code = [], False
    for text_line in text.splitlines():
        code ^= bool(_FENCE.match(text_line.strip()))
        lines.append(text_line if code else _LINK.sub(link, text_line))
    return "\n".join(lines) + "\n"


def _mover(root: Path, inside: str) -> Callable[[str], str]:
    return lambda text: moved(text, inside, lambda path: (root / path).exists())


def _put(to: Path, path: Path, change: Callable[[str], str]) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text(encoding="utf-8")
    to.write_text(change(text) if path.suffix == ".md" else text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Make the site's source; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m compressor.pages.site", description="source of the site")
    parser.add_argument("folder", type=Path, help="where to write it")
    try:
        pages = make_site(parser.parse_args(arguments).folder)
    except CompressorError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(f"{len(pages)} pages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
