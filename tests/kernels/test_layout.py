"""The runtime layout: exact both ways for every grid, and what may be sliced."""

import pytest
import torch
from torch import Tensor

from compressor.errors import UnsupportedError
from compressor.formats import get_format
from compressor.formats.base import PackedTensor, QParams
from compressor.formats.float4 import SPLITS, Float4
from compressor.formats.fp8 import FP8
from compressor.formats.nvfp4 import NVFP4
from compressor.kernels.gpu.layout import (
    CODES,
    PAD_COLUMNS,
    PAD_ROWS,
    TABLES,
    THREE_BITS,
    chunked,
    code_bits,
    constants,
    groups_per_chunk,
    pack_words,
    refuse,
    unchunked,
    unpack_words,
)
from compressor.kernels.gpu.prepare import decode, prepare, restore
from compressor.testing.kernels import KernelCase, build_weight

BITS = {"int2": 2, "int3": 3, "int4": 4, "int8": 8, "e2m1": 4, "e3m0": 4, "table8": 4, "table16": 4}
BITS |= {"table2bit": 2, "table3bit": 3}
WEIGHTS = [
    *(
        (f"int{bits}{sign}", group)
        for bits in (2, 3, 4, 8)
        for sign in ("", "-asym")
        for group in (16, 64, 96, None, -1)
    ),
    ("nvfp4", 16),
    ("mxfp4", 32),
    ("fp4:e2m1", None),
    ("fp4:e1m2", None),
    ("fp4:e3m0", None),
    *((f"power{bits}{exponent}", group) for bits in (2, 3, 4) for exponent in ("", ":0.3") for group in (64, None, -1)),
    *((f"codebook{bits}{table}", group) for bits in (2, 3, 4) for table in ("", ":skewed") for group in (64, None)),
]


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("grid", sorted(BITS))
@pytest.mark.parametrize("shape", [(1, 1), (3, 128), (64, 256), (65, 200), (5, 1000)])
def test_words_unpack_to_what_was_packed(grid: str, shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 1 << BITS[grid], shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    words, bits = pack_words(codes, grid)
    rows, columns = words.shape[0], words.shape[1] * CODES[grid]
    assert rows % PAD_ROWS == columns % PAD_COLUMNS == 0
    assert rows - shape[0] < PAD_ROWS
    assert columns - shape[1] < PAD_COLUMNS
    assert torch.equal(unpack_words(words, bits, grid, shape), codes)
    assert 8 * (words.nbytes + bits.nbytes) == BITS[grid] * rows * columns


@pytest.mark.parametrize("grid", sorted(BITS))
def test_every_bit_has_its_own_place_where_instructions_read_it(grid: str) -> None:
    places = code_bits(grid)
    every = [place for code in places for place in code]
    assert sorted(every) == list(range(48 if grid in THREE_BITS else 32))
    if grid == "table2bit":
        assert all(place // 4 == code % 8 for code in range(16) for place in places[code])
        return
    if grid == "table3bit":
        assert [code[0] for code in places[:12]] == [4 * j for j in range(12)]
        assert all(place % 4 == 3 for code in places[12:] for place in code)
        return
    if grid in TABLES:
        assert [code[:3] for code in places] == [(4 * j, 4 * j + 1, 4 * j + 2) for j in range(8)]
        assert [code[3] for code in places] == [7, 15, 23, 31, 3, 11, 19, 27]
        return
    for even, odd in zip(places[::2], places[1::2], strict=True):
        assert [b - a for a, b in zip(even, odd, strict=True)] == [8 if a >= 32 else 16 for a in even]


@pytest.mark.parametrize(
    ("grid", "dtype"),
    [*((grid, torch.float16) for grid in ("int2", "int3", "int4", "int8")), ("int3", torch.bfloat16)],
)
def test_constants_stand_for_powers_of_two(grid: str, dtype: torch.dtype) -> None:
    word = torch.tensor([constants(grid, dtype)[0]], dtype=torch.int64).to(torch.int32)
    low, high = word.view(dtype).tolist()
    assert low == high == (128 if dtype == torch.bfloat16 else 1024)
    code = torch.tensor([constants(grid, dtype)[0] | 3], dtype=torch.int32).view(dtype)[0]
    assert float(code) - low == 3


@pytest.mark.parametrize(("grid", "half", "steps"), [("int2", 2, 4), ("int4", 8, 2), ("int8", 128, 1)])
def test_bfloat16_reads_codes_as_subnormal_numbers(grid: str, half: int, steps: int) -> None:
    assert constants(grid, torch.bfloat16) == (0, 0, 0)
    codes = torch.arange(2 * half, dtype=torch.int16)
    width = 8 // steps
    for place in range(steps):  # what the kernels' multiply-add makes of a code that many bits up
        value = (codes << width * place).view(torch.bfloat16).double() * 2.0 ** (127 - width * place) - half / 64
        assert torch.equal(value * 64, codes.double() - half)
        assert torch.equal(value.bfloat16().double(), value)


@pytest.mark.parametrize("grid", sorted(BITS))
def test_rows_and_columns_can_be_sliced(grid: str) -> None:
    codes = torch.randint(0, 1 << BITS[grid], (128, 512), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    words, bits = pack_words(codes, grid)
    part, part_bits = pack_words(codes[64:, 128:384], grid)
    cut = slice(128 // CODES[grid], 384 // CODES[grid])
    assert torch.equal(words[64:, cut], part)
    if grid in THREE_BITS:
        assert torch.equal(bits[64:, cut], part_bits)


@pytest.mark.parametrize(("group", "groups"), [(16, 20), (32, 4), (64, 3), (96, 5), (128, 2), (0, 1)])
def test_scales_lie_together_by_chunks(group: int, groups: int) -> None:
    scale = torch.randn(70, groups, generator=torch.Generator().manual_seed(3))
    laid = chunked(scale, group)
    per = groups_per_chunk(group)
    assert laid.shape == (-(-groups // per), 128, per)
    assert laid[groups // 2 // per, 41, groups // 2 % per] == scale[41, groups // 2]
    assert torch.equal(unchunked(laid, 70, groups), scale)


@pytest.mark.parametrize(("name", "group"), WEIGHTS)
def test_prepared_weights_decode_and_restore_exactly(name: str, group: int | None) -> None:
    case = KernelCase(name, group, 0, 37, 192, "bfloat16", codes="fitted" if name.startswith("fp4") else "random")
    packed, fmt, dense = build_weight(case, torch.Generator().manual_seed(4))
    weight = prepare(packed, fmt)
    assert torch.equal(decode(weight), dense)
    back = restore(weight, fmt)
    assert back.tensors.keys() == packed.tensors.keys()
    for suffix, tensor in packed.tensors.items():
        assert back.tensors[suffix].dtype == tensor.dtype
        assert torch.equal(raw(back.tensors[suffix]), raw(tensor)), suffix


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tables_take_no_more_bits_than_their_codes(bits: int) -> None:
    for name in (f"power{bits}", f"codebook{bits}"):
        packed, fmt, _ = build_weight(KernelCase(name, 64, 0, 64, 256, "bfloat16"), torch.Generator().manual_seed(5))
        weight = prepare(packed, fmt)
        assert 8 * (weight.words.nbytes + weight.bits.nbytes) == bits * 64 * 256


def test_mxfp4_rows_of_very_different_scales() -> None:
    fmt = get_format("mxfp4", 32, torch.float32)
    scale = torch.tensor([[0, 0], [1, 250], [252, 0], [127, 126]], dtype=torch.uint8)
    codes = torch.arange(16, dtype=torch.uint8).repeat(4, 4)
    packed = fmt.pack(codes, QParams(scale))
    weight = prepare(packed, fmt)
    assert torch.equal(decode(weight), fmt.decode(codes, QParams(scale)))
    assert torch.equal(restore(weight, fmt).tensors["weight_scale"], scale)


def test_minus_zero_of_e1m2_becomes_zero() -> None:
    fmt = Float4()
    q = QParams(torch.ones(1, 1), codebook=torch.tensor(SPLITS["e1m2"]))
    packed = fmt.pack(torch.full((1, 4), 8, dtype=torch.uint8), q)
    assert decode(prepare(packed, fmt)).tolist() == [[0, 0, 0, 0]]


def test_what_no_kernel_reads_is_refused_with_a_reason() -> None:
    assert refuse("int4", 4096, 64) is None
    assert refuse("int4", 4096, 0) is None
    assert refuse("int4-asym", 576, 576) is None
    assert refuse("int8", 4096, 4096 * 4096) is None
    assert "int5" in str(refuse("int5", 4096, 64))
    assert "24" in str(refuse("int4", 4080, 24))
    assert "fp8" in str(refuse("fp8", 4096, 0))
    fp8 = FP8("channel", torch.bfloat16)
    w = torch.randn(4, 32)
    q = fp8.fit(w)
    with pytest.raises(UnsupportedError, match="fp8"):
        prepare(fp8.pack(fp8.encode(w, q), q), fp8)
    int5 = get_format("int5", 16, torch.bfloat16)
    q = int5.fit(w)
    with pytest.raises(UnsupportedError, match="int5"):
        prepare(int5.pack(int5.encode(w, q), q), int5)


def test_negative_nvfp4_scales_are_refused() -> None:
    fmt = NVFP4()
    w = torch.randn(4, 32)
    q = fmt.fit(w)
    packed = fmt.pack(fmt.encode(w, q), q)
    scale = packed.tensors["weight_scale"].float().neg().to(torch.float8_e4m3fn)
    with pytest.raises(UnsupportedError, match="negative"):
        prepare(PackedTensor("nvfp4", packed.shape, {**packed.tensors, "weight_scale": scale}), fmt)
