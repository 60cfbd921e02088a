"""The table of a run, as data, JSON and Markdown; cells without a measurement say so."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from compressor.kernels.bench.roofline import LAYERS, layer_bytes

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Machine:
    """The device, as measured in the same run.

    Attributes:
        name: The device's name; `not measured` without one.
        capability: Compute capability, e.g. `9.0`.
        bandwidth: Bytes per second, read and written, of a copy; None if not measured.
        rate: Operations per second of a large bfloat16 product; None if not measured.
        versions: Versions of PyTorch, Triton and peers.
    """

    name: str = NOT_MEASURED
    capability: str = ""
    bandwidth: float | None = None
    rate: float | None = None
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One format on one layer with one number of rows.

    Attributes:
        format: Name of the format.
        layer: Key of `roofline.LAYERS`.
        m: Rows of activations.
        weight_bytes: Bytes of the packed weight, or of the experts that were needed.
        seconds: Time of one call; None if not measured, as the others.
        dense_seconds: The same of cuBLAS with a bfloat16 weight.
        peers: Time of other kernels on the same weight, by name.
        error: Relative error of the result against float64.
        path: Which kernel ran: `small`, `large`, `dequant`, `int`, or `grouped` and its rows per tile.
    """

    format: str
    layer: str
    m: int
    weight_bytes: int
    seconds: float | None = None
    dense_seconds: float | None = None
    peers: dict[str, float] = field(default_factory=dict)
    error: float | None = None
    path: str = ""

    @property
    def speedup(self) -> float | None:
        """How many times as fast as the bfloat16 weight."""
        return self.dense_seconds / self.seconds if self.seconds and self.dense_seconds else None

    @property
    def bytes_per_second(self) -> float | None:
        """Bytes the product must move, over its time."""
        n, k = LAYERS[self.layer]
        return layer_bytes(self.weight_bytes, self.m, n, k) / self.seconds if self.seconds else None

    @property
    def operations_per_second(self) -> float | None:
        """Operations of the product, over its time."""
        n, k = LAYERS[self.layer]
        return 2 * self.m * n * k / self.seconds if self.seconds else None


@dataclass(frozen=True)
class Report:
    """A run.

    Attributes:
        machine: The device.
        cells: The table.
        repack: Seconds of laying a million weights out when they are loaded, by format; None if not measured.
    """

    machine: Machine
    cells: tuple[Cell, ...]
    repack: dict[str, float | None] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write `kernels.json` and `kernels.md`."""
        folder.mkdir(parents=True, exist_ok=True)
        data = asdict(self)
        (folder / "kernels.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        (folder / "kernels.md").write_text(render(self), encoding="utf-8")


def geomean(values: Iterable[float]) -> float | None:
    """Return the geometric mean, None of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def render(report: Report) -> str:
    """Return the report as Markdown."""
    machine = report.machine
    lines = ["# Packed matmul kernels", "", f"Device: {machine.name}{_brackets(machine.capability)}. "]
    if machine.bandwidth is None or machine.rate is None:
        lines[-1] += "No CUDA device was there: nothing below is a measurement."
    else:
        lines[-1] += (
            f"Copies move {machine.bandwidth / 1e12:.2f} TB/s (read and written), an 8192^3 bf16 product does "
            f"{machine.rate / 1e12:.0f} TFLOP/s; fractions are of these."
        )
    lines += ["", ", ".join(f"{name} {version}" for name, version in machine.versions.items()), ""]
    if report.repack:
        costs = ", ".join(f"{name} {_number(seconds, digits=4)}" for name, seconds in report.repack.items())
        lines += [f"Laying a million weights out on the device, when they are loaded, in seconds: {costs}.", ""]
    for name in dict.fromkeys(cell.format for cell in report.cells):
        cells = [cell for cell in report.cells if cell.format == name]
        lines += [f"## {name}", "", *_table(cells, machine), ""]
        mean = geomean(cell.speedup for cell in cells if cell.speedup is not None and cell.m <= 64)
        lines += [f"Geometric mean over bf16 for up to 64 rows: {_number(mean)}.", ""]
    return "\n".join(lines)


def _table(cells: Sequence[Cell], machine: Machine) -> list[str]:
    peers = sorted({peer for cell in cells for peer in cell.peers})
    head = [
        "layer",
        "M",
        "us",
        "GB/s",
        "of copy",
        "TFLOP/s",
        "of matmul",
        "x bf16",
        *(f"x {p}" for p in peers),
        "error",
        "path",
    ]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for cell in cells:
        moved, done = cell.bytes_per_second, cell.operations_per_second
        values = [
            cell.layer,
            str(cell.m),
            _number(cell.seconds, 1e6),
            _number(moved, 1e-9, 0),
            _percent(moved, machine.bandwidth),
            _number(done, 1e-12, 1),
            _percent(done, machine.rate),
            _number(cell.speedup),
            *(_number(cell.peers[p] / cell.seconds if p in cell.peers and cell.seconds else None) for p in peers),
            NOT_MEASURED if cell.error is None else f"{cell.error:.1e}",
            cell.path,
        ]
        rows.append("| " + " | ".join(values) + " |")
    return rows


def _number(value: float | None, factor: float = 1.0, digits: int = 2) -> str:
    return NOT_MEASURED if value is None else f"{value * factor:.{digits}f}"


def _percent(value: float | None, whole: float | None) -> str:
    return NOT_MEASURED if value is None or whole is None else f"{100 * value / whole:.0f} %"


def _brackets(text: str) -> str:
    return f" (compute capability {text})" if text else ""
