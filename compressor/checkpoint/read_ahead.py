"""Asks the system to fetch weights from disk before they are read, while the processor works on the block before.

Only the page cache fills: this process holds no byte more, and what is read later is the same whether the system
followed the hint or not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from compressor.checkpoint.source import Source

HEADER_LENGTH = 8
"""Bytes before the JSON header of a safetensors file, which say how long that is (little-endian)."""

PIECE = 128 << 10
"""Bytes per hint: Linux fetches only the first part of longer ones, as much as one request to the device holds."""


class ReadAhead:
    """Hints for the tensors of one checkpoint.

    Args:
        source: The checkpoint; its headers have been checked when it was opened.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._places: dict[str, dict[str, tuple[int, int]]] = {}

    def hint(self, names: Iterable[str]) -> int:
        """Tell the system which tensors are read next; returns at once.

        Args:
            names: Tensors of the source; for decoded ones their parts on disk are meant.

        Returns:
            Bytes asked for; 0 where the system takes no such hints.
        """
        if not hasattr(os, "posix_fadvise"):  # macOS and Windows read ahead by themselves or not at all
            return 0
        by_file: dict[str, list[tuple[int, int]]] = {}
        for name in names:
            decoder = self.source.decoders.get(name)
            for part in (name,) if decoder is None else decoder.parts:
                file = (self.source.stored or self.source.tensors)[part].file
                by_file.setdefault(file, []).append(self._place(file, part))
        for file, places in by_file.items():
            descriptor = os.open(self.source.path / file, os.O_RDONLY)
            try:
                for start, stop in places:
                    for at in range(start, stop, PIECE):
                        os.posix_fadvise(descriptor, at, min(PIECE, stop - at), os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)
        return sum(stop - start for places in by_file.values() for start, stop in places)

    def _place(self, file: str, name: str) -> tuple[int, int]:
        """Return where a tensor starts and stops in its file, in bytes."""
        if file not in self._places:
            self._places[file] = _places(self.source.path / file)
        return self._places[file][name]


def _places(path: Path) -> dict[str, tuple[int, int]]:
    """Return the first byte of every tensor of a file and the one after its last."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(HEADER_LENGTH), "little")
        header = json.loads(file.read(length))
    data = HEADER_LENGTH + length
    return {
        name: (data + entry["data_offsets"][0], data + entry["data_offsets"][1])
        for name, entry in header.items()
        if name != "__metadata__"
    }
