"""`python -m compressor.pages [--check]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from compressor.errors import CompressorError, RecipeError
from compressor.files import replace_text
from compressor.pages.assemble import FOLDER, ROOT, page, pages

STALE = 3
"""Exit code of `--check` where pages are not what would be made: a verdict, not an error."""


def main(arguments: list[str] | None = None) -> int:
    """Write the pages, or say which are stale; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m compressor.pages", description="make docs/methods")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 3 if a page is stale")
    parser.add_argument("--folder", type=Path, default=ROOT / FOLDER, help="where the pages lie")
    options = parser.parse_args(arguments)
    try:
        return run(options.folder, options.check)
    except CompressorError as error:
        print(f"error: {error.message}", *([f"hint: {error.hint}"] if error.hint else []), sep="\n", file=sys.stderr)
        return error.exit_code


def run(folder: Path, check: bool) -> int:
    """Make every page, or compare it.

    Raises:
        RecipeError: The folder is not there.
    """
    if not folder.is_dir():
        raise RecipeError(f"{folder} is no folder", "pages are made in a clone of the repository")
    stale = 0
    for name in pages():
        path = folder / f"{name}.md"
        made = page(name, folder)
        if path.is_file() and path.read_text(encoding="utf-8") == made:
            continue
        stale += 1
        print(f"{'stale' if check else 'written'}: {path}")
        if not check:
            replace_text(path, made)
    return STALE if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
