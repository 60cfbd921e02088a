"""LLM-FP4's 4-bit floats as whole numbers on the CPU: exact, restored, and multiplied with one scale per output."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compressor.errors import CheckpointError, UnsupportedError
from compressor.formats import get_format
from compressor.formats.base import PackedTensor
from compressor.formats.float4 import SPLITS, Float4
from compressor.kernels import dispatch
from compressor.kernels.cpu import numbers, table
from compressor.kernels.cpu.numbers import NumbersWeight
from compressor.kernels.cpu.table import TableWeight
from compressor.kernels.dispatch import Problem
from compressor.kernels.reference.linear import dequantize, packed_linear
from compressor.runtime import PackedLinear

BF16 = torch.bfloat16
PROBLEM = Problem("linear", "fp4", 1, 128, 256, 0, BF16, "cpu")

pytestmark = pytest.mark.skipif(
    numbers.accepts(PROBLEM) is not None, reason=f"the operator is not fast here: {numbers.accepts(PROBLEM)}"
)


def weight(split: str, shape: tuple[int, int], seed: int) -> tuple[PackedTensor, Float4, Tensor]:
    """Return a packed weight of every code but -0, its format, and what it decodes to."""
    generator = torch.Generator().manual_seed(seed)
    fmt = get_format("fp4", None, BF16)
    assert isinstance(fmt, Float4)
    w = torch.randn(shape, generator=generator) * torch.linspace(0.01, 2, shape[0])[:, None]
    q = fmt.fit_table(w, SPLITS[split])
    codes = torch.randint(0, 15, shape, generator=generator, dtype=torch.uint8)
    codes[codes == 8] = 15
    return fmt.pack(codes, q), fmt, fmt.decode(codes, q)


@pytest.mark.parametrize("shape", [(1, 2), (70, 192), (33, 1001)])
@pytest.mark.parametrize("split", SPLITS)
def test_weights_decode_and_restore_exactly(
    split: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "AT_ONCE", 3000)
    packed, fmt, dense = weight(split, shape, seed=1)
    prepared = numbers.prepare(packed, fmt)
    assert isinstance(prepared, NumbersWeight)
    assert torch.equal(prepared.dequantize(torch.float32), dense)
    assert torch.equal(prepared.dequantize(BF16), dequantize(packed, fmt, BF16))
    back = prepared.restore()
    assert back.tensors.keys() == packed.tensors.keys()
    for suffix, tensor in packed.tensors.items():
        assert torch.equal(back.tensors[suffix], tensor), suffix
        assert back.tensors[suffix].dtype == tensor.dtype
    assert sum(tensor.nbytes for tensor in prepared.tensors.values()) == shape[0] * (shape[1] + 6) + 64


@pytest.mark.parametrize("shape", [(1, 2), (70, 192), (33, 1001)])
@pytest.mark.parametrize("split", SPLITS)
def test_products_against_float64(split: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "PART", 3000)
    n, k = shape
    packed, fmt, dense = weight(split, shape, seed=2)
    prepared = numbers.prepare(packed, fmt)
    generator = torch.Generator().manual_seed(3)
    bias = torch.randn(n, generator=generator).bfloat16()
    for m in (0, 1, 3, 20, 21, 130):
        x = torch.randn(m, k, generator=generator).bfloat16()
        product = x.double() @ dense.double().T
        found = prepared.linear(x.view(m, 1, k), bias, BF16)
        assert found.shape == (m, 1, n)
        assert found.dtype == BF16
        # Sums are rounded, and what scales and biases make of them.
        size = x.double().abs() @ dense.double().abs().T
        allowed = 2**-8 * (product.abs() * 1.01 + (product + bias.double()).abs()) + 1e-6 * size
        assert ((found[:, 0].double() - product - bias.double()).abs() <= allowed).all()
        if m > 20:
            reference = packed_linear(x, packed, fmt, None, BF16).double()
            ours = prepared.linear(x, None, BF16).double()
            assert (ours - product).norm() < 1.2 * (reference - product).norm()
        wide = prepared.linear(x.float(), bias, torch.float32)
        torch.testing.assert_close(wide.double(), product + bias.double(), rtol=1e-5, atol=1e-4)


def test_the_sign_of_zeros_is_kept() -> None:
    """A weight of other programs, which may store -0: numbers would lose it."""
    packed, fmt, _ = weight("e2m1", (8, 32), seed=4)
    codes, q = fmt.unpack(packed)
    codes[3, 5] = 8
    signed = fmt.pack(codes, q)
    prepared = numbers.prepare(signed, fmt)
    assert isinstance(prepared, TableWeight)
    assert prepared.restore() is signed


def test_what_is_no_such_weight_is_refused() -> None:
    packed, fmt, _ = weight("e2m1", (8, 32), seed=5)
    with pytest.raises(CheckpointError, match="weight_codebook"):
        numbers.prepare(replace(packed, tensors={**packed.tensors, "weight_codebook": torch.full((16,), 0.3)}), fmt)
    with pytest.raises(UnsupportedError, match="nvfp4 is not made of whole numbers"):
        numbers.prepare(packed, get_format("nvfp4", 16, BF16))


def test_dispatch_takes_numbers_for_bfloat16_models_only() -> None:
    for m in (1, 512):
        assert dispatch.pick(replace(PROBLEM, m=m)).name == "cpu-numbers"
    reasons = {
        "not float32": replace(PROBLEM, dtype=torch.float32),
        "nvfp4 is not made of": replace(PROBLEM, format="nvfp4", group=16),
        "not on cuda": replace(PROBLEM, device="cuda", capability=(9, 0)),
        "does no 'conv'": replace(PROBLEM, op="conv"),
    }
    for words, problem in reasons.items():
        assert words in str(dict(dispatch.explain(problem))["cpu-numbers"])
        assert dispatch.pick(problem).name != "cpu-numbers"


def test_layers_use_them_compile_and_give_back_their_bytes() -> None:
    packed, fmt, dense = weight("e3m0", (48, 64), seed=6)
    bias = torch.randn(48, generator=torch.Generator().manual_seed(7))
    layer = PackedLinear(packed, fmt, bias.bfloat16(), dtype=BF16)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (3, 50):
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)).bfloat16()
        expected = x.double() @ dense.double().T + bias.bfloat16().double()
        out = layer(x)
        assert (out.double() - expected).norm() / expected.norm() < 4e-3
        assert torch.equal(compiled(x), out)
    assert isinstance(layer.prepared, NumbersWeight)
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    exact = PackedLinear(packed, fmt, None, dtype=torch.float32)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(8))
    assert torch.equal(exact(x), torch.nn.functional.linear(x, dense))
    assert isinstance(exact.prepared, TableWeight)
