"""Writes the tile table: `python -m compressor.kernels.gpu.tune`.

With a GPU, candidates are timed on one large layer, and the table says on what device. Without one they are only
compiled: what spills is dropped, and the rest is ranked by the instructions it spends on a weight, made worse in
proportion where it keeps too few bytes in flight or too few warps running. The table says that, too.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from compressor.errors import ResourceError
from compressor.kernels.gpu import tables, tiles
from compressor.kernels.gpu.aot import ARCHITECTURES, SHARED_LIMIT, Compiled, compile_case, standard_case
from compressor.kernels.gpu.layout import CODES, SPARSE, THREE_BITS
from compressor.kernels.gpu.tiles import Tile

BUCKETS = (16, 32, 64, 128)
IN_FLIGHT = {80: 20 << 10, 89: 8 << 10, 90: 32 << 10, 100: 48 << 10}
"""Bytes of weights on their way to one multiprocessor that keep its share of the memory busy (Little's law)."""

MIN_WARPS = 8
"""Warps on one multiprocessor below which its four schedulers wait for results instead of issuing."""

KINDS = {"e2m1": "mxfp4", "e3m0": "channel", "int8": "channel", **dict.fromkeys(SPARSE, "dense")}
LAYER = (8192, 8192)
_REGISTERS = 65536
_STATIC = "compiled, not measured"


def candidates(grid: str, rows: int) -> Iterator[Tile]:
    """Yield the tiles worth trying for up to `rows` rows of activations."""
    for block_n, block_k, warps in itertools.product((64, 128), (64, 128, 256), (4, 8)):
        per_thread = block_n * block_k // (32 * warps)
        words = block_k // CODES[grid]
        # Fewer weights per thread than this leave the loop's own cost showing; more do not fit in registers.
        if 32 <= per_thread <= 256 and words >= (16 if grid in THREE_BITS else 8):
            yield Tile(rows, block_n, block_k, warps, 4)


def rank(compiled: Compiled, tile: Tile, grid: str) -> float:
    """Return what a compiled tile is expected to cost: instructions per weight, more if memory or schedulers idle."""
    threads = 32 * tile.warps
    programs = max(1, min(SHARED_LIMIT[compiled.arch] // compiled.shared, _REGISTERS // (compiled.registers * threads)))
    bits = 32 / CODES[grid] + (1 if grid in THREE_BITS else 0)
    in_flight = programs * (tile.stages - 1) * tile.block_n * tile.block_k * bits / 8
    idle = max(1.0, IN_FLIGHT[compiled.arch] / in_flight, MIN_WARPS / (programs * tile.warps))
    return compiled.per_weight * idle


def compiled_cost(grid: str, rows: int, arch: int, tile: Tile) -> tuple[float, Tile] | None:
    """Return the rank of a tile and the tile with as many stages as fit, or None if it spills."""
    case = standard_case(grid, rows, arch, kind=KINDS.get(grid, "group"))
    for stages in range(tile.stages, 1, -1):
        candidate = replace(tile, stages=stages)
        group = (case.grid, case.group, case.scale_kind)
        fitted, on_weights = tiles.fit_groups(candidate, *group, True)
        carry = tiles.carries(fitted, case.group, on_weights, arch)
        config = replace(case.config, tile=fitted, on_weights=on_weights, carry=carry)
        try:
            compiled = compile_case(replace(case, config=config), arch)
        except (ResourceError, RuntimeError):  # the latter: a layout that Triton cannot make
            continue
        return None if compiled.spills else (rank(compiled, fitted, grid), candidate)
    return None


def measured_cost(grid: str, rows: int, arch: int, tile: Tile) -> tuple[float, Tile] | None:
    """Return the seconds one call takes on this machine's GPU with a tile, or None if it cannot run."""
    from compressor.kernels.gpu import launch, timing
    from compressor.kernels.gpu.samples import random_weight

    if compiled_cost(grid, rows, arch, tile) is None:
        return None
    properties = torch.cuda.get_device_properties(0)
    weight = random_weight(grid, *LAYER, KINDS.get(grid, "group"), "cuda")
    copies = [weight.clone() for _ in range(timing.copies_for(weight.nbytes, properties.L2_cache_size))]
    x = torch.randn(rows, LAYER[1], dtype=SPARSE.get(grid, torch.bfloat16), device="cuda")
    config = tiles.configure_with(
        tile, grid, *LAYER, weight.group, weight.scale_kind, True, rows, arch, properties.multi_processor_count
    )
    return timing.time_calls([lambda w=copy: launch.matmul(x, w, None, config) for copy in copies]), tile  # type: ignore[misc]


def choose(
    grid: str, rows: int, arch: int, cost: Callable[[str, int, int, Tile], tuple[float, Tile] | None], like: int | None
) -> tuple[float, Tile]:
    """Return the best candidate and its cost; with `like`, the tile of that architecture is the only candidate.

    Raises:
        ResourceError: No candidate fits the architecture.
    """
    tried = candidates(grid, rows) if like is None else [Tile(*tables.TILES[like, grid, rows])]
    found = [result for tile in tried if (result := cost(grid, rows, arch, tile)) is not None]
    if not found:
        raise ResourceError(f"no tile for {grid} with {rows} rows fits sm_{arch}", "widen the candidates")
    return min(found, key=lambda result: result[0])


def write_table(path: Path, rows: Mapping[tuple[int, str, int], tuple[int, ...]], sources: dict[int, str]) -> None:
    """Write `tables.py`."""
    lines = [
        '"""Tiles by architecture, grid and number of rows; written by `python -m compressor.kernels.gpu.tune`."""',
        "",
        "from __future__ import annotations",
        "",
        "SOURCES: dict[int, str] = {",
        *(f'    {arch}: "{sources[arch]}",' for arch in sorted(sources)),
        "}",
        '"""Where the tiles of an architecture come from: the device they were timed on, if they were."""',
        "",
        "# block_m, block_n, block_k, warps, stages",
        "TILES: dict[tuple[int, str, int], tuple[int, int, int, int, int]] = {",
        *(f'    ({key[0]}, "{key[1]}", {key[2]}): {tuple(rows[key])},' for key in sorted(rows)),
        "}",
        '"""`(architecture, grid, most rows of activations)` to the sizes of `tiles.Tile`."""',
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(arguments: Iterable[str] | None = None) -> None:
    """Tune and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHITECTURES, help="architectures, without a GPU")
    parser.add_argument("--grid", nargs="*", default=sorted(CODES))
    parser.add_argument("--rows", type=int, nargs="*", default=BUCKETS)
    parser.add_argument("--like", type=int, help="take another architecture's tiles, with as many stages as fit")
    parser.add_argument("--output", type=Path, default=Path(tables.__file__))
    options = parser.parse_args(None if arguments is None else list(arguments))
    measured = torch.cuda.is_available()
    archs, source, cost = options.arch, _STATIC, compiled_cost
    if measured:
        archs = [tiles.architecture(torch.cuda.get_device_capability())]
        source, cost = f"measured on {torch.cuda.get_device_name()}", measured_cost
    importlib.reload(tables)
    rows, sources = dict(tables.TILES), dict(tables.SOURCES)
    for arch, grid, bucket in itertools.product(archs, options.grid, options.rows):
        value, tile = choose(grid, bucket, arch, cost, options.like)
        rows[arch, grid, bucket] = (tile.block_m, tile.block_n, tile.block_k, tile.warps, tile.stages)
        sources[arch] = source if options.like is None else f"{source}, after sm_{options.like}"
        print(
            f"sm_{arch} {grid} {bucket}: {tile} ({value * 1e6:.1f} us)"
            if measured
            else f"sm_{arch} {grid} {bucket}: {tile} ({value:.2f})"
        )
        sys.stdout.flush()
        write_table(options.output, rows, sources)


if __name__ == "__main__":
    main()
