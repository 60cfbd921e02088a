"""Reading ahead names the very bytes that are read next, and changes nothing else."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressor.checkpoint import read_ahead
from compressor.checkpoint.read_ahead import ReadAhead
from compressor.checkpoint.source import Source

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no hints")


@pytest.fixture
def source(tmp_path: Path) -> Source:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(rows, 5, generator=generator) for name, rows in (("b", 3), ("a", 7), ("c.x", 2))}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    return Source.open(tmp_path)


def test_the_bytes_asked_for_are_the_tensors(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []

    def advise(descriptor: int, start: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        asked.append(os.pread(descriptor, length, start))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(read_ahead, "PIECE", 64)  # of 140 and 40 bytes
    read = source.read(["c.x", "a"])
    assert ReadAhead(source).hint(["c.x", "a"]) == (2 + 7) * 5 * 4
    assert [len(piece) for piece in asked] == [40, 64, 64, 12]
    assert b"".join(asked) == read["c.x"].numpy().tobytes() + read["a"].numpy().tobytes()


def test_the_system_takes_the_hint_and_no_file_stays_open(source: Source) -> None:
    ahead = ReadAhead(source)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else None
    assert ahead.hint(["a", "b", "c.x"]) == sum(info.nbytes for info in source.tensors.values())
    assert ahead.hint([]) == 0
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before
