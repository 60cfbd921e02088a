"""Every method we ship keeps the promises of `MethodConformance`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import compressor.methods
from compressor.formats import BUILDERS, get_format, parse_group_size
from compressor.formats.base import QuantFormat
from compressor.formats.codebook import Codebook
from compressor.formats.float4 import Float4
from compressor.formats.ints import IntFormat
from compressor.formats.power import Power
from compressor.methods import METHODS, SUMMARIES, get_method
from compressor.methods.adaround import AdaRound, AdaRoundOptions
from compressor.methods.awq import AWQ, AWQOptions
from compressor.methods.base import describe_options
from compressor.methods.flexround import FlexRound, FlexRoundOptions
from compressor.methods.fp4 import FP4, FP4Options
from compressor.methods.gptq import GPTQ, GPTQOptions
from compressor.methods.nupes import Nupes, NupesOptions
from compressor.methods.outliertune import OutlierTune, OutlierTuneOptions
from compressor.methods.rtn import RTN, RTNOptions
from compressor.methods.smoothquant import SmoothQuant
from compressor.testing import BlockMethodConformance, MethodConformance
from compressor.testing.layers import GAIN, correlated_inputs, fused_layers, heavy_tailed_weights, quantized, solve


class TestRTN(MethodConformance):
    method = RTN()
    formats = (
        *("int2", "int3", "int4", "int8", "nvfp4", "mxfp4", "fp4", "fp8", "fp8-tensor", "fp8-block", "mxfp8"),
        *(Codebook(4, 32), "power2", "power4"),
    )


class TestClippedRTN(MethodConformance):
    method = RTN(RTNOptions(clip="mse"))
    formats = ("int2", "int4", "int3-asym", "nvfp4", "mxfp4", "fp4", Codebook(4, 32))

    def test_output_error_is_at_most_that_of_rounding(self, fmt: QuantFormat) -> None:
        """It sees no inputs, so the error it promises to lower is that of the weights."""
        for seed in range(3):
            w = heavy_tailed_weights(12, 4 * (fmt.group_size or 37), seed)
            layers = fused_layers((), fmt, [w], correlated_inputs(w.shape[1]))
            errors = []
            for method in (self.method, RTN()):
                decision = quantized(solve(method, layers, fmt).decisions[layers[0].ref.name])
                errors.append(float((fmt.decode(decision.codes, decision.qparams) - w).abs().pow(2.4).sum()))
            assert errors[0] < errors[1] or (fmt.name == "mxfp4" and errors[0] == errors[1]), (fmt.name, seed)


class TestGPTQ(MethodConformance):
    method = GPTQ()
    formats = (
        *("int2", "int3", "int4", "int8", "int2-asym", "int4-asym", "nvfp4", "mxfp4", "fp4"),
        IntFormat(4, None, torch.float32),
        IntFormat(4, None, torch.bfloat16, per_tensor=True),
        *(Codebook(4, 32), "power2", "power3", "power4", "power8", Power(4, None, per_tensor=True)),
    )


class TestClassicGPTQ(MethodConformance):
    method = GPTQ(GPTQOptions(order="static", grid="minmax"))
    formats = ("int2", "int4", "int4-asym", "nvfp4", "mxfp4", "fp4", Codebook(3, 32), "power4")


class TestGPTQInStoredOrder(MethodConformance):
    method = GPTQ(GPTQOptions(order="none", grid="mse", block_size=48))
    formats = ("int3", "int3-asym", "nvfp4")


class TestGPTQOnWideGroups(MethodConformance):
    """Groups wider than a block take their scales from the variance left to their inputs."""

    method = GPTQ(GPTQOptions(block_size=20))
    formats = ("int4", "int4-asym", "mxfp4")


class TestGPTQOnScaledWeights(MethodConformance):
    method = GPTQ(GPTQOptions(scaling="awq"))
    formats = ("int2", "int4", "int4-asym", "nvfp4", "mxfp4", "fp4", "power4", IntFormat(4, None, torch.float32))


class TestAWQ(MethodConformance):
    method = AWQ()
    formats = (
        *("int2", "int3", "int4", "int8", "int4-asym", "nvfp4", "mxfp4", "fp4"),
        IntFormat(4, None, torch.float32),
        IntFormat(4, None, torch.bfloat16, per_tensor=True),
        Codebook(4, 32),
    )


class TestPlainAWQ(MethodConformance):
    method = AWQ(AWQOptions(duo=False, n_grid=10, clip=False))
    formats = ("int2", "int4", "nvfp4")


class TestSmoothQuant(MethodConformance):
    """It flattens inputs and looks at no error of the weights, so it is not held to one."""

    method = SmoothQuant()
    formats = ("int4", "int8", "nvfp4", "mxfp4", "fp4", "fp8", "fp8-tensor", "fp8-block", "mxfp8", Codebook(4, 32))

    def test_output_error_is_at_most_that_of_rounding(self, fmt: QuantFormat) -> None:
        """What it promises: the loudest channel of the input stands out less."""
        for seed in range(3):
            layers = self._layers(fmt, seed=seed)
            x = correlated_inputs(layers[0].weight.shape[1], seed=seed)
            gain = solve(self.method, layers, fmt).rewrites[GAIN]
            before, after = (loud / loud.median() for loud in (x.abs().amax(0), (x * gain).abs().amax(0)))
            assert after.max() < 0.5 * before.max()

    def test_data_pays(self) -> None:
        """Covered by the flatter inputs."""


class TestOutlierTune(MethodConformance):
    """It makes weights harder to round, as inputs are rounded as well: it is not held to the error of weights alone."""

    method = OutlierTune(OutlierTuneOptions(clip="mse"))
    formats = ("int6", "int8", "int8-bytes", "int8-asym", IntFormat(4, None, torch.float32))

    def test_output_error_is_at_most_that_of_rounding(self, fmt: QuantFormat) -> None:
        """What it promises: all channels of the input reach equally far."""
        for seed in range(3):
            layers = self._layers(fmt, seed=seed)
            x = correlated_inputs(layers[0].weight.shape[1], seed=seed)
            loud = (x * solve(self.method, layers, fmt).rewrites[GAIN]).abs().amax(0)
            assert loud.max() < 1.001 * loud.min()

    def test_data_pays(self) -> None:
        """Covered by the even inputs."""


class TestFP4(MethodConformance):
    method = FP4()
    formats = ("nvfp4", "mxfp4", "fp4", Float4("reference"), Float4("hybrid"), "fp6", "fp8-searched")


class TestFP4WithoutSweeps(MethodConformance):
    method = FP4(FP4Options(sweeps=0, globals=8))
    formats = ("nvfp4", "mxfp4")


class TestFlexRound(BlockMethodConformance):
    method = FlexRound(FlexRoundOptions(iters=12))
    formats = (
        *("int2", "int4", "int8", "int3-asym", "nvfp4", "mxfp4", "fp4", "power4"),
        IntFormat(4, None, torch.bfloat16, per_tensor=True),
        Codebook(4, 32),
    )


class TestFlexRoundMixed(BlockMethodConformance):
    """Inputs mixed from both streams, float32 products, clipped start, one sample a step, no row divisors."""

    method = FlexRound(
        FlexRoundOptions(iters=12, input_mix=0.5, precision="fp32", start="minmax", batch=1, row_divisor=False)
    )
    formats = ("int4", "nvfp4")


class TestFlexRoundOnScaledWeights(BlockMethodConformance):
    method = FlexRound(FlexRoundOptions(iters=12, scaling="awq"))
    formats = ("int2", "int4", "nvfp4")


class TestAdaRound(BlockMethodConformance):
    method = AdaRound(AdaRoundOptions(iters=60))
    formats = ("int2", "int4", "int3-asym", IntFormat(4, None, torch.bfloat16, per_tensor=True))


class TestNupes(BlockMethodConformance):
    method = Nupes(NupesOptions(iters=12))
    formats = ("power2", "power3", "power4", "power8", Power(4, None, torch.float32, per_tensor=True))


class TestNupesOnClippedScales(BlockMethodConformance):
    method = Nupes(NupesOptions(iters=12, start="mse", input_mix=0.5))
    formats = ("power3", "power4")


class TestNupesAsInThePaper(BlockMethodConformance):
    """Scales that cover all weights, codes whose powers are nearest."""

    method = Nupes(NupesOptions(iters=12, rounding="power", start="minmax", precision="fp32"))
    formats = ("power3", "power4")


class TestSearchedNupes(MethodConformance):
    """It sees no inputs, so the error it promises to lower is that of the weights."""

    method = Nupes(NupesOptions(learn=False, start="minmax"))
    formats = ("power2", "power3", "power4", "power8", Power(4, None, torch.float32, per_tensor=True))

    def test_output_error_is_at_most_that_of_rounding(self, fmt: Power) -> None:
        """Nor is it ever above that of exponent 1, a plain integer grid."""
        for seed in range(3):
            w = heavy_tailed_weights(12, 4 * (fmt.group_size or 37), seed)
            layers = fused_layers((), fmt, [w], correlated_inputs(w.shape[1]))
            decision = quantized(solve(self.method, layers, fmt).decisions[layers[0].ref.name])
            error = float((fmt.decode(decision.codes, decision.qparams) - w).double().square().sum())
            codes = fmt.encode_powers if self.method.options.rounding == "power" else fmt.encode
            plain = [fmt.params(fmt.absmax(w), exponent) for exponent in (1.0, fmt.fitted_exponent)]
            limits = [float((fmt.decode(codes(w, q), q) - w).double().square().sum()) for q in plain]
            assert error <= min(limits), (fmt.name, seed)
            if fmt.bits in (3, 4):
                assert error < 0.8 * limits[0], (fmt.name, seed)


class TestSearchedNupesAsInThePaper(TestSearchedNupes):
    method = Nupes(NupesOptions(learn=False, start="minmax", rounding="power"))
    formats = ("power3", "power4")


class TestSearchedNupesOnClippedScales(TestSearchedNupes):
    method = Nupes(NupesOptions(learn=False))
    formats = ("power3", "power4", "power8")


def test_fp4_refuses_what_is_no_4_bit_float() -> None:
    for name in BUILDERS:
        fmt = get_format(name, parse_group_size(name, None), torch.bfloat16)
        layers = fused_layers((), fmt, [heavy_tailed_weights(2, 64)], correlated_inputs(64))
        reason = FP4().refuse(layers[0].ref, fmt)
        assert (reason is None) == (name in ("nvfp4", "mxfp4", "fp4", "fp6", "fp8-searched")), name
        assert reason is None or name in reason


def test_registry_and_summaries_list_the_same_methods() -> None:
    assert METHODS.keys() == SUMMARIES.keys()


@pytest.mark.parametrize("name", METHODS)
def test_pages_state_the_defaults(name: str) -> None:
    page = (Path(compressor.methods.__file__).parent / f"{name}.md").read_text(encoding="utf-8")
    assert len(page.splitlines()) < 70
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        f"## {part}" for part in ("Idea", "When to use it", "Options", "Evidence", "Limits", "Paper")
    ]
    for option in describe_options(type(get_method(name, {})).Options):
        assert re.search(rf"^- `{option['name']}` \(default {option['default']}\b", page, re.MULTILINE), option
