"""Formats of inputs: bit equality with what compressed-tensors simulates, and reading what it writes."""

from __future__ import annotations

import json

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor

from compressor.errors import CheckpointError, RecipeError, UnsupportedError
from compressor.formats import get_format
from compressor.formats.activations import (
    GLOBAL_SCALE,
    INPUT_FORMATS,
    INPUT_SUMMARIES,
    InputFormat,
    get_input_format,
    input_format_from,
)
from compressor.formats.int_bytes import IntBytes
from compressor.inputs import Quantize, rebuild, stored_slots
from compressor.runtime import PackedLinear

KNOWN = {name: fmt for name, fmt in INPUT_FORMATS.items() if not fmt.native}
EVERY = pytest.mark.parametrize("fmt", KNOWN.values(), ids=KNOWN.keys())


def uneven_inputs(seed: int, width: int = 256) -> Tensor:
    """Inputs `[2, 7, width]` with a loud channel, a silent token, a tiny one, a constant one and exact ties."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 7, width, generator=generator)
    x[..., 3] *= 50
    x[0, 1] = 0
    x[0, 2] *= 1e-12
    x[1, 0] = -2.5
    x[1, 1] = torch.arange(width) / 2
    return x


def theirs(fmt: InputFormat, x: Tensor, scale: Tensor | None) -> Tensor:
    """Return what compressed-tensors makes of an input `[batch, tokens, in]`."""
    args = QuantizationArgs(**fmt.arguments())
    shared = scale if fmt.suffix == GLOBAL_SCALE else None
    if args.dynamic:
        scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity(), global_scale=shared)
    else:
        zero = torch.zeros_like(scale) if scale is not None else None
    return fake_quantize(x, scale, zero, args, global_scale=shared)


@EVERY
def test_rounding_is_bit_equal_to_compressed_tensors(fmt: InputFormat) -> None:
    for seed in range(3):
        x = uneven_inputs(seed)
        op = Quantize.calibrated(fmt, 0.8 * x.abs().max(), torch.float32)  # some values saturate
        before = x.clone()
        got = op.apply(x)
        assert torch.equal(got, theirs(fmt, x, op.scale))
        assert torch.equal(x, before)
        assert torch.equal(op.apply(x.flatten(0, 1)), got.flatten(0, 1)), "a token is a row, whatever the shape"
        assert not torch.equal(got, x)


@EVERY
def test_the_scheme_leads_back_to_its_format(fmt: InputFormat) -> None:
    assert input_format_from(fmt.arguments()) == fmt
    spelled = QuantizationArgs(**fmt.arguments())
    assert input_format_from(spelled.model_dump(mode="json")) == fmt
    assert input_format_from(spelled.model_dump()) == fmt
    assert INPUT_SUMMARIES.keys() == INPUT_FORMATS.keys()


@EVERY
def test_it_is_stored_and_comes_back(fmt: InputFormat) -> None:
    op = Quantize.calibrated(fmt, torch.tensor(3.0), torch.bfloat16)
    slots = stored_slots([op.describe()], (64, 256), torch.bfloat16)
    assert slots == {name: (type(slot)(t.dtype, tuple(t.shape))) for (name, slot), t in zip(
        slots.items(), op.tensors().values(), strict=True)}  # fmt: skip
    assert op.describe() == fmt.describe() == json.loads(json.dumps(op.describe()))
    (again,) = rebuild([op.describe()], op.tensors())
    x = uneven_inputs(9)
    assert torch.equal(again.apply(x), op.apply(x))
    if fmt.static:
        with pytest.raises(CheckpointError, match="input_"):
            rebuild([fmt.describe()], {})


@EVERY
def test_degenerate_inputs_stay_finite(fmt: InputFormat) -> None:
    for largest in (0.0, 1e-38, 1e38):
        op = Quantize.calibrated(fmt, torch.tensor(largest), torch.float32)
        for x in (torch.zeros(3, 128), torch.full((3, 128), 1e-30), torch.full((1, 128), 1e30), torch.zeros(0, 128)):
            assert torch.isfinite(op.apply(x)).all()
    assert not op.apply(torch.zeros(3, 128)).any()


def test_static_scales_follow_the_largest_value() -> None:
    largest = torch.tensor(5.1)
    found = {name: Quantize.calibrated(get_input_format(name), largest, torch.float32).scale for name in KNOWN}
    assert float(found["int8-tensor"] or 0) == pytest.approx(5.1 / 127.5)
    assert float(found["fp8-tensor"] or 0) == pytest.approx(5.1 / 448)
    assert float(found["nvfp4"] or 0) == pytest.approx(448 * 6 / 5.1)
    assert found["int8-token"] is None
    scale = Quantize.calibrated(get_input_format("int8-tensor"), largest, torch.bfloat16).scale
    assert scale is not None
    assert scale.dtype == torch.bfloat16


def test_saturated_values_are_counted() -> None:
    op = Quantize(get_input_format("int8-tensor"), torch.tensor([0.5]))
    assert op.saturated(torch.tensor([[0.0, 63.5, 63.6, 90.0, -64.0, -64.2, -64.3, -1e9]])) == 4
    op = Quantize(get_input_format("fp8-tensor"), torch.tensor([1.0]))
    assert op.saturated(torch.tensor([[448.0, 470.0, 480.0, -1e9]])) == 2
    assert Quantize(get_input_format("int8-token")).saturated(torch.tensor([[1e9, 1.0]])) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False},
        {"num_bits": 3, "type": "int", "strategy": "token", "dynamic": True},
        {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": True},
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 64, "dynamic": True},
        {"num_bits": 6, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    ],
    ids=str,
)
def test_schemes_that_are_not_run_are_refused_by_name(arguments: dict[str, object]) -> None:
    with pytest.raises(UnsupportedError, match=f"num_bits {arguments['num_bits']}"):
        input_format_from(arguments)


def test_unknown_names_get_a_hint() -> None:
    with pytest.raises(RecipeError) as caught:
        get_input_format("int8token")
    assert "int8-token" in caught.value.hint


def test_int_bytes_hold_what_int8_holds() -> None:
    packed, words = IntBytes(None, torch.bfloat16), get_format("int8", None, torch.bfloat16)
    w = torch.randn(5, 37, generator=torch.Generator().manual_seed(1))
    q = packed.fit(w)
    codes = packed.encode(w, q)
    assert torch.equal(packed.decode(codes, q), words.decode(words.encode(w, words.fit(w)), words.fit(w)))
    stored = packed.pack(codes, q).tensors["weight"]
    assert stored.dtype == torch.int8
    assert torch.equal(stored.float() * q.scale.float(), packed.decode(codes, q))
    with pytest.raises(UnsupportedError, match="groups of 64"):
        IntBytes(64, torch.bfloat16)


def test_a_packed_layer_rounds_before_it_multiplies() -> None:
    fmt = IntBytes(None, torch.float32)
    generator = torch.Generator().manual_seed(4)
    w, x = torch.randn(6, 32, generator=generator), torch.randn(2, 3, 32, generator=generator)
    q = fmt.fit(w)
    codes = fmt.encode(w, q)
    op = Quantize(get_input_format("int8-token"))
    layer = PackedLinear(fmt.pack(codes, q), fmt, inputs=(op,))
    steps = op.steps(x)  # [2, 3, 1]
    integers = (x / steps).round().clamp(-128, 127).long() @ (codes.long() - 128).T
    expected = integers.double() * steps.double() * q.scale.double().T
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
