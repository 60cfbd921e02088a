"""Memory does not grow with depth: one block is resident, and nothing of the last one stays."""

from pathlib import Path

import psutil
import pytest

import compressor
from compressor.process import release_memory
from compressor.report import Silent
from compressor.testing import models
from compressor.testing.tools import save_checkpoint, write_text

BLOCKS = 40


class Watch(Silent):
    """Notes resident memory whenever a block is on the disk."""

    def __init__(self) -> None:
        self.resident: list[int] = []

    def unit_done(self, name: str, mean_error: float | None, seconds: float) -> None:
        release_memory()  # what the allocator keeps for itself depends on the tests before
        self.resident.append(psutil.Process().memory_info().rss)


@pytest.mark.parametrize("method", ["rtn", "fp4"])
def test_flat_over_forty_blocks(method: str, tmp_path: Path) -> None:
    # A block's weights are 2.6 MB in float32, its statistics as much again: keeping 30 of them would show as 150 MB.
    model = models.tiny_llama(layers=BLOCKS, hidden_size=256, intermediate_size=512)
    block_bytes = sum(4 * parameter.numel() for parameter in model.model.layers[0].parameters())
    assert block_bytes > 2_500_000
    source = save_checkpoint(model, tmp_path / "source")
    del model
    watch, text = Watch(), write_text(tmp_path / "text.txt")
    out = tmp_path / "out"
    compressor.quantize(
        str(source), method=method, format="nvfp4", output=out, data=str(text), n_samples=8, seq_len=64, progress=watch
    )
    assert len(watch.resident) == BLOCKS + 1
    early, late = max(watch.resident[5:12]), max(watch.resident[-12:-1])
    assert late - early < 6 * block_bytes, f"{(late - early) / 1e6:.1f} MB more after {BLOCKS} blocks than after 12"
