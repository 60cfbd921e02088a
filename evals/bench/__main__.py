"""`python -m compressor.evals.bench run|render|list|plant`: the project's tables, made again or extended.

The command line is argparse's: the user's program does not need this one.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from compressor.checkpoint.cache import cache_root
from compressor.errors import CompressorError, RecipeError
from compressor.evals.bench.record import read_record
from compressor.evals.bench.render import render_table
from compressor.evals.bench.steps import save
from compressor.evals.bench.table import TABLES, find_table, read_table, results_folder

if TYPE_CHECKING:
    from compressor.evals.bench.runner import Settings

INCOMPLETE = 3
"""Exit code when chosen rows have no result: a verdict, not an error."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    options = _parser().parse_args(arguments)
    return guarded(lambda: int(options.command(options)))


def guarded(command: Callable[[], int]) -> int:
    """Run a command and return its exit code; an error is a line and a hint, and a signal ends what is running."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return command()
    except CompressorError as error:
        print(f"error: {error.message}", *([f"hint: {error.hint}"] if error.hint else []), sep="\n", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; finished rows are kept", file=sys.stderr)
        return 130
    except _TerminatedError:
        print("terminated; finished rows are kept", file=sys.stderr)
        return 143


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m compressor.evals.bench", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="run|render|list|plant")
    run = verbs.add_parser("run", help="make the rows that have no result yet, then the page")
    run.add_argument("table", help="YAML file, or the name of one of the project's tables")
    add_run_options(run)
    run.set_defaults(command=_run)
    render = verbs.add_parser("render", help="write the page from the row files")
    render.add_argument("table", help="YAML file, or the name of one of the project's tables")
    render.add_argument("--results", type=Path, metavar="DIR", help="folder of the row files")
    render.set_defaults(command=_render)
    listing = verbs.add_parser("list", help="the project's tables and how far they are")
    listing.set_defaults(command=_list)
    copy = verbs.add_parser("plant", help="write the copy with planted outlier channels that a table is about")
    copy.add_argument("table", help="YAML file, or the name of one of the project's tables")
    copy.add_argument("folder", type=Path, help="where the copy goes")
    copy.add_argument("--data-dir", type=Path, default=Path(), metavar="DIR", help="folder of a model that is no name")
    copy.set_defaults(command=_plant)
    return parser


def add_run_options(run: argparse.ArgumentParser) -> None:
    """Add the flags of `run` that say which rows are made, where and how."""
    run.add_argument("--rows", default="*", metavar="GLOB", help="only rows whose name matches, and the original")
    run.add_argument("--data-dir", type=Path, default=Path(), metavar="DIR", help="folder with the table's texts")
    run.add_argument("--work", type=Path, metavar="DIR", help="folder for checkpoints and logs; default: the cache")
    run.add_argument("--results", type=Path, metavar="DIR", help="folder of the row files")
    run.add_argument("--env", action="append", default=[], metavar="TOOL=PYTHON", help="interpreter of another tool")
    run.add_argument("--threads", type=int, default=1, help="threads of every command (default 1)")
    run.add_argument("--device", default="cpu", help="auto, cpu, cuda, ... (default cpu)")
    run.add_argument("--rerun", action="store_true", help="make rows again that have a result")
    run.add_argument("--keep", action="store_true", help="leave checkpoints and logs in the work folder")


def settings_of(options: argparse.Namespace, path: Path) -> Settings:
    """Return what those flags say about a table.

    Raises:
        RecipeError: Fewer threads than one, or a malformed `--env`.
    """
    # Imported here: it loads torch, which pages are made without.
    from compressor.evals.bench.runner import Settings

    if options.threads < 1:
        raise RecipeError(f"--threads {options.threads}: at least 1")
    return Settings(
        data=options.data_dir,
        work=options.work or cache_root() / "bench" / path.stem,
        results=options.results or results_folder(path),
        rows=options.rows,
        environments=_environments(options.env),
        threads=options.threads,
        device=options.device,
        rerun=options.rerun,
        keep=options.keep,
    )


def _run(options: argparse.Namespace) -> int:
    # Imported here: it loads torch, which pages are made without.
    from compressor.evals.bench.runner import run_table
    from compressor.evals.bench.vision import run_vision_table
    from compressor.evals.bench.vision_table import is_vision

    path = find_table(options.table)
    settings = settings_of(options, path)
    make = run_vision_table if is_vision(path) else run_table
    summary = make(path, settings, say=lambda text: print(text, flush=True))
    _write_page(path, options.results)
    print(
        f"{len(summary.done)} rows made, {len(summary.kept)} kept, {len(summary.failed)} failed, "
        f"{len(summary.skipped)} skipped"
    )
    return 0 if summary.complete else INCOMPLETE


def _plant(options: argparse.Namespace) -> int:
    # Imported here: it loads torch, which pages are made without.
    from compressor.evals.bench.inputs import find_model
    from compressor.evals.bench.planted import plant

    table = read_table(find_table(options.table))
    if table.planted is None:
        raise RecipeError(f"{options.table}: its model has no planted channels", "name a table with planted: {...}")
    print(plant(find_model(table, options.data_dir)[0], options.folder, table.planted))
    return 0


def _render(options: argparse.Namespace) -> int:
    print(_write_page(find_table(options.table), options.results))
    return 0


def _write_page(path: Path, results: Path | None) -> Path:
    page = path.with_suffix(".md")
    from compressor.evals.bench.vision_page import render_vision
    from compressor.evals.bench.vision_table import is_vision

    save(page, render_vision(path, results) if is_vision(path) else render_table(path, results))
    return page


def _list(options: argparse.Namespace) -> int:
    from compressor.evals.bench.vision import progress_of
    from compressor.evals.bench.vision_table import is_vision

    for path in sorted(TABLES.glob("*.yaml")):
        if is_vision(path):
            title, seeds, done, failed = progress_of(path)
            print(f"{path.stem}: {title}; {seeds} seeds, {done} done, {failed} failed")
            continue
        table = read_table(path)
        records = [read_record(results_folder(path) / f"{table.key(row)}.json") for row in table.rows]
        failed = sum(1 for record in records if record is not None and record.error is not None)
        done = sum(1 for record in records if record is not None) - failed
        print(f"{path.stem}: {table.title}; {len(records)} rows, {done} done, {failed} failed")
    return 0


def _environments(pairs: list[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        tool, separator, interpreter = pair.partition("=")
        if not separator or not tool or not interpreter:
            raise RecipeError(f"--env {pair!r} is not TOOL=PYTHON", "for example --env llmcompressor=venv/bin/python")
        # Not resolved: the interpreter of an environment is a link, and what it points to is another environment.
        found[tool] = str(Path(interpreter).absolute())
    return found


class _TerminatedError(BaseException):
    """SIGTERM, as an exception that no one takes for a failed row, so that the running command is ended too."""


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise _TerminatedError


if __name__ == "__main__":
    sys.exit(main())
