"""Every format we ship keeps the promises of `FormatConformance`, and broken ones are caught."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from compressor.errors import NumericalError, UnsupportedError
from compressor.formats import BUILDERS, get_format, parse_group_size
from compressor.formats.base import PackedTensor, QParams, QuantFormat, SearchableFormat
from compressor.formats.codebook import Codebook
from compressor.formats.float4 import Float4
from compressor.formats.fp8 import FP8
from compressor.formats.int_bytes import IntBytes
from compressor.formats.ints import IntFormat
from compressor.formats.mxfp4 import MXFP4
from compressor.formats.mxfp8 import MXFP8
from compressor.formats.nvfp4 import NVFP4
from compressor.formats.power import Power
from compressor.formats.split_floats import WideFloat
from compressor.testing import FormatConformance
from compressor.testing.formats import failing_checks

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class TestIntGroups(FormatConformance):
    formats = tuple(IntFormat(bits, group, BF16) for bits in range(2, 9) for group in (64, 32))


class TestIntChannels(FormatConformance):
    formats = tuple(IntFormat(bits, None, BF16) for bits in range(2, 9))


class TestIntScaleDtypes(FormatConformance):
    formats = tuple(
        IntFormat(bits, group, dtype) for dtype in (FP16, FP32) for bits, group in ((2, 64), (4, 64), (8, None))
    )


class TestAsymmetricIntGroups(FormatConformance):
    formats = tuple(
        IntFormat(bits, group, BF16, symmetric=False)
        for bits, group in ((2, 32), (3, 64), (4, 64), (5, 64), (6, 64), (7, 64), (8, 64))
    )


class TestAsymmetricIntChannels(FormatConformance):
    formats = tuple(IntFormat(bits, None, BF16, symmetric=False) for bits in (2, 3, 4, 8))


class TestAsymmetricIntScaleDtypes(FormatConformance):
    formats = tuple(
        IntFormat(bits, group, dtype, symmetric=False)
        for dtype in (FP16, FP32)
        for bits, group in ((2, 64), (4, 64), (8, None))
    )


class TestIntTensors(FormatConformance):
    formats = tuple(
        IntFormat(bits, None, dtype, symmetric, per_tensor=True)
        for symmetric in (True, False)
        for bits, dtype in ((2, BF16), (3, FP16), (4, BF16), (8, BF16), (8, FP32))
    )


class TestIntBytes(FormatConformance):
    formats = (IntBytes(None, BF16), IntBytes(None, FP32), IntBytes(None, FP16, per_tensor=True))


class TestNVFP4(FormatConformance):
    formats = (NVFP4(),)


class TestMXFP4(FormatConformance):
    formats = (MXFP4(),)


class TestFP8(FormatConformance):
    formats = (FP8("channel", BF16), FP8("tensor", BF16), FP8("block", BF16))


class TestFP8ScaleDtypes(FormatConformance):
    formats = (FP8("channel", FP32), FP8("tensor", FP16), FP8("block", FP32))


class TestMXFP8(FormatConformance):
    formats = (MXFP8(),)


class TestCodebook(FormatConformance):
    formats = (
        *(Codebook(bits, group) for bits in (2, 3, 4) for group in (32, None)),
        # A power-law grid in no order, with an entry twice and one more negative than positive ones.
        Codebook(3, None, (1.0, -0.5, 0.25, 0.0, -0.25, 0.5, -1.25, 0.25)),
    )


class TestFloat4(FormatConformance):
    formats = (Float4(), Float4("hybrid"), Float4("reference"))


class TestWideFloat(FormatConformance):
    formats = (WideFloat(6), WideFloat(8), WideFloat(6, "hybrid"), WideFloat(8, "reference"))


class TestPower(FormatConformance):
    formats = (
        *(Power(bits, group) for bits, group in ((2, 32), (3, 64), (4, 64), (4, None), (5, None), (6, 32), (8, None))),
        *(Power(bits, None, FP32, exponent=a) for bits, a in ((2, 0.7), (3, 1.0), (4, 0.613), (4, 0.1), (8, 0.2))),
        *(Power(bits, None, BF16, per_tensor=True, exponent=a) for bits, a in ((3, 0.5), (8, 0.35))),
    )


def test_registry_builds_each_format_under_its_name() -> None:
    for name in BUILDERS:
        fmt = get_format(name, parse_group_size(name, None), BF16)
        assert fmt.name == name
        assert isinstance(fmt, SearchableFormat) == (name in ("nvfp4", "mxfp4", "fp4", "fp6", "fp8-searched"))


def test_one_scale_per_matrix_and_groups_exclude_each_other() -> None:
    with pytest.raises(UnsupportedError, match="per 64 inputs"):
        IntFormat(4, 64, BF16, per_tensor=True)


@pytest.mark.parametrize(
    ("bits", "group", "dtype"), [(1, 64, BF16), (9, 64, BF16), (4, 0, BF16), (4, 64, torch.float64)]
)
def test_impossible_integers_are_refused(bits: int, group: int, dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedError) as error:
        IntFormat(bits, group, dtype)
    assert error.value.hint


def test_scales_that_overflow_their_dtype_are_refused_not_clipped() -> None:
    w = torch.full((2, 64), 1e6)
    with pytest.raises(NumericalError, match=r"1e\+06.*float16"):
        IntFormat(4, 64, FP16).fit(w)
    assert torch.isfinite(IntFormat(4, 64, BF16).fit(w).scale).all()


class SwappedNibbles(NVFP4):
    """Reads the two codes of a byte in the wrong order."""

    def unpack(self, packed: PackedTensor) -> tuple[Tensor, QParams]:
        codes, q = super().unpack(packed)
        return codes.unflatten(1, (-1, 2)).flip(-1).flatten(1), q


class UnroundedScale(IntFormat):
    """Computes codes against the float32 scale and rounds it only when packing."""

    def fit(self, w: Tensor, global_scale: Tensor | None = None) -> QParams:
        q = super().fit(w)
        return replace(q, scale=q.scale.float() * (1 + 2.0**-12))

    def pack(self, codes: Tensor, q: QParams) -> PackedTensor:
        return super().pack(codes, replace(q, scale=q.scale.to(self.dtype)))


class ForgottenZeroPoints(IntFormat):
    """Reads asymmetric codes as if they were symmetric."""

    def unpack(self, packed: PackedTensor) -> tuple[Tensor, QParams]:
        codes, q = super().unpack(packed)
        assert q.zero_point is not None
        return codes, replace(q, zero_point=torch.zeros_like(q.zero_point))


class RealZeroPoints(IntFormat):
    """Rounds weights to a grid that does not hit zero."""

    def encode(self, w: Tensor, q: QParams) -> Tensor:
        return super().encode(w - 0.4 * q.scale.float().repeat_interleave(w.shape[1] // q.scale.shape[1], 1), q)

    def decode(self, codes: Tensor, q: QParams) -> Tensor:
        return super().decode(codes, q) + 0.4 * q.scale.float().repeat_interleave(codes.shape[1] // q.scale.shape[1], 1)


class HalfStepOff(IntFormat):
    """A grid without a zero: every value lies half a step above its code."""

    def encode(self, w: Tensor, q: QParams) -> Tensor:
        return super().encode(w - 0.5 * q.scale.float().repeat_interleave(w.shape[1] // q.scale.shape[1], 1), q)

    def decode(self, codes: Tensor, q: QParams) -> Tensor:
        return super().decode(codes, q) + 0.5 * q.scale.float().repeat_interleave(codes.shape[1] // q.scale.shape[1], 1)


class TruncatingCodes(IntFormat):
    """Rounds towards minus infinity."""

    def encode(self, w: Tensor, q: QParams) -> Tensor:
        return super().encode(w - 0.499 * q.scale.float().repeat_interleave(w.shape[1] // q.scale.shape[1], 1), q)


@dataclass(frozen=True)
class BlindToNaN(IntFormat):
    """Fits whatever it is given."""

    def fit(self, w: Tensor, global_scale: Tensor | None = None) -> QParams:
        return super().fit(torch.nan_to_num(w, 0.0, 1.0, -1.0))


class SwappedTiles(FP8):
    """Counts tiles from the last row and column."""

    def encode(self, w: Tensor, q: QParams) -> Tensor:
        return super().encode(w, replace(q, scale=q.scale.flip(0, 1)))

    def decode(self, codes: Tensor, q: QParams) -> Tensor:
        return super().decode(codes, replace(q, scale=q.scale.flip(0, 1)))


class RoundingUp(Float4):
    """Rounds ties of the search away from zero."""

    def round(self, w: Tensor, q: QParams) -> Tensor:
        return super().round(w * (1 + 2.0**-22), q)


@pytest.mark.parametrize(
    ("fmt", "check"),
    [
        (SwappedNibbles(), "test_all_codes_survive_packing_bit_for_bit"),
        (SwappedNibbles(), "test_every_code_survives_in_every_lane"),
        (UnroundedScale(4, 64, BF16), "test_parameters_are_in_stored_precision"),
        (ForgottenZeroPoints(4, 64, BF16, symmetric=False), "test_all_codes_survive_packing_bit_for_bit"),
        (ForgottenZeroPoints(4, 64, BF16, symmetric=False), "test_parameters_are_in_stored_precision"),
        (RealZeroPoints(4, 64, BF16, symmetric=False), "test_zero_stays_zero"),
        (HalfStepOff(4, 64, BF16), "test_zero_stays_zero"),
        (HalfStepOff(4, 64, BF16), "test_zero_groups_and_rows_have_usable_scales"),
        (TruncatingCodes(4, 64, BF16), "test_codes_are_the_nearest"),
        (BlindToNaN(4, 64, BF16), "test_nan_and_infinity_are_refused"),
        (SwappedTiles("block", BF16), "test_one_row_and_one_group_equal_their_part_of_a_matrix"),
        (SwappedTiles("block", BF16), "test_min_max_covers_the_weights"),
        (RoundingUp(), "test_rounding_is_decoding_what_was_encoded"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_suite_catches_broken_formats(fmt: QuantFormat, check: str) -> None:
    assert check in failing_checks(fmt)


def test_the_suite_passes_sound_formats_without_pytest() -> None:
    assert failing_checks(IntFormat(4, 64, BF16)) == []
