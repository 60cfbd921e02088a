"""Every format we ship keeps the promises of `FormatConformance`, and broken ones are caught."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from compressor.errors import NumericalError, UnsupportedError
from compressor.formats import BUILDERS, get_format, parse_group_size
from compressor.formats.base import PackedTensor, QParams, SearchableFormat
from compressor.formats.ints import IntFormat
from compressor.formats.mxfp4 import MXFP4
from compressor.formats.nvfp4 import NVFP4
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


class TestNVFP4(FormatConformance):
    formats = (NVFP4(),)


class TestMXFP4(FormatConformance):
    formats = (MXFP4(),)


def test_registry_builds_each_format_under_its_name() -> None:
    for name in BUILDERS:
        fmt = get_format(name, parse_group_size(name, None), BF16)
        assert fmt.name == name
        assert isinstance(fmt, SearchableFormat) == (name in ("nvfp4", "mxfp4"))


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


@pytest.mark.parametrize(
    ("fmt", "check"),
    [
        (SwappedNibbles(), "test_all_codes_survive_packing_bit_for_bit"),
        (SwappedNibbles(), "test_every_code_survives_in_every_lane"),
        (UnroundedScale(4, 64, BF16), "test_parameters_are_in_stored_precision"),
        (HalfStepOff(4, 64, BF16), "test_zero_stays_zero"),
        (HalfStepOff(4, 64, BF16), "test_zero_groups_and_rows_have_usable_scales"),
        (TruncatingCodes(4, 64, BF16), "test_codes_are_the_nearest"),
        (BlindToNaN(4, 64, BF16), "test_nan_and_infinity_are_refused"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_suite_catches_broken_formats(fmt: IntFormat | NVFP4, check: str) -> None:
    assert check in failing_checks(fmt)


def test_the_suite_passes_sound_formats_without_pytest() -> None:
    assert failing_checks(IntFormat(4, 64, BF16)) == []
