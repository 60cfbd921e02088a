"""Time the CPU paths of a packed linear layer: `python -m compressor.kernels.cpu.bench`; see `docs/bench.md`.

Says for each format, layer and number of rows how many times faster than a dense bfloat16 layer the packed operator,
decoding once, and the reference are. `matmul.PACKED_ROWS` comes from it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch.nn import functional

from compressor.formats import get_format
from compressor.kernels import dispatch
from compressor.kernels.cpu import matmul
from compressor.kernels.cpu.prepare import prepare
from compressor.kernels.reference.linear import packed_linear

FORMATS: tuple[tuple[str, int | None], ...] = (
    ("int4", 64),
    ("int4", 128),
    ("int4", None),
    ("int4-asym", 64),
    ("int8", 64),
    ("int8", None),
)
LAYERS = ((576, 576), (1536, 576), (576, 1536), (4096, 4096))
ROWS = (1, 4, 8, 16, 32, 64, 128, 512)
CACHE = 64 << 20
"""Bytes of weights that calls go round among, as the layers of a model do: more than caches hold."""


@dataclass(frozen=True)
class Timing:
    """One layer of one format under some rows, in seconds.

    Attributes:
        dense: `functional.linear` on a bfloat16 weight.
        packed: The packed operator.
        decode: Decoding once, then the dense product.
        reference: The reference, which does the same without a layout of its own; None where it was left out.
        chosen: The kernel dispatch takes.
    """

    dense: float
    packed: float
    decode: float
    reference: float | None
    chosen: str

    def ratios(self) -> tuple[float | None, ...]:
        """Return how many times faster than dense the others are."""
        paths = (self.packed, self.decode, self.reference)
        return tuple(None if seconds is None else self.dense / seconds for seconds in paths)


def measure(name: str, group: int | None, shape: tuple[int, int], m: int, calls: int, reference: bool = True) -> Timing:
    """Time one cell, each path the best of `calls`, random data."""
    n, k = shape
    generator = torch.Generator().manual_seed(n + k + m)
    fmt = get_format(name, group, torch.bfloat16)
    w = torch.randn(n, k, generator=generator)
    q = fmt.fit(w)
    packed = fmt.pack(fmt.encode(w, q), q)
    x = torch.randn(m, k, generator=generator).bfloat16()
    copies = max(1, CACHE // (2 * n * k))
    dense = cycle([w.bfloat16() for _ in range(copies)])
    weights = cycle([prepare(packed, fmt) for _ in range(copies)])
    problem = dispatch.linear_problem(packed, fmt, m, torch.bfloat16, torch.device("cpu"))

    def through(path: str) -> Callable[[], object]:
        return lambda: matmul.linear(x, next(weights), None, torch.bfloat16, path)

    return Timing(
        dense=_best(lambda: functional.linear(x, next(dense)), calls),
        packed=_best(through("packed"), calls),
        decode=_best(through("decode"), calls),
        reference=_best(lambda: packed_linear(x, packed, fmt, None, torch.bfloat16), 2) if reference else None,
        chosen=dispatch.pick(problem).name,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m compressor.kernels.cpu.bench", description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calls", type=int, default=10, help="calls of which the best counts")
    parser.add_argument("--reference", action="store_true", help="time the reference too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, threads: {options.threads}\n")
    print("| format | layer | rows | dense ms | packed | decode | reference | chosen |\n|" + "---|" * 8)
    for name, group in FORMATS:
        for shape in LAYERS:
            if shape[1] % (group or 1):
                continue
            for m in ROWS:
                cell = measure(name, group, shape, m, options.calls, options.reference)
                ratios = " | ".join("" if ratio is None else f"{ratio:.2f}x" for ratio in cell.ratios())
                title = f"{name} {f'g{group}' if group else 'channel'} | {shape[0]}x{shape[1]} | {m}"
                print(f"| {title} | {cell.dense * 1e3:.3f} | {ratios} | {cell.chosen} |", flush=True)


def _best(call: Callable[[], object], calls: int) -> float:
    """Return the least seconds of a call; with one thread its processor time, which other programs do not disturb."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    call()
    found = []
    for _ in range(calls):
        started = clock()
        call()
        found.append(clock() - started)
    return min(found)


if __name__ == "__main__":
    main()
