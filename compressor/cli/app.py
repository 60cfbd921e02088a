"""`compress`: entry point, exit codes, signals. Each verb is a file beside this one.

Nothing here imports torch or transformers before a verb needs them, so that `--help` is instant.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from types import FrameType

import click
import typer

from compressor import __version__
from compressor.cli import (
    auto,
    bench,
    check,
    evaluate,
    export,
    gate,
    generate,
    inspect,
    listing,
    prune,
    push,
    quantize,
    run,
)
from compressor.cli.help import dressed, epilog
from compressor.cli.render import STDERR, STDOUT, print_error
from compressor.errors import CompressorError, RecipeError
from compressor.ranks import announced, leave, speaks, whose_error

app = typer.Typer(
    name="compress",
    help="Compress Hugging Face checkpoints: quantize, prune, write, reload, measure.",
    epilog=epilog(""),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
VERBS: dict[str, dict[str, Callable[..., None]]] = {
    "Compress": {"quantize": quantize.quantize, "prune": prune.prune, "run": run.run, "auto": auto.auto},
    "Measure and judge": {
        "eval": evaluate.evaluate,
        "gate": gate.gate,
        "bench": bench.bench,
        "generate": generate.generate,
    },
    "Look and publish": {
        "check": check.check,
        "inspect": inspect.inspect,
        "list": listing.listing,
        "export": export.export,
        "push": push.push,
    },
}
"""Heading in the help -> verb -> its function."""

for _heading, _verbs in VERBS.items():
    for _verb, _function in _verbs.items():
        app.command(_verb, epilog=epilog(_verb), rich_help_panel=_heading)(dressed(_verb, _function))


_USAGE: tuple[type[click.ClickException], ...] = (
    click.ClickException,
    *(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException"),
)
"""What flags that make no sense raise; some versions of typer carry a click of their own."""


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


SHARED = ("quantize", "prune")
"""Commands that several processes can share."""


@app.callback()
def _options(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Compress Hugging Face checkpoints: quantize, prune, write, reload, measure."""
    _, size = announced()
    if size > 1 and context.invoked_subcommand not in SHARED:
        raise RecipeError(
            f"compress {context.invoked_subcommand} runs in one process, but WORLD_SIZE is {size}",
            f"run it without torchrun, or unset WORLD_SIZE; what processes can share: compress {', '.join(SHARED)}",
        )


def _terminate(signum: int, frame: FrameType | None) -> None:
    # Not an exception: libraries in the middle of their work may catch it. What is finished is on the disk already.
    if speaks():
        os.write(2, b"terminated; the same command continues where it was\n")
    os._exit(128 + signum)


def main() -> None:
    """Run the command line; every way out has its documented exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not speaks():
        STDERR.quiet = STDOUT.quiet = True
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    try:
        code = app(standalone_mode=False) or 0
        if code == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        leave()
    except CompressorError as error:
        _tell(error)
        code = error.exit_code
    except (click.exceptions.Abort, typer.Abort, KeyboardInterrupt):
        if speaks():
            sys.stderr.write("stopped; the same command continues where it was\n")
        code = 130
    except _USAGE as error:
        _tell(RecipeError(error.format_message(), "see --help"))
        code = error.exit_code
    except Exception as error:
        code = _bug(error)
    sys.stdout.flush()
    sys.exit(code)


def _bug(error: Exception) -> int:
    """Keep the traceback in a file and tell the user one line."""
    with tempfile.NamedTemporaryFile("w", prefix="compress-", suffix=".log", delete=False) as file:
        traceback.print_exc(file=file)
    _tell(CompressorError(f"unexpected {type(error).__name__}: {error}".splitlines()[0], f"please report {file.name}"))
    return 1


def _tell(error: CompressorError) -> None:
    """Print an error, unless another process of the job does, or already did."""
    if whose_error(error) is not None:
        STDERR.quiet = False
        print_error(error)
