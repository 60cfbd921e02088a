"""The operators: their fakes, what they compute without a GPU, and how layers and dispatch use them."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional

from compressor.errors import UnsupportedError
from compressor.formats import get_format
from compressor.formats.base import PackedTensor, QuantFormat
from compressor.kernels import dispatch
from compressor.kernels.dispatch import Kernel, Problem
from compressor.kernels.gpu import kernel, ops
from compressor.kernels.gpu.layout import RuntimeWeight
from compressor.kernels.gpu.prepare import prepare
from compressor.runtime.modules import PackedLinear
from compressor.testing.kernels import KernelCase, build_weight

GPU = Problem("linear", "int4", 8, 4096, 4096, 64, torch.bfloat16, "cuda", (9, 0))
TRITON = next(k for k in dispatch.KERNELS if k.name == "triton")


def weight_of(
    name: str = "int4", group: int | None = 64, n: int = 70, k: int = 192
) -> tuple[PackedTensor, QuantFormat, Tensor]:
    return build_weight(KernelCase(name, group, 0, n, k, "bfloat16"), torch.Generator().manual_seed(5))


def inputs(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6)).to(dtype)


def arguments(x: Tensor, w: RuntimeWeight, bias: Tensor | None) -> tuple[object, ...]:
    kinds = (w.grid, *w.shape, w.group, w.scale_kind, w.row_kind)
    return (x, *w.tensors, bias, *kinds, torch.bfloat16, "")


@pytest.mark.parametrize(("name", "group"), [("int4", 64), ("int3-asym", None), ("nvfp4", 16)])
def test_operators_pass_opcheck(name: str, group: int | None) -> None:
    packed, fmt, _ = weight_of(name, group, 8, 64)
    weight = prepare(packed, fmt)
    torch.library.opcheck(ops.packed_linear, arguments(inputs(3, 64), weight, inputs(8)))
    kinds = (weight.grid, *weight.shape, weight.group, weight.scale_kind, weight.row_kind)
    torch.library.opcheck(ops.unpack_weight, (*weight.tensors, *kinds, torch.float16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_a_gpu_they_equal_the_reference(dtype: torch.dtype) -> None:
    packed, fmt, dense = weight_of()
    weight = prepare(packed, fmt)
    x, bias = inputs(2, 3, 192, dtype=dtype), inputs(70)
    expected = functional.linear(x, dense.bfloat16().to(dtype), bias.to(dtype))
    assert torch.equal(ops.linear(x, weight, bias, torch.bfloat16), expected)
    assert torch.equal(ops.dense(weight, torch.float16), dense.half())
    assert ops.linear(inputs(0, 192), weight, None, torch.bfloat16).shape == (0, 70)


def test_fakes_have_shapes_dtypes_and_checks_on_a_device_that_is_not_there() -> None:
    packed, fmt, _ = weight_of()
    weight = prepare(packed, fmt)
    with FakeTensorMode() as mode:
        there = [torch.empty_like(mode.from_tensor(tensor), device="cuda") for tensor in weight.tensors]
        fake = RuntimeWeight(weight.grid, weight.shape, weight.group, weight.scale_kind, weight.row_kind, *there)
        x = torch.empty(2, 5, 192, dtype=torch.float16, device="cuda")
        out = ops.linear(x, fake, None, torch.float16)
        assert (out.shape, out.dtype, out.device.type) == ((2, 5, 70), torch.float16, "cuda")
        assert ops.dense(fake, torch.float32).shape == (70, 192)
        narrow = torch.empty(2, 191, dtype=torch.float16, device="cuda")
        with pytest.raises(RuntimeError, match="191 columns"):
            ops.linear(narrow, fake, None, torch.float16)


def test_compiled_models_see_one_node_and_any_number_of_rows() -> None:
    packed, fmt, _ = weight_of()
    weight = prepare(packed, fmt)

    def double(x: Tensor) -> Tensor:
        return ops.linear(x, weight, None, torch.bfloat16) * 2

    compiled = torch.compile(double, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (2, 5):
        x = inputs(rows, 192)
        assert torch.equal(compiled(x), double(x))


def test_mistakes_are_named() -> None:
    packed, fmt, _ = weight_of()
    weight = prepare(packed, fmt)
    with pytest.raises(UnsupportedError, match="191 columns"):
        ops.linear(inputs(2, 191), weight, None, torch.bfloat16)
    with pytest.raises(UnsupportedError, match="fastest"):
        ops.linear(inputs(2, 192), weight, None, torch.bfloat16, "fastest")


def test_dispatch_picks_triton_on_cuda_and_says_why_not_elsewhere() -> None:
    assert dispatch.pick(GPU) is TRITON
    for format_name, group in (
        ("nvfp4", 16),
        ("mxfp4", 32),
        ("fp4", 0),
        ("int2", 64),
        ("int3-asym", 0),
        ("int8", 4096**2),
        ("power3", 0),
        ("codebook4", 128),
    ):
        assert TRITON.accepts(replace(GPU, format=format_name, group=group)) is None
    reasons = {
        "cpu": replace(GPU, device="cpu"),
        "7.5": replace(GPU, capability=(7, 5)),
        "float64": replace(GPU, dtype=torch.float64),
        "int5": replace(GPU, format="int5"),
        "power5": replace(GPU, format="power5"),
        "groups of 24": replace(GPU, group=24),
        "'conv'": replace(GPU, op="conv"),
    }
    for words, problem in reasons.items():
        assert words in str(dict(dispatch.explain(problem))["triton"])
        assert dispatch.pick(problem).name != "triton"


def test_missing_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_missing", lambda: "needs Triton, which is not installed")
    assert dict(dispatch.explain(GPU))["triton"] == "needs Triton, which is not installed"


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the Triton kernels' operators serve this machine, too: in plain torch."""
    kernels = (Kernel("triton", lambda problem: None, kernel.run, kernel.prepare), dispatch.KERNELS[-1])
    monkeypatch.setattr(dispatch, "KERNELS", kernels)
    dispatch.choose.cache_clear()
    yield
    dispatch.choose.cache_clear()


@pytest.mark.usefixtures("everywhere")
def test_layers_keep_only_the_prepared_weight_and_give_back_the_stored_one() -> None:
    packed, fmt, dense = weight_of()
    bias = inputs(70)
    layer = PackedLinear(packed, fmt, bias, dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = inputs(4, 192)
    expected = functional.linear(x, dense.bfloat16(), bias)
    assert torch.equal(layer(x), expected)
    names = set(dict(layer.named_buffers()))
    assert names == {"runtime_words", "runtime_scale"}
    assert torch.equal(layer.dequantize(), dense.bfloat16())
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(layer.packed.tensors["weight_packed"], packed.tensors["weight_packed"])
    # Moving it keeps it prepared; converting it does not touch its bytes.
    assert torch.equal(layer.to(torch.float32).to(torch.bfloat16)(x), expected)
    assert set(dict(layer.named_buffers())) == names


@pytest.mark.usefixtures("everywhere")
def test_a_model_of_prepared_layers_compiles_in_one_graph() -> None:
    packed, fmt, _ = weight_of()
    layer = PackedLinear(packed, fmt, dtype=torch.bfloat16)
    layer.prepare()
    model = nn.Sequential(layer, nn.ReLU())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = inputs(4, 192)
    assert torch.equal(compiled(x), model(x))


@pytest.mark.usefixtures("everywhere")
def test_layers_can_be_loaded_over_when_prepared() -> None:
    packed, fmt, _ = weight_of()
    layer = PackedLinear(packed, fmt, dtype=torch.bfloat16)
    layer.prepare()
    problem = layer.problem(3)
    assert (problem.m, problem.n, problem.k, problem.group) == (3, 70, 192, 64)
    meta = PackedLinear(packed, fmt, dtype=torch.bfloat16).to("meta")
    assert all(tensor.is_meta for tensor in meta.buffers())


def test_the_reference_keeps_weights_as_they_lie_on_disk() -> None:
    packed, fmt, _ = weight_of()
    layer = PackedLinear(packed, fmt, dtype=torch.float32)
    layer(inputs(2, 192, dtype=torch.float32))
    assert set(dict(layer.named_buffers())) == set(packed.tensors)


def test_unprepared_weights_multiply_too() -> None:
    packed, fmt, dense = weight_of("mxfp4", 32)
    x = inputs(3, 192)
    assert torch.equal(kernel.run(x, packed, fmt, None, torch.bfloat16), functional.linear(x, dense.bfloat16()))
    assert get_format("mxfp4", 32, torch.bfloat16).name == fmt.name
