"""Tables of filter pruning: several seeds, each training a small classifier and cutting it in every way of the table.

A seed is one command, and one file among the results.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import CheckpointError, CompressorError, RecipeError
from compressor.evals.bench.machine import describe
from compressor.evals.bench.steps import Surroundings, run_step, save
from compressor.evals.bench.table import results_folder
from compressor.evals.bench.vision_table import SCHEMA, VisionTable, read_vision_table
from compressor.files import sha256_file

if TYPE_CHECKING:
    from compressor.evals.bench.runner import Settings, Summary

PROGRAM = "compressor.vision.experiment"
ROUNDING_PROGRAM = "compressor.vision_trial"


def run_vision_table(path: Path, settings: Settings, say: Callable[[str], None] = lambda text: None) -> Summary:
    """Make the chosen seeds (rows `seed-0`, `seed-1`, ...) that have no result yet.

    Raises:
        RecipeError: Not a table, no seed chosen, or another run is using the work folder.
        CheckpointError: The images are not those of the table.
    """
    # Imported here: it loads torch, which pages are made without.
    from compressor.evals.bench.runner import Summary, only_run

    table = read_vision_table(path)
    data = settings.data / table.file
    if not data.is_file():
        raise RecipeError(f"{data}: no such file", "give the folder that holds it with --data-dir")
    if (found := sha256_file(data)) != table.sha256:
        raise CheckpointError(f"{data}: SHA-256 is {found}, the table names {table.sha256}", "get that file")
    chosen = [seed for seed in range(table.seeds) if fnmatch.fnmatchcase(f"seed-{seed}", settings.rows)]
    if not chosen:
        raise RecipeError(f"{path.name}: no row matches {settings.rows!r}", f"seed-0 to seed-{table.seeds - 1}")
    work = settings.work.resolve()
    hidden = {str(data.resolve()): table.file, str(work): "WORK", str(Path.home()): "~", tempfile.gettempdir(): "TMP"}
    around = Surroundings(settings.threads, settings.device, hidden)
    done, kept, failed = [], [], {}
    with only_run(work):
        for seed in chosen:
            place = settings.results / f"{table.key(seed)}.json"
            record = read_seed(place)
            if record is not None and record["error"] is None and not settings.rerun:
                kept.append(f"seed-{seed}")
                continue
            say(f"seed-{seed}: running")
            record = _make(table, seed, data.resolve(), work / table.folder(seed), around)
            lines = [f"{json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in record.items()]
            save(place, "{\n" + ",\n".join(lines) + "\n}\n")
            if record["error"] is not None:
                failed[f"seed-{seed}"] = record["error"]
            else:
                done.append(f"seed-{seed}")
            say(f"seed-{seed}: {record['error'] or 'done'}")
    return Summary(tuple(done), tuple(kept), failed, {})


def read_seed(path: Path) -> dict[str, Any] | None:
    """Read a seed's result; None if there is none.

    Raises:
        CheckpointError: Damaged, or of another version.
    """
    if not path.is_file():
        return None
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']!r}")
        return data
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged: {error}", "delete it and run the seed again") from error


def progress_of(path: Path) -> tuple[str, int, int, int]:
    """Return title, seeds, how many have a result, and how many failed."""
    table = read_vision_table(path)
    records = [read_seed(results_folder(path) / f"{table.key(seed)}.json") for seed in range(table.seeds)]
    failed = sum(1 for record in records if record is not None and record["error"] is not None)
    return table.title, table.seeds, sum(1 for record in records if record is not None) - failed, failed


def _make(table: VisionTable, seed: int, data: Path, folder: Path, around: Surroundings) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    mine, shared = folder / "result.safetensors", folder.parent.parent / "originals" / table.original(seed)
    _copy(shared, mine)
    save(folder / "spec.json", json.dumps(table.spec(seed, str(data)), indent=2))
    program = ROUNDING_PROGRAM if table.roundings else PROGRAM
    command = [sys.executable, "-m", program, str(folder / "spec.json"), str(folder / "result.json")]
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "seed": seed,
        "digest": table.digest(seed),
        "machine": describe(around.device, around.threads),
        "versions": {name: version(name) for name in ("torch", "transformers", "torch-pruning")},
        "error": None,
        "cost": None,
        "result": None,
    }
    request = {"digest": table.digest(seed)}
    try:
        record["cost"] = asdict(run_step(folder, "experiment", command, request, around))
        record["result"] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        _copy(mine, shared)
    except CompressorError as error:
        record["error"] = around.scrub(" ".join(str(error).split()))
    return record


def _copy(source: Path, target: Path) -> None:
    """Copy a file that is there to where there is none yet, whole or not at all."""
    if source.is_file() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        shutil.copyfile(source, part)
        part.replace(target)
