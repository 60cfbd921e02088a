"""The packed kernels, run by Triton's interpreter, against float64 products with the decoded weights.

The interpreter computes bfloat16 in float32 and runs programs one after the other: it shows indexing, masks, packing
and constants, not rounding in bfloat16 and not races.
"""

import pytest

from compressor.testing.expert_kernels import ExpertCase
from compressor.testing.kernels import Interpreter, KernelCase

FORMATS = [
    ("int2", 64),
    ("int3", 64),
    ("int3", None),
    ("int4", 128),
    ("int4", 64),
    ("int4", None),
    ("int8", 32),
    ("int8", None),
    ("int4-asym", 64),
    ("int2-asym", 128),
    ("int8-asym", None),
    ("nvfp4", 16),
    ("mxfp4", 32),
    ("fp4:e2m1", None),
    ("fp4:e1m2", None),
    ("fp4:e3m0", None),
]
TABLES = [
    ("power4", None, "bfloat16"),
    ("power4:0.3", 64, "bfloat16"),
    ("power4:0.1", None, "float32"),
    ("power3:0.7", -1, "bfloat16"),
    ("power2", 32, "float32"),
    ("codebook4", 128, "float32"),
    ("codebook3:skewed", None, "float32"),
    ("codebook4:skewed", 64, "float32"),
    ("power3", 64, "bfloat16"),
    ("codebook2", None, "float32"),
]
"""Formats whose codes index a table, with the dtype of scales; entries are rounded to the dtype of activations."""
SMALL = (16, 64, 128, 4, 3)
LIMIT = 2e-5
"""Of the error with float32 results; weights and activations are exact."""

MANY_ROWS = (1, 2, 3, 7, 8, 15, 16, 17, 33, 64, 65, 100)
CASES = [
    *(KernelCase(fmt, group, 5, 72, 384, dtype) for fmt, group in FORMATS for dtype in ("float16", "bfloat16")),
    *(KernelCase(fmt, group, 5, 72, 256, d, scales) for fmt, group, scales in TABLES for d in ("float16", "bfloat16")),
    KernelCase("codebook4:skewed", None, 6, 40, 200, "float16", "float32", codes="random", x="strided", bias=True),
    KernelCase("power4", 128, 5, 70, 1024, "bfloat16", codes="highest", config=(*SMALL, True, False, 3)),
    *(KernelCase("int4", 128, m, 72, 256, bias=m % 2 == 1) for m in MANY_ROWS),
    *(
        KernelCase(fmt, group, 3, 70, 256, codes=c)
        for c in ("random", "lowest", "highest")
        for fmt, group in FORMATS[:13:3]
    ),
    *(
        KernelCase("int4", 128, 4, 64, 256, x=x, dtype=d)
        for x in ("shifted", "outliers")
        for d in ("float16", "bfloat16")
    ),
    KernelCase("int4", 64, 6, 64, 192, x="strided"),
    KernelCase("nvfp4", 16, 6, 40, 208, x="strided"),
    # Columns that no block divides, one column block, one group, groups that are no power of two.
    KernelCase("int4", None, 3, 33, 200),
    KernelCase("int8", None, 2, 5, 40),
    KernelCase("int2", None, 2, 65, 136, "bfloat16"),
    KernelCase("int4", 48, 3, 64, 240),
    KernelCase("int8-asym", 96, 3, 64, 288, "bfloat16"),
    KernelCase("int4", 256, 3, 64, 512),
    KernelCase("int2", 192, 3, 64, 384),
    KernelCase("int4", -1, 3, 64, 256),
    KernelCase("int4-asym", -1, 3, 64, 256),
    # Scales of another dtype than the activations are never rounded to it.
    KernelCase("int4", 64, 3, 64, 256, "float16", "float32"),
    KernelCase("int3", 64, 3, 64, 256, "bfloat16", "float32"),
    KernelCase("int4", 16, 3, 64, 256, "bfloat16", "float16"),
    # Programs that share the work along K, evenly and not.
    *(KernelCase("int4", 128, 5, 130, 1024, config=(*SMALL, False, False, split)) for split in (2, 3, 8)),
    KernelCase("mxfp4", 32, 5, 64, 768, "bfloat16", config=(*SMALL, True, False, 4), bias=True),
    # The tiles of many rows, where the matrix unit adds up by itself.
    KernelCase("int4", 64, 130, 70, 256, config=(128, 64, 128, 8, 3, True, True, 1)),
    KernelCase("nvfp4", 16, 130, 70, 256, "bfloat16", config=(128, 64, 64, 8, 3, True, True, 2)),
    KernelCase("fp4:e2m1", None, 130, 70, 256, config=(128, 64, 128, 8, 3, False, True, 1)),
    KernelCase("int3", 256, 70, 70, 512, "bfloat16", config=(64, 64, 256, 8, 3, True, True, 1)),
    KernelCase("int8", 128, 9, 64, 256, config=(16, 64, 256, 4, 3, True, False, 1)),
    # As before sm_90.
    KernelCase("int4", 128, 5, 70, 512, config=(*SMALL, False, False, 2, True)),
    KernelCase("nvfp4", 16, 9, 64, 256, "bfloat16", config=(*SMALL, True, False, 1, True)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_equal_float64(interpreter: Interpreter, case: KernelCase) -> None:
    result = interpreter.check(case)
    assert result.error < LIMIT
    assert result.worst_row < 2 * LIMIT
    assert result.clean
    assert result.repeatable
    assert result.weights_exact


EXPERTS = [
    *(ExpertCase(fmt, group, 6, 2, 3, 72, 256, d) for fmt, group in FORMATS[3::4] for d in ("float16", "bfloat16")),
    ExpertCase("codebook4:skewed", 64, 6, 2, 3, 40, 256, "float16", "float32"),
    ExpertCase("power4", None, 6, 2, 3, 40, 200, "bfloat16", "bfloat16"),
    ExpertCase("nvfp4", 16, 5, 3, 4, 70, 208),
    *(ExpertCase("int4", 64, 7, 2, 3, 64, 192, chosen=chosen) for chosen in ("one", "none", "each")),
    ExpertCase("int4", 128, 20, 4, 3, 64, 256, block_m=16),
    ExpertCase("int4", 128, 20, 4, 3, 64, 256, block_m=128),
    ExpertCase("mxfp4", 32, 4, 2, 3, 64, 768, split=3),
    ExpertCase("int4-asym", 64, 1, 1, 5, 64, 256),
]


@pytest.mark.parametrize("case", EXPERTS, ids=str)
def test_experts_equal_float64(interpreter: Interpreter, case: ExpertCase) -> None:
    result = interpreter.check(case)
    assert result.error < LIMIT
    assert result.worst_row < 2 * LIMIT
    assert result.clean
    assert result.repeatable
    assert result.weights_exact


def test_no_rows(interpreter: Interpreter) -> None:
    assert interpreter.check(KernelCase("int4", 64, 0, 64, 128)).weights_exact


def test_what_raises_in_the_interpreter_is_reported(interpreter: Interpreter) -> None:
    with pytest.raises(AssertionError, match="UnsupportedError"):
        interpreter.check(KernelCase("fp8", None, 2, 64, 128))
