"""`compress`: entry point, exit codes, signals. Each verb is a file beside this one.

Nothing here imports torch or transformers before a verb needs them, so that `--help` is instant.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from types import FrameType

import click
import typer

from compressor import __version__
from compressor.cli import auto, bench, check, evaluate, gate, generate, inspect, listing, prune, push, quantize, run
from compressor.cli.render import print_error
from compressor.errors import CompressorError, RecipeError

app = typer.Typer(
    name="compress",
    help="Compress Hugging Face checkpoints: quantize, prune, write, reload, measure.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("quantize")(quantize.quantize)
app.command("prune")(prune.prune)
app.command("eval")(evaluate.evaluate)
app.command("gate")(gate.gate)
app.command("generate")(generate.generate)
app.command("check")(check.check)
app.command("inspect")(inspect.inspect)
app.command("bench")(bench.bench)
app.command("run")(run.run)
app.command("auto")(auto.auto)
app.command("push")(push.push)
app.command("list")(listing.listing)


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Compress Hugging Face checkpoints: quantize, prune, write, reload, measure."""


def _terminate(signum: int, frame: FrameType | None) -> None:
    # Not an exception: libraries in the middle of their work may catch it. What is finished is on the disk already.
    os.write(2, b"terminated; the same command continues where it was\n")
    os._exit(128 + signum)


def main() -> None:
    """Run the command line; every way out has its documented exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = app(standalone_mode=False) or 0
    except CompressorError as error:
        print_error(error)
        code = error.exit_code
    except click.exceptions.Abort:
        code = 130
    except click.ClickException as error:
        print_error(RecipeError(error.format_message(), "see --help"))
        code = error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command continues where it was\n")
        code = 130
    except Exception as error:
        code = _bug(error)
    sys.stdout.flush()
    sys.exit(code)


def _bug(error: Exception) -> int:
    """Keep the traceback in a file and tell the user one line."""
    with tempfile.NamedTemporaryFile("w", prefix="compress-", suffix=".log", delete=False) as file:
        traceback.print_exc(file=file)
    print_error(
        CompressorError(f"unexpected {type(error).__name__}: {error}".splitlines()[0], f"please report {file.name}")
    )
    return 1
