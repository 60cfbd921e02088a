"""The integer kernels, run by Triton's interpreter: codes equal the reference's, products are exact."""

import pytest

from compressor.testing.int_kernels import IntCase
from compressor.testing.kernels import Interpreter

SMALL = (16, 64, 128, 4, 3)
INPUTS = ("int8-token", "int8-token-asym", "int8-tensor", "int6-token", "int4-token-asym")
CASES = [
    *(IntCase("int8-bytes", None, inputs, 5, 72, 200) for inputs in INPUTS),
    *(IntCase("int4", group, inputs, 5, 72, 384) for group in (None, 64, 128, 192) for inputs in INPUTS[:2]),
    *(IntCase("int8", group, "int8-token-asym", 5, 40, 384) for group in (64, 128)),
    *(IntCase("int8-bytes", None, "int8-token", m, 70, 128, "bfloat16", bias=m % 2 == 1) for m in (1, 2, 16, 17, 65)),
    IntCase("int6", None, "int6-tensor", 3, 33, 136),
    IntCase("int6", -1, "int6-token", 3, 33, 136),
    IntCase("int5", None, "int7-token-asym", 3, 5, 40, "float32"),
    *(IntCase("int8-bytes", None, i, 4, 40, 144, d, treated=True) for i in INPUTS[:3] for d in ("float16", "float32")),
    *(IntCase("int8-bytes", None, "int8-token", 4, 40, 144, x=x) for x in ("outliers", "zeros", "nan")),
    IntCase("int8-bytes", None, "int8-token-asym", 4, 40, 144, x="nan"),
    # LLM-FP4's small floats as integers, with and without powers of two per channel.
    *(IntCase("fp4", None, f"fpq4:{m}", 5, 40, 144, treated=shifted) for m in (1, 2) for shifted in (False, True)),
    *(IntCase("int8-bytes", None, inputs, 5, 40, 144, "bfloat16") for inputs in ("fpq4:0", "fpq6:3", "fpq6:4")),
    IntCase("fp4", None, "fpq4:1", 6, 40, 256, "float32", treated=True, bias=True),
    *(IntCase("fp4", None, "fpq4:1", 4, 40, 144, treated=True, x=x) for x in ("outliers", "zeros", "nan")),
    # Programs that share the work along K, evenly and not.
    *(IntCase("int8-bytes", None, "int8-token-asym", 5, 130, 1024, tile=SMALL, split=s, bias=True) for s in (2, 3, 8)),
    *(IntCase("int4", group, "int8-token-asym", 5, 64, 1024, tile=SMALL, split=3) for group in (None, 64, 128)),
    # The tiles of many rows, and long steps.
    IntCase("int8-bytes", None, "int8-token", 130, 70, 256),
    IntCase("int4", None, "int8-token", 130, 70, 256),
    IntCase("int4", None, "int8-token", 5, 128, 512, tile=(16, 128, 256, 4, 3), split=1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_equal_exact_products(interpreter: Interpreter, case: IntCase) -> None:
    result = interpreter.check(case)
    assert result.weights_exact  # codes, scales and zero points of inputs
    assert result.error < 1e-6
    assert result.worst_row < 1e-6
    assert result.clean
    assert result.repeatable


ROTATED = [
    *(IntCase("int8-bytes", None, inputs, 5, 40, 256, rotated=128) for inputs in INPUTS[:3]),
    IntCase("int4", None, "int4-token-asym", 17, 24, 384, treated=True, rotated=128),
    IntCase("int8-bytes", None, "int8-token-asym", 3, 24, 192, treated=True, rotated=64, bias=True),
    IntCase("int8-bytes", None, "int8-token", 3, 24, 144, rotated=16, x="outliers"),
    IntCase("int8-bytes", None, "int8-token-asym", 3, 24, 128, rotated=128),  # one program per tile
    IntCase("int8-bytes", None, "int8-token", 3, 24, 128, "float32", treated=True, rotated=32),
    IntCase("int8-bytes", None, "int8-token-asym", 4, 24, 128, x="nan", rotated=32),
    IntCase("int8-bytes", None, "int8-token", 4, 24, 128, x="zeros", rotated=32),
]


@pytest.mark.parametrize("case", ROTATED, ids=str)
def test_rotations_run_in_the_kernel_that_rounds(interpreter: Interpreter, case: IntCase) -> None:
    result = interpreter.check(case)
    assert result.weights_exact  # codes, scales and zero points of inputs, but for rounding boundaries
    assert result.error < 1e-6
    assert result.worst_row < 1e-6
    assert result.clean
    assert result.repeatable


FLOATS = [
    *(
        IntCase("fp8", None, "fp8-token", 5, 48, 208, dtype, x=x)
        for dtype in ("float16", "bfloat16", "float32")
        for x in ("normal", "outliers")
    ),
    IntCase("fp8-tensor", None, "fp8-tensor", 5, 48, 208),
    IntCase("fp8", None, "fp8-token", 4, 16, 64, "float16", treated=True),
    *(IntCase("fp8", None, "fp8-token", 4, 16, 64, x=x) for x in ("zeros", "nan")),
    IntCase("fp8", None, "fp8-token", 5, 16, 128, treated=True, rotated=64),
]


@pytest.mark.parametrize("case", FLOATS, ids=str)
def test_inputs_become_the_floats_of_the_reference(interpreter: Interpreter, case: IntCase) -> None:
    result = interpreter.check(case)
    assert result.weights_exact  # codes and scales of inputs
    assert result.error < 4e-3
    assert result.clean
    assert result.repeatable


def test_no_rows(interpreter: Interpreter) -> None:
    assert interpreter.check(IntCase("int8-bytes", None, "int8-token", 0, 8, 128)).weights_exact
