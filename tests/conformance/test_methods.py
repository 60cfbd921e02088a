"""Every method we ship keeps the promises of `MethodConformance`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import compressor.methods
from compressor.formats import BUILDERS, get_format, parse_group_size
from compressor.formats.codebook import Codebook
from compressor.formats.float4 import Float4
from compressor.methods import METHODS, SUMMARIES, get_method
from compressor.methods.base import describe_options
from compressor.methods.fp4 import FP4, FP4Options
from compressor.methods.rtn import RTN
from compressor.testing import MethodConformance
from compressor.testing.layers import correlated_inputs, fused_layers, heavy_tailed_weights


class TestRTN(MethodConformance):
    method = RTN()
    formats = (
        *("int2", "int3", "int4", "int8", "nvfp4", "mxfp4", "fp4", "fp8", "fp8-tensor", "fp8-block", "mxfp8"),
        Codebook(4, 32),
    )


class TestFP4(MethodConformance):
    method = FP4()
    formats = ("nvfp4", "mxfp4", "fp4", Float4("reference"), Float4("hybrid"))


class TestFP4WithoutSweeps(MethodConformance):
    method = FP4(FP4Options(sweeps=0, globals=8))
    formats = ("nvfp4", "mxfp4")


def test_fp4_refuses_what_is_no_4_bit_float() -> None:
    for name in BUILDERS:
        fmt = get_format(name, parse_group_size(name, None), torch.bfloat16)
        layers = fused_layers((), fmt, [heavy_tailed_weights(2, 64)], correlated_inputs(64))
        reason = FP4().refuse(layers[0].ref, fmt)
        assert (reason is None) == (name in ("nvfp4", "mxfp4", "fp4")), name
        assert reason is None or name in reason


def test_registry_and_summaries_list_the_same_methods() -> None:
    assert METHODS.keys() == SUMMARIES.keys()


@pytest.mark.parametrize("name", METHODS)
def test_pages_state_the_defaults(name: str) -> None:
    page = (Path(compressor.methods.__file__).parent / f"{name}.md").read_text(encoding="utf-8")
    assert len(page.splitlines()) < 60
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        f"## {part}" for part in ("Idea", "When to use it", "Options", "Evidence", "Limits", "Paper")
    ]
    for option in describe_options(type(get_method(name, {})).Options):
        assert re.search(rf"^- `{option['name']}` \(default {option['default']}\b", page, re.MULTILINE), option
