"""One step of a row: a command in a process of its own, its time and memory, and what it wrote, kept for a resumed run.

A finished step leaves `STEP.json` in the row's work folder: what was asked for and what it took. The same request
again is answered from there. The file is written after the step has ended well, so a killed step is done again from
the start: the time of a run that was continued would be the time of neither.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compressor.errors import CheckpointError, CompressorError, disk_error
from compressor.files import replace_text

MEASURED = Path(__file__).with_name("measured.py")
ERROR_CHARS = 300
GRACE_SECONDS = 20.0


class StepError(CompressorError):
    """A command of a row failed; the row is recorded as failed and the table goes on."""


@dataclass(frozen=True)
class Cost:
    """What a command took.

    Attributes:
        seconds: Wall time of the whole process, imports included.
        cpu_seconds: Processor time of it and its children.
        peak_rss: Largest resident memory of any one of its processes, bytes.
    """

    seconds: float
    cpu_seconds: float
    peak_rss: int

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Surroundings:
    """What every command of a table is given.

    Attributes:
        threads: Threads of OpenMP and of the BLAS.
        device: As `--device`.
        hidden: Text -> what stands for it wherever something is recorded: paths of this machine.
    """

    threads: int
    device: str
    hidden: Mapping[str, str]

    def environment(self, foreign: bool) -> dict[str, str]:
        """Return the environment of a command; another tool's interpreter must not see this one's packages."""
        count = str(self.threads)
        given = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "TOKENIZERS_PARALLELISM": "false"}
        if not foreign:
            return {**os.environ, **given}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        given["HF_HUB_OFFLINE"] = "1"  # model and tokens are local: nothing is to be fetched, nor asked for
        if self.device == "cpu":
            given["CUDA_VISIBLE_DEVICES"] = ""  # tools take a GPU they see
        return {**kept, **given}

    def scrub(self, text: str) -> str:
        """Replace paths of this machine, the longest first."""
        for path in sorted(self.hidden, key=len, reverse=True):
            text = text.replace(path, self.hidden[path])
        return text


def finished(folder: Path, step: str, request: Mapping[str, Any]) -> Cost | None:
    """Return what a step took if it has been done with the same request, else None.

    Raises:
        CheckpointError: The file that says so is damaged.
    """
    path = folder / f"{step}.json"
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Cost(**data["cost"]) if data["request"] == json.loads(json.dumps(request)) else None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged: {error}", "delete it; the step is done again") from error


def run_step(
    folder: Path,
    step: str,
    command: Sequence[str],
    request: Mapping[str, Any],
    around: Surroundings,
    *,
    foreign: bool = False,
) -> Cost:
    """Run a command in `folder` unless it has been done; its output goes to `STEP.log`.

    Args:
        folder: The row's work folder; the command's working directory.
        step: Name of the step.
        command: Argument vector.
        request: Plain data that says what is done and to what, free of paths; the key for not doing it again.
        around: Threads, device, paths to hide.
        foreign: The interpreter is another environment's.

    Raises:
        StepError: The command failed; the message is its last line, without paths.
    """
    cost = finished(folder, step, request)
    if cost is not None:
        return cost
    measured = folder / f"{step}.measured.json"
    measured.unlink(missing_ok=True)
    log = folder / f"{step}.log"
    # -I -S: the measuring program stays small, whatever this environment loads at start.
    launcher = [sys.executable, "-I", "-S", str(MEASURED), str(measured), *command]
    with log.open("wb") as out:
        child = subprocess.Popen(
            launcher,
            cwd=folder,
            env=around.environment(foreign),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = child.wait()
        except BaseException:  # stopped: the command must not run on and write into a folder another run will use
            _stop(child)
            raise
    if code:
        raise StepError(around.scrub(last_error(log, code)), f"see {step}.log in the row's work folder")
    found = json.loads(measured.read_text(encoding="utf-8"))
    cost = Cost(found["seconds"], found["cpu_seconds"], found["peak_rss"])
    save(folder / f"{step}.json", json.dumps({"request": request, "cost": cost.to_json()}, indent=2) + "\n")
    return cost


def save(path: Path, text: str) -> None:
    """Write a text file whole or not at all; its folder is made if need be.

    Raises:
        ResourceError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    except OSError as error:
        raise disk_error(error, path) from error


def last_error(log: Path, code: int) -> str:
    """Return the line of a log that says best what went wrong: the last `error:` line, else the last line."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 65_536))
        text = file.read().decode(errors="replace")
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if code >= 128 and not errors:
        return f"killed by signal {code - 128}"
    chosen = (errors or lines or [f"exit code {code} and no output"])[-1]
    return chosen if len(chosen) <= ERROR_CHARS else chosen[: ERROR_CHARS - 1] + "…"


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End a command and all it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
            child.wait(timeout=GRACE_SECONDS)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
