"""Products of 8-bit floats: the operator, what dispatch gives it, and layers that use it."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from compressor.errors import UnsupportedError
from compressor.formats import get_format
from compressor.formats.activations import INPUT_FORMATS
from compressor.formats.base import PackedTensor, QuantFormat
from compressor.inputs import Quantize, Shift
from compressor.kernels import dispatch
from compressor.kernels.dispatch import Kernel, Problem
from compressor.kernels.gpu import fp8, int_kernel
from compressor.kernels.gpu.rounding import codes_of
from compressor.runtime.modules import PackedLinear

GPU = Problem("linear", "fp8", 8, 4096, 4096, 0, torch.bfloat16, "cuda", (9, 0), rounds="fp8")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def packed_of(name: str, n: int = 32, k: int = 64) -> tuple[PackedTensor, QuantFormat, Tensor]:
    fmt = get_format(name, None, torch.bfloat16)
    w = torch.randn(n, k, generator=generator(1)) * torch.linspace(0.01, 2, n)[:, None]
    q = fmt.fit(w)
    codes = fmt.encode(w, q)
    return fmt.pack(codes, q), fmt, fmt.decode(codes, q)


def quantizer(name: str) -> Quantize:
    fmt = INPUT_FORMATS[name]
    return Quantize(fmt, torch.tensor([0.01]).bfloat16() if fmt.static else None)


@pytest.mark.parametrize(
    ("weight", "inputs"), [("fp8", "fp8-token"), ("fp8-tensor", "fp8-tensor"), ("fp8", "fp8-tensor")]
)
def test_products_equal_the_simulation(weight: str, inputs: str) -> None:
    packed, fmt, dense = packed_of(weight)
    op = quantizer(inputs)
    layer = fp8.prepare(packed, fmt, (op,))
    x, bias = torch.randn(5, 64, generator=generator(2)), torch.randn(32, generator=generator(3))
    expected = op.apply(x).double() @ dense.double().T
    found = layer.linear(x.view(5, 1, 64), bias, torch.bfloat16)
    assert found.shape == (5, 1, 32)
    assert (found[:, 0] - expected - bias).norm() / expected.norm() < 1e-6
    # What CUDA devices run after rounding; CPUs have the operator, too.
    codes, scale, _ = codes_of(x, layer.rounding)
    product = fp8.scaled_product(codes, scale, layer.weight, layer.scale, bias).double()
    assert (product - expected - bias).norm() / expected.norm() < 4e-3
    assert fp8.scaled_product(codes[:0], scale[:0], layer.weight, layer.scale, None).shape == (0, 32)
    assert torch.equal(layer.dequantize(torch.float32), dense)
    assert layer.restore() is packed


def test_the_operator_passes_opcheck_and_has_a_fake() -> None:
    packed, fmt, _ = packed_of("fp8")
    layer = fp8.prepare(packed, fmt, (quantizer("fp8-token"),))
    x = torch.randn(3, 64, generator=generator()).bfloat16()
    torch.library.opcheck(
        fp8.fp8_linear, (x, layer.weight.view(torch.uint8), layer.scale, None, *layer.rounding.tensors, None, 1.0)
    )
    with FakeTensorMode():
        there = (torch.empty(32, 64, dtype=torch.uint8, device="cuda"), torch.empty(32, device="cuda"))
        rest = [torch.empty(0, device="cuda")] * 4
        out = fp8.fp8_linear(torch.empty(2, 3, 64, device="cuda").bfloat16(), *there, None, *rest, None, 1.0)
        assert (out.shape, out.dtype, out.device.type) == ((2, 3, 32), torch.bfloat16, "cuda")
    with pytest.raises(UnsupportedError, match="63 columns"):
        layer.linear(x[:, :63], None, torch.bfloat16)


def test_dispatch_picks_it_only_where_both_sides_are_8_bit_floats() -> None:
    assert dispatch.pick(GPU).name == "torch-fp8"
    assert dispatch.pick(replace(GPU, format="fp8-tensor")).name == "torch-fp8"
    reasons = {
        "not rounded to any": replace(GPU, rounds="int"),
        "8.9": replace(GPU, capability=(8, 9)),
        "not on cpu": replace(GPU, device="cpu"),
        "float16": replace(GPU, dtype=torch.float16),
        "fp8-block": replace(GPU, format="fp8-block"),
        "multiples of 16": replace(GPU, k=4104),
    }
    for words, problem in reasons.items():
        assert words in str(dict(dispatch.explain(problem))["torch-fp8"])
        assert dispatch.pick(problem).name != "torch-fp8"


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the operator serve this machine, too: in plain torch."""

    def accepts(problem: Problem) -> str | None:
        return None if problem.rounds == "fp8" else "not rounded"

    first = Kernel("torch-fp8", accepts, int_kernel.run, prepare_rounded=fp8.prepare)
    monkeypatch.setattr(dispatch, "KERNELS", (first, dispatch.KERNELS[-1]))
    dispatch.choose.cache_clear()
    yield
    dispatch.choose.cache_clear()


@pytest.mark.usefixtures("everywhere")
def test_layers_round_their_inputs_once_and_give_back_the_stored_weight() -> None:
    packed, fmt, dense = packed_of("fp8")
    ops = (Shift(torch.full((64,), 0.25)), quantizer("fp8-token"))
    layer = PackedLinear(packed, fmt, None, ops)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(4, 64, generator=generator(4))
    expected = ops[1].apply(x - 0.25) @ dense.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(layer.prepared, fp8.Fp8Linear)
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name].float(), tensor.float()) for name, tensor in before.items())
    torch.testing.assert_close(layer.to(torch.float32)(x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UnsupportedError, match="prepared"):
        int_kernel.run(x, packed, fmt, None, torch.float32)
