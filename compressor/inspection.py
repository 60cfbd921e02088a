"""A look inside a compressed checkpoint: what every layer became, and how a layer's grid lies over its weights."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.fused_experts import split_experts
from compressor.checkpoint.skeleton import Skeleton
from compressor.checkpoint.source import Source, read_json
from compressor.errors import RecipeError
from compressor.formats.base import PackedTensor, QParams, QuantFormat, ScaledFormat, bits_per_weight, grouped
from compressor.output import REPORT
from compressor.runtime.stored import AnySchemes, open_checkpoint, packed_modules, read_packed

DRAWN = 3
"""Layers that are drawn at most."""

_BLOCKS = " ▁▂▃▄▅▆▇█"
_REACH = 1.05
"""Bins end a little beyond the largest value: weights that were clipped lie there."""

_TINY = 1e-30

_SAME = 1e-5
"""Values of a grid that differ by less, in shares of the largest, are one."""


@dataclass(frozen=True)
class LayerView:
    """One compressed layer.

    Attributes:
        name: Its module on disk.
        format: Name of its format, with the exponent of a power grid.
        shape: `[out, in]`.
        bits: Stored bits per weight, scales included.
        weight_error: From the report: `||W - W'|| / ||W||`; None without a report.
        output_error: From the report: the same for the layer's output; None without calibration data.
        outlier: Its largest stored magnitude over the root mean square of all.
        sparsity: Share of stored weights that are zero.
        inputs: From the report: format its inputs are rounded to, or None.
    """

    name: str
    format: str
    shape: tuple[int, int]
    bits: float
    weight_error: float | None
    output_error: float | None
    outlier: float
    sparsity: float
    inputs: str | None = None


@dataclass(frozen=True)
class Drawing:
    """A grid over the weights it rounds, in shares of each group's largest value.

    Attributes:
        name: The layer's module on disk.
        format: As in `LayerView`.
        grid: Values of the grid, ascending; those no weight has are missing.
        counts: Weights in each of equally wide bins from -1.05 to 1.05.
        original: Whether the original's weights were counted; else the stored ones, each spread over its cell.
    """

    name: str
    format: str
    grid: tuple[float, ...]
    counts: tuple[float, ...]
    original: bool

    def lines(self, height: int = 8) -> list[str]:
        """Return the histogram, one character per bin, and the grid under it."""
        most = max(self.counts) or 1.0
        eighths = [round(8 * height * count / most) for count in self.counts]
        rows = [
            "".join(_BLOCKS[min(max(tall - 8 * row, 0), 8)] for tall in eighths).rstrip()
            for row in reversed(range(height))
        ]
        marks = ["─"] * len(self.counts)
        for value in self.grid:
            marks[_column(value, len(marks))] = "┼"
        labels = [" "] * len(marks)
        for text, value in (("-1", -1.0), ("0", 0.0), ("1", 1.0)):
            at = min(_column(value, len(marks)), len(marks) - len(text))
            labels[at : at + len(text)] = text
        return [*rows, "".join(marks), "".join(labels).rstrip()]


@dataclass(frozen=True)
class Inspection:
    """What `inspect_checkpoint` found."""

    path: str
    layers: tuple[LayerView, ...]
    drawings: tuple[Drawing, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def inspect_checkpoint(
    path: Path, patterns: Sequence[str] = (), original: Path | None = None, bins: int = 72
) -> Inspection:
    """Read what every packed layer of a checkpoint is, and draw up to three of them.

    Args:
        path: The checkpoint.
        patterns: Globs over module names; only layers that match one are listed. The first, the middle and the last
            of them are drawn.
        original: Folder of the model it was made from, for histograms of its weights.
        bins: Columns of a drawing.

    Raises:
        CheckpointError: Unreadable or damaged.
        RecipeError: A pattern matches nothing, or nothing is compressed.
        UnsupportedError: A scheme that is not supported.
    """
    source, schemes = open_checkpoint(path)
    names = _chosen(sorted(packed_modules(source), key=_natural), patterns, path)
    errors = _reported(path)
    before = None if original is None else _expert_by_expert(original, names)
    drawn = {names[0], names[len(names) // 2], names[-1]}
    layers, drawings = [], []
    for name, fmt, packed in _read(source, schemes, names):
        said = errors.get(f"{name}.weight", {})
        exponent = packed.tensors.get("weight_exponent")
        kind = fmt.name if exponent is None else f"{fmt.name}, exponent {float(exponent):.3f}"
        bits = bits_per_weight(fmt, packed.shape)
        weight = fmt.decode(*fmt.unpack(packed))
        layers.append(
            LayerView(
                name=name,
                format=kind,
                shape=packed.shape,
                bits=bits,
                weight_error=said.get("weight_error"),
                output_error=said.get("output_error"),
                outlier=float(weight.abs().max() / weight.square().mean().sqrt().clamp(min=_TINY)),
                sparsity=float((weight == 0).float().mean()),
                inputs=said.get("inputs"),
            )
        )
        del weight
        if name in drawn and isinstance(fmt, ScaledFormat):
            w = None if before is None else before.read([f"{name}.weight"])[f"{name}.weight"].float()
            drawings.append(draw(name, kind, fmt, *fmt.unpack(packed), w, bins))
    return Inspection(str(path), tuple(layers), tuple(drawings))


def _expert_by_expert(original: Path, names: Sequence[str]) -> Source:
    """Open the original, with stacks of experts taken apart if modules are named that it does not have as such."""
    source = Source.open(original)
    if all(f"{name}.weight" in source.tensors for name in names):
        return source
    return split_experts(source, Skeleton.build(original))


def draw(
    name: str, kind: str, fmt: ScaledFormat, codes: Tensor, q: QParams, original: Tensor | None, bins: int
) -> Drawing:
    """Count weights in bins; see `Drawing`.

    Args:
        name: The layer.
        kind: What its format is called.
        fmt: Its format.
        codes: uint8 `[out, in]`.
        q: Its parameters.
        original: The weights before, `[out, in]` float32, or None.
        bins: How many bins.
    """
    steps = fmt.steps(q)
    units = grouped(fmt.decode(codes, q), fmt.group_size) / steps
    top = float(units.abs().max()) or 1.0
    values, sizes = units.div(top).unique(return_counts=True)
    # One code's values may differ in their last bits after the division by scales.
    first = torch.cat([torch.ones(1, dtype=torch.bool), values.diff() > _SAME])
    grid = values[first]
    sizes = torch.zeros(len(grid)).index_add_(0, first.cumsum(0) - 1, sizes.float())
    if original is not None:
        shares = (grouped(original, fmt.group_size) / steps).div_(top).clamp_(-_REACH, _REACH)
        counts = torch.histc(shares, bins, -_REACH, _REACH)
    else:
        counts = _spread(grid, sizes, bins)
    return Drawing(name, kind, tuple(grid.tolist()), tuple(counts.tolist()), original is not None)


def _spread(grid: Tensor, sizes: Tensor, bins: int) -> Tensor:
    """Return counts per bin if the weights of every value lie evenly between the middles to its neighbours."""
    middles = (grid[1:] + grid[:-1]) / 2
    ends = torch.full((1,), _REACH)
    edges = torch.cat([-ends, middles.clamp(-_REACH, _REACH), ends])
    below = torch.cat([torch.zeros(1), sizes.cumsum(0)])  # weights below every edge
    at = torch.linspace(-_REACH, _REACH, bins + 1)
    cell = (torch.searchsorted(edges, at, right=True) - 1).clamp(0, len(sizes) - 1)
    share = (at - edges[cell]) / (edges[cell + 1] - edges[cell])
    return (below[cell] + share * sizes[cell]).diff()


def _column(value: float, bins: int) -> int:
    return min(int((value + _REACH) / (2 * _REACH) * bins), bins - 1)


def _read(
    source: Source, schemes: AnySchemes | None, names: Sequence[str]
) -> Iterator[tuple[str, QuantFormat, PackedTensor]]:
    for name in names:
        fmt, packed = read_packed(source, schemes, name)
        yield name, fmt, packed


def _chosen(names: list[str], patterns: Sequence[str], path: Path) -> list[str]:
    """Return the names that match a pattern; all of them if there are no patterns."""
    if not names:
        raise RecipeError(f"{path}: nothing in it is compressed", "give a checkpoint that compress wrote")
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise RecipeError(f"--layer {pattern!r} matches no compressed layer", f"names are like {names[0]}")
    return [name for name in names if not patterns or any(fnmatch.fnmatchcase(name, p) for p in patterns)]


def _reported(path: Path) -> dict[str, dict[str, Any]]:
    """Return the report's rows by tensor name; empty if another program wrote the checkpoint."""
    if not (path / REPORT).is_file():
        return {}
    return {row["name"]: row for row in read_json(path / REPORT).get("rows", [])}


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in name.split(".")]
