"""`python -m compressor.evals.bench.peers run|render|tools`: the table of this package beside other tools.

Rows are made, kept and resumed by the bench runner; this command makes the tools' environments before and a summary
after. The command line is argparse's: the user's program does not need this one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from compressor.checkpoint.cache import cache_root
from compressor.errors import RecipeError
from compressor.evals.bench.__main__ import INCOMPLETE, add_run_options, guarded, settings_of
from compressor.evals.bench.peers.environments import TOOLS, SetupError, make_environment
from compressor.evals.bench.peers.summary import summary_json
from compressor.evals.bench.render import render_table
from compressor.evals.bench.steps import save
from compressor.evals.bench.table import find_table, read_table

PEERS = "peers"
"""The table that is run unless another one is named."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    options = _parser().parse_args(arguments)
    return guarded(lambda: int(options.command(options)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m compressor.evals.bench.peers", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="run|render|tools")
    run = verbs.add_parser("run", help="make environments and rows, then peers.json and peers.md")
    add_run_options(run)
    run.add_argument("--table", default=PEERS, help="YAML file or name of the table (default peers)")
    run.add_argument("--tools", default=",".join(TOOLS), metavar="A,B", help="tools to make environments for")
    run.add_argument("--envs", type=Path, metavar="DIR", help="folder of the environments; default: the cache")
    run.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="for peers.json and peers.md")
    run.set_defaults(command=_run)
    render = verbs.add_parser("render", help="write peers.json and peers.md from the row files")
    render.add_argument("--table", default=PEERS, help="YAML file or name of the table (default peers)")
    render.add_argument("--results", type=Path, metavar="DIR", help="folder of the row files")
    render.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="for peers.json and peers.md")
    render.set_defaults(command=lambda options: _write(options, {}))
    tools = verbs.add_parser("tools", help="the tools, what pip is asked for, and whether there is an environment")
    tools.add_argument("--envs", type=Path, metavar="DIR", help="folder of the environments; default: the cache")
    tools.set_defaults(command=_tools)
    return parser


def _run(options: argparse.Namespace) -> int:
    # Imported here: it loads torch, which summaries are made without.
    from compressor.evals.bench.runner import run_table

    def say(text: str) -> None:
        print(text, flush=True)

    path = find_table(options.table)
    table = read_table(path)
    wanted = [name for name in options.tools.split(",") if name]
    for name in wanted:
        if name not in TOOLS:
            raise RecipeError(f"--tools {name}: no such tool", f"one of {', '.join(TOOLS)}")
    settings = settings_of(options, path)
    environments = dict(settings.environments or {})
    missing: dict[str, str] = {}
    for name in wanted:
        if name in environments or not any(row.tool == name for row in table.rows):
            continue
        try:
            environments[name] = str(make_environment(name, _envs(options), say))
        except SetupError as error:
            missing[name] = error.message
            say(error.message)
    summary = run_table(path, replace(settings, environments=environments), say)
    _write(options, missing)
    print(
        f"{len(summary.done)} rows made, {len(summary.kept)} kept, {len(summary.failed)} failed, "
        f"{len(summary.skipped)} skipped"
    )
    return 0 if summary.complete else INCOMPLETE


def _write(options: argparse.Namespace, missing: Mapping[str, str]) -> int:
    path = find_table(options.table)
    for name, text in (
        ("peers.json", summary_json(path, options.results, missing)),
        ("peers.md", render_table(path, options.results)),
    ):
        save(options.output / name, text)
        print(options.output / name)
    return 0


def _tools(options: argparse.Namespace) -> int:
    for name, tool in TOOLS.items():
        there = (_envs(options) / name).is_dir()
        print(f"{name}: {tool.requirement}, {tool.home}{', environment made' if there else ''}")
    return 0


def _envs(options: argparse.Namespace) -> Path:
    folder: Path = options.envs or cache_root() / "bench" / "environments"
    return folder.resolve()


if __name__ == "__main__":
    sys.exit(main())
