"""FP8 and MXFP8: rounding at the edges of E4M3, scales of ragged tiles, and what is refused."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from compressor.errors import CheckpointError, NumericalError, UnsupportedError
from compressor.formats.base import PackedTensor, QParams, QuantFormat
from compressor.formats.fp8 import FP8, Granularity
from compressor.formats.mxfp8 import MXFP8

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def unit(fmt: QuantFormat, columns: int) -> QParams:
    """Parameters under which a code means its own E4M3 value, for one row."""
    if isinstance(fmt, MXFP8):
        return QParams(torch.full((1, columns // 32), 127, dtype=torch.uint8))
    return QParams(torch.ones(fmt.layout((1, columns))["weight_scale"].shape))


EVERY = pytest.mark.parametrize(
    "fmt", [FP8("channel", FP32), FP8("tensor", FP32), FP8("block", FP32), MXFP8()], ids=lambda fmt: fmt.name
)

# (weight, value): between 16 and 32 the step is 2, below 2**-6 it is 2**-9; ties go to the even mantissa.
ROUNDING = (
    (17.0, 16.0), (17.01, 18.0), (19.0, 20.0), (-19.0, -20.0), (1.0625, 1.0), (1.1875, 1.25),
    (447.0, 448.0), (464.0, 448.0), (465.0, 448.0), (1e30, 448.0), (-1e30, -448.0),
    (2.0**-9, 2.0**-9), (2.0**-10, 0.0), (1.01 * 2.0**-10, 2.0**-9), (-1e-30, 0.0), (-0.0, 0.0), (0.0, 0.0),
)  # fmt: skip


@EVERY
def test_rounding_is_to_nearest_even_and_saturates(fmt: QuantFormat) -> None:
    weights = torch.zeros(1, 32)
    weights[0, : len(ROUNDING)] = torch.tensor([weight for weight, _ in ROUNDING])
    codes = fmt.encode(weights, unit(fmt, 32))
    values = fmt.decode(codes, unit(fmt, 32))[0, : len(ROUNDING)]
    assert values.tolist() == [value for _, value in ROUNDING]
    assert codes[0, 14].item() == 0x80, "a negative weight that rounds to zero keeps its sign"
    assert codes[0, 15].item() == 0, "-0 is 0"


@EVERY
def test_no_weight_becomes_nan(fmt: QuantFormat) -> None:
    """Whatever the scale, also one that is far too small."""
    rng = torch.Generator().manual_seed(1)
    weights = torch.randn(64, 256, generator=rng) * torch.logspace(-40, 38, 256)
    weights[0, :2] = torch.tensor([torch.finfo(FP32).max, -torch.finfo(FP32).max])
    small = fmt.fit(weights.clamp(-1e-3, 1e-3))
    codes = fmt.encode(weights, small)
    assert not ((codes & 0x7F) == 0x7F).any()
    assert torch.isfinite(fmt.decode(codes, small)).all()


@EVERY
def test_codes_that_mean_nan_are_not_packed(fmt: QuantFormat) -> None:
    codes = torch.zeros(2, 32, dtype=torch.uint8)
    q = fmt.fit(torch.ones(2, 32))
    fmt.pack(codes, q)
    for bad in (0x7F, 0xFF):
        codes[1, 3] = bad
        with pytest.raises(NumericalError, match="1 of 64 codes"):
            fmt.pack(codes, q)


@pytest.mark.parametrize("shape", [(128, 128), (127, 129), (300, 200), (1, 1), (257, 64)])
def test_every_tile_has_the_scale_of_its_own_largest_weight(shape: tuple[int, int]) -> None:
    rng = torch.Generator().manual_seed(2)
    weights = torch.randn(shape, generator=rng) * torch.rand(shape[0], 1, generator=rng)
    fmt = FP8("block", FP32)
    q = fmt.fit(weights)
    codes = fmt.encode(weights, q)
    decoded = fmt.decode(codes, q)
    assert q.scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    for row, column in product(range(q.scale.shape[0]), range(q.scale.shape[1])):
        tile = (slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
        scale = weights[tile].abs().max() / 448
        assert q.scale[row, column] == scale
        assert torch.equal(decoded[tile], (weights[tile] / scale).to(torch.float8_e4m3fn).float() * scale)
    stored = fmt.pack(codes, q)
    assert stored.tensors["weight"].shape == shape
    again, params = fmt.unpack(stored)
    assert torch.equal(again, codes)
    assert torch.equal(params.scale, q.scale)


def test_one_scale_for_the_whole_matrix() -> None:
    weights = torch.tensor([[1.0, -2.0, 0.5], [0.25, 3.5, 0.0]])
    q = FP8("tensor", FP32).fit(weights)
    assert q.scale.tolist() == [3.5 / 448]


def test_scales_that_overflow_their_dtype_are_refused_not_clipped() -> None:
    weights = torch.full((2, 64), 1e8)
    with pytest.raises(NumericalError, match=r"1e\+08.*fp8.*float16"):
        FP8("channel", FP16).fit(weights)
    assert torch.isfinite(FP8("channel", BF16).fit(weights).scale).all()


def test_dtypes_readers_do_not_know_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"fp8-block scales of dtype torch\.float64") as error:
        FP8("block", torch.float64)
    assert error.value.hint


@pytest.mark.parametrize("granularity", ["channel", "tensor", "block"])
def test_a_bad_weight_is_named_by_its_place(granularity: Granularity) -> None:
    weights = torch.zeros(200, 150)
    weights[130, 140] = float("nan")
    with pytest.raises(NumericalError, match=r"matrix \[200, 150\].*row 130, column 140"):
        FP8(granularity, BF16).fit(weights)


def test_another_granularity_is_not_read() -> None:
    weights = torch.ones(200, 130)

    def packed(fmt: QuantFormat) -> PackedTensor:
        q = fmt.fit(weights)
        return fmt.pack(fmt.encode(weights, q), q)

    channel, block = FP8("channel", BF16), FP8("block", BF16)
    stored: dict[str, Tensor] = packed(block).tensors
    with pytest.raises(CheckpointError, match=r"weight_scale is torch.bfloat16 \[2, 2\]"):
        channel.unpack(PackedTensor(channel.name, (200, 130), stored))
    with pytest.raises(CheckpointError, match="fp8-block tensor was given to the fp8 reader"):
        channel.unpack(packed(block))
