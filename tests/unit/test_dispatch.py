"""Choosing kernels: order, refusals, the environment variable, and one log line per shape."""

import logging
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from compressor.errors import RecipeError, UnsupportedError
from compressor.formats import BUILDERS, CHANNEL_FIRST, FIXED_GROUP, get_format
from compressor.formats.ints import IntFormat
from compressor.formats.mxfp4 import MXFP4
from compressor.kernels import dispatch
from compressor.kernels.dispatch import Kernel, Problem
from compressor.kernels.reference import linear

PROBLEM = Problem("linear", "int4", 8, 64, 128, 64, torch.float32, "cpu")
REFERENCE = dispatch.KERNELS[-1]
PICKY = Kernel("picky", lambda problem: None if problem.m > 4 else f"m is {problem.m}, needs 5", REFERENCE.run)


def test_the_reference_is_last_and_accepts_everything() -> None:
    assert REFERENCE.name == "reference"
    for op, fmt, device in (("linear", "int4", "cpu"), ("other", "unheard-of", "cuda")):
        assert REFERENCE.accepts(replace(PROBLEM, op=op, format=fmt, device=device)) is None
    assert dispatch.pick(PROBLEM) is dispatch.choose(PROBLEM, dispatch.KERNELS)


def test_the_first_kernel_that_accepts_wins() -> None:
    kernels = (PICKY, REFERENCE)
    assert dispatch.choose(PROBLEM, kernels) is PICKY
    assert dispatch.choose(replace(PROBLEM, m=3), kernels) is REFERENCE


def test_forcing_a_kernel() -> None:
    kernels = (PICKY, REFERENCE)
    assert dispatch.choose(PROBLEM, kernels, "reference") is REFERENCE
    with pytest.raises(UnsupportedError, match="m is 3, needs 5"):
        dispatch.choose(replace(PROBLEM, m=3), kernels, "picky")


def test_the_environment_forces_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_KERNEL", "reference")
    assert dispatch.pick(PROBLEM) is REFERENCE
    monkeypatch.setenv("COMPRESS_KERNEL", "marlin")
    with pytest.raises(RecipeError, match="marlin") as caught:
        dispatch.pick(PROBLEM)
    assert "reference" in caught.value.hint


def test_explain_lists_every_kernel_with_its_reason() -> None:
    assert dispatch.explain(PROBLEM)[-1] == ("reference", None)
    assert len(dispatch.explain(PROBLEM)) == len(dispatch.KERNELS)


def test_the_choice_is_logged_once_per_shape(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "compressor.kernels")
    unseen = replace(PROBLEM, n=4711)
    for m in (1, 2, 3):
        dispatch.pick(replace(unseen, m=m))
    assert [record.getMessage() for record in caplog.records] == [
        "linear int4 [4711, 128] groups of 64 on cpu: reference kernel"
    ]
    dispatch.pick(replace(unseen, n=4712))
    assert len(caplog.records) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fmt", [IntFormat(3, 32, torch.float32), IntFormat(8, None, torch.float32), MXFP4()])
def test_linear_equals_the_decoded_matmul(fmt: IntFormat | MXFP4, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(48, 96, generator=generator)
    qparams = fmt.fit(weight)
    codes = fmt.encode(weight, qparams)
    x = torch.randn(2, 3, 96, generator=generator).to(dtype)
    bias = torch.randn(48, generator=generator).to(dtype)
    out = dispatch.linear(x, fmt.pack(codes, qparams), fmt, bias, dtype)
    assert out.dtype == dtype
    assert torch.equal(out, functional.linear(x, fmt.decode(codes, qparams).to(dtype), bias))


def test_linear_takes_no_rows_and_strided_input() -> None:
    fmt = MXFP4()
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(12))
    qparams = fmt.fit(weight)
    packed = fmt.pack(fmt.encode(weight, qparams), qparams)
    assert dispatch.linear(torch.zeros(0, 64), packed, fmt, None, torch.float32).shape == (0, 32)
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(13)).T
    again = dispatch.linear(x.contiguous(), packed, fmt, None, torch.float32)
    torch.testing.assert_close(dispatch.linear(x, packed, fmt, None, torch.float32), again)


@pytest.mark.parametrize("name", sorted(BUILDERS))
@pytest.mark.parametrize("rows", [1, 3])
def test_the_reference_in_parts_is_the_reference(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = get_format(name, FIXED_GROUP.get(name, None if name in CHANNEL_FIRST else 32), torch.bfloat16)
    weight = torch.randn(300, 160, generator=torch.Generator().manual_seed(21))
    qparams = fmt.fit(weight, fmt.fit_global([weight]))
    packed = fmt.pack(fmt.encode(weight, qparams), qparams)
    x = torch.randn(rows, 1, 160, generator=torch.Generator().manual_seed(22))
    bias = torch.randn(300, generator=torch.Generator().manual_seed(23))
    whole = linear.dequantize(packed, fmt, torch.float32), linear.packed_linear(x, packed, fmt, bias, torch.bfloat16)
    assert torch.equal(whole[0], fmt.decode(*fmt.unpack(packed)))
    monkeypatch.setattr(linear, "AT_ONCE", 160 * 128)
    monkeypatch.setattr(linear, "FEW_ROWS", 2)
    sizes = [part.shape[0] for _, part in linear._parts(packed, fmt)]
    assert sizes == [128, 128, 44]
    assert torch.equal(linear.dequantize(packed, fmt, torch.float32), whole[0])
    torch.testing.assert_close(linear.packed_linear(x, packed, fmt, bias, torch.bfloat16), whole[1])


def test_problems_describe_shape_group_and_device() -> None:
    fmt = IntFormat(4, None, torch.float32)
    weight = torch.ones(32, 64)
    qparams = fmt.fit(weight)
    packed = fmt.pack(fmt.encode(weight, qparams), qparams)
    problem = dispatch.linear_problem(packed, fmt, 7, torch.bfloat16, torch.device("cpu"))
    assert problem == Problem("linear", "int4", 7, 32, 64, 0, torch.bfloat16, "cpu", (0, 0), torch.float32)


def test_one_scale_per_matrix_is_no_group_size_a_kernel_could_take_for_another() -> None:
    fmt = IntFormat(4, None, torch.float32, symmetric=False, per_tensor=True)
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(3))
    qparams = fmt.fit(weight)
    packed = fmt.pack(fmt.encode(weight, qparams), qparams)
    problem = dispatch.linear_problem(packed, fmt, 7, torch.bfloat16, torch.device("cpu"))
    assert problem == Problem("linear", "int4-asym", 7, 32, 64, 32 * 64, torch.bfloat16, "cpu", (0, 0), torch.float32)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    expected = functional.linear(x, fmt.decode(fmt.encode(weight, qparams), qparams))
    assert torch.equal(dispatch.linear(x, packed, fmt, None, torch.float32), expected)
