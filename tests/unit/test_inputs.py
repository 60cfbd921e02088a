"""Input operations: hand-computed examples, storing and rebuilding, and their place in a packed layer."""

import json

import pytest
import torch
from torch.nn import functional

from compressor.errors import CheckpointError, UnsupportedError
from compressor.formats.activations import INPUT_FORMATS
from compressor.formats.ints import IntFormat
from compressor.inputs import InputOp, Permute, Pow2, Quantize, Rotate, Shift, apply_ops, rebuild
from compressor.runtime import PackedLinear

FMT = IntFormat(4, 16, torch.float32)


def packed_layer(seed: int, inputs: tuple[InputOp, ...], dtype: torch.dtype = torch.float32) -> PackedLinear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 32, generator=generator)
    qparams = FMT.fit(weight)
    bias = torch.randn(8, generator=generator).to(dtype)
    return PackedLinear(FMT.pack(FMT.encode(weight, qparams), qparams), FMT, bias, inputs, dtype)


def every_op(width: int) -> list[InputOp]:
    generator = torch.Generator().manual_seed(5)
    matrix = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    return [
        Shift(torch.randn(width, generator=generator)),
        Pow2(torch.randint(-4, 5, (width,), generator=generator, dtype=torch.int8)),
        Permute(torch.randperm(width, generator=generator)),
        Rotate(matrix),
        Quantize(INPUT_FORMATS["int8-token"]),
        Quantize(INPUT_FORMATS["int4-token"], clip=0.75),
        Quantize(INPUT_FORMATS["int8-tensor"], torch.tensor([0.02])),
        Quantize(INPUT_FORMATS["fp8-token"]),
        Quantize(INPUT_FORMATS["nvfp4"], torch.tensor([900.0])),
        Quantize(INPUT_FORMATS["mxfp4"]),
    ]


def test_shift() -> None:
    assert Shift(torch.tensor([1.0, -2.0])).apply(torch.tensor([[3.0, 4.0]])).tolist() == [[2.0, 6.0]]


def test_pow2() -> None:
    out = Pow2(torch.tensor([3, 0, -2], dtype=torch.int8)).apply(torch.tensor([[1.5, 1.5, 1.5]]))
    assert out.tolist() == [[12.0, 1.5, 0.375]]


def test_pow2_is_exact_and_keeps_the_dtype() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(1)).bfloat16()
    k = torch.full((64,), 7, dtype=torch.int8)
    there = Pow2(k).apply(x)
    assert there.dtype == torch.bfloat16
    assert torch.equal(Pow2(-k).apply(there), x)


def test_permute() -> None:
    assert Permute(torch.tensor([2, 0, 1])).apply(torch.tensor([[10.0, 20.0, 30.0]])).tolist() == [[30.0, 10.0, 20.0]]


def test_rotate() -> None:
    quarter_turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    assert Rotate(quarter_turn).apply(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).tolist() == [[-2.0, 1.0, -4.0, 3.0]]


def test_rotation_of_input_and_weight_cancel() -> None:
    generator = torch.Generator().manual_seed(2)
    matrix = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
    x, w = (torch.randn(3, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    rotate = Rotate(matrix)
    torch.testing.assert_close(rotate.apply(x) @ rotate.apply(w).T, x @ w.T)


def test_quantize_static() -> None:
    op = Quantize(INPUT_FORMATS["int4-tensor"], torch.tensor([0.5]))
    # Codes reach from -8 to 7; 0.25 is a tie and goes to the even code.
    assert op.apply(torch.tensor([[0.25, 0.75, 1.1, -9.0, 100.0]])).tolist() == [[0.0, 1.0, 1.0, -4.0, 3.5]]


def test_quantize_per_token() -> None:
    out = Quantize(INPUT_FORMATS["int4-token"]).apply(torch.tensor([[-7.5, 3.2, 0.6], [-75.0, 32.0, 6.0], [0, 0, 0]]))
    assert out.tolist() == [[-8.0, 3.0, 1.0], [-80.0, 30.0, 10.0], [0.0, 0.0, 0.0]]


def test_quantize_with_clip() -> None:
    out = Quantize(INPUT_FORMATS["int4-token"], clip=0.5).apply(torch.tensor([[15.0, 1.4, -0.4, -15.0]]))
    assert out.tolist() == [[7.0, 1.0, 0.0, -8.0]]


def test_apply_ops_runs_in_order() -> None:
    x = torch.tensor([[1.0, 2.0]])
    shift, double = Shift(torch.tensor([1.0, 1.0])), Pow2(torch.tensor([1, 1], dtype=torch.int8))
    assert apply_ops((shift, double), x).tolist() == [[0.0, 2.0]]
    assert apply_ops((double, shift), x).tolist() == [[1.0, 3.0]]


@pytest.mark.parametrize("op", every_op(32), ids=lambda op: type(op).__name__)
def test_stored_operations_come_back(op: InputOp) -> None:
    description = json.loads(json.dumps(op.describe()))
    (again,) = rebuild([description], {name: tensor.clone() for name, tensor in op.tensors().items()})
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    assert type(again) is type(op)
    assert torch.equal(again.apply(x), op.apply(x))
    assert not torch.equal(op.apply(x), x)


def test_rebuild_refuses_what_it_cannot_know() -> None:
    with pytest.raises(CheckpointError, match="wavelet"):
        rebuild([{"op": "wavelet"}], {})
    with pytest.raises(CheckpointError, match="input_shift"):
        rebuild([{"op": "shift"}], {})
    with pytest.raises(CheckpointError, match="format"):
        rebuild([{"op": "quantize", "clip": 1.0}], {})
    with pytest.raises(CheckpointError, match="input_scale"):
        rebuild([INPUT_FORMATS["int8-tensor"].describe()], {})


def test_packed_linear_applies_its_operations_first() -> None:
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(32, generator=generator)
    k = torch.randint(-2, 3, (32,), generator=generator, dtype=torch.int8)
    order = torch.randperm(32, generator=generator)
    matrix = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    ops = (Shift(z), Pow2(k), Permute(order), Rotate(matrix), Quantize(INPUT_FORMATS["int8-token"]))
    layer = packed_layer(4, ops)
    x = torch.randn(2, 5, 32, generator=generator)

    steps = ((x - z) * 2.0 ** k.float())[..., order]
    steps = torch.cat([steps[..., :16] @ matrix, steps[..., 16:] @ matrix], -1)
    scale = steps.abs().amax(-1, keepdim=True) / 127.5
    steps = (steps / scale).round().clamp(-128, 127) * scale
    weight = FMT.decode(*FMT.unpack(layer.packed))
    torch.testing.assert_close(layer(x), functional.linear(steps, weight, layer.bias), rtol=1e-5, atol=1e-5)
    suffixes = {"input_shift", "input_pow2", "input_order", "input_rotation", "weight_packed", "weight_scale"}
    assert suffixes < set(layer.state_dict())


def test_packed_linear_refuses_two_operations_of_one_kind() -> None:
    z = torch.zeros(32)
    with pytest.raises(UnsupportedError, match="input_shift"):
        packed_layer(6, (Shift(z), Shift(z)))


def test_moving_a_packed_linear_never_converts_its_bytes() -> None:
    layer = packed_layer(7, (Shift(torch.randn(32, generator=torch.Generator().manual_seed(7))),))
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    layer.to(torch.bfloat16)
    after = dict(layer.named_buffers())
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(8)).bfloat16()
    expected = functional.linear(x - before["input_shift"].bfloat16(), layer.dequantize().bfloat16(), layer.bias)
    assert torch.equal(layer(x), expected)


def test_the_weight_is_rounded_to_the_model_dtype_once() -> None:
    layer = packed_layer(9, (), torch.bfloat16)
    exact = FMT.decode(*FMT.unpack(layer.packed))
    assert torch.equal(layer.dequantize(), exact.bfloat16())
    # float32 inputs meet the rounded weight, in float32.
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(9))
    assert layer.bias is not None
    expected = functional.linear(x, exact.bfloat16().float(), layer.bias.float())
    assert torch.equal(layer(x), expected)
