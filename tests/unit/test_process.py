"""Memory that is free goes back to the system when it is asked to."""

import ctypes

import psutil
import pytest
import torch

from compressor.process import release_memory


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library cannot be told")
def test_freed_memory_is_given_back() -> None:
    pieces = [torch.ones(16 << 10) for _ in range(4_000)]  # 64 KB each: kept by the C library when they are freed
    last = pieces[-1]  # pins the end of the heap
    del pieces
    before = psutil.Process().memory_info().rss
    release_memory()
    assert before - psutil.Process().memory_info().rss > 100 << 20
    assert float(last.sum()) == 16 << 10
