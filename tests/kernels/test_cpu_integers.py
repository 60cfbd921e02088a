"""Integers times integers on the CPU: codes, products, what dispatch takes, layers, and a whole model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import compressor
import compressor.verify
from compressor.check import check
from compressor.errors import UnsupportedError
from compressor.formats import get_format
from compressor.formats.activations import INPUT_FORMATS
from compressor.formats.base import PackedTensor, QuantFormat
from compressor.inputs import InputOp, Permute, Quantize, Rotate, Scale, Shift, apply_ops
from compressor.kernels import dispatch
from compressor.kernels.cpu import integers
from compressor.kernels.cpu.integers import IntegerLinear, prepare, quantize
from compressor.kernels.dispatch import Problem
from compressor.kernels.gpu.rounding import Rounding, codes_of, fused
from compressor.runtime import PackedLinear, execution_path
from compressor.testing.grids import mirrored
from compressor.testing.models import tiny_llama
from compressor.testing.tools import save_checkpoint, write_text

CPU = torch.device("cpu")
BF16 = torch.bfloat16
PROBLEM = Problem("linear", "int8-bytes", 8, 96, 200, 0, BF16, "cpu", rounds="int")
INPUTS = [name for name in INPUT_FORMATS if name.startswith("int")]

pytestmark = pytest.mark.skipif(
    integers.accepts(PROBLEM) is not None, reason=f"bytes are not multiplied here: {integers.accepts(PROBLEM)}"
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight(name: str, group: str | None, n: int, k: int, seed: int = 1) -> tuple[PackedTensor, QuantFormat, Tensor]:
    """Return a packed weight of every code there is, its format, and what it decodes to."""
    fmt = get_format(name, group, BF16)  # type: ignore[arg-type]
    q = mirrored(fmt, fmt.fit(torch.randn(n, k, generator=generator(seed)) * torch.linspace(0.01, 2, n)[:, None]))
    codes = torch.randint(0, 1 << fmt.bits, (n, k), generator=generator(seed), dtype=torch.uint8)
    return fmt.pack(codes, q), fmt, fmt.decode(codes, q)


def quantizer(name: str, clip: float = 1.0) -> Quantize:
    fmt = INPUT_FORMATS[name]
    return Quantize(fmt, torch.tensor([0.37]).bfloat16() if fmt.static else None, 1.0 if fmt.static else clip)


def activations(m: int, k: int, dtype: torch.dtype = BF16, seed: int = 2) -> Tensor:
    x = torch.randn(m, k, generator=generator(seed)) + 0.5
    x[:, ::9] *= 40
    return x.to(dtype)


def exact(x: Tensor, end: Rounding, dense: Tensor) -> Tensor:
    """Return the product with the rounded inputs in float64, where it loses nothing."""
    codes, steps, zero = codes_of(x, end)
    return (codes.double() - zero[:, None]) * steps.double()[:, None] @ dense.double().T


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", INPUTS)
def test_codes_are_those_of_the_definition(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    k = 45
    monkeypatch.setattr(integers, "IN_CACHE", 4 * k + 3)
    ops: tuple[InputOp, ...] = (
        Permute(torch.randperm(k, generator=generator(3))),
        Shift(torch.randn(k, generator=generator(4))),
        Scale(torch.rand(k, generator=generator(5)) + 0.2),
        quantizer(name, clip=0.9),
    )
    for m in (1, 4, 11):
        for steps in (ops, ops[1:], ops[3:]):
            before, end = fused(steps, CPU)
            assert before == ()
            x = activations(m, k, dtype, seed=m)
            x[m // 2] = 0
            codes, scale, zero = quantize(x, end)
            expected = codes_of(x, end)
            assert torch.equal(codes, expected[0])
            assert torch.equal(scale[:, 0], expected[1])
            assert zero.numel() == (0 if end.symmetric else m)
            assert torch.equal(zero.flatten().int(), expected[2][: zero.numel()])
            simulated = ((codes - (zero if zero.numel() else 0.0)) * scale).to(dtype)
            assert torch.equal(simulated, apply_ops(steps, x))


@pytest.mark.parametrize("few", [0, 8])
@pytest.mark.parametrize("name", INPUTS)
def test_rows_that_are_not_finite_harm_no_other(name: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, fmt, _ = weight("int8-bytes", None, 6, 32)
    layer = prepare(packed, fmt, (quantizer(name),))
    monkeypatch.setattr(integers, "FEW_ROWS", few)
    x = activations(5, 32)
    clean = layer.linear(x, None, BF16)
    x[1, 5], x[3, 0] = torch.nan, torch.inf
    out = layer.linear(x, None, BF16)
    assert out[1].isnan().all()
    assert out[3].isnan().all() or INPUT_FORMATS[name].static  # a stored scale cuts Inf off
    assert torch.equal(out[::2], clean[::2])


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (33, 17), (96, 200), (70, 1025)])
@pytest.mark.parametrize(
    ("name", "group", "inputs"),
    [
        ("int8-bytes", None, "int8-token"),
        ("int8-bytes", "tensor", "int8-tensor"),
        ("int8", None, "int8-token-asym"),
        ("int6", "tensor", "int6-token-asym"),
        ("int5", None, "int4-tensor"),
        ("int7", None, "int5-token"),
    ],
)
def test_products_against_float64(
    name: str, group: str | None, inputs: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rounding to 16 bits, and those of scales in float32, are all that is lost."""
    monkeypatch.setattr(integers, "FEW_ROWS", 0)
    monkeypatch.setattr(integers, "ROWS_AT_ONCE", 50)
    monkeypatch.setattr(integers, "IN_CACHE", 1500)
    n, k = shape
    packed, fmt, dense = weight(name, group, n, k, seed=n)
    layer = prepare(packed, fmt, (quantizer(inputs),))
    bias = torch.randn(n, generator=generator(6)).bfloat16()
    for m in (0, 1, 2, 5, 16, 17, 130):
        x = activations(m, k, seed=m)
        expected = exact(x, layer.rounding, dense)
        found = layer.linear(x.view(m, 1, k), bias, BF16)
        assert found.shape == (m, 1, n)
        product = expected.abs()
        torch.testing.assert_close(layer.linear(x, None, BF16).double(), expected, rtol=2**-8, atol=0)
        allowed = 2**-8 * (expected + bias.double()).abs() + 1e-6 * (product + bias.double().abs())
        assert ((found[:, 0].double() - expected - bias.double()).abs() <= allowed).all()


@pytest.mark.parametrize("inputs", ["int8-token", "int8-tensor", "int6-token-asym"])
def test_few_rows_are_the_simulation_on_the_same_bytes(inputs: str) -> None:
    op, bias = quantizer(inputs), torch.randn(24, generator=generator(6)).bfloat16()
    for name, k in (("int8-bytes", 64), ("int6", 48)):
        packed, fmt, dense = weight(name, None, 24, k)
        layer = prepare(packed, fmt, (op,))
        x = activations(integers.FEW_ROWS, k).view(2, -1, k)
        expected = op.apply(x).double() @ dense.double().T + bias.double()
        found = layer.linear(x, bias, BF16)
        assert found.shape == expected.shape
        assert (found.double() - expected).norm() / expected.norm() < 4e-3
        assert layer._takes_few(BF16)
        assert not layer._takes_few(torch.float16)
    assert not prepare(*weight("int8", None, 24, 40)[:2], (op,))._takes_few(BF16)  # it would read past the end


@pytest.mark.parametrize("k", [65536, 513])
def test_the_largest_sums_are_exact(k: int) -> None:
    """Nothing saturates, which happens to bytes on processors without instructions for them."""
    fmt = get_format("int8-bytes", None, BF16)
    codes = torch.tensor([[0], [255], [0]], dtype=torch.uint8).repeat(1, k)  # -128, 127, -128
    codes[2, ::2] = 255
    packed = fmt.pack(codes, fmt.fit(torch.ones(3, k)))
    op = quantizer("int8-token-asym")
    layer = prepare(packed, fmt, (op,))
    x = torch.ones(20, k, dtype=BF16)
    x[:, ::2] = -3.0
    x[10:] *= -1
    expected = exact(x, layer.rounding, fmt.decode(*fmt.unpack(packed)))
    torch.testing.assert_close(layer.linear(x, None, BF16).double(), expected, rtol=2**-8, atol=1e-5 * k)


@pytest.mark.parametrize(
    ("name", "group"), [("int8-bytes", None), ("int8-bytes", "tensor"), ("int8", None), ("int6", "tensor")]
)
def test_weights_decode_and_restore_exactly(name: str, group: str | None) -> None:
    packed, fmt, dense = weight(name, group, 37, 130)
    layer = prepare(packed, fmt, (quantizer("int8-token"),))
    assert torch.equal(layer.dequantize(torch.float32), dense)
    assert set(layer.tensors) == {"runtime_numbers", "runtime_scale"}
    assert layer.tensors["runtime_numbers"].nbytes == 37 * 130
    back = layer.restore()
    assert back.tensors.keys() == packed.tensors.keys()
    for suffix, tensor in packed.tensors.items():
        assert torch.equal(back.tensors[suffix], tensor), suffix
        assert back.tensors[suffix].dtype == tensor.dtype


def test_formats_it_cannot_multiply_are_refused() -> None:
    for name, group in (("int8-asym", None), ("int8", 32)):
        fmt = get_format(name, group, BF16)
        w = torch.randn(4, 64, generator=generator(1))
        packed = fmt.pack(fmt.encode(w, fmt.fit(w)), fmt.fit(w))
        with pytest.raises(UnsupportedError, match=f"{name}: no symmetric integers"):
            prepare(packed, fmt, (quantizer("int8-token"),))
    packed, fmt, _ = weight("int8-bytes", None, 4, 8)
    with pytest.raises(UnsupportedError, match="must be prepared"):
        integers.run(activations(1, 8), packed, fmt, None, BF16)
    with pytest.raises(UnsupportedError, match="9 columns for a weight of 8"):
        prepare(packed, fmt, (quantizer("int8-token"),)).linear(activations(1, 9), None, BF16)


def test_dispatch_takes_integers_only_where_both_sides_are_integers() -> None:
    for problem in (
        PROBLEM,
        replace(PROBLEM, m=1),
        replace(PROBLEM, m=5000),
        replace(PROBLEM, format="int6"),
        replace(PROBLEM, format="int8", group=200),
        replace(PROBLEM, format="int8", group=96 * 200),
        replace(PROBLEM, dtype=torch.float16),
    ):
        assert dispatch.pick(problem).name == "cpu-int"
    reasons = {
        "not rounded": replace(PROBLEM, rounds=""),
        "inputs are not rounded to any": replace(PROBLEM, rounds="fp8"),
        "int8-asym is no symmetric": replace(PROBLEM, format="int8-asym"),
        "int4 is no symmetric grid of 5 to 8": replace(PROBLEM, format="int4"),
        "not per 64 inputs": replace(PROBLEM, format="int8", group=64),
        "overflow": replace(PROBLEM, k=1 << 17),
        "not on cuda": replace(PROBLEM, device="cuda", capability=(9, 0)),
        "does no 'embedding'": replace(PROBLEM, op="embedding"),
        "float32 models keep the exact simulation": replace(PROBLEM, dtype=torch.float32),
    }
    for words, problem in reasons.items():
        assert words in str(dict(dispatch.explain(problem))["cpu-int"])
        assert dispatch.pick(problem).name != "cpu-int"


def test_processors_that_saturate_or_are_slow_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    integers._refuse_machine.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_int_mm", lambda a, b: (a.int() @ b.int()).clamp(max=1 << 22))
        assert "not exact" in str(integers.accepts(PROBLEM))
    integers._refuse_machine.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
        assert "DEFAULT" in str(integers.accepts(PROBLEM))
    integers._refuse_machine.cache_clear()
    assert integers.accepts(PROBLEM) is None


def test_the_operator_passes_opcheck_and_compiles() -> None:
    packed, fmt, _ = weight("int8-bytes", None, 8, 64)
    layer = prepare(packed, fmt, (quantizer("int8-token-asym"),))
    end = layer.rounding
    arguments = (activations(3, 64), layer.numbers, layer.scale, layer.sums, None, *end.tensors, 8, False, 1.0)
    torch.library.opcheck(integers.cpu_int_linear, arguments)
    module = PackedLinear(packed, fmt, None, (quantizer("int8-token"),), BF16)
    module.prepare()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for rows in (5, 50):
        x = activations(rows, 64)
        assert torch.equal(compiled(x), module(x))


def outliertune(k: int, dense: Tensor) -> tuple[InputOp, ...]:
    """Return what OutlierTune stores in front of a layer: subtract, divide, round."""
    z = torch.randn(k, generator=generator(7)) * 3
    factor = torch.rand(k, generator=generator(8)) * 4 + 0.25
    return Shift(z, dense @ z), Scale(factor), quantizer("int8-tensor")


@pytest.mark.parametrize("rotated", [False, True])
def test_layers_round_their_inputs_once_and_give_back_the_stored_weight(rotated: bool) -> None:
    packed, fmt, dense = weight("int8-bytes", None, 24, 64)
    ops = outliertune(64, dense)
    if rotated:  # nothing a kernel does: runs before
        ops = (Rotate(torch.linalg.qr(torch.randn(16, 16, generator=generator(9)))[0]), *ops)
    bias = torch.randn(24, generator=generator(10)).bfloat16()
    layer = PackedLinear(packed, fmt, bias, ops, BF16)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = activations(20, 64)
    found = layer(x)
    prepared = layer.prepared
    torch.testing.assert_close(layer(x[:2]), found[:2], rtol=0.05, atol=0.02 * float(found.abs().max()))
    assert isinstance(prepared, IntegerLinear)
    assert len(prepared.before) == int(rotated)
    expected = exact(apply_ops(prepared.before, x), prepared.rounding, dense) + bias.double()
    expected = expected.bfloat16() + ops[-3].carry.bfloat16()  # type: ignore[attr-defined]
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7 * float(expected.abs().max()) / 16)
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(layer.dequantize(), dense.bfloat16())


def test_float32_models_keep_the_exact_simulation() -> None:
    packed, fmt, dense = weight("int8-bytes", None, 24, 64)
    op = quantizer("int8-token")
    layer = PackedLinear(packed, fmt, None, (op,), torch.float32)
    x = activations(4, 64, torch.float32)
    assert torch.equal(layer(x), torch.nn.functional.linear(op.apply(x), dense))
    assert layer.prepared is None


@pytest.mark.parametrize(("method", "inputs"), [("rtn", "int8-token"), ("outliertune", None)])
def test_whole_models(method: str, inputs: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    save_checkpoint(tiny_llama(31).bfloat16(), source)
    write_text(tmp_path / "text.txt")
    data = {"data": str(tmp_path / "text.txt"), "n_samples": 4, "seq_len": 32}
    monkeypatch.setattr("compressor.verify.verify", compressor.verify.check)  # in this process
    compressor.quantize(str(source), method=method, inputs=inputs, output=tmp_path / "out", **data)  # type: ignore[arg-type]
    fast, exact_model = compressor.load(tmp_path / "out", dtype=BF16), compressor.load(tmp_path / "out")
    assert execution_path(fast).startswith("cpu-int-bfloat16 (packed int8-bytes")
    assert execution_path(fast, 512).startswith("cpu-int-")
    assert "cpu-int" not in execution_path(exact_model)
    monkeypatch.setenv(dispatch.ENV, "reference")
    plain = compressor.load(tmp_path / "out", dtype=BF16)
    tokens = torch.randint(0, 64, (2, 20), generator=generator(11))
    with torch.no_grad():
        expected = exact_model(tokens).logits.double()
        simulated = plain(tokens).logits.double()
        monkeypatch.delenv(dispatch.ENV)
        ours = float((fast(tokens).logits.double() - expected).norm() / expected.norm())
    theirs = float((simulated - expected).norm() / expected.norm())
    assert ours < 1.3 * theirs + 2e-3, (ours, theirs)
    state, stored = fast.state_dict(), plain.state_dict()
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    kernels = {row.kernel for row in check(tmp_path / "out", device=CPU, dtype=BF16).kernels}
    assert kernels == {"cpu-int"}
