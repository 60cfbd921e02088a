"""What happened, as plain data: one row per tensor, every event, totals. Saved beside the checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Row:
    """What happened to one tensor.

    Attributes:
        name: Name on disk in the source.
        action: Format name, `kept`, or `rewritten`: dense, but with other values.
        reason: Why it was kept or rewritten. Of compressed tensors, why the method treated it plainly, or None.
        bytes_before: Bytes in the source.
        bytes_after: Bytes in the result.
        weight_error: `||W - W'|| / ||W||`, or None.
        output_error: The same for the layer's output on calibration data, or None where there was none.
        tokens: Calibration tokens the layer saw.
        inputs: Format its inputs are rounded to at run time, or None.
        routed: Of an expert, the calibration tokens its router sends to it; `tokens` counts those it was topped up with
            too. None for other tensors, and where nothing was calibrated.
        input_error: `||x' - x|| / ||x||` of rounding them, on calibration data; None where none passed.
        sparsity: Share of zeros among the values that were written; None for kept tensors.
        pruned: Share of the weights that a mask removes, whatever their values were; None where no mask was chosen.
    """

    name: str
    action: str
    reason: str | None
    bytes_before: int
    bytes_after: int
    weight_error: float | None = None
    output_error: float | None = None
    tokens: int = 0
    inputs: str | None = None
    input_error: float | None = None
    routed: int | None = None
    sparsity: float | None = None
    pruned: float | None = None

    @property
    def error(self) -> float | None:
        """The output error where there was data, else the weight error; None for kept tensors."""
        return self.weight_error if self.output_error is None else self.output_error


@dataclass
class RunReport:
    """One run.

    Attributes:
        output: The folder that was written.
        digest: Plan digest: equal digests mean equal bytes.
        recipe: The resolved recipe.
        versions: Package versions.
        rows: One per tensor of the source.
        events: Fall-backs and surprises, in order.
        units: Every block and what lies outside: `name`, `seconds`, and what the method measured.
        bytes_before: Weight bytes in the source.
        bytes_after: Weight bytes in the result.
        bits_per_weight: Of the compressed weights, scales included.
        mean_error: Mean output error of the compressed layers (weight error where there was no data).
        sparsity: Share of zeros among all values of the compressed layers, as written.
        seconds: Wall time of this process; a resumed run counts only its own.
        peak_rss: Peak resident memory of this process, bytes.
        resumed_at: Units a previous run had finished.
        processes: Processes that shared the work; the peak is that of the largest.
        verification: What the fresh process found, or why it did not run.
        files: Name -> SHA-256 of every other file of the result.
    """

    output: str
    digest: str
    recipe: dict[str, Any]
    versions: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    units: list[dict[str, Any]] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    bits_per_weight: float = 0.0
    mean_error: float | None = None
    sparsity: float | None = None
    seconds: float = 0.0
    peak_rss: int = 0
    resumed_at: int = 0
    processes: int = 1
    verification: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


class Progress(Protocol):
    """What the engine tells whoever watches; the command line draws it, the default says nothing."""

    def stage(self, name: str) -> None:
        """A named stage begins."""
        ...

    def units(self, total: int, done: int) -> None:
        """The number of units is known; `done` of them were finished by an earlier run."""
        ...

    def unit_done(self, name: str, mean_error: float | None, seconds: float) -> None:
        """A unit is on the disk."""
        ...

    def event(self, text: str) -> None:
        """Something the user should know."""
        ...


class Silent:
    """Progress that shows nothing."""

    def stage(self, name: str) -> None:
        """Ignore."""

    def units(self, total: int, done: int) -> None:
        """Ignore."""

    def unit_done(self, name: str, mean_error: float | None, seconds: float) -> None:
        """Ignore."""

    def event(self, text: str) -> None:
        """Ignore."""
