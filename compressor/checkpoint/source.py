"""Reading a checkpoint: headers first, weights only when asked for, one unit at a time.

A source is a directory with `config.json` and one or several safetensors files. Opening it reads headers only and
rejects everything that could surprise later: pickles, truncated files, shards outside the folder, names stored twice.
A checkpoint that is quantized already shows the dense tensors its packed ones stand for, and decodes them as they are
read; nothing behind a source needs to know.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compressor.errors import CheckpointError, UnsupportedError
from compressor.files import read_bounded, sha256_file
from compressor.formats.base import Slot

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Safetensors spelling -> torch dtype."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes a checkpoint's floating scales and dense tensors may be stored in; readers cast between them."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
PROVENANCE = "compress_source.json"
"""Beside a checkpoint this package converted: `{"notes": [...]}`, which belong into every report about it."""

MAX_JSON_BYTES = 64 << 20
"""A config or index larger than this is not one; the bound keeps memory bounded on hostile input."""

SUMMED_AT_ONCE = 1 << 18
"""Values in one step of looking for NaN: their copy in float64 stays in the processor's cache."""

MAX_NAME_BYTES = 255
"""Of a file's name, on every common file system."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its file's header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str


class Decoder(Protocol):
    """How one dense tensor comes out of the tensors on disk that stand for it."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names on disk."""
        ...

    @property
    def index(self) -> int | None:
        """The entry along the first dimension of every part that is needed, the others need not be read; None: all."""
        ...

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the values, float32, in the shape the source announces."""
        ...


@dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Attributes:
        path: The directory.
        label: What the user called it: a path, an embedded model's name, a Hub id.
        revision: The commit a Hub id was pinned to, or None.
        config: Parsed `config.json`, without what described a quantization that is undone on reading.
        tensors: Every tensor there is to read, by name: those in the shards, or the dense ones they stand for.
        stored: Every tensor in every shard where that differs from `tensors`; else empty.
        decoders: How the tensors that are not stored as such are made.
        notes: What a report about this source must say.
    """

    path: Path
    label: str
    revision: str | None
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    stored: dict[str, TensorInfo] = field(default_factory=dict)
    decoders: Mapping[str, Decoder] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path, label: str | None = None, revision: str | None = None) -> Source:
        """Read config and headers.

        Raises:
            CheckpointError: The folder, its config or a shard is missing, unreadable, pickled or inconsistent.
            UnsupportedError: The checkpoint is quantized in a way that is not decoded here.
        """
        if not path.is_dir():
            raise CheckpointError(
                f"{path}: no such directory", "give a checkpoint folder, or see: compress list models"
            )
        source = cls(path, label or str(path), revision, read_json(path / "config.json"), read_headers(path))
        # Imported here: decoding reads sources itself.
        from compressor.checkpoint.quantized import dequantizing

        return dequantizing(replace(source, notes=read_notes(path)))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors into memory of our own, so that closing the file gives its pages back.

        Raises:
            CheckpointError: A tensor is unreadable or holds NaN or Inf.
        """
        out: dict[str, Tensor] = {}
        with ExitStack() as stack:
            handles: dict[str, Any] = {}
            for name in names:
                decoder = self.decoders.get(name)
                if decoder is None:
                    tensor = self._get(name, handles, stack)
                else:
                    index = decoder.index
                    values = decoder.decode({part: self._get(part, handles, stack, index) for part in decoder.parts})
                    tensor = values.to(DTYPES[self.tensors[name].dtype])
                check_finite(name, tensor)
                out[name] = tensor
        return out

    def _get(self, name: str, handles: dict[str, Any], stack: ExitStack, index: int | None = None) -> Tensor:
        """Read one tensor, or one entry along its first dimension, as it lies on disk."""
        file = (self.stored or self.tensors)[name].file
        try:
            if file not in handles:
                handles[file] = stack.enter_context(safe_open(self.path / file, framework="pt"))
            tensor: Tensor = (
                handles[file].get_tensor(name) if index is None else handles[file].get_slice(name)[index]
            ).clone()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot read {name}: {error}", "download it again") from error
        return tensor

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over config and every shard's content, so that the same weights are known by any path."""
        total = hashlib.sha256()
        for file in ["config.json", *shard_files(self.path)]:
            total.update(f"{file}\0{sha256_file(self.path / file)}\n".encode())
        return total.hexdigest()

    @property
    def dtype(self) -> str:
        """The dtype most weight bytes are stored in, in safetensors spelling."""
        sizes: dict[str, int] = {}
        for info in self.tensors.values():
            if info.dtype in ("F64", "F32", "F16", "BF16"):
                sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        if not sizes:
            raise UnsupportedError(f"{self.path}: no floating-point weights", "start from the original checkpoint")
        return max(sizes, key=lambda name: sizes[name])


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object from a file of bounded size.

    Raises:
        CheckpointError: Missing, too large, not UTF-8, not JSON, or not an object.
    """
    try:
        if path.is_file() and path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes is no config", "is this the right folder?")
        data = json.loads(read_bounded(path, MAX_JSON_BYTES))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file", "is this a Hugging Face checkpoint folder?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}", "download it again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds a {type(data).__name__}, not an object", "download it again")
    return data


def read_notes(path: Path) -> tuple[str, ...]:
    """Return the notes a conversion left beside a checkpoint."""
    if not (path / PROVENANCE).is_file():
        return ()
    notes = read_json(path / PROVENANCE).get("notes")
    return tuple(str(note) for note in notes) if isinstance(notes, list) else ()


def is_plain_name(name: str) -> bool:
    """Return whether a name from a file can be that of a file in the same folder, on any file system."""
    return name.isprintable() and len(name.encode()) <= MAX_NAME_BYTES and Path(name).name == name


def indexed_files(path: Path) -> list[str]:
    """Return the shards a folder's index names, sorted; they need not be there.

    Raises:
        CheckpointError: The index is unreadable or empty, or a name points outside the folder.
    """
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX}: no weight_map", "download it again")
    files = sorted({str(file) for file in weight_map.values()})
    for file in files:
        if not is_plain_name(file) or not file.endswith(".safetensors"):
            raise CheckpointError(f"{INDEX}: shard {file!r} is not a file of this folder", "do not trust this one")
    return files


def shard_files(path: Path) -> list[str]:
    """Return the safetensors file names of a checkpoint folder, sorted.

    Raises:
        CheckpointError: There are none, one is missing, or a name points outside the folder.
    """
    if (path / INDEX).exists():
        files = indexed_files(path)
        for file in files:
            if not (path / file).is_file():
                raise CheckpointError(f"{path / file}: no such file, but the index names it", "download it again")
        return files
    if (path / SINGLE).is_file():
        return [SINGLE]
    others = sorted(file.name for file in path.glob("*.safetensors"))
    if others:
        raise CheckpointError(f"{path}: has {others[0]} but no {INDEX}", "download the index too")
    pickles = sorted(file.name for suffix in PICKLES for file in path.glob(f"*{suffix}"))
    if pickles:
        raise CheckpointError(
            f"{path}: only pickled weights ({pickles[0]}), which can run code when opened",
            "allow it: compress quantize --allow-pickle reads plain tensors and runs nothing; or ask for safetensors",
        )
    raise CheckpointError(f"{path}: no safetensors file", "is this a Hugging Face checkpoint folder?")


def read_headers(path: Path) -> dict[str, TensorInfo]:
    """Return every tensor of a checkpoint folder by name.

    Raises:
        CheckpointError: A shard is missing or unreadable, a name is stored twice, or there is nothing.
    """
    tensors: dict[str, TensorInfo] = {}
    for file in shard_files(path):
        for info in read_header(path / file):
            if info.name in tensors:
                raise CheckpointError(f"{path}: {info.name} is stored in two shards", "the index is inconsistent")
            tensors[info.name] = info
    if not tensors:
        raise CheckpointError(f"{path}: the safetensors files hold no tensors", "is the download complete?")
    return tensors


def read_header(path: Path) -> Iterator[TensorInfo]:
    """Yield the tensors of one safetensors file from its header.

    Raises:
        CheckpointError: The file is truncated, its header is corrupt, or it uses a dtype torch does not have.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a dict
                view = handle.get_slice(name)
                dtype, shape = view.get_dtype(), tuple(view.get_shape())
                if dtype not in DTYPES:
                    raise CheckpointError(f"{path}: {name} has dtype {dtype}", "start from the original checkpoint")
                count = 1
                for size in shape:
                    count *= size
                yield TensorInfo(name, dtype, shape, count * DTYPES[dtype].itemsize, path.name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file: {error}", "download it again") from error


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise if a floating-point tensor holds NaN or Inf.

    Raises:
        CheckpointError: Names the tensor, how many values are bad, and where the first one is.
    """
    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
        return
    if all_finite(tensor):
        return
    bad = ~torch.isfinite(tensor)
    first = tuple(bad.nonzero()[0].tolist())
    raise CheckpointError(
        f"{name}: {int(bad.sum())} of {tensor.numel()} values are NaN or Inf, the first at {first}",
        "the checkpoint is damaged; download it again or train on",
    )


def all_finite(tensor: Tensor) -> bool:
    """Return whether no value of a floating-point tensor is NaN or Inf; takes next to no memory beside it."""
    for part in tensor.flatten().split(SUMMED_AT_ONCE):
        # A sum is NaN or Inf whenever one value is; only then look at every value. What is summed is converted first.
        if not torch.isfinite(part.sum(dtype=torch.float64)) and not torch.isfinite(part).all():
            return False
    return True


def fits(info: TensorInfo, slot: Slot) -> bool:
    """Return whether a stored tensor can fill a slot: equal shape, and equal dtype up to the width of a float."""
    dtype = DTYPES[info.dtype]
    return info.shape == slot.shape and (dtype == slot.dtype or (dtype in FLOATS and slot.dtype in FLOATS))
