"""Opening a checkpoint to check it: whatever can be read is shown, and what cannot is listed.

It fails only when there is no checkpoint at all, or one that nothing is known about.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from compressor.check.checkpoint import CONTAINER, Checkpoint
from compressor.check.finding import Reader, error
from compressor.checkpoint.source import (
    INDEX,
    SINGLE,
    TensorInfo,
    indexed_files,
    read_header,
    read_json,
    shard_files,
)
from compressor.errors import CheckpointError, UnsupportedError, VerificationError
from compressor.formats.native import QUANT_METHOD


def open_checkpoint(path: Path, reader: Reader | None = None, trust_remote_code: bool = False) -> Checkpoint:
    """Open a folder.

    Raises:
        CheckpointError: It is no checkpoint: no folder, no readable config, or no safetensors file.
        UnsupportedError: It is quantized in a way this package knows nothing about.
        VerificationError: It failed its verification when it was written.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory", "give a checkpoint folder")
    if (path / "config.json.failed").is_file() and not (path / "config.json").is_file():
        raise VerificationError(
            f"{path}: failed its verification when it was written (config.json.failed)", "write it again"
        )
    config = read_json(path / "config.json")
    section = config.get("quantization_config")
    if section is not None:
        _check_method(path, section)
    files: dict[str, tuple[TensorInfo, ...]] = {}
    metadata: dict[str, Mapping[str, str]] = {}
    damaged = []
    for file in _shards(path):
        try:
            files[file] = tuple(read_header(path / file))
            with safe_open(path / file, framework="pt") as handle:
                metadata[file] = handle.metadata() or {}
        except CheckpointError as problem:
            damaged.append(error(file, problem.message.removeprefix(f"{path / file}: "), problem.hint))
    tensors: dict[str, TensorInfo] = {}
    for entries in files.values():
        for entry in entries:
            tensors.setdefault(entry.name, entry)
    return Checkpoint(path, config, tensors, files, metadata, tuple(damaged), reader, trust_remote_code)


def _check_method(path: Path, section: Any) -> None:
    if not isinstance(section, Mapping):
        raise CheckpointError(f"{path}: quantization_config is not an object", "config.json is damaged")
    method = section.get("quant_method", CONTAINER if "config_groups" in section else None)
    if method not in (CONTAINER, QUANT_METHOD):
        raise UnsupportedError(
            f"{path}: quant_method is {method!r}; nothing is known here about how it must be stored",
            f"checked are {CONTAINER}, native and dense checkpoints",
        )


def _shards(path: Path) -> list[str]:
    """Return the safetensors files to look at; ones the index names but that are missing are left to their check."""
    if (path / INDEX).exists():
        try:
            named = indexed_files(path)
        except CheckpointError:
            named = []
        return [file for file in named if (path / file).is_file()] or sorted(
            file.name for file in path.glob("*.safetensors")
        )
    if (path / SINGLE).is_file():
        return [SINGLE]
    others = sorted(file.name for file in path.glob("*.safetensors"))
    return others or shard_files(path)  # raises, and says what is there instead
