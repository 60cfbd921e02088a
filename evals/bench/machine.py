"""The machine a row ran on: what its times depend on, and nothing that identifies it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]


def describe(device: str, threads: int) -> dict[str, Any]:
    """Return processor, cores, memory, device, threads and operating system as plain data.

    Args:
        device: As `--device`; `auto` is looked up.
        threads: Threads the commands were given.
    """
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "ram_gib": round(psutil.virtual_memory().total / 2**30),
        "device": _device_name(device),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def sentence(machine: dict[str, Any]) -> str:
    """Return one line about a machine."""
    device = "" if machine["device"] == "cpu" else f", {machine['device']}"
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['ram_gib']} GiB{device}; {threads}"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def _device_name(device: str) -> str:
    if device == "cpu":
        return "cpu"
    # Imported here: a table on the CPU does not need it.
    import torch

    if device == "auto" and not torch.cuda.is_available():
        return "cpu"
    return torch.cuda.get_device_name() if device in ("auto", "cuda") else device
