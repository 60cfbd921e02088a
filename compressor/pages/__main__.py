"""`python -m compressor.pages [--check]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from compressor.errors import CompressorError, RecipeError
from compressor.files import replace_text
from compressor.pages.assemble import FOLDER, ROOT, marked, page, pages
from compressor.pages.pareto import PICTURE, pareto_page, pareto_rows, pareto_svg
from compressor.pages.study import STUDY, study_page

STALE = 3
"""Exit code of `--check` where pages are not what would be made: a verdict, not an error."""


def main(arguments: list[str] | None = None) -> int:
    """Write the pages, or say which are stale; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m compressor.pages", description="make docs/methods, docs/pareto.md and docs/calibration.md"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 3 if a page is stale")
    parser.add_argument("--folder", type=Path, default=ROOT / FOLDER, help="where the pages of methods lie")
    parser.add_argument("--studies", type=Path, default=ROOT / "docs", help="where the other pages lie")
    options = parser.parse_args(arguments)
    try:
        return run(options.folder, options.studies, options.check)
    except CompressorError as error:
        print(f"error: {error.message}", *([f"hint: {error.hint}"] if error.hint else []), sep="\n", file=sys.stderr)
        return error.exit_code


def run(folder: Path, studies: Path, check: bool) -> int:
    """Make every page, or compare it.

    Raises:
        RecipeError: A folder is not there.
    """
    for place in (folder, studies):
        if not place.is_dir():
            raise RecipeError(f"{place} is no folder", "pages are made in a clone of the repository")
    made = {folder / f"{name}.md": page(name, folder) for name in pages()}
    rows = pareto_rows()
    made[studies / PICTURE] = pareto_svg(rows)
    for name, text in (("pareto", pareto_page(rows)), (STUDY, study_page())):
        made[studies / f"{name}.md"] = marked(text, studies / f"{name}.md")
    stale = 0
    for path, text in made.items():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        print(f"{'stale' if check else 'written'}: {path}")
        if not check:
            replace_text(path, text)
    return STALE if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
