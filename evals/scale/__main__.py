"""`python -m compressor.evals.scale write|measure|render`: what runs at real widths use."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from compressor.checkpoint.sink import write_json, write_text
from compressor.errors import CompressorError, RecipeError, disk_error
from compressor.evals.bench.machine import describe
from compressor.evals.scale.measure import check_limit, measure
from compressor.evals.scale.render import RESULTS, fill, read_results
from compressor.evals.scale.write import SHAPES, write_llama


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    options, rest = _parser().parse_known_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that what it started ends with it
    try:
        if rest and options.command is not _measure:
            raise RecipeError(f"what is {rest[0]}?", "see --help")
        options.command(options, [argument for argument in rest if argument != "--"])
    except CompressorError as error:
        print(f"error: {error.message}", *([f"hint: {error.hint}"] if error.hint else []), sep="\n", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m compressor.evals.scale", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="write|measure|render")
    write = verbs.add_parser("write", help="write a random checkpoint of a known model's shape, shard by shard")
    write.add_argument("folder", type=Path)
    write.add_argument("--shape", default="llama-7b", help=f"one of {', '.join(SHAPES)}")
    write.add_argument("--layers", type=int, help="blocks; default: as many as the model has")
    write.add_argument("--seed", type=int, default=0)
    write.set_defaults(command=_write)
    run = verbs.add_parser("measure", help="run compress quantize; unknown flags are passed on to it")
    run.add_argument("source", type=Path, help="a sharded checkpoint, such as write makes")
    run.add_argument("name", help="name of the result file and of the row")
    run.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder for the compressed checkpoint")
    run.add_argument("--threads", type=int, default=1, help="threads of the command (default 1)")
    run.add_argument("--limit-gb", type=float, help="fail if more than so many GB were resident")
    run.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="folder of the result files")
    run.add_argument("--keep", action="store_true", help="leave the compressed checkpoint there")
    run.set_defaults(command=_measure)
    page = verbs.add_parser("render", help="make the tables of a page again from the result files")
    page.add_argument("page", type=Path, help="docs/scale.md")
    page.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="folder of the result files")
    page.set_defaults(command=_render)
    return parser


def _write(options: argparse.Namespace, _: list[str]) -> None:
    total = write_llama(options.folder, options.shape, options.layers, options.seed, _say)
    print(f"{options.folder}: {total / 1e9:.2f} GB")


def _measure(options: argparse.Namespace, rest: list[str]) -> None:
    out = options.work / options.name
    try:
        options.results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, options.results) from error
    usage = measure(options.source, out, rest, options.threads, _say)
    record = {**usage.to_json(), "limit_gb": options.limit_gb, "machine": describe("cpu", options.threads)}
    write_json(options.results / f"{options.name}.json", record)
    if not options.keep:
        shutil.rmtree(out)
    if options.limit_gb is not None:
        check_limit(usage, options.limit_gb)
    print(json.dumps({key: value for key, value in record.items() if key != "units"}, indent=2))


def _render(options: argparse.Namespace, _: list[str]) -> None:
    try:
        text = options.page.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{options.page}: {error.strerror}", "give docs/scale.md") from error
    write_text(options.page, fill(text, read_results(options.results)))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
