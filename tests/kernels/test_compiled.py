"""Kernels compiled for GPUs that are not there: spills, load widths, matrix instructions, instructions per weight.

Ceilings are for the machine code of one step of the hot loop with 16 rows of activations. Kept low, because from about
3.2 instructions per weight on an H200 waits for instructions and no longer for 4-bit weights.
"""

import pytest
import torch

from compressor.kernels.gpu.aot import (
    ARCHITECTURES,
    Compiled,
    compile_case,
    compile_int,
    compile_quantize,
    compile_rotate,
    compile_unpack,
    standard_case,
)
from compressor.kernels.gpu.layout import CODES, SPARSE

MATRIX = {80: {"HMMA"}, 89: {"HMMA"}, 90: {"HGMMA"}, 100: {"UTCHMMA"}}
CEILINGS = {
    ("int4", "group"): 2.6,
    ("int4", "channel"): 2.6,
    ("e2m1", "nvfp4"): 3.7,
    ("e2m1", "mxfp4"): 3.7,
    ("e2m1", "channel"): 3.3,
    ("e3m0", "channel"): 3.3,
    ("int2", "group"): 2.6,
    ("int3", "group"): 4.2,
    ("int8", "channel"): 3.2,
    ("table2bit", "group"): 4.0,
    ("table2bit", "channel"): 4.0,
    ("table3bit", "group"): 4.0,
    ("table3bit", "channel"): 4.0,
    ("table8", "group"): 3.2,
    ("table8", "channel"): 3.2,
    ("table16", "channel"): 4.0,
    ("float16-2of4", "dense"): 3.6,
    ("bfloat16-2of4", "dense"): 3.6,
}
KEYS = sorted(CEILINGS)
FAST = [
    (g, k, torch.bfloat16) for g, k in (("int4", "group"), ("e2m1", "nvfp4"), ("int2", "group"), ("table8", "group"))
]
FAST += [("table3bit", "group", torch.bfloat16), ("bfloat16-2of4", "dense", torch.bfloat16)]
ALL = [
    (grid, kind, dtype)
    for grid, kind in KEYS
    for dtype in (torch.bfloat16, torch.float16)
    if SPARSE.get(grid, dtype) == dtype
]


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


@pytest.mark.parametrize(("grid", "kind", "dtype"), FAST)
def test_sm_90_spends_few_instructions(grid: str, kind: str, dtype: torch.dtype) -> None:
    compiled = compile_case(standard_case(grid, 16, 90, dtype, kind), 90)
    check(compiled, grid, kind, 16)
    assert compiled.per_weight <= CEILINGS[grid, kind]


@pytest.mark.parametrize(
    ("arch", "grid", "kind"),
    [(80, "int4", "group"), (89, "e2m1", "nvfp4"), (80, "int2", "group"), (100, "int4", "group")],
)
def test_other_architectures(arch: int, grid: str, kind: str) -> None:
    compiled = compile_case(standard_case(grid, 16, arch, kind=kind), arch)
    check(compiled, grid, kind, 16)
    assert compiled.per_weight <= CEILINGS[grid, kind]


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
    assert compiled.per_weight <= CEILINGS[grid, kind]
    assert compile_unpack(standard_case(grid, 16, arch, dtype, kind), arch).spills == 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("m", [1, 32, 64, 256])
@pytest.mark.parametrize(("grid", "kind"), KEYS)
def test_every_tile_of_the_table(grid: str, kind: str, m: int, arch: int) -> None:
    check(compile_case(standard_case(grid, m, arch, kind=kind), arch), grid, kind, m)


OTHERS = {80: 1.8, 89: 1.8, 100: 1.25}
"""How much more integer kernels may spend on other architectures than on sm_90."""

INT_MATRIX = {80: {"IMMA"}, 89: {"IMMA"}, 90: {"IGMMA"}, 100: {"IMMA"}}
INT_CEILINGS = {(8, 0): 0.95, (8, 128): 1.2, (4, 0): 1.0, (4, 128): 1.6, (4, 64): 1.95}
"""Instructions per weight with 16 rows on sm_90, by bits and columns per scale."""


def check_int(compiled: Compiled, bits: int) -> None:
    assert compiled.spills == 0
    assert compiled.registers <= 255
    assert compiled.matrix == INT_MATRIX[compiled.arch]
    # Weights go from global memory past the registers, 16 bytes at a time; the matrix unit gets whole words.
    wide = sum(".128" in name for name in compiled.global_loads)
    assert wide >= compiled.weights_per_lane * bits / 8 / 16
    assert not any(".U8" in name or ".S8" in name or "16" in name.split(".") for name in compiled.global_loads)


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 0), (4, 128)])
def test_integers_on_sm_90_spend_few_instructions(bits: int, group: int) -> None:
    compiled = compile_int(bits, group, 16, 90)
    check_int(compiled, bits)
    assert compiled.per_weight <= INT_CEILINGS[bits, group]


@pytest.mark.parametrize(("treated", "mantissa"), [(False, None), (True, None), (False, 1)])
def test_rounding_inputs_reads_and_writes_wide(treated: bool, mantissa: int | None) -> None:
    compiled = compile_quantize(90, symmetric=True, treated=treated, mantissa=mantissa)
    assert compiled.spills == 0
    names = [text.split()[0 if not text.startswith("@") else 1] for text in compiled.instructions]
    assert any(name.startswith("STG") and (".64" in name or ".128" in name) for name in names)
    assert treated or not any(name.startswith("LDG") and ".U16" in name for name in names)


def check_rotation(compiled: Compiled) -> None:
    assert compiled.spills == 0
    assert compiled.registers <= 255
    assert compiled.matrix == {"HMMA"}  # sixteen rows are too few for newer instructions
    # The matrix is loaded once, inputs one by one, as their order has it: 16 rows times 128 columns for 128 threads.
    assert sum(".U16" in name for name in compiled.global_loads) <= compiled.weights_per_lane
    assert any(text.startswith(("STG.E.128", "@P")) and "STG.E.128" in text for text in compiled.instructions)


def test_turning_inputs_uses_the_matrix_unit() -> None:
    check_rotation(compile_rotate(90, 128, split=4))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("size", "split"), [(16, 4), (64, 4), (128, 1), (128, 4)])
def test_every_rotation(arch: int, size: int, split: int) -> None:
    check_rotation(compile_rotate(arch, size, split, symmetric=split == 1))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("m", [16, 32, 64, 256])
@pytest.mark.parametrize(("bits", "group"), sorted(INT_CEILINGS))
def test_every_integer_kernel(bits: int, group: int, m: int, arch: int) -> None:
    compiled = compile_int(bits, group, m, arch)
    check_int(compiled, bits)
    if m == 16:
        assert compiled.per_weight <= INT_CEILINGS[bits, group] * OTHERS.get(arch, 1.0)
    if m == 256:
        assert compile_int(bits, group, m, arch, split=4).spills == 0


EXPERT_CEILINGS = {
    ("int4", "group", torch.bfloat16): 2.6,
    ("int4", "group", torch.float16): 2.6,
    ("e2m1", "nvfp4", torch.bfloat16): 3.7,
    ("table8", "group", torch.bfloat16): 3.2,
}
"""As `CEILINGS`, for experts; keys also name the dtype."""


@pytest.mark.parametrize("key", [("int4", "group", torch.bfloat16)])
def test_experts_on_sm_90_cost_what_single_weights_do(key: tuple[str, str, torch.dtype]) -> None:
    grid, kind, dtype = key
    compiled = compile_case(standard_case(grid, 16, 90, dtype, kind, grouped=True), 90)
    check(compiled, grid, kind, 16)
    assert compiled.per_weight <= EXPERT_CEILINGS[key]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("m", [16, 128])
@pytest.mark.parametrize("key", sorted(EXPERT_CEILINGS, key=str))
def test_every_expert_kernel(key: tuple[str, str, torch.dtype], m: int, arch: int) -> None:
    grid, kind, dtype = key
    compiled = compile_case(standard_case(grid, m, arch, dtype, kind, grouped=True), arch)
    check(compiled, grid, kind, m)
    if m == 16:
        assert compiled.per_weight <= EXPERT_CEILINGS[key]
