"""Is a GGUF file's header one that can be read? Every count and length in it is held against the size of the file.

The `gguf` package trusts them: an array that says it has 10^12 numbers is read until memory is full, as past the end of
the file there is always one more empty number. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from compressor.errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Type of a value -> its bytes."""
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
_MAX_NAME_BYTES = 1024


def check_header(path: Path) -> None:
    """Walk over a GGUF file's header without keeping any of it.

    Raises:
        CheckpointError: Not GGUF, cut off, or a header that says more than the file holds.
    """
    if path.stat().st_size < 24:
        raise CheckpointError(f"{path}: not readable as GGUF: {path.stat().st_size} bytes", "is the file complete?")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Walk(path, data).check()


class _Walk:
    """A position in the header."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0
        self.order = "<"

    def fail(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: not readable as GGUF: {problem}", "is the file complete?")

    def check(self) -> None:
        if self.data[:4] != _MAGIC:
            raise self.fail("it does not start with GGUF")
        self.at = 4
        if self.data[4:6] == b"\0\0":
            self.order = ">"  # written on a big-endian machine: a small version number ends in its low bytes
        version = self.number("I")
        if version not in _VERSIONS:
            raise self.fail(f"version {version}")
        n_tensors, n_values = self.number("Q"), self.number("Q")
        # The smallest tensor entry takes 24 bytes, the smallest value 13.
        if 24 * n_tensors + 13 * n_values > len(self.data):
            raise self.fail(f"{n_tensors} tensors and {n_values} values in {len(self.data)} bytes")
        for _ in range(n_values):
            self.string(_MAX_NAME_BYTES)
            self.value(self.number("I"))
        total = sum(self.tensor() for _ in range(n_tensors))
        if total > len(self.data):
            raise self.fail(f"its tensors take {total} bytes, the file has {len(self.data)}")

    def number(self, code: str) -> int:
        width = struct.calcsize("=" + code)
        self.skip(width)
        found: int = struct.unpack_from(self.order + code, self.data, self.at - width)[0]
        return found

    def skip(self, nbytes: int) -> None:
        if nbytes > len(self.data) - self.at:
            raise self.fail(f"{nbytes} bytes at offset {self.at} lie behind its end")
        self.at += nbytes

    def string(self, longest: int | None = None) -> None:
        length = self.number("Q")
        if longest is not None and length > longest:
            raise self.fail(f"a name of {length} bytes at offset {self.at}")
        self.skip(length)

    def value(self, kind: int) -> None:
        if kind in _WIDTHS:
            self.skip(_WIDTHS[kind])
        elif kind == _STRING:
            self.string()
        elif kind == _ARRAY:
            item, count = self.number("I"), self.number("Q")
            if item in _WIDTHS:
                self.skip(count * _WIDTHS[item])
            elif item == _STRING:
                self.skip(0 if 8 * count <= len(self.data) - self.at else 8 * count)  # each has at least a length
                for _ in range(count):
                    self.string()
            else:
                raise self.fail(f"an array of type {item} at offset {self.at}")
        else:
            raise self.fail(f"a value of type {kind} at offset {self.at}")

    def tensor(self) -> int:
        """Return the bytes of the tensor that is described here."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        self.string(_MAX_NAME_BYTES)
        n_dims = self.number("I")
        if not 0 < n_dims <= _MAX_DIMS:
            raise self.fail(f"a tensor of {n_dims} dimensions at offset {self.at}")
        shape = [self.number("Q") for _ in range(n_dims)]
        kind, offset = self.number("I"), self.number("Q")
        try:
            block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (KeyError, ValueError):
            raise self.fail(f"a tensor of type {kind} at offset {self.at}") from None
        size = math.prod(shape) // block * nbytes
        if offset + size > len(self.data):
            raise self.fail(f"a tensor of shape {tuple(shape)} at offset {offset} in {len(self.data)} bytes")
        return size
