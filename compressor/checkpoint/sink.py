"""Writing a checkpoint so that it is either complete or does not load, and so that a killed run can continue.

Every tensor's place is known from the plan before the first byte is written: shards are allocated at full size under
`.compress-work/` and each finished unit is written at its offsets, fsynced and noted in a journal with its hash. At the
end shards get their final names, then the index, and `config.json` last, without which nothing loads the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from compressor.checkpoint.source import DTYPE_NAMES, INDEX, SINGLE
from compressor.errors import disk_error
from compressor.files import replace_text
from compressor.formats.base import Slot

WORK = ".compress-work"
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Place:
    """Where one tensor lies: shard index, absolute byte offset, and what it must be."""

    shard: int
    offset: int
    slot: Slot


class Sink:
    """Writes tensors of a sealed plan into preallocated shards.

    Args:
        out: The checkpoint folder.
        slots: Every tensor of the result, name -> dtype and shape.
        shard_bytes: Size at which a new shard starts.
    """

    def __init__(self, out: Path, slots: Mapping[str, Slot], shard_bytes: int = SHARD_BYTES) -> None:
        self.out = out
        self.work = out / WORK
        groups = _split(slots, shard_bytes)
        n = len(groups)
        self.shards = [SINGLE] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
        self.places: dict[str, Place] = {}
        self._headers: list[bytes] = []
        self._sizes: list[int] = []
        for shard, names in enumerate(groups):
            header, size = _header({name: slots[name] for name in names})
            offset = len(header)
            for name in names:
                self.places[name] = Place(shard, offset, slots[name])
                offset += slots[name].nbytes
            self._headers.append(header)
            self._sizes.append(len(header) + size)
        self.total_bytes = sum(slot.nbytes for slot in slots.values())

    def allocate(self) -> None:
        """Reserve the full size of every shard, so that a disk that is too small is noticed before any work.

        Raises:
            ResourceError: Not enough space.
        """
        for shard in range(len(self.shards)):
            path = self._path(shard)
            if path.exists():
                if self._has_header(shard):
                    continue
                path.unlink()
            part = path.with_name(f"{path.name}.new")
            try:
                with part.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, self._sizes[shard])
                    file.write(self._headers[shard])
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                part.unlink(missing_ok=True)
                raise disk_error(error, self.out) from error
            part.replace(path)

    def _has_header(self, shard: int) -> bool:
        """Return whether a shard of an earlier run has its size and header; units have hashes, these have none."""
        path, header = self._path(shard), self._headers[shard]
        if path.stat().st_size != self._sizes[shard]:
            return False
        with path.open("rb") as file:
            return file.read(len(header)) == header

    def write(self, tensors: Mapping[str, Tensor]) -> str:
        """Write one unit's tensors at their places and return the unit's SHA-256, once they are on the disk.

        Raises:
            ResourceError: The disk is full.
        """
        digest = hashlib.sha256()
        files: dict[int, Any] = {}
        try:
            for name in sorted(tensors):
                place, tensor = self.places[name], tensors[name]
                assert tensor.dtype == place.slot.dtype, (name, tensor.dtype, place.slot)
                assert tuple(tensor.shape) == place.slot.shape, (name, tuple(tensor.shape), place.slot)
                data = tensor_bytes(tensor)
                if place.shard not in files:
                    files[place.shard] = self._path(place.shard).open("r+b")
                files[place.shard].seek(place.offset)
                files[place.shard].write(data)
                digest.update(name.encode())
                digest.update(data)
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise disk_error(error, self.out) from error
        finally:
            for file in files.values():
                with suppress(OSError):  # what could not be written is tried once more, and has been said
                    file.close()
        return digest.hexdigest()

    def unit_hash(self, names: list[str]) -> str | None:
        """Return the SHA-256 of what is on disk for these tensors; None if a shard is missing or not the plan's."""
        digest = hashlib.sha256()
        for name in sorted(names):
            place = self.places[name]
            path = self._path(place.shard)
            if not path.is_file() or not self._has_header(place.shard):
                return None
            with path.open("rb") as file:
                file.seek(place.offset)
                digest.update(name.encode())
                digest.update(file.read(place.slot.nbytes))
        return digest.hexdigest()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors that have been written.

        Raises:
            ResourceError: They cannot be read.
        """
        out: dict[str, Tensor] = {}
        for name in names:
            place = self.places[name]
            data = bytearray(place.slot.nbytes)
            try:
                with self._path(place.shard).open("rb") as file:
                    file.seek(place.offset)
                    file.readinto(data)
            except OSError as error:
                raise disk_error(error, self.out) from error
            out[name] = torch.frombuffer(data, dtype=torch.uint8).view(place.slot.dtype).view(place.slot.shape)
        return out

    def publish(self) -> None:
        """Give shards their final names and write the index; `config.json` is the caller's, and last."""
        for shard, name in enumerate(self.shards):
            if self._path(shard) != self.out / name:
                self._path(shard).replace(self.out / name)
        if len(self.shards) > 1:
            weight_map = {name: self.shards[place.shard] for name, place in sorted(self.places.items())}
            write_json(self.out / INDEX, {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map})
        sync_folder(self.out)

    def _path(self, shard: int) -> Path:
        """Where the shard is now: under its final name if a previous run got that far."""
        final = self.out / self.shards[shard]
        return final if final.exists() else self.work / f"{self.shards[shard]}.part"


class Journal:
    """One JSON line per finished unit; a line cut short by a crash counts as never written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """Return the complete lines, and cut off an incomplete last one."""
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) != len(data):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        entries = []
        for line in whole.splitlines():
            try:
                entries.append(json.loads(line))
            except (ValueError, RecursionError):
                return []  # not our writing: the caller starts again
        return entries

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add a line and make it durable; only now does the unit count as finished."""
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(entry, sort_keys=True).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise disk_error(error, self.path) from error


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return a tensor's content as little-endian bytes, as safetensors stores it."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        ResourceError: The disk is full or the folder not writable.
    """
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except OSError as error:
        raise disk_error(error, path) from error
    except SafetensorError as error:  # the number of what the system said is in the words
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise disk_error(OSError(number, os.strerror(number)), path) from error


def write_json(path: Path, data: object) -> None:
    """Write JSON atomically: a reader sees the old file or the new one."""
    write_text(path, json.dumps(data, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically and durably.

    Raises:
        ResourceError: The disk is full or the folder not writable.
    """
    try:
        replace_text(path, text)
    except OSError as error:
        raise disk_error(error, path) from error


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _split(slots: Mapping[str, Slot], shard_bytes: int) -> list[list[str]]:
    """Fill shards in plan order; inside a shard, widest dtype first, which keeps every tensor aligned."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, slot in slots.items():
        if groups[-1] and size + slot.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += slot.nbytes
    return [sorted(group, key=lambda name: (-slots[name].dtype.itemsize, name)) for group in groups]


def _header(slots: Mapping[str, Slot]) -> tuple[bytes, int]:
    """Return the safetensors header and the number of data bytes behind it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, slot in slots.items():
        entries[name] = {
            "dtype": DTYPE_NAMES[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [offset, offset + slot.nbytes],
        }
        offset += slot.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offset
