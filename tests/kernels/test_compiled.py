"""Kernels compiled for GPUs that are not there: spills, load widths, matrix instructions, instructions per weight.

Ceilings are for the machine code of one step of the hot loop with 16 rows of activations. Kept low, because from about
3.2 instructions per weight on an H200 waits for instructions and no longer for 4-bit weights.
"""

import pytest
import torch

from compressor.kernels.gpu.aot import ARCHITECTURES, Compiled, compile_case, compile_unpack, standard_case
from compressor.kernels.gpu.layout import CODES

MATRIX = {80: {"HMMA"}, 89: {"HMMA"}, 90: {"HGMMA"}, 100: {"UTCHMMA"}}
CEILINGS = {
    ("int4", "group"): 3.0,
    ("int4", "channel"): 3.0,
    ("e2m1", "nvfp4"): 3.7,
    ("e2m1", "mxfp4"): 3.7,
    ("e2m1", "channel"): 3.3,
    ("e3m0", "channel"): 3.3,
    ("int2", "group"): 2.6,
    ("int3", "group"): 4.2,
    ("int8", "channel"): 3.4,
}
OTHERS = {80: 1.8, 89: 1.8, 100: 1.25}
"""How much more other architectures may spend: before sm_90 weights make one more trip through registers."""

KEYS = sorted(CEILINGS)
FAST = [("int4", "group", torch.bfloat16), ("e2m1", "nvfp4", torch.bfloat16), ("int2", "group", torch.bfloat16)]
ALL = [(grid, kind, dtype) for grid, kind in KEYS for dtype in (torch.bfloat16, torch.float16)]


def check(compiled: Compiled, grid: str, kind: str, m: int) -> None:
    case = standard_case(grid, m, compiled.arch, kind=kind)
    tile = case.config.tile
    assert compiled.spills == 0
    assert compiled.registers <= 255
    assert compiled.matrix == MATRIX[compiled.arch]
    # All of the weights' words, and of the activations, come 16 bytes at a time.
    words = tile.block_n * tile.block_k // CODES[grid] * 4
    activations = tile.block_m * tile.block_k * 2
    threads = 32 * tile.warps
    wide = sum(name.endswith(".128") or ".128." in name for name in compiled.global_loads)
    assert wide >= words // 16 // threads + activations // 16 // threads
    # What is left for narrow loads are scales, a few for each thread: too few bytes to be weights.
    narrow = sum(".U8" in name or ".U16" in name for name in compiled.global_loads)
    assert 2 * narrow * threads <= words // 2


def at_most(compiled: Compiled, grid: str, kind: str) -> float:
    return CEILINGS[grid, kind] * OTHERS.get(compiled.arch, 1.0)


@pytest.mark.parametrize(("grid", "kind", "dtype"), FAST)
def test_sm_90_spends_few_instructions(grid: str, kind: str, dtype: torch.dtype) -> None:
    compiled = compile_case(standard_case(grid, 16, 90, dtype, kind), 90)
    check(compiled, grid, kind, 16)
    assert compiled.per_weight <= at_most(compiled, grid, kind)


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != 90])
def test_other_architectures(arch: int) -> None:
    compiled = compile_case(standard_case("int4", 16, arch), arch)
    check(compiled, "int4", "group", 16)
    assert compiled.per_weight <= at_most(compiled, "int4", "group")


def test_writing_weights_out_does_not_spill() -> None:
    compiled = compile_unpack(standard_case("e2m1", 16, 90, kind="nvfp4"), 90)
    assert compiled.spills == 0
    loads = [text.split()[0] for text in compiled.instructions if text.split()[0].startswith("LDG")]
    assert any(".128" in name for name in loads), loads
    assert any("STG.E.128" in text for text in compiled.instructions)


def test_the_counter_sees_what_it_counts() -> None:
    compiled = compile_case(standard_case("int4", 16, 90), 90)
    assert compiled.loop
    assert len(compiled.loop) < len(compiled.instructions)
    assert compiled.per_weight == len(compiled.loop) / compiled.weights_per_lane
    # A pair of weights costs at least a mask, a subtraction and half of its way to the matrix unit.
    assert compiled.per_weight > 1.0


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("grid", "kind", "dtype"), ALL)
def test_every_kernel_on_every_architecture(grid: str, kind: str, dtype: torch.dtype, arch: int) -> None:
    compiled = compile_case(standard_case(grid, 16, arch, dtype, kind), arch)
    check(compiled, grid, kind, 16)
    assert compiled.per_weight <= at_most(compiled, grid, kind)
    assert compile_unpack(standard_case(grid, 16, arch, dtype, kind), arch).spills == 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("m", [1, 32, 64, 256])
@pytest.mark.parametrize(("grid", "kind"), KEYS)
def test_every_tile_of_the_table(grid: str, kind: str, m: int, arch: int) -> None:
    check(compile_case(standard_case(grid, m, arch, kind=kind), arch), grid, kind, m)
