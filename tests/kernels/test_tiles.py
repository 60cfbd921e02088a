"""The rules that choose kernels, tiles and splits."""

from itertools import product

import pytest

from compressor.kernels.gpu import tables, tiles, tune
from compressor.kernels.gpu.aot import ARCHITECTURES
from compressor.kernels.gpu.layout import CODES, pad_columns
from compressor.kernels.gpu.tiles import Config, Tile, architecture, configure, fit_groups, path_for, split_for

TILE = Tile(16, 128, 128, 4, 4)


def of(
    grid: str, n: int, k: int, group: int, m: int, matches: bool = True, kind: str = "float", sm: int = 90
) -> Config:
    return configure(grid, n, k, group, kind, matches, m, sm, 132)


def test_rows_choose_the_kernel() -> None:
    assert [path_for(m) for m in (0, 1, 64, 65, 512, 513)] == ["small", "small", "small", "large", "large", "dequant"]


def test_devices_use_the_newest_tiles_that_are_not_newer() -> None:
    known = sorted({sm for sm, _, _ in tables.TILES})
    assert known == sorted(ARCHITECTURES)
    assert [architecture(c) for c in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))] == [80, 89, 89, 90, 100, 89]


def test_the_table_has_every_grid_and_says_where_it_comes_from() -> None:
    for sm in ARCHITECTURES:
        assert tables.SOURCES[sm]
        for grid in CODES:
            buckets = sorted(bucket for arch, kind, bucket in tables.TILES if (arch, kind) == (sm, grid))
            assert buckets == list(tune.BUCKETS)
            for bucket in buckets:
                tile = Tile(*tables.TILES[sm, grid, bucket])
                assert tile.block_m >= bucket
                assert tile.block_n in (64, 128)


LAYERS = ((8192, 8192, 128), (192, 576, 64), (1, 16, 0), (100, 11008, 32), (70, 240, 48))


@pytest.mark.parametrize("grid", CODES)
def test_every_launch_is_legal(grid: str) -> None:
    for sm, m, layer, matches in product(ARCHITECTURES, (1, 9, 64, 65, 500), LAYERS, (True, False)):
        n, k, group = layer
        config = of(grid, n, k, group, m, matches, sm=sm)
        tile = config.tile
        assert -(-n // 64) * 64 % tile.block_n == 0
        assert -(-k // pad_columns(grid)) * pad_columns(grid) % tile.block_k == 0
        assert tile.block_k % CODES[grid] == 0
        assert tile.block_k >= 16  # the shortest the matrix unit takes
        assert 1 <= config.split <= tiles.MAX_SPLIT
        if group:
            assert tile.block_k % group == 0 or group % tile.block_k == 0
            assert config.on_weights or group % tile.block_k == 0
            assert matches or not config.on_weights
        if config.carry:
            assert config.on_weights or not group


def test_scales_go_to_sums_where_that_is_cheaper_and_to_weights_where_it_is_not() -> None:
    assert fit_groups(TILE, "int4", 128, "float", True) == (TILE, False)
    assert fit_groups(TILE, "int4", 64, "float", True) == (TILE, True)
    assert fit_groups(TILE, "e2m1", 16, "e4m3", False) == (TILE, True)
    assert fit_groups(TILE, "int4", 0, "none", False) == (TILE, False)
    wide = Tile(128, 128, 128, 8, 3)
    assert fit_groups(wide, "int4", 128, "float", True) == (wide, True)
    tile, on_weights = fit_groups(TILE, "int4", 48, "float", False)
    assert (tile.block_k, on_weights) == (16, False)


def test_a_path_can_be_asked_for_with_any_number_of_rows() -> None:
    layer = ("int4", 8192, 8192, 128, "float", True)
    assert configure(*layer, 500, 90, 132, "small").tile.block_m == 64
    assert configure(*layer, 1, 90, 132, "large").tile.block_m == 128
    assert configure(*layer, 1, 90, 132) == configure(*layer, 1, 90, 132, "small")


def test_splitting_fills_the_device_once() -> None:
    assert split_for(64, 64, 132) == 4  # 256 programs for 264 places
    assert split_for(132 * 2, 64, 132) == 1
    assert split_for(10_000, 64, 132) == 1
    assert split_for(1, 3, 132) == 1  # too short to share
    assert split_for(1, 64, 132) == 8
