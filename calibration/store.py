"""Hidden states between two blocks, kept on disk so that memory does not grow with the number of samples.

One file per stream and boundary: samples of equal shape, one after the other, raw. Values pass through the dtype they
are stored in, so a run that was interrupted sees the same numbers as one that was not.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.errors import disk_error
from compressor.files import sha256_file


@dataclass(frozen=True)
class Boundary:
    """One finished file of hidden states.

    Attributes:
        file: File name inside the store's folder.
        shape: Shape of one sample, batch dimension included (`[1, seq, hidden]`).
        n_samples: Samples in the file.
        sha256: Hash of its content.
    """

    file: str
    shape: tuple[int, ...]
    n_samples: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """Return plain data for the journal."""
        return asdict(self)


class HiddenStore:
    """Reads and writes boundaries of one stream.

    Args:
        folder: Where the files live; created with the first one.
        stream: Name of the stream, part of the file names.
        device: Where `read` puts samples.
    """

    dtype = torch.float32

    def __init__(self, folder: Path, stream: str, device: torch.device) -> None:
        self.folder = folder
        self.stream = stream
        self.device = device

    def writer(self, boundary: int) -> BoundaryWriter:
        """Return a writer for the states that enter block `boundary`."""
        return BoundaryWriter(self.folder, f"{self.stream}-{boundary:05d}.bin")

    def read(self, boundary: Boundary, sample: int) -> Tensor:
        """Return one sample's hidden states, float32."""
        count = 1
        for size in boundary.shape:
            count *= size
        nbytes = count * self.dtype.itemsize
        with (self.folder / boundary.file).open("rb") as file:
            file.seek(sample * nbytes)
            data = bytearray(file.read(nbytes))
        return torch.frombuffer(data, dtype=self.dtype).view(boundary.shape).to(self.device)

    def intact(self, boundary: Boundary) -> bool:
        """Return whether the file is there and still has the content it was written with."""
        path = self.folder / boundary.file
        return path.is_file() and sha256_file(path) == boundary.sha256

    def drop_all_but(self, keep: Boundary | None) -> None:
        """Delete this stream's other files."""
        for path in self.folder.glob(f"{self.stream}-*.bin*"):
            if keep is None or path.name != keep.file:
                path.unlink()


class BoundaryWriter:
    """Appends samples in order; `close` makes the file durable and describes it.

    As a context it gives the space of a file that was not closed back, whatever the reason.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / name
        self._part = folder / f"{name}.part"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._part.open("wb")
        except OSError as error:
            raise disk_error(error, self._path) from error
        self._hash = hashlib.sha256()
        self._shape: tuple[int, ...] = ()
        self._count = 0

    def __enter__(self) -> BoundaryWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._file.closed:
            self._abandon()

    def append(self, hidden: Tensor) -> None:
        """Write one sample; all samples must have the same shape.

        Raises:
            ResourceError: The disk is full.
        """
        assert not self._count or tuple(hidden.shape) == self._shape, (tuple(hidden.shape), self._shape)
        self._shape = tuple(hidden.shape)
        data = hidden.detach().to("cpu", HiddenStore.dtype).contiguous().numpy().tobytes()
        try:
            self._file.write(data)
        except OSError as error:
            self._abandon()
            raise disk_error(error, self._path) from error
        self._hash.update(data)
        self._count += 1

    def close(self) -> Boundary:
        """Flush to disk, give the file its final name, and return its description."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            self._abandon()
            raise disk_error(error, self._path) from error
        self._part.replace(self._path)
        return Boundary(self._path.name, self._shape, self._count, self._hash.hexdigest())

    def _abandon(self) -> None:
        """Give the space of an unfinished file back; what is still buffered could not be written anyway."""
        with suppress(OSError):
            self._file.close()
        self._part.unlink(missing_ok=True)
