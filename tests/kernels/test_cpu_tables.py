"""Weights whose codes index a table, multiplied on a CPU as they lie on disk: bit-equal to the reference."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from compressor.errors import CheckpointError
from compressor.formats import get_format
from compressor.formats.base import PackedTensor, QuantFormat
from compressor.formats.codebook import Codebook
from compressor.kernels import dispatch
from compressor.kernels.cpu import table
from compressor.kernels.dispatch import Problem
from compressor.kernels.reference.linear import dequantize, packed_linear
from compressor.runtime import PackedLinear, execution_path, load
from compressor.testing.checkpoints import write_compressed
from compressor.testing.models import sample_tokens, tiny_llama

BF16 = torch.bfloat16
PROBLEM = Problem("linear", "nvfp4", 1, 128, 256, 16, BF16, "cpu")
FORMATS: dict[str, QuantFormat] = {
    "nvfp4": get_format("nvfp4", 16, BF16),
    "mxfp4": get_format("mxfp4", 32, BF16),
    "fp4": get_format("fp4", None, BF16),
    "power4-group": get_format("power4", 32, BF16),
    "power4-matrix": get_format("power4", "tensor", BF16),
    "codebook3": Codebook(3, 32),
    "codebook4": Codebook(4, None, tuple(float(v) ** 3 for v in range(-7, 9))),
}


def weight(fmt: QuantFormat, shape: tuple[int, int], seed: int) -> tuple[PackedTensor, Tensor]:
    """Return a packed weight of random codes, and what it decodes to."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator) * torch.linspace(0.01, 2, shape[0])[:, None]
    q = fmt.fit(w)
    codes = torch.randint(0, 1 << fmt.bits, shape, generator=generator, dtype=torch.uint8)
    return fmt.pack(codes, q), fmt.decode(codes, q)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("at_once", [table.AT_ONCE, 3000])  # one part, and several that rows do not divide
def test_weights_are_bit_equal_to_the_reference(
    fmt: QuantFormat, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "AT_ONCE", at_once)
    packed, dense = weight(fmt, (70, 192), seed=1)
    prepared = table.prepare(packed, fmt)
    assert torch.equal(prepared.dequantize(torch.float32), dense)
    for dtype in (BF16, torch.float16):
        assert torch.equal(prepared.dequantize(dtype), dequantize(packed, fmt, dtype))
    assert prepared.restore() is packed


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("m", [1, 5, 100])
def test_products_against_float64(fmt: QuantFormat, m: int) -> None:
    packed, dense = weight(fmt, (70, 192), seed=2)
    generator = torch.Generator().manual_seed(m)
    x, bias = torch.randn(m, 192, generator=generator), torch.randn(70, generator=generator)
    expected = x.double() @ dense.double().T + bias.double()
    y = table.run(x, packed, fmt, bias, torch.float32)
    assert (y - expected).norm() / expected.norm() < 1e-6
    x = x.bfloat16()
    y = table.run(x, packed, fmt, bias, BF16)
    assert y.dtype == BF16
    torch.testing.assert_close(y, packed_linear(x, packed, fmt, bias, BF16), rtol=1e-2, atol=1e-2)


def test_shapes_of_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "AT_ONCE", 3000)
    packed, dense = weight(FORMATS["nvfp4"], (300, 192), seed=3)
    x = torch.randn(192, 2, 3, generator=torch.Generator().manual_seed(4)).permute(1, 2, 0)
    prepared = table.prepare(packed, FORMATS["nvfp4"])
    torch.testing.assert_close(prepared.linear(x, None, torch.float32), x @ dense.T, rtol=1e-4, atol=1e-3)
    assert prepared.linear(x[:0], None, torch.float32).shape == (0, 3, 300)


def test_dispatch_says_who_reads_tables() -> None:
    assert dispatch.choose(PROBLEM, dispatch.KERNELS).name == "cpu-table"
    for m, dtype in ((512, BF16), (1, torch.float32)):
        assert dispatch.choose(replace(PROBLEM, m=m, dtype=dtype), dispatch.KERNELS).name == "cpu-table"
    for change, why in (
        ({"format": "mxfp8"}, "which mxfp8 is not made of"),
        ({"device": "cuda"}, "not on cuda"),
        ({"op": "conv"}, "no 'conv'"),
        ({"format": "codebook4", "k": 33}, "in pairs, not 33"),
    ):
        problem = replace(PROBLEM, **change)  # type: ignore[arg-type]
        assert why in str(dict(dispatch.explain(problem))["cpu-table"])
        assert dispatch.choose(problem, dispatch.KERNELS[1:]).name == "reference"


def test_damaged_tables_are_refused() -> None:
    fmt = FORMATS["fp4"]
    packed, _ = weight(fmt, (16, 32), seed=5)
    broken = {**packed.tensors, "weight_codebook": torch.full((16,), torch.nan)}
    with pytest.raises(CheckpointError, match="weight_codebook"):
        table.prepare(replace(packed, tensors=broken), fmt)
    with pytest.raises(CheckpointError):
        table.prepare(replace(packed, tensors={**packed.tensors, "weight_scale": torch.ones(3, 1)}), fmt)


def test_the_operator_passes_opcheck() -> None:
    packed, _ = weight(FORMATS["nvfp4"], (8, 32), seed=6)
    prepared = table.prepare(packed, FORMATS["nvfp4"])
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(7)).bfloat16()
    torch.library.opcheck(table.table_linear, (x, *prepared._stored, x.new_ones(8), 8, 32, BF16))


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_a_model_generates_compiles_and_keeps_its_bytes(name: str, tmp_path: Path) -> None:
    model = tiny_llama(8, kv_heads=2).to(BF16)
    write_compressed(model, tmp_path, FORMATS[name])
    packed = load(tmp_path, dtype=BF16)
    assert execution_path(packed).startswith("cpu-table-bfloat16")
    tokens = sample_tokens(model, seed=9)[:1, :6]
    out = packed.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape[1] > tokens.shape[1]
    layer = next(module for module in packed.modules() if isinstance(module, PackedLinear))
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    assert torch.equal(layer(x), functional.linear(x, layer.dequantize()))
    stored = layer.packed
    size = sum(tensor.nbytes for tensor in layer.buffers())
    assert size == stored.nbytes
    assert set(stored.tensors) <= set(layer.state_dict())
