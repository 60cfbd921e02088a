"""Compiling a kernel for a GPU that is not there, and reading what the assembler made of it.

Shows spills, registers, shared memory, the width of loads, which matrix instructions are used and how many instructions
the hot loop spends on a weight. Does not show speed, races or occupancy.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compressor.errors import ResourceError
from compressor.kernels.gpu.int_launch import QUANTIZE_COLUMNS, ROTATE_COLUMNS, ROTATE_ROWS, int_tile
from compressor.kernels.gpu.launch import ROW_CODES, UNPACK_COLUMNS, UNPACK_ROWS
from compressor.kernels.gpu.layout import CODES, SPARSE, groups_per_chunk
from compressor.kernels.gpu.samples import KINDS
from compressor.kernels.gpu.tiles import Config, Tile, configure

ARCHITECTURES = (80, 89, 90, 100)
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory one program can have."""

MATRIX = re.compile(r"^(HGMMA|UTC\w*MMA|HMMA|QMMA|OMMA|IGMMA|IMMA)")
_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.uint8: "u8"}


@dataclass(frozen=True)
class Case:
    """A specialisation of `packed_matmul`.

    Attributes:
        grid: See `layout.RuntimeWeight`, as the next three.
        group: See `grid`.
        scale_kind: See `grid`.
        row_kind: See `grid`.
        dtype: Dtype of activations.
        config: How it is launched.
        scale_dtype: Dtype of floating-point scales.
        has_zero: Whether there are zero points.
        even_k: Whether steps divide the columns.
        grouped: Whether it multiplies experts.
    """

    grid: str
    group: int
    scale_kind: str
    row_kind: str
    dtype: torch.dtype
    config: Config
    scale_dtype: torch.dtype | None = None
    has_zero: bool = False
    even_k: bool = True
    grouped: bool = False


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a kernel for one architecture.

    Attributes:
        arch: The architecture, 90 for sm_90.
        registers: Per thread.
        stack: Bytes of stack per thread.
        shared: Bytes of shared memory per program.
        instructions: All machine instructions.
        loop: Those of the hot loop: the longest that ends in a backward branch and uses the matrix unit.
        weights_per_lane: Weights that a thread's share of one step is.
    """

    arch: int
    registers: int
    stack: int
    shared: int
    instructions: tuple[str, ...]
    loop: tuple[str, ...]
    weights_per_lane: float

    @property
    def per_weight(self) -> float:
        """Instructions of the hot loop per weight."""
        return len(self.loop) / self.weights_per_lane

    @property
    def spills(self) -> int:
        """Instructions that write or read registers that did not fit."""
        return sum(re.search(r"\b(STL|LDL)\b", text) is not None for text in self.instructions)

    @property
    def mnemonics(self) -> tuple[str, ...]:
        """Names of the loop's instructions with their modifiers, predicates removed."""
        return tuple(re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for text in self.loop)

    @property
    def matrix(self) -> frozenset[str]:
        """The matrix instructions of the loop, e.g. `HGMMA`."""
        return frozenset(match[0] for name in self.mnemonics if (match := MATRIX.match(name)))

    @property
    def global_loads(self) -> tuple[str, ...]:
        """The loop's loads from global memory, asynchronous ones too."""
        return tuple(
            name for name in self.mnemonics if name.startswith(("LDG", "UBLKCP", "UTMALDG")) and "DEPBAR" not in name
        )


def compile_case(case: Case, arch: int) -> Compiled:
    """Compile `packed_matmul` for an architecture, as a launch on aligned tensors would.

    Raises:
        ResourceError: The program needs more registers or shared memory than the architecture has.
    """
    from compressor.kernels.gpu.matmul import packed_matmul

    tile = case.config.tile
    per_lane = tile.block_n * tile.block_k / (32 * tile.warps)
    return _compile(packed_matmul, _constants(case), lambda name: _type(name, case), arch, tile, per_lane)


def compile_unpack(case: Case, arch: int) -> Compiled:
    """Compile `unpack_weight`, writing the case's dtype; it has no hot loop."""
    from compressor.kernels.gpu.dequant import unpack_weight

    shared = ("GRID", "GROUP", "PER", "SCALE", "ROW", "HAS_ZERO", "CODES", "INTERPRET")
    constexprs = {name: value for name, value in _constants(case).items() if name in shared}
    constexprs |= {"BLOCK_N": UNPACK_ROWS, "BLOCK_K": UNPACK_COLUMNS}
    tile = Tile(0, UNPACK_ROWS, UNPACK_COLUMNS, 4, 1)
    per_lane = UNPACK_ROWS * UNPACK_COLUMNS / 128
    return _compile(unpack_weight, constexprs, lambda name: _type(name, case), arch, tile, per_lane)


def compile_int(bits: int, group: int, m: int, arch: int, split: int = 1) -> Compiled:
    """Compile `int_matmul` as a large layer with so many rows of activations in bfloat16 starts it.

    Args:
        bits: 4 or 8.
        group: Columns per scale; 0 for whole rows.
        m: Rows of activations.
        arch: The architecture.
        split: Programs that share the work along K.
    """
    from compressor.kernels.gpu.int_matmul import int_matmul

    tile = int_tile(bits, 8192, 8192, group, m, arch)
    sums = "*fp32" if group else "*i32"
    types = {"x_ptr": "*i8", "words_ptr": "*i8", "y_ptr": "*bf16", "bias_ptr": "*bf16", "sum_ptr": sums}
    types |= {"partial_ptr": sums, "scale_ptr": "*fp32", "x_scale_ptr": "*fp32"}
    types |= {name: "*i32" for name in ("x_zero_ptr", "counter_ptr")}
    constexprs = {"BITS": bits, "GROUP": group, "HAS_ZERO": False, "HAS_BIAS": False, "SPLIT": split}
    constexprs |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "INTERPRET": False}
    per_lane = tile.block_n * tile.block_k / (32 * tile.warps)
    return _compile(int_matmul, constexprs, lambda name: types.get(name, "i32"), arch, tile, per_lane)


def compile_quantize(
    arch: int, symmetric: bool, treated: bool, floating: bool = False, mantissa: int | None = None
) -> Compiled:
    """Compile `quantize_rows` for bfloat16; it has no hot loop.

    Args:
        arch: The architecture.
        symmetric: Whether there are no zero points.
        treated: Whether channels are reordered, shifted and scaled.
        floating: Whether they become 8-bit floats.
        mantissa: Mantissa bits of the 4-bit floats that they become as integers, with scales of their own; None: none.
    """
    from compressor.kernels.gpu.quantize import quantize_rows

    types = {"x_ptr": "*bf16", "codes_ptr": "*i8", "order_ptr": "*i32", "zero_ptr": "*i32", "clip": "fp32"}
    types |= {name: "*fp32" for name in ("shift_ptr", "factor_ptr", "step_ptr", "scale_ptr")}
    constexprs: dict[str, Any] = {f"HAS_{name}": treated for name in ("ORDER", "SHIFT", "FACTOR")}
    constexprs |= {"STATIC": False, "SYMMETRIC": symmetric, "FLOATING": floating, "BITS": 8, "BLOCK": QUANTIZE_COLUMNS}
    constexprs |= {"MANTISSA": -1, "OFFSET": 0}
    if mantissa is not None:
        constexprs |= {"STATIC": True, "BITS": 4, "MANTISSA": mantissa, "OFFSET": 1, "HAS_FACTOR": True}
    tile = Tile(0, 0, QUANTIZE_COLUMNS, 8, 1)
    return _compile(quantize_rows, constexprs, lambda name: types.get(name, "i32"), arch, tile, 1.0)


def compile_rotate(arch: int, size: int, split: int, symmetric: bool = False) -> Compiled:
    """Compile `quantize_rotated` for bfloat16; its hot loop turns blocks, its "weights" are a thread's inputs of one.

    Args:
        arch: The architecture.
        size: Columns of a block.
        split: Programs that share some rows.
        symmetric: Whether there are no zero points.
    """
    from compressor.kernels.gpu.rotate import quantize_rotated

    types = {name: "*bf16" for name in ("x_ptr", "turned_ptr")} | {"codes_ptr": "*i8", "matrix_ptr": "*fp16"}
    types |= {name: "*fp32" for name in ("shift_ptr", "factor_ptr", "step_ptr", "scale_ptr", "range_ptr")}
    types |= {name: "*i32" for name in ("order_ptr", "zero_ptr", "counter_ptr")} | {"clip": "fp32"}
    constexprs: dict[str, Any] = {"HAS_ORDER": True, "HAS_SHIFT": False, "HAS_FACTOR": False, "STATIC": False}
    constexprs |= {"SYMMETRIC": symmetric, "FLOATING": False, "BITS": 4, "SPLIT": split, "SIZE": size}
    constexprs |= {"BLOCK_M": ROTATE_ROWS, "BLOCK": ROTATE_COLUMNS, "INTERPRET": False}
    tile = Tile(ROTATE_ROWS, 0, size, 4, 3)
    per_lane = ROTATE_ROWS * size / 128
    return _compile(quantize_rotated, constexprs, lambda name: types.get(name, "i32"), arch, tile, per_lane)


def _compile(
    kernel: Any, constexprs: dict[str, Any], type_of: Callable[[str], str], arch: int, tile: Tile, per_lane: float
) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: "constexpr" if name in constexprs else type_of(name) for name in names},
        {(names.index(name),): value for name, value in constexprs.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in names if _divisible(name)},
    )
    done = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True},
    )
    shared = int(done.metadata.shared)
    if shared > SHARED_LIMIT[arch]:
        raise ResourceError(f"{tile} needs {shared} bytes of shared memory on sm_{arch}", "use fewer stages")
    registers, stack, text = _disassemble(done.asm["cubin"])
    instructions, loop = _hot_loop(text)
    return Compiled(arch, registers, stack, shared, instructions, loop, per_lane)


def _constants(case: Case) -> dict[str, Any]:
    config, tile = case.config, case.config.tile
    return {
        "GRID": case.grid,
        "GROUP": case.group,
        "PER": groups_per_chunk(case.group),
        "SCALE": case.scale_kind,
        "ON_WEIGHTS": config.on_weights,
        "ROW": ROW_CODES[case.row_kind],
        "HAS_ZERO": case.has_zero,
        "HAS_BIAS": False,
        "CODES": CODES[case.grid],
        "EVEN_K": case.even_k,
        "CARRY": config.carry,
        "REGISTERS": config.registers,
        "SPLIT": config.split,
        "GROUPED": case.grouped,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "INTERPRET": False,
        "x_stride_k": 1,
    }


def _type(name: str, case: Case) -> str:
    if name in ("x_ptr", "y_ptr", "bias_ptr", "out_ptr"):
        return f"*{_TYPES[case.dtype]}"
    if name == "scale_ptr":
        dtype = torch.uint8 if case.scale_kind in ("e4m3", "e8m0") else case.scale_dtype or case.dtype
        return f"*{_TYPES[dtype]}"
    fixed = {"words_ptr": "*u32", "bits_ptr": "*u16", "zero_ptr": "*fp16", "row_ptr": "*fp32", "partial_ptr": "*fp32"}
    fixed |= {name: "*i32" for name in ("counter_ptr", "table_ptr", "blocks_ptr", "order_ptr")}
    return {**fixed, "unit": "fp32"}.get(name, "i32")


def _divisible(name: str) -> bool:
    """Whether a launch would find the argument to be a multiple of 16, for layers of common sizes."""
    strides: tuple[str, ...] = ("x_stride_m", "words_stride", "bits_stride", "scale_stride", "y_stride", "out_stride")
    strides += ("words_expert", "bits_expert", "scale_expert", "row_expert")
    strides += ("x_stride", "codes_stride", "group_stride", "columns")
    return name.endswith("_ptr") or name in ("n", "k", *strides)


def _disassemble(cubin: bytes) -> tuple[int, int, str]:
    """Return registers, stack bytes and the disassembly."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run(tools / "cuobjdump", "-res-usage", path)
        text = _run(tools / "nvdisasm", "-c", path)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), int(found[2]), text


def _run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _hot_loop(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return all instructions and those of the longest loop with a matrix instruction."""
    labels: dict[str, int] = {}
    found: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_[\w.]+):", line):
            labels[label[1]] = len(found)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            found.append(instruction[1])
    loop: list[str] = []
    for place, instruction_text in enumerate(found):
        branch = re.search(r"BRA.*`\((\.L_[\w.]+)\)", instruction_text)
        start = labels.get(branch[1], place) if branch else place
        body = found[start : place + 1]
        if len(body) > max(len(loop), 1) and any("MMA" in line for line in body):
            loop = body
    return tuple(found), tuple(loop)


def standard_case(
    grid: str, m: int, arch: int, dtype: torch.dtype = torch.bfloat16, kind: str = "group", grouped: bool = False
) -> Case:
    """Return the case that a large layer of a format launches with `m` rows of activations.

    Args:
        grid: See `layout.RuntimeWeight`.
        m: Rows of activations.
        arch: Architecture whose tiles are used.
        dtype: Dtype of activations; grids of 16-bit floats have their own.
        kind: A key of `samples.KINDS`.
        grouped: Whether it multiplies experts.
    """
    group, scale_kind, row_kind = KINDS[kind]
    config = configure(grid, 8192, 8192, group, scale_kind, True, m, arch, 132)
    return Case(grid, group, scale_kind, row_kind, SPARSE.get(grid, dtype), config, grouped=grouped)
