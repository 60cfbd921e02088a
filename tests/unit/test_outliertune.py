"""OutlierTune: hand-computed examples, the two exact identities, and what a shift buys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from compressor.calibration.channels import ChannelRange, MaxAbs
from compressor.decision import Quantized
from compressor.errors import RecipeError
from compressor.formats.activations import INPUT_FORMATS
from compressor.formats.ints import IntFormat
from compressor.inputs import Quantize, apply_ops, carried
from compressor.methods.outliertune import OutlierTune, OutlierTuneOptions, factors, reach
from compressor.methods.rounding import InputMethod, InputSite
from compressor.methods.scaling import Factors
from compressor.methods.smoothquant import SmoothQuant, SmoothQuantOptions
from compressor.plan import Fold, FoldKind
from compressor.testing.layers import GAIN, fold, fused_layers

X1 = torch.tensor([[1, 20, -0.5], [3, 28, 0.5], [-1, 24, 0]])
X2 = torch.tensor([[2, 22, 1], [0, 30, -1], [4, 26, 0.4]])
W = torch.tensor([[0.5, -0.1, 1.0], [-0.2, 0.06, 0.4]])
B = torch.tensor([0.1, -0.3])


def ranges_of(samples: Sequence[Tensor], cut: float = 1.0) -> Any:
    total = ChannelRange(cut).start(samples[0].shape[1], torch.device("cpu"))
    for sample in samples:
        total.update(sample)
        total.close_lane()
    return total


def test_midpoints_and_reaches_of_the_spec() -> None:
    middle, low, high = ranges_of([X1, X2]).value()
    torch.testing.assert_close(middle, torch.tensor([1.5, 25, 0]))
    assert low.tolist() == [-1, 20, -1]
    assert high.tolist() == [4, 30, 1]
    assert reach(torch.stack([middle, low, high]), middle).tolist() == [2.5, 5, 1]
    assert reach(torch.stack([middle, low, high]), None).tolist() == [4, 30, 1]
    samples = [torch.tensor([[0.0], [3], [10]]), torch.tensor([[0.0], [1], [2]])]
    ranges = ranges_of(samples).value()
    assert float(ranges[0]) == 3
    assert float(reach(ranges, ranges[0])) == 7
    middle = OutlierTune(OutlierTuneOptions(midpoint="global"))._middle(ranges)
    assert (float(middle), float(reach(ranges, middle))) == (5, 5)


def test_ranges_follow_division_and_shift() -> None:
    c, z = torch.tensor([0.5, 2.0, 4.0]), torch.tensor([1.0, -3.0, 0.25])
    total = ranges_of([X1, X2])
    total.divide(c)
    total.subtract(z)
    torch.testing.assert_close(total.value(), ranges_of([X1 / c - z, X2 / c - z]).value())
    assert total.n_tokens == 6
    with pytest.raises(NotImplementedError, match="MaxAbsOf"):
        MaxAbs().start(3, torch.device("cpu")).subtract(z)


def test_a_cut_reaches_a_share_of_each_samples_own_extremes() -> None:
    value = ranges_of([X1, X2], cut=0.5).value()
    clamped = [x.clamp(0.5 * x.min(), 0.5 * x.max()) for x in (X1, X2)]
    torch.testing.assert_close(value, ranges_of(clamped).value())


def decide(
    options: OutlierTuneOptions, samples: Sequence[Tensor], w: Tensor, fmt: IntFormat, bits: int = 8
) -> tuple[Factors, Quantized]:
    """Fold and solve one layer behind a norm that takes up no shift, as the engine would."""
    method = OutlierTune(options)
    (layer,) = fused_layers((), fmt, [w], torch.cat(list(samples)))
    layer = replace(layer, stats={ChannelRange(): ranges_of(samples)})
    (layer,), chosen = fold(method, [layer], fmt)
    where = Fold("norm", FoldKind.NORM, 0, GAIN, None, (layer.ref.name,), w.shape[1])
    steps = method.steps(INPUT_FORMATS[f"int{bits}-token"], InputSite(layer.ref, where))
    outcome = method.solve(replace(layer, steps=steps), fmt, torch.Generator())
    decision = outcome.decisions[layer.ref.name]
    assert isinstance(decision, Quantized)
    return chosen, decision


def codes_of(decision: Quantized, x: Tensor) -> Tensor:
    rounding = decision.inputs[-1]
    assert isinstance(rounding, Quantize)
    assert rounding.scale is not None
    return apply_ops(decision.inputs, x) / rounding.scale


def test_codes_and_output_of_the_spec() -> None:
    """Examples 8.1 and 8.2: inputs of 6 bits."""
    fmt = IntFormat(8, None, torch.float32)
    chosen, decision = decide(OutlierTuneOptions(shift="all"), [X1, X2], W, fmt, bits=6)
    x = torch.tensor([[2.6, 27, 0.9], [-2.5, 19, -0.2]])
    torch.testing.assert_close(codes_of(decision, x / chosen.c), torch.tensor([[14.0, 12, 28], [-32, -32, -6]]))
    carry = carried(decision.inputs)
    assert carry is not None
    torch.testing.assert_close(carry + B, torch.tensor([-1.65, 0.9]))
    weight = W * chosen.c  # before it is rounded
    out = functional.linear(apply_ops(decision.inputs, x / chosen.c), weight, B + carry)
    torch.testing.assert_close(out, torch.tensor([[-0.3758064516, 1.1516129032], [-2.6177419355, 1.0290322581]]))


def test_a_constant_channel_is_carried_exactly() -> None:
    """Example 8.4."""
    x, w = torch.tensor([[5.0, 0, 1], [5, 0, -1]]), torch.tensor([[2.0, 3, 1]])
    chosen, decision = decide(OutlierTuneOptions(shift="all"), [x], w, IntFormat(8, None, torch.float32))
    carry = carried(decision.inputs)
    assert carry is not None
    assert float(carry) == pytest.approx(10)
    out = functional.linear(apply_ops(decision.inputs, x / chosen.c), w * chosen.c, carry)
    torch.testing.assert_close(out, torch.tensor([[11.0], [9.0]]))


def typical(seed: int, width: int = 96) -> tuple[list[Tensor], Tensor]:
    """Return samples behind a norm with four loud channels far from zero, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    gain = torch.exp(0.3 * torch.randn(width, generator=generator))
    bias = 0.2 * torch.randn(width, generator=generator)
    gain[:4] *= torch.tensor([8.0, 10, 6, 12])
    bias[:4] = torch.tensor([30.0, -40, 20, -25])
    noise = torch.randn(12, 32, width, generator=generator)
    return list(functional.layer_norm(noise, (width,)) * gain + bias), 0.05 * torch.randn(
        64, width, generator=generator
    )


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_without_a_shift_it_is_smoothquant_with_alpha_one(bits: int, symmetric: bool) -> None:
    """Section 2.7: the same codes of inputs and of weights; scales of weights differ by one factor."""
    for seed in range(3):
        samples, w = typical(seed)
        x, qmax = torch.cat(samples), 2 ** (bits - 1) - 1
        fmt = IntFormat(bits, None, torch.float32, symmetric)
        chosen, decision = decide(OutlierTuneOptions(shift="none"), samples, w, fmt, bits)
        (quantize,) = decision.inputs
        assert isinstance(quantize, Quantize)
        assert quantize.scale is not None

        smooth = SmoothQuant(SmoothQuantOptions(alpha=1))
        (layer,), theirs = fold(smooth, fused_layers((MaxAbs(),), fmt, [w], x), fmt)
        other = smooth.solve(layer, fmt, torch.Generator()).decisions[layer.ref.name]
        assert isinstance(other, Quantized)
        assert torch.equal(decision.codes, other.codes)
        ratio = decision.qparams.scale * quantize.scale / (other.qparams.scale / qmax)
        torch.testing.assert_close(ratio, torch.ones_like(ratio))
        static = Quantize(INPUT_FORMATS[f"int{bits}-tensor"], torch.tensor([1 / qmax]))
        expected = (static.apply(x / theirs.c) * qmax).round()
        assert torch.equal(codes_of(decision, x / chosen.c).round(), expected)


@pytest.mark.parametrize("shift", ["all", "none"])
def test_scaling_channels_beforehand_changes_nothing(shift: str) -> None:
    """Section 2.7: neither codes of inputs nor of weights; powers of two keep even the rounding."""
    samples, w = typical(5)
    d = 2.0 ** torch.randint(-3, 4, (w.shape[1],), generator=torch.Generator().manual_seed(1))
    fmt, x = IntFormat(8, None, torch.float32), torch.cat(samples)
    options = OutlierTuneOptions.model_validate({"shift": shift})
    chosen, before = decide(options, samples, w, fmt)
    other, after = decide(options, [sample / d for sample in samples], w * d, fmt)
    assert torch.equal(before.codes, after.codes)
    assert torch.equal(codes_of(before, x / chosen.c), codes_of(after, x / d / other.c))
    assert not torch.equal(chosen.c, other.c)


@pytest.mark.parametrize("bits", [6, 8])
def test_errors_come_in_the_order_of_the_spec(bits: int) -> None:
    """Section 9: per tensor > per token > no shift > shift, which at least halves the squared error."""
    fmt, errors = IntFormat(bits, None, torch.float32), []
    for seed in range(3):
        samples, w = typical(seed)
        x = torch.cat(samples)
        exact, q = x.double() @ w.double().T, fmt.fit(w)
        plain = fmt.decode(fmt.encode(w, q), q)
        static = Quantize.calibrated(INPUT_FORMATS[f"int{bits}-tensor"], x.abs().max(), torch.float32)
        outs = [static.apply(x) @ plain.T, Quantize(INPUT_FORMATS[f"int{bits}-token"]).apply(x) @ plain.T]
        for shift in ("none", "all"):
            options = OutlierTuneOptions.model_validate({"shift": shift})
            chosen, decision = decide(options, samples, w, fmt, bits)
            weight, carry = fmt.decode(decision.codes, decision.qparams), carried(decision.inputs)
            outs.append(functional.linear(apply_ops(decision.inputs, x / chosen.c), weight, carry))
        errors.append([float((out.double() - exact).norm() / exact.norm()) ** 2 for out in outs])
    tensor, token, unshifted, shifted = torch.tensor(errors).mean(0).tolist()
    assert tensor > token > unshifted > 2 * shifted, errors


def test_what_is_planned() -> None:
    method = OutlierTune()
    assert isinstance(method, InputMethod)
    ref = fused_layers((), IntFormat(8, None, torch.float32), [W], X1)[0].ref
    bare = Fold("norm", FoldKind.NORM, 0, GAIN, None, (ref.name,), 3)
    absorbing = replace(bare, bias="norm.bias", shifted=("q.bias",))
    static = INPUT_FORMATS["int6-tensor"].describe()
    shift = {"op": "shift", "carry": True}
    for option, where, expected in (
        ("auto", None, ()),
        ("auto", bare, (static,)),
        ("auto", absorbing, (static,)),
        ("all", bare, (shift, static)),
        ("all", absorbing, (static,)),
        ("none", bare, (static,)),
    ):
        chosen = OutlierTune(OutlierTuneOptions.model_validate({"shift": option}))
        assert chosen.steps(INPUT_FORMATS["int6-token"], InputSite(ref, where)) == expected
    weights = (None, "int8", "int6-asym", "int3", "fp8")
    found = ["int8-token", "int8-token", "int6-token", "int4-token", "int8-token"]
    assert [method.input_format(None, name) for name in weights] == found
    assert method.input_format("int8-token", "int4") == "int8-token"
    for wanted in ("fp8-token", "int8-tensor", "nvfp4", "what"):
        with pytest.raises(RecipeError, match="outliertune rounds inputs to integers"):
            method.input_format(wanted, None)


def test_factors_have_a_floor() -> None:
    c = factors(torch.tensor([4.0, 4.0, 4.0, 1e-9, 0.0]))
    assert torch.isfinite(c).all()
    assert float(c[3]) == float(c[4]) == pytest.approx(float(c[0]) / 256)
    assert factors(torch.zeros(3)).tolist() == [1, 1, 1]
