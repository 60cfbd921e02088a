"""Which kernel runs, in what tiles: explicit rules, so that nothing is tuned while a user waits for a first token.

The tiles are in `tables.py`; what is decided here follows from a weight's layout and the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from compressor.kernels.gpu.layout import CODES, PAD_ROWS, THREE_BITS, pad_columns
from compressor.kernels.gpu.tables import TILES

SMALL_ROWS, LARGE_ROWS = 64, 512
"""Most rows of activations for the small kernel, and for the large one; beyond, weights are written out dense."""

CARRY_ROWS = 128
"""Rows of activations per program from which on the matrix unit adds up along K by itself.

Below, each step's product waits to be scaled and added: fewer instructions than letting the sums stay in the unit,
which makes the compiler cut steps into slices with a barrier for each. On sm_100 it never pays: sums make a round trip.
"""

MAX_SPLIT = 8
_SLOTS = 2  # programs a multiprocessor holds at once
_OVERHEAD = 4  # steps that filling the pipeline and writing the result cost a program
_REDUCE = 2  # steps that adding up partial sums costs


@dataclass(frozen=True)
class Tile:
    """Sizes of one program.

    Attributes:
        block_m: Rows of activations.
        block_n: Rows of the weight.
        block_k: Columns per step.
        warps: Warps of 32 threads.
        stages: Steps in flight.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Config:
    """Everything a launch of `packed_matmul` is specialised on besides dtypes.

    Attributes:
        tile: Sizes, with `block_k` fitted to groups and padding.
        on_weights: Whether group scales multiply weights rather than partial sums.
        carry: Whether the matrix unit adds up along K by itself.
        split: Programs that share the work along K.
        registers: Whether the matrix unit takes operands from registers alone, as it does before sm_90.
    """

    tile: Tile
    on_weights: bool
    carry: bool
    split: int
    registers: bool = False


def path_for(m: int) -> str:
    """Return `small`, `large` or `dequant`: what multiplies this many rows of activations."""
    return "small" if m <= SMALL_ROWS else "large" if m <= LARGE_ROWS else "dequant"


def architecture(capability: tuple[int, int]) -> int:
    """Return the key of the tile table that serves a device: the newest architecture that is not newer.

    Consumer devices of other generations have the shared memory of sm_89, so they use its tiles.
    """
    number = capability[0] * 10 + capability[1]
    if number == 86 or number >= 120:
        return 89
    known = sorted({sm for sm, _, _ in TILES})
    older = [sm for sm in known if sm <= number]
    assert older, f"no tiles for compute capability {capability}"
    return older[-1]


@lru_cache(maxsize=4096)
def configure(
    grid: str,
    n: int,
    k: int,
    group: int,
    scale_kind: str,
    scale_matches: bool,
    m: int,
    sm: int,
    processors: int,
    path: str = "",
) -> Config:
    """Return how to launch `packed_matmul`.

    Args:
        grid: See `layout.RuntimeWeight`, as `group` and `scale_kind`.
        n: Rows of the weight.
        k: Its columns.
        group: See `grid`.
        scale_kind: See `grid`.
        scale_matches: Whether floating-point scales have the dtype of the activations.
        m: Rows of activations.
        sm: Key of the tile table, see `architecture`.
        processors: Multiprocessors of the device.
        path: `small` or `large`: use those tiles, however many rows there are; empty: as `path_for` says.
    """
    rows = {"small": min(m, SMALL_ROWS), "large": max(m, SMALL_ROWS + 1)}.get(path, m)
    largest = max(bucket for arch, kind, bucket in TILES if (arch, kind) == (sm, grid))
    bucket = min((b for arch, kind, b in TILES if (arch, kind) == (sm, grid) and b >= rows), default=largest)
    tile = Tile(*TILES[sm, grid, bucket])
    return configure_with(tile, grid, n, k, group, scale_kind, scale_matches, m, sm, processors)


def configure_with(
    tile: Tile,
    grid: str,
    n: int,
    k: int,
    group: int,
    scale_kind: str,
    scale_matches: bool,
    m: int,
    sm: int,
    processors: int,
) -> Config:
    """Return how to launch `packed_matmul` with a tile; other arguments as `configure`."""
    rows, columns = -(-n // PAD_ROWS) * PAD_ROWS, -(-k // pad_columns(grid)) * pad_columns(grid)
    if rows % tile.block_n:
        tile = replace(tile, block_n=PAD_ROWS)
    while columns % tile.block_k:
        tile = replace(tile, block_k=tile.block_k // 2)
    tile, on_weights = fit_groups(tile, grid, group, scale_kind, scale_matches)
    carry = carries(tile, group, on_weights, sm)
    tiles = -(-n // tile.block_n) * -(-m // tile.block_m)
    return Config(tile, on_weights, carry, split_for(tiles, -(-k // tile.block_k), processors), sm < 90)


def carries(tile: Tile, group: int, on_weights: bool, sm: int) -> bool:
    """Return whether the matrix unit adds up along K by itself; see `CARRY_ROWS`."""
    return tile.block_m >= CARRY_ROWS and sm < 100 and (on_weights or not group)


def fit_groups(tile: Tile, grid: str, group: int, scale_kind: str, scale_matches: bool) -> tuple[Tile, bool]:
    """Return the tile with `block_k` fitted to the groups, and whether scales multiply weights.

    Multiplying the partial sum of a group is the more accurate way, and the cheaper one while a tile has at most half
    as many rows as a group has columns. It needs steps that stay inside a group, and those must not be so short that a
    row's words belong to one thread. Scales of another dtype than the activations may not be rounded to it.
    """
    if not group:
        return tile, False
    if scale_kind != "float":
        return tile, True
    inside = tile.block_k
    while group % inside:
        inside //= 2
    long_enough = inside // CODES[grid] >= (16 if grid in THREE_BITS else 8)
    if not scale_matches or (long_enough and group >= 128 and 2 * tile.block_m <= group):
        return replace(tile, block_k=inside), False
    if tile.block_k % group and group % tile.block_k:
        return replace(tile, block_k=inside), True
    return tile, True


def split_for(tiles: int, steps: int, processors: int) -> int:
    """Return how many programs share a tile's steps: what ends first if programs run in waves over the device."""

    def cost(split: int) -> int:
        waves = -(-tiles * split // (_SLOTS * processors))
        return waves * (-(-steps // split) + _OVERHEAD + (_REDUCE if split > 1 else 0))

    choices = [split for split in range(1, MAX_SPLIT + 1) if split == 1 or steps // split >= 4]
    return min(choices, key=lambda split: (cost(split), split))
