"""Hidden states between two blocks, kept on disk so that memory does not grow with the number of samples.

One file per stream and boundary: samples of equal shape, one after the other, raw. Values pass through the dtype they
are stored in, so a run that was interrupted sees the same numbers as one that was not. Several processes may fill one
file, each with samples of its own; what is in it does not show how many there were.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from compressor.errors import disk_error
from compressor.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Boundary:
    """One finished file of hidden states.

    Attributes:
        file: File name inside the store's folder.
        shape: Shape of one sample, batch dimension included (`[1, seq, hidden]`).
        n_samples: Samples in the file.
        sha256: Hash over the hashes of its samples.
    """

    file: str
    shape: tuple[int, ...]
    n_samples: int
    sha256: str

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample."""
        return math.prod(self.shape) * HiddenStore.dtype.itemsize

    def to_json(self) -> dict[str, Any]:
        """Return plain data for the journal."""
        return asdict(self)


class HiddenStore:
    """Reads and writes boundaries of one stream.

    Args:
        folder: Where the files live; created with the first one.
        stream: Name of the stream, part of the file names.
        device: Where `read` puts samples.
        ranks: The processes that write files together, on a file system they all see.
    """

    dtype = torch.float32

    def __init__(self, folder: Path, stream: str, device: torch.device, ranks: Ranks = ALONE) -> None:
        self.folder = folder
        self.stream = stream
        self.device = device
        self.ranks = ranks

    def writer(self, boundary: int) -> BoundaryWriter:
        """Return a writer for the states that enter block `boundary`; all processes must ask for one."""
        return BoundaryWriter(self.folder, f"{self.stream}-{boundary:05d}.bin", self.ranks)

    def read(self, boundary: Boundary, sample: int) -> Tensor:
        """Return one sample's hidden states, float32."""
        with (self.folder / boundary.file).open("rb") as file:
            file.seek(sample * boundary.sample_bytes)
            data = bytearray(file.read(boundary.sample_bytes))
        return torch.frombuffer(data, dtype=self.dtype).view(boundary.shape).to(self.device)

    def intact(self, boundary: Boundary) -> bool:
        """Return whether the file is there and still has the content it was written with."""
        path = self.folder / boundary.file
        if not path.is_file() or path.stat().st_size != boundary.n_samples * boundary.sample_bytes:
            return False
        digests = {}
        with path.open("rb") as file:
            for sample in range(boundary.n_samples):
                digests[sample] = hashlib.sha256(file.read(boundary.sample_bytes)).digest()
        return _of_all(digests) == boundary.sha256

    def drop_all_but(self, keep: Boundary | None) -> None:
        """Delete this stream's other files."""
        for path in self.folder.glob(f"{self.stream}-*.bin*"):
            if keep is None or path.name != keep.file:
                path.unlink()


class BoundaryWriter:
    """Writes samples at their places; `close` makes the file durable and describes it.

    As a context it gives the space of a file that was not closed back, whatever the reason.
    """

    def __init__(self, folder: Path, name: str, ranks: Ranks = ALONE) -> None:
        self._path = folder / name
        self._part = folder / f"{name}.part"
        self._ranks = ranks
        self._file: IO[bytes]
        try:
            if ranks.leads:
                folder.mkdir(parents=True, exist_ok=True)
                self._file = self._part.open("wb")
                ranks.share(None)
            else:
                ranks.share(None)  # once the leader has made it
                self._file = self._part.open("r+b")
        except OSError as error:
            raise disk_error(error, self._path) from error
        self._digests: dict[int, bytes] = {}
        self._shape: tuple[int, ...] = ()

    def __enter__(self) -> BoundaryWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._file.closed:
            self._abandon()

    def append(self, hidden: Tensor) -> None:
        """Write the sample behind those this process has written; see `put`."""
        self.put(len(self._digests), hidden)

    def put(self, sample: int, hidden: Tensor) -> None:
        """Write one sample; all samples must have the same shape, and each is written by one process.

        Raises:
            ResourceError: The disk is full.
        """
        assert not self._digests or tuple(hidden.shape) == self._shape, (tuple(hidden.shape), self._shape)
        assert sample not in self._digests, f"sample {sample} is written twice"
        self._shape = tuple(hidden.shape)
        data = hidden.detach().to("cpu", HiddenStore.dtype).contiguous().numpy().tobytes()
        try:
            self._file.seek(sample * len(data))
            self._file.write(data)
        except OSError as error:
            self._abandon()
            raise disk_error(error, self._path) from error
        self._digests[sample] = hashlib.sha256(data).digest()

    def close(self) -> Boundary:
        """Flush to disk, give the file its final name, and return its description."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            self._abandon()
            raise disk_error(error, self._path) from error
        digests: dict[int, bytes] = {}
        for shape, theirs in self._ranks.gather((self._shape, self._digests)):
            assert not digests.keys() & theirs.keys(), "two processes wrote one sample"
            digests |= theirs
            self._shape = self._shape or shape
        if self._ranks.leads:
            self._part.replace(self._path)
        boundary = Boundary(self._path.name, self._shape, len(digests), _of_all(digests))
        return self._ranks.share(boundary)  # nobody looks for the file before it has its name

    def _abandon(self) -> None:
        """Give the space of an unfinished file back; what is still buffered could not be written anyway."""
        with suppress(OSError):
            self._file.close()
        self._part.unlink(missing_ok=True)


def _of_all(digests: Mapping[int, bytes]) -> str:
    """Return the hash over the hashes of samples, which must be all from the first on."""
    assert sorted(digests) == list(range(len(digests))), "a sample is missing"
    return hashlib.sha256(b"".join(digests[sample] for sample in range(len(digests)))).hexdigest()
