"""Integer products: the layout of weights, what rounds inputs, the operator, and how layers and dispatch use them."""

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
from compressor.formats.float4 import SPLITS, Float4
from compressor.inputs import InputOp, Permute, Quantize, Rotate, RoundFloat, Scale, Shift, apply_ops
from compressor.kernels import dispatch
from compressor.kernels.dispatch import Kernel, Problem
from compressor.kernels.gpu import int_kernel, int_ops, int_weight, rounding
from compressor.kernels.gpu.int_launch import int_tile
from compressor.kernels.gpu.int_weight import HALF, IntWeight, pack_bytes, unpack_bytes
from compressor.kernels.gpu.rounding import codes_of, fused
from compressor.kernels.reference.small_floats import float_linear, input_integers, unit
from compressor.runtime.modules import PackedLinear
from compressor.testing.grids import mirrored

CPU = torch.device("cpu")
ROUNDED = [name for name in INPUT_FORMATS if name.startswith("int") or name in ("fp8-token", "fp8-tensor")]
GPU = Problem("linear", "int8-bytes", 8, 4096, 4096, 0, torch.bfloat16, "cuda", (9, 0), rounds="int")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def packed_of(name: str, group: int | str | None, n: int, k: int) -> tuple[PackedTensor, QuantFormat, Tensor]:
    name, _, split = name.partition(":")
    fmt = get_format(name, group, torch.bfloat16)  # type: ignore[arg-type]
    w = torch.randn(n, k, generator=generator(1)) * torch.linspace(0.01, 2, n)[:, None]
    q = fmt.fit_table(w, SPLITS[split]) if isinstance(fmt, Float4) else mirrored(fmt, fmt.fit(w))
    codes = fmt.encode(w, q)
    return fmt.pack(codes, q), fmt, fmt.decode(codes, q)


def quantizer(name: str, clip: float = 1.0) -> Quantize:
    fmt = INPUT_FORMATS[name]
    return Quantize(fmt, torch.tensor([0.03]).bfloat16() if fmt.static else None, clip)


def activations(m: int, k: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(m, k, generator=generator(2)) + 0.5
    x[:, ::9] *= 40
    return x.to(dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (64, 128), (65, 200), (3, 1000)])
def test_bytes_unpack_to_what_was_packed(bits: int, shape: tuple[int, int]) -> None:
    half = 1 << (bits - 1)
    numbers = torch.randint(-half, half, shape, generator=generator(), dtype=torch.int64).to(torch.int8)
    words = pack_bytes(numbers, bits)
    assert torch.equal(unpack_bytes(words, bits)[: shape[0], : shape[1]], numbers)
    if bits == 4:  # what the kernel's shift and masks see
        low = ((words.int() << 4) & 0xF0).to(torch.uint8).view(torch.int8) // 16
        expected = torch.nn.functional.pad(numbers, (0, -shape[1] % 128))[:, :HALF]
        assert torch.equal(low[: shape[0], :HALF], expected)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("int8-bytes", None),
        ("int8", None),
        ("int8", 64),
        ("int6", None),
        ("int6", "tensor"),
        ("int5", 128),
        ("int4", None),
        ("int4", 64),
        ("int4", 192),
        ("fp4:e2m1", None),
        ("fp4:e1m2", None),
        ("fp4:e3m0", None),
    ],
)
def test_weights_decode_and_restore_exactly(name: str, group: int | str | None) -> None:
    packed, fmt, dense = packed_of(name, group, 37, 384)
    weight = int_weight.prepare(packed, fmt)
    assert weight.bits == (4 if name in ("int4", "fp4:e1m2") else 8)
    assert torch.equal(int_weight.decode(weight), dense)
    back = int_kernel.prepare(packed, fmt, (quantizer("int8-token"),)).restore()
    assert back.tensors.keys() == packed.tensors.keys()
    for suffix, tensor in packed.tensors.items():
        assert torch.equal(back.tensors[suffix], tensor), suffix
        assert back.tensors[suffix].dtype == tensor.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROUNDED)
def test_codes_are_what_is_simulated(name: str, dtype: torch.dtype) -> None:
    k = 48
    ops: tuple[InputOp, ...] = (
        Permute(torch.randperm(k, generator=generator(3))),
        Shift(torch.randn(k, generator=generator(4))),
        Scale(torch.rand(k, generator=generator(5)) + 0.2),
        quantizer(name, 1.0 if INPUT_FORMATS[name].static else 0.9),
    )
    x = activations(7, k, dtype)
    x[3] = 0
    before, end = fused(ops, CPU)
    assert before == ()
    codes, scale, zero = codes_of(x, end)
    simulated = apply_ops(ops, x)
    values = codes.view(torch.float8_e4m3fn).float() if end.floating else codes.float()
    found = ((values - zero[:, None]) * scale[:, None]).to(dtype)
    assert torch.equal(found, simulated)


def test_what_no_kernel_does_runs_before() -> None:
    rotate = Rotate(torch.eye(4))
    scale, shift = Scale(torch.ones(8)), Shift(torch.zeros(8))
    before, end = fused((rotate, scale, shift, quantizer("int8-token")), CPU)
    assert before == (rotate, scale)  # a shift behind a factor is not what the kernel does
    assert (end.shift.numel(), end.factor.numel(), end.order.numel()) == (8, 0, 0)
    ends = {"int8-token": "int", "int4-token-asym": "int", "fp8-token": "fp8", "fp8-group": "", "mxfp4": ""}
    assert {name: rounding.kind_of((scale, quantizer(name))) for name in ends} == ends
    assert rounding.kind_of((rotate,)) == rounding.kind_of(()) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotation_of_fitting_size_runs_in_the_kernel_that_rounds(dtype: torch.dtype) -> None:
    k = 64
    first, second = (
        Rotate(torch.linalg.qr(torch.randn(32, 32, generator=generator(seed)))[0].half(), second=seed == 9, half=True)
        for seed in (8, 9)
    )
    ops = (first, Permute(torch.randperm(k, generator=generator(3))), second, quantizer("int4-token-asym", 0.9))
    before, end = fused(ops, CPU, rotations=True)
    assert before == (first,)
    assert end.matrix is second.matrix
    assert end.order.numel() == k
    x = activations(7, k, dtype)
    codes, scale, zero = codes_of(apply_ops(before, x), end)
    assert torch.equal(((codes - zero[:, None]) * scale[:, None]).to(dtype), apply_ops(ops, x))
    assert fused(ops, CPU)[0] == ops[:-1]  # kernels that turn nothing
    small = Rotate(torch.eye(8))
    assert fused((small, ops[-1]), CPU, rotations=True)[0] == (small,)
    packed, fmt, _ = packed_of("int8-bytes", None, 24, k)
    layer = int_kernel.prepare(packed, fmt, ops)
    assert layer.before == (first,)
    expected = apply_ops(ops, x).double() @ layer.dequantize(torch.float64).T
    found = layer.linear(x, None, dtype).double()
    assert (found - expected).norm() / expected.norm() < (1e-6 if dtype == torch.float32 else 4e-3)
    torch.library.opcheck(
        int_ops.int_linear, arguments(apply_ops(before, x), int_weight.prepare(packed, fmt), end, None)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("bits", "mantissa", "most"), [(4, 1, 3), (4, 1, 0), (4, 2, 1), (4, 0, 0), (6, 3, 1), (6, 4, 1)]
)
def test_small_floats_become_the_integers_of_the_oracle(
    bits: int, mantissa: int, most: int, dtype: torch.dtype
) -> None:
    op = small_floats(bits, mantissa, most, 48)
    before, end = fused((op,), CPU)
    assert before == ()
    x = activations(7, 48, dtype)
    x[3] = 0
    x[4, 2] = torch.inf if most else 6e4
    x[5, ::2] = -x[5, ::2]
    codes, scale, zero = codes_of(x, end)
    attached = input_integers(x, op) << (most - op.k.long())
    assert torch.equal(codes.long(), attached)
    assert int(codes.abs().max()) <= 127
    assert not zero.any()
    assert torch.equal(scale, (op.scale * unit(mantissa) * 2.0**-most).expand(7))
    # What is stored rounds the product of value and scale; powers of two change nothing.
    simulated = (input_integers(x, op).double() * op.scale.double() * unit(mantissa)).float() * 2.0 ** -op.k.float()
    assert torch.equal(op.apply(x), simulated.to(dtype))
    assert torch.equal((codes.double() * scale.double()[:, None]).float().to(dtype), simulated.to(dtype))


def small_floats(bits: int, mantissa: int, most: int, k: int) -> RoundFloat:
    shifts = torch.arange(k).remainder(most + 1).to(torch.int8)
    return RoundFloat(bits, torch.tensor([0.3]), torch.tensor([mantissa], dtype=torch.uint8), shifts)


@pytest.mark.parametrize(
    ("bits", "mantissa", "most", "kind"),
    [
        (4, 0, 1, ""),
        (6, 3, 2, ""),
        (6, 2, 0, ""),
        (8, 4, 0, ""),
        (4, 0, 0, "split"),
        (4, 1, 3, "split"),
        (4, 2, 1, "split"),
        (6, 4, 1, "split"),
    ],
)
def test_small_floats_beyond_a_byte_are_left_to_plain_operations(
    bits: int, mantissa: int, most: int, kind: str
) -> None:
    assert rounding.kind_of((small_floats(bits, mantissa, most, 16),)) == kind


@pytest.mark.parametrize("split", ["e2m1", "e1m2", "e3m0"])
def test_products_of_small_floats_equal_the_oracle(split: str) -> None:
    packed, fmt, _ = packed_of(f"fp4:{split}", None, 24, 192)
    assert isinstance(fmt, Float4)
    op = small_floats(4, 1, 3, 192)
    x = activations(5, 192, torch.float32)
    found = int_kernel.prepare(packed, fmt, (op,)).linear(x, None, torch.float32)
    expected = float_linear(x, packed, fmt, op)
    assert (found - expected).norm() / expected.norm() < 1e-6
    end = fused((op,), CPU)[1]
    torch.library.opcheck(int_ops.int_linear, arguments(x, int_weight.prepare(packed, fmt), end, None))


def test_nan_in_a_row_makes_the_row_nan_and_no_other() -> None:
    packed, fmt, _ = packed_of("int8-bytes", None, 8, 32)
    x = activations(3, 32, torch.float32)
    x[1, 5] = torch.nan
    _, end = fused((quantizer("int8-token-asym"),), CPU)
    out = int_ops.linear(x, int_weight.prepare(packed, fmt), end, None)
    assert out.isnan().any(1).tolist() == [False, True, False]
    assert out[1].isnan().all()


@pytest.mark.parametrize("name", ["int8-token", "int8-token-asym", "int6-tensor"])
@pytest.mark.parametrize(("weight", "group"), [("int8-bytes", None), ("int6", None), ("int4", 64)])
def test_the_operator_equals_the_simulation(name: str, weight: str, group: int | None) -> None:
    packed, fmt, dense = packed_of(weight, group, 24, 192)
    op = quantizer(name)
    _, end = fused((op,), CPU)
    x, bias = activations(5, 192, torch.float32), torch.randn(24, generator=generator(6))
    expected = op.apply(x).double() @ dense.double().T + bias
    found = int_ops.linear(x.view(5, 1, 192), int_weight.prepare(packed, fmt), end, bias)
    assert found.shape == (5, 1, 24)
    assert (found[:, 0] - expected).norm() / expected.norm() < 1e-6


def arguments(x: Tensor, w: IntWeight, end: rounding.Rounding, bias: Tensor | None) -> tuple[object, ...]:
    kinds = (w.bits, *w.shape, w.group, end.bits, end.symmetric, end.clip, end.mantissa, end.offset)
    return (x, *w.tensors, bias, *end.tensors, end.matrix, *kinds)


def test_the_operator_passes_opcheck_and_has_a_fake() -> None:
    packed, fmt, _ = packed_of("int8-bytes", None, 8, 64)
    weight = int_weight.prepare(packed, fmt)
    _, end = fused((quantizer("int8-tensor"),), CPU)
    torch.library.opcheck(int_ops.int_linear, arguments(activations(3, 64, torch.bfloat16), weight, end, None))
    with FakeTensorMode() as mode:
        there = [torch.empty_like(mode.from_tensor(tensor), device="cuda") for tensor in weight.tensors]
        fake = IntWeight(weight.bits, weight.shape, weight.group, *there)
        step, *rest = (torch.empty_like(mode.from_tensor(tensor), device="cuda") for tensor in end.tensors)
        end_there = rounding.Rounding(end.bits, end.symmetric, end.clip, step, *rest)
        x = torch.empty(2, 5, 64, dtype=torch.float16, device="cuda")
        out = int_ops.linear(x, fake, end_there, None)
        assert (out.shape, out.dtype, out.device.type) == ((2, 5, 8), torch.float16, "cuda")
        with pytest.raises(RuntimeError, match="63 columns"):
            int_ops.linear(torch.empty(2, 63, device="cuda"), fake, end_there, None)
    with pytest.raises(UnsupportedError, match="63 columns"):
        int_ops.linear(activations(2, 63, torch.float32), weight, end, None)


def test_dispatch_picks_integers_only_where_both_sides_are_integers() -> None:
    assert dispatch.pick(GPU).name == "triton-int"
    assert dispatch.pick(replace(GPU, format="int4", group=128)).name == "triton-int"
    assert dispatch.pick(replace(GPU, format="int6")).name == "triton-int"
    assert dispatch.pick(replace(GPU, format="fp4")).name == "triton-int"
    assert dispatch.pick(replace(GPU, format="fp4", rounds="split")).name == "triton-int"
    assert dispatch.pick(replace(GPU, rounds="split", device="cpu", capability=(0, 0))).name != "cpu-int"
    reasons = {
        "not rounded": replace(GPU, rounds=""),
        "int8-asym": replace(GPU, format="int8-asym"),
        "groups of 32": replace(GPU, format="int4", group=32),
        "overflow": replace(GPU, k=1 << 17),
        "CUDA": replace(GPU, device="cpu"),
        "8.0": replace(GPU, capability=(7, 5)),
    }
    for words, problem in reasons.items():
        assert words in str(dict(dispatch.explain(problem))["triton-int"])
        assert dispatch.pick(problem).name != "triton-int"


def test_every_launch_is_legal() -> None:
    for bits in (4, 8):
        for group in (0, 64, 128, 192, 256, 576):
            for m in (1, 16, 17, 64, 65, 500):
                for sm in (80, 89, 90, 100):
                    tile = int_tile(bits, 1152, 192, group, m, sm)
                    assert 192 % tile.block_n == 1152 % tile.block_k == 0
                    assert bits == 8 or tile.block_k % 128 == 0
                    assert group % tile.block_k == 0 or (bits == 4 and tile.block_k == 128 and group % 64 == 0)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the integer kernels' operator serve this machine, too: in plain torch."""

    def accepts(problem: Problem) -> str | None:
        return None if problem.rounds else "not rounded"

    first = Kernel("triton-int", accepts, int_kernel.run, prepare_rounded=int_kernel.prepare)
    monkeypatch.setattr(dispatch, "KERNELS", (first, dispatch.KERNELS[-1]))
    dispatch.choose.cache_clear()
    yield
    dispatch.choose.cache_clear()


@pytest.mark.usefixtures("everywhere")
def test_layers_round_their_inputs_once_and_give_back_the_stored_weight() -> None:
    packed, fmt, dense = packed_of("int8-bytes", None, 24, 64)
    z = torch.randn(64, generator=generator(7))
    ops = (Shift(z, (dense @ z)), Scale(torch.full((64,), 0.5)), quantizer("int8-tensor"))
    bias = torch.randn(24, generator=generator(8))
    layer = PackedLinear(packed, fmt, bias, ops)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = activations(4, 64, torch.float32)
    expected = apply_ops(ops, x) @ dense.T + bias + dense @ z
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)
    assert isinstance(layer._prepared, int_kernel.RoundedLinear)
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(layer.dequantize(), dense)
    assert layer.problem(3).rounds == "int"
    torch.testing.assert_close(layer.to(torch.float32)(x), expected, rtol=1e-5, atol=1e-4)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
