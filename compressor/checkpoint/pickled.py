"""Pickled checkpoints as sources, on request: read as plain tensors, converted once into the cache.

A pickle is a program; opening one can run anything. `torch.load(..., weights_only=True)` runs none of it: it knows how
to build tensors and containers, and raises on whatever else the file asks for. What it builds is still bounded here by
the size of the file, as a few bytes can ask for a tensor of terabytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.cache import cache_root, is_intact, locked, publishing
from compressor.checkpoint.export import MAX_SIDE_FILE_BYTES, NOT_COPIED_SUFFIXES
from compressor.checkpoint.sink import save_tensors
from compressor.checkpoint.source import DTYPE_NAMES, INDEX, PICKLES, PROVENANCE, SINGLE, is_plain_name, read_json
from compressor.errors import CheckpointError, CompressorError, disk_error
from compressor.files import sha256_file

PICKLE_SINGLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth")
"""Pickles that trainers leave beside a model; they are not opened."""

TIES = 2
"""How often, on average, the bytes of a file may be named: tied weights have two names."""

_CONVERSION = "1"
"""Part of the cache key; raise it when a change to the conversion changes the bytes it writes."""
_LOG = logging.getLogger("compressor")


def is_pickled(path: Path) -> bool:
    """Return whether a folder holds pickled weights and no safetensors."""
    if any(path.glob("*.safetensors")) or (path / INDEX).exists():
        return False
    return any(path.glob(f"*{suffix}") for suffix in PICKLES)


def resolve_pickled(path: Path) -> Path:
    """Return the folder of a pickled checkpoint as an ordinary one, converting it if it is not in the cache.

    The folder belongs to the cache: read it, never write to it.

    Raises:
        CheckpointError: A file is no plain dictionary of tensors, asks for code to be run, or for more than it holds.
        ResourceError: The cache cannot be written.
    """
    files = pickle_files(path)
    digest = hashlib.sha256(f"{_CONVERSION}:{torch.__version__}\n".encode())
    sides = _side_files(path)
    for file in (*sides, *(path / name for name in files)):
        digest.update(f"{file.name}\0{sha256_file(file)}\n".encode())
    entry = cache_root() / "models" / f"pickle-{digest.hexdigest()[:16]}"
    if not is_intact(entry):
        with locked(entry):
            if not is_intact(entry):  # another process may have finished while this one waited
                with publishing(entry) as folder:
                    _convert(path, files, sides, folder / "checkpoint")
    return entry / "checkpoint"


def pickle_files(path: Path) -> list[str]:
    """Return the names of a folder's pickled weights.

    Raises:
        CheckpointError: There are none, several without an index, or the index points outside the folder.
    """
    if (path / PICKLE_INDEX).exists():
        weight_map = read_json(path / PICKLE_INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path / PICKLE_INDEX}: no weight_map", "download it again")
        found = sorted({str(name) for name in weight_map.values()})
        for name in found:
            if not is_plain_name(name) or not name.endswith(PICKLES) or not (path / name).is_file():
                raise CheckpointError(f"{PICKLE_INDEX}: {name!r} is no pickle of this folder", "do not trust this one")
        return found
    if (path / PICKLE_SINGLE).is_file():
        return [PICKLE_SINGLE]
    others = sorted({file.name for suffix in PICKLES for file in path.glob(f"*{suffix}")} - set(NOT_WEIGHTS))
    if len(others) != 1:
        raise CheckpointError(
            f"{path}: {len(others)} pickles ({', '.join(others[:3])}) and no {PICKLE_INDEX}", "keep the weights alone"
        )
    return others


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read one file of pickled tensors without running what else is in it.

    Raises:
        CheckpointError: It asks for code to be run, holds anything but tensors, or asks for more than it holds.
    """
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _check_archive(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except Exception as error:  # a parser of foreign bytes can raise anything
        reason = (str(error).strip() or type(error).__name__).split("\n")[0].partition(" (1)")[0]
        raise CheckpointError(
            f"{path}: not read, nothing in it was run: {type(error).__name__}: {reason[:300]}",
            "it is damaged, or holds more than tensors; ask for safetensors",
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not names and tensors", "is it a state dict?")
    total = 0
    for name, tensor in state.items():
        total += _check(path, name, tensor)
    if total > TIES * path.stat().st_size:
        raise CheckpointError(
            f"{path}: its tensors take {total} bytes, the file has {path.stat().st_size}", "do not trust this one"
        )
    return dict(state)


def _check_archive(path: Path) -> None:
    """Refuse archives whose content is larger than they are."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: a damaged archive: {error}", "download it again") from error
    stored = sum(entry.file_size for entry in entries)
    if stored > path.stat().st_size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{path}: compressed, or larger inside than outside", "do not trust this one")


def _check(path: Path, name: object, tensor: object) -> int:
    """Refuse what is no plain named tensor; returns its bytes."""
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise CheckpointError(
            f"{path}: {str(name)[:100]!r} is a {type(tensor).__name__}, no tensor", "save tensors alone"
        )
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{path}: {name} is {tensor.dtype}, {tensor.layout}", "save plain tensors")
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{path}: {name} {tuple(tensor.shape)} repeats what it holds", "do not trust this one")
    return nbytes


def _side_files(path: Path) -> list[Path]:
    """Return config, tokenizer and whatever else is neither weights nor hidden."""
    return [
        file
        for file in sorted(path.iterdir())
        if file.is_file()
        and file.suffix not in NOT_COPIED_SUFFIXES
        and not file.name.startswith(".")
        and file.name not in (PICKLE_INDEX, PROVENANCE)
        and file.stat().st_size <= MAX_SIDE_FILE_BYTES
    ]


def _convert(path: Path, files: list[str], sides: list[Path], out: Path) -> None:
    """Write the checkpoint anew, one file at a time."""
    _LOG.info("converting %s", path)
    weight_map: dict[str, str] = {}
    try:
        out.mkdir()
        for index, file in enumerate(files):
            name = SINGLE if len(files) == 1 else f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
            tensors = read_pickle(path / file)
            if twice := sorted(set(tensors) & set(weight_map)):
                raise CheckpointError(f"{path}: {twice[0]} is stored in two files", "the index is inconsistent")
            weight_map |= dict.fromkeys(tensors, name)
            save_tensors(out / name, _apart(tensors), {"format": "pt"})
        for side in sides:
            shutil.copyfile(side, out / side.name)
        index_json: dict[str, Any] = {"metadata": {}, "weight_map": weight_map}
        if len(files) > 1:
            (out / INDEX).write_text(json.dumps(index_json), encoding="utf-8")
        notes = [f"the weights were pickled ({', '.join(files[:3])}); they were read as plain tensors, no code was run"]
        (out / PROVENANCE).write_text(json.dumps({"notes": notes}), encoding="utf-8")
    except CompressorError:
        raise
    except OSError as error:
        raise disk_error(error, out) from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give every tensor memory of its own, as safetensors wants it; those that have it stay where they are."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        out[name] = tensor if whole and place not in seen else tensor.contiguous().clone()
        seen.add(place)
    return out
