"""What this process has used, and giving it back."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]


def peak_rss() -> int:
    """Return the peak resident memory of this process, in bytes.

    On Linux of the program it runs: what the system calls the process's maximum starts with that of its parent.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss() -> int:
    """Return the resident memory of this process, in bytes."""
    return int(psutil.Process().memory_info().rss)


def release_memory() -> None:
    """Give memory that nothing uses any more back to the system, where the C library can be told to (glibc).

    It keeps freed pieces for itself otherwise, gigabytes of them after a large model has passed through.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
