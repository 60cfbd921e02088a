"""Timing the CPU kernels: `python -m compressor.kernels.bench --cpu`; see `docs/bench.md`.

Every format is multiplied by the kernel dispatch takes, by decoding the weight and multiplying densely (what a program
without kernels does), and as a dense bfloat16 layer, in turns and in one process: whatever else the machine does
meets all three. `matmul.PACKED_ROWS` comes from it.
"""

from __future__ import annotations

import copy
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from compressor.formats import GroupSize, get_format
from compressor.formats.activations import INPUT_FORMATS
from compressor.formats.base import PackedTensor, QuantFormat
from compressor.inputs import InputOp, Quantize, apply_ops
from compressor.kernels import dispatch
from compressor.kernels.cpu import matmul
from compressor.kernels.cpu.kernel import PreparedWeight
from compressor.kernels.reference.linear import packed_linear

FORMATS: dict[str, tuple[str, GroupSize, str]] = {
    "int2 g64": ("int2", 64, ""),
    "int2 channel": ("int2", None, ""),
    "int3 g64": ("int3", 64, ""),
    "int3 channel": ("int3", None, ""),
    "int4 g64": ("int4", 64, ""),
    "int4 channel": ("int4", None, ""),
    "int4-asym g64": ("int4-asym", 64, ""),
    "int8 g64": ("int8", 64, ""),
    "int8 channel": ("int8", None, ""),
    "nvfp4": ("nvfp4", 16, ""),
    "mxfp4": ("mxfp4", 32, ""),
    "fp4": ("fp4", None, ""),
    "power4 g64": ("power4", 64, ""),
    "int8 channel, int8-token": ("int8-bytes", None, "int8-token"),
    "int8 channel, int8-tensor": ("int8-bytes", None, "int8-tensor"),
}
"""What the table calls a format, its name, its group size, and what inputs are rounded to."""

LAYERS = ((1536, 576), (2048, 2048))
ROWS = (1, 4, 16, 64, 512)
CACHE = 64 << 20
"""Bytes of weights that calls go round among, as the layers of a model do: more than caches hold."""


@dataclass(frozen=True)
class CpuCell:
    """One layer of one format under some rows of bfloat16 activations; medians, in seconds.

    Attributes:
        format: Key of `FORMATS`.
        shape: Outputs and inputs.
        m: Rows.
        kernel: What dispatch takes.
        seconds: Its time.
        decoded: Time of decoding from the layout of the disk and multiplying.
        dense: Time of a bfloat16 layer.
        over_decoded: How many times as fast as decoding: the median of the ratios of each round.
        over_dense: The same, of a bfloat16 layer.
        repack: Seconds it took to lay the weight out, per million weights; 0 if it stays as it lies on disk.
        error: Relative error of the result against float64.
        forced: Times of the packed operator and of decoding its layout, where the format has it.
    """

    format: str
    shape: tuple[int, int]
    m: int
    kernel: str
    seconds: float
    decoded: float
    dense: float
    over_decoded: float
    over_dense: float
    repack: float
    error: float
    forced: dict[str, float]


def measure(name: str, shape: tuple[int, int], rows: Sequence[int], rounds: int, forced: bool = False) -> list[CpuCell]:
    """Time one layer of one format.

    Args:
        name: Key of `FORMATS`.
        shape: Outputs and inputs.
        rows: Numbers of rows of activations.
        rounds: Rounds of which medians count; one more comes first.
        forced: Also time the packed operator and decoding its layout with any number of rows.
    """
    n, k = shape
    generator = torch.Generator().manual_seed(n + k)
    kind, group, rounded = FORMATS[name]
    fmt, inputs = get_format(kind, group, torch.bfloat16), _inputs(rounded)
    w = torch.randn(n, k, generator=generator)
    q = fmt.fit(w)
    packed = fmt.pack(fmt.encode(w, q), q)
    exact = fmt.decode(*fmt.unpack(packed))
    prepared, repack = _prepared(packed, fmt, inputs)
    copies = max(1, CACHE // (2 * n * k))
    stored = cycle([copy.deepcopy(packed) for _ in range(copies)])
    weights = cycle([copy.deepcopy(prepared) for _ in range(copies)])
    dense = cycle([w.bfloat16() for _ in range(copies)])
    cells = []
    for m in rows:
        x = torch.randn(m, k, generator=generator).bfloat16()
        problem = dispatch.linear_problem(packed, fmt, m, torch.bfloat16, torch.device("cpu"), inputs)
        kernel = dispatch.pick(problem)
        ways: dict[str, Callable[[], Tensor]] = {
            kernel.name: _chosen(kernel, x, weights, stored, fmt),
            "decoded": _decoded(x, stored, fmt, inputs),
            "dense": lambda x=x: functional.linear(x, next(dense)),  # type: ignore[misc]
        }
        if forced and isinstance(prepared, PreparedWeight):
            ways |= {f"forced {path}": _forced(x, weights, path) for path in ("packed", "decode")}
        found = _in_turns(ways, rounds)
        expected = apply_ops(inputs, x.float()).double() @ exact.double().T
        error = float((ways[kernel.name]().double() - expected).norm() / expected.norm())
        cells.append(_cell(name, shape, m, kernel.name, found, repack, error))
    return cells


def render(cells: Sequence[CpuCell], machine: str) -> str:
    """Return the table as Markdown."""
    head = "| format | layer | rows | kernel | us | GFLOP/s | x decode and multiply | x dense bf16 | error |"
    lines = ["# CPU kernels", "", machine, "", head, "|" + "---|" * 9]
    for cell in cells:
        n, k = cell.shape
        lines.append(
            f"| {cell.format} | {n} x {k} | {cell.m} | `{cell.kernel}` | {cell.seconds * 1e6:.0f} "
            f"| {2 * cell.m * n * k / cell.seconds * 1e-9:.0f} "
            f"| {cell.over_decoded:.2f} | {cell.over_dense:.2f} | {cell.error:.1e} |"
        )
    lines += ["", "Laying a weight out when it is loaded, seconds per million weights:", ""]
    costs: dict[str, list[float]] = {}
    for cell in cells:
        costs.setdefault(cell.format, []).append(cell.repack)
    lines.append(", ".join(f"{name} {statistics.median(values):.3f}" for name, values in costs.items()) + ".")
    for label, values in (
        ("decoding and multiplying", [cell.over_decoded for cell in cells]),
        ("a dense bfloat16 layer", [cell.over_dense for cell in cells]),
    ):
        mean = math.exp(sum(map(math.log, values)) / len(values))
        lines += ["", f"Over {label}: geometric mean {mean:.2f}, least {min(values):.2f}."]
    return "\n".join(lines) + "\n"


def run(
    formats: Sequence[str], layers: Sequence[tuple[int, int]], rows: Sequence[int], rounds: int, threads: int,
    output: Path | None,
) -> str:  # fmt: skip
    """Measure a table, write `cpu.json` and `cpu.md` to `output` if given, and return the Markdown."""
    torch.set_num_threads(threads)
    capability = torch.backends.cpu.get_cpu_capability()
    if torch.cpu.get_capabilities().get("amx_bf16"):
        capability += " and AMX"
    machine = (
        f"{platform.machine()} CPU with {capability}, {threads} thread{'s' * (threads > 1)}, PyTorch "
        f"{torch.__version__}; medians of {rounds} rounds."
    )
    cells: list[CpuCell] = []
    for name in formats:
        for shape in layers:
            group = FORMATS[name][1]
            if not isinstance(group, int) or shape[1] % group == 0:
                cells += measure(name, shape, rows, rounds)
    text = render(cells, machine)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        data = {"machine": machine, "cells": [asdict(cell) for cell in cells]}
        (output / "cpu.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        (output / "cpu.md").write_text(text, encoding="utf-8")
    return text


def _inputs(name: str) -> tuple[InputOp, ...]:
    """Return what rounds inputs of a standard deviation of 1; nothing for the empty name."""
    return (Quantize.calibrated(INPUT_FORMATS[name], torch.tensor(5.0), torch.bfloat16),) if name else ()


def _prepared(
    packed: PackedTensor, fmt: QuantFormat, inputs: Sequence[InputOp]
) -> tuple[dispatch.Prepared | None, float]:
    """Return the weight laid out, and what that took in seconds per million weights."""
    started = _clock()()
    prepared = dispatch.prepare(packed, fmt, torch.bfloat16, inputs)
    seconds = _clock()() - started
    return prepared, 0.0 if prepared is None else seconds / (packed.shape[0] * packed.shape[1]) * 1e6


def _chosen(
    kernel: dispatch.Kernel, x: Tensor, weights: cycle[dispatch.Prepared | None], stored: cycle[PackedTensor],
    fmt: QuantFormat,
) -> Callable[[], Tensor]:  # fmt: skip
    def call() -> Tensor:
        weight = next(weights)
        if weight is None:
            return kernel.run(x, next(stored), fmt, None, torch.bfloat16)
        return weight.linear(x, None, torch.bfloat16)

    return call


def _decoded(
    x: Tensor, stored: cycle[PackedTensor], fmt: QuantFormat, inputs: Sequence[InputOp]
) -> Callable[[], Tensor]:
    return lambda: packed_linear(apply_ops(inputs, x), next(stored), fmt, None, torch.bfloat16)


def _forced(x: Tensor, weights: cycle[dispatch.Prepared | None], path: str) -> Callable[[], Tensor]:
    def call() -> Tensor:
        weight = next(weights)
        assert isinstance(weight, PreparedWeight)
        return matmul.linear(x, weight.weight, None, torch.bfloat16, path)

    return call


def _in_turns(ways: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every call of every way, taken in turns, the first round left out.

    Each is called twice, and the second call counts: in a model, a layer follows another of its kind, too, and finds
    the memory that this one wrote to in the cache. Its weights it does not.
    """
    clock = _clock()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, call in ways.items():
            call()
            started = clock()
            call()
            if turn:
                found[name].append(clock() - started)
    return found


def _cell(
    name: str, shape: tuple[int, int], m: int, kernel: str, found: dict[str, list[float]], repack: float, error: float
) -> CpuCell:
    def ratio(other: str) -> float:
        return statistics.median(theirs / ours for ours, theirs in zip(found[kernel], found[other], strict=True))

    middle = {way: statistics.median(times) for way, times in found.items()}
    return CpuCell(
        format=name,
        shape=shape,
        m=m,
        kernel=kernel,
        seconds=middle[kernel],
        decoded=middle["decoded"],
        dense=middle["dense"],
        over_decoded=ratio("decoded"),
        over_dense=ratio("dense"),
        repack=repack,
        error=error,
        forced={way.removeprefix("forced "): t for way, t in middle.items() if way.startswith("forced ")},
    )


def _clock() -> Callable[[], float]:
    """Return the clock: with one thread its processor time, which other programs disturb less."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
