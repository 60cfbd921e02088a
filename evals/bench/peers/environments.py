"""Environments of other tools: made once with `venv` and `pip`, pinned to the versions their programs are for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from compressor.errors import CompressorError, disk_error
from compressor.evals.bench.steps import last_error, save

MARK = "environment.json"
"""Written when an environment is finished: one without it was stopped half-way and is made again."""


class SetupError(CompressorError):
    """A tool's environment could not be made; its rows are skipped and the others go on."""


@dataclass(frozen=True)
class Tool:
    """Another tool.

    Attributes:
        requirement: What pip is asked for.
        home: Project, for the page of tools.
    """

    requirement: str
    home: str


TOOLS: Mapping[str, Tool] = {
    "llmcompressor": Tool("llmcompressor==0.14.*", "https://github.com/vllm-project/llm-compressor"),
    "autoround": Tool("auto-round==0.15.*", "https://github.com/intel/auto-round"),
    "gptqmodel": Tool("gptqmodel==7.6.*", "https://github.com/ModelCloud/GPTQModel"),
}
"""Name in tables -> what it is."""


def make_environment(name: str, folder: Path, say: Callable[[str], None]) -> Path:
    """Return the interpreter of a tool's environment, making the environment if it is not there.

    pip is configured as the user has it (`PIP_INDEX_URL` and the like), so that a build of torch for the CPU is
    found where the user keeps it.

    Args:
        name: A key of `TOOLS`.
        folder: Where environments are kept, one folder each.
        say: Told before something slow begins.

    Raises:
        SetupError: venv or pip failed; the message is pip's last error.
        ResourceError: The folder cannot be written.
    """
    place, requirement = folder / name, TOOLS[name].requirement
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if python.is_file() and _made_for(place) == requirement:
        return python
    try:
        shutil.rmtree(place, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, folder) from error
    say(f"{name}: making an environment with {requirement}")
    log = folder / f"{name}.log"
    _call([sys.executable, "-m", "venv", str(place)], log, name)
    _call([str(python), "-m", "pip", "install", "--disable-pip-version-check", requirement], log, name)
    save(place / MARK, json.dumps({"requirement": requirement}) + "\n")
    return python


def _made_for(place: Path) -> str | None:
    """Return the requirement a finished environment was made for."""
    try:
        return str(json.loads((place / MARK).read_text(encoding="utf-8"))["requirement"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _call(command: list[str], log: Path, name: str) -> None:
    """Run one command; its output goes to the log."""
    # Another environment's pip must see neither this one's packages nor its path.
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    hint = f"see {log}, or give your own: --env {name}=PYTHON"
    try:
        out = log.open("wb")
    except OSError as error:
        raise disk_error(error, log) from error
    with out:
        try:
            code = subprocess.run(command, env=kept, stdin=subprocess.DEVNULL, stdout=out, stderr=out).returncode
        except OSError as error:
            raise SetupError(f"{name}: no environment: {command[0]}: {error.strerror or error}", hint) from error
    if code:
        raise SetupError(f"{name}: no environment: {last_error(log, code)}", hint)
