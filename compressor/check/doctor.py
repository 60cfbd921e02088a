"""What this machine and this installation are: `compress check` without a folder, to be pasted into a bug report.

It names no user, no host and no path below the home folder, and of the environment only variables that decide how
things are computed.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from packaging.requirements import Requirement

from compressor import __version__
from compressor.checkpoint.cache import cache_root
from compressor.errors import CompressorError
from compressor.formats import get_format, parse_group_size
from compressor.kernels import dispatch
from compressor.runtime.swap import empty_packed

DISTRIBUTION = "compress-hf"
VARIABLES = (
    *("COMPRESS_KERNEL", "COMPRESSOR_OFFLINE", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"),
    *("PYTORCH_CUDA_ALLOC_CONF", "TRITON_INTERPRET", "CUDA_LAUNCH_BLOCKING", "WORLD_SIZE"),
)
FORMATS = ("int4", "int4-asym", "int8", "nvfp4", "mxfp4", "fp8", "fp8-block", "mxfp8", "fp4", "power4")
"""One of every family whose kernels differ."""
SHAPE = (4096, 4096)
ROWS = (1, 512)


@dataclass(frozen=True)
class Package:
    """One dependency.

    Attributes:
        name: As the registry spells it.
        installed: Its version, or None.
        tested: The versions this release is tested with, as `>=2.13`.
        fits: Whether the one is among the other.
    """

    name: str
    installed: str | None
    tested: str
    fits: bool


@dataclass(frozen=True)
class Device:
    """Something to compute on.

    Attributes:
        name: As its maker calls it.
        kind: `cpu` or `cuda`.
        capability: Of a CUDA device, as `9.0`.
        memory: Bytes it has.
        free: Bytes that are free now.
        detail: Cores and instruction set, or driver version.
    """

    name: str
    kind: str
    capability: str | None
    memory: int
    free: int
    detail: str


@dataclass(frozen=True)
class KernelChoice:
    """Which kernel would multiply by a weight of `SHAPE` in one format.

    Attributes:
        format: The format, in its usual groups.
        rows: Rows of activations -> kernel, or why there is none.
    """

    format: str
    rows: dict[str, str]


@dataclass(frozen=True)
class Environment:
    """Everything the report says; see `examine`."""

    version: str
    python: str
    system: str
    packages: tuple[Package, ...]
    triton: str
    devices: tuple[Device, ...]
    disks: dict[str, int]
    variables: dict[str, str]
    kernels_on: str
    kernels: tuple[KernelChoice, ...]

    @property
    def untested(self) -> tuple[Package, ...]:
        """Packages that are missing or not of a tested version."""
        return tuple(package for package in self.packages if not package.fits)

    def to_json(self) -> dict[str, Any]:
        """Return plain data; sizes in bytes."""
        return {**asdict(self), "untested": [package.name for package in self.untested]}

    def to_markdown(self) -> str:
        """Return the report as Markdown that reads well as plain text."""
        lines = [
            f"### compress {self.version}",
            "",
            f"- Python {self.python}, {self.system}",
            f"- triton: {self.triton}",
        ]
        for device in self.devices:
            capability = f", compute capability {device.capability}" if device.capability else ""
            lines.append(
                f"- {device.kind}: {device.name}{capability}, {_gb(device.free)} of {_gb(device.memory)} free, "
                f"{device.detail}"
            )
        lines += [f"- disk, {name}: {_gb(free)} free" for name, free in self.disks.items()]
        lines += [f"- {name}={value}" for name, value in self.variables.items()]
        lines += ["", "| package | installed | tested | |", "|---|---|---|---|"]
        lines += [
            f"| {p.name} | {p.installed or 'missing'} | {p.tested or 'any'} | {'ok' if p.fits else 'NOT TESTED'} |"
            for p in self.packages
        ]
        heads = [f"{rows} row{'s' if rows != 1 else ''}" for rows in ROWS]
        lines += ["", f"Kernels on {self.kernels_on}, weight {SHAPE[0]} x {SHAPE[1]}:", ""]
        lines += [f"| format | {' | '.join(heads)} |", "|---|" + "---|" * len(ROWS)]
        lines += [f"| {choice.format} | {' | '.join(choice.rows.values())} |" for choice in self.kernels]
        return "\n".join(lines)


def examine(device: torch.device) -> Environment:
    """Look at the installation and the machine.

    Args:
        device: Where kernels would run.
    """
    dtype = torch.bfloat16
    cache = cache_root()
    folders = {
        "this folder": Path.cwd(),
        f"cache ({_short(cache)})": cache,
        "temporary files": Path(tempfile.gettempdir()),
    }
    return Environment(
        version=__version__,
        python=f"{platform.python_version()} ({sys.implementation.name})",
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        packages=tuple(_packages()),
        triton=_triton(),
        devices=tuple(_devices()),
        disks={name: shutil.disk_usage(_existing(folder)).free for name, folder in folders.items()},
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        kernels_on=f"{device}, activations {str(dtype).removeprefix('torch.')}",
        kernels=tuple(_choice(name, device, dtype) for name in FORMATS),
    )


def _packages() -> Iterator[Package]:
    """Yield what the distribution's own metadata requires here; its lower bounds are what has been tested."""
    for line in importlib.metadata.requires(DISTRIBUTION) or ():
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            installed: str | None = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            installed = None
        fits = installed is not None and wanted.specifier.contains(installed, prereleases=True)
        yield Package(wanted.name, installed, str(wanted.specifier), fits)


def _triton() -> str:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    return f"{version}, {'usable' if torch.cuda.is_available() else 'unused: no CUDA device'}"


def _devices() -> Iterator[Device]:
    memory = psutil.virtual_memory()
    detail = (
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, "
        f"swap {_gb(psutil.swap_memory().total)}"
    )
    yield Device(_processor(), "cpu", None, memory.total, memory.available, detail)
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
        yield Device(found.name, "cuda", f"{found.major}.{found.minor}", total, free, built)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _choice(name: str, device: torch.device, dtype: torch.dtype) -> KernelChoice:
    fmt = get_format(name, parse_group_size(name, None), dtype)
    packed, rows = empty_packed(fmt, SHAPE), {}
    for m in ROWS:
        try:
            rows[str(m)] = dispatch.pick(dispatch.linear_problem(packed, fmt, m, dtype, device)).name
        except CompressorError as error:
            rows[str(m)] = f"none: {error.message}"
    return KernelChoice(name, rows)


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def _short(path: Path) -> str:
    """Return a path without the name of the user it belongs to."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else "set by a variable"


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"
