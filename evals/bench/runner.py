"""Going through a table's rows: what is done already, what can be done here, and what became of each."""

from __future__ import annotations

import contextlib
import fnmatch
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from compressor.errors import CompressorError, RecipeError, ResourceError, disk_error
from compressor.evals.bench.inputs import find_inputs
from compressor.evals.bench.record import Record, read_record
from compressor.evals.bench.row import ORIGINAL, Row, TextFile
from compressor.evals.bench.rows import Bench
from compressor.evals.bench.steps import Surroundings
from compressor.evals.bench.table import DIGEST_CHARS, Table, read_table
from compressor.evals.bench.tools import SCRIPTS


@dataclass(frozen=True)
class Summary:
    """What a run did, by row name.

    Attributes:
        done: Made now.
        kept: Made by an earlier run.
        failed: Tried now, with the error.
        skipped: Not tried, with the reason.
    """

    done: tuple[str, ...]
    kept: tuple[str, ...]
    failed: Mapping[str, str]
    skipped: Mapping[str, str]

    @property
    def complete(self) -> bool:
        """Whether every chosen row has a result."""
        return not self.failed and not self.skipped


@dataclass(frozen=True)
class Settings:
    """How a table is run.

    Attributes:
        data: Folder with the texts, and with models that the table names by folder.
        work: Folder for checkpoints and logs; finished rows leave nothing there.
        results: Folder of the row files.
        rows: Glob over row names; the original is always among them.
        environments: Tool -> interpreter.
        threads: Threads of every command.
        device: As `--device`.
        rerun: Make chosen rows again that have a result.
        keep: Leave checkpoints and logs of finished rows in the work folder.
    """

    data: Path
    work: Path
    results: Path
    rows: str = "*"
    environments: Mapping[str, str] | None = None
    threads: int = 1
    device: str = "cpu"
    rerun: bool = False
    keep: bool = False


def run_table(path: Path, settings: Settings, say: Callable[[str], None] = lambda text: None) -> Summary:
    """Make the chosen rows that have no result yet; a failed one is recorded, shown, and tried again next time.

    Args:
        path: The table's YAML.
        settings: Where, which and how.
        say: Told one line about every row.

    Raises:
        RecipeError: Not a table, no row chosen, an unknown tool, or another run is using the work folder.
        CompressorError: The inputs cannot be read. Errors of single rows are recorded instead.
    """
    table = read_table(path)
    chosen = [row for row in table.rows if row.is_original or fnmatch.fnmatchcase(row.name, settings.rows)]
    if len(chosen) == 1 and settings.rows != ORIGINAL:
        raise RecipeError(
            f"{path.name}: no row matches {settings.rows!r}", f"rows: {', '.join(r.name for r in table.rows)}"
        )
    bench = _prepare(table, settings)
    with only_run(settings.work):
        return _run(bench, chosen, settings, say)


def _prepare(table: Table, settings: Settings) -> Bench:
    environments = dict(settings.environments or {})
    for tool, interpreter in environments.items():
        if tool not in SCRIPTS:
            raise RecipeError(f"--env {tool}: no such tool", f"one of {', '.join(SCRIPTS)}")
        if not Path(interpreter).is_file():
            raise RecipeError(f"--env {tool}={interpreter}: no such file", "give the interpreter of its environment")
    work = settings.work.resolve()
    inputs = find_inputs(table, settings.data, work)
    hidden = {
        str(inputs.calibration): table.calibration.file,
        str(inputs.evaluation): table.evaluation.file,
        **{inputs.texts[row.name]: row.text.file for row in table.rows if isinstance(row.text, TextFile)},
        inputs.model_argument: table.model_name,
        str(inputs.model): table.model_name,
        str(settings.data.resolve()): "DATA",
        str(work): "WORK",
        str(Path.home()): "~",
        tempfile.gettempdir(): "TMP",
        **{str(Path(python).parent.parent): f"env-{tool}" for tool, python in environments.items()},
    }
    around = Surroundings(settings.threads, settings.device, {key: v for key, v in hidden.items() if len(key) > 1})
    return Bench(table, inputs, work, around, environments)


def _run(bench: Bench, chosen: list[Row], settings: Settings, say: Callable[[str], None]) -> Summary:
    done: list[str] = []
    kept: list[str] = []
    failed: dict[str, str] = {}
    skipped: dict[str, str] = {}
    original: Record | None = None
    for row in chosen:
        path = settings.results / f"{bench.table.key(row)}.json"
        again = settings.rerun and fnmatch.fnmatchcase(row.name, settings.rows)
        record = None if again else _found(bench, row, path)
        if record is not None:
            kept.append(row.name)
            original = record if row.is_original else original
            continue
        reason = _why_not(row, bench, original)
        if reason:
            skipped[row.name] = reason
            say(f"{row.name}: skipped: {reason}")
            continue
        if again:
            bench.clean(row)
        say(f"{row.name}: running")
        record = _make(bench, row, original)
        record.write(path)
        if record.error is not None:
            failed[row.name] = record.error
            say(f"{row.name}: failed: {record.error}")
            continue
        done.append(row.name)
        say(f"{row.name}: done")
        original = record if row.is_original else original
        if not settings.keep:
            bench.clean(row)
    return Summary(tuple(done), tuple(kept), failed, skipped)


def _found(bench: Bench, row: Row, path: Path) -> Record | None:
    """Return a result made earlier: of this table, or of another table's row with the same digest."""
    digest = bench.table.digest(row)
    others = sorted(path.parent.parent.glob(f"*/*-{digest[:DIGEST_CHARS]}.json"))
    for place in [path, *others]:
        record = read_record(place)
        usable = record is not None and record.error is None and record.digest == digest
        if record is None or not usable or record.fingerprint != bench.inputs.fingerprint:
            continue
        if place != path or record.name != row.name:  # the digest knows nothing of names
            record = replace(record, name=row.name)
            record.write(path)
        return record
    return None


def _make(bench: Bench, row: Row, original: Record | None) -> Record:
    try:
        return bench.make(row, original)
    except ResourceError:
        raise  # a full disk is no property of the row, and would fail the others too
    except CompressorError as error:
        return replace(bench.base(row), error=bench.around.scrub(" ".join(str(error).split())))


def _why_not(row: Row, bench: Bench, original: Record | None) -> str | None:
    """Return why a row cannot be tried, or None."""
    if not row.is_original and original is None:
        return "the original has no result to compare with"
    if row.tool is not None and row.tool not in bench.environments:
        return f"needs --env {row.tool}=PYTHON"
    return None


@contextlib.contextmanager
def only_run(work: Path) -> Iterator[None]:
    """Hold the work folder's lock: two runs would write the same checkpoints."""
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, work) from error
    lock = FileLock(work / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RecipeError(f"{work}: another run is using it", "wait for it, or give another --work") from None
    try:
        yield
    finally:
        lock.release()
