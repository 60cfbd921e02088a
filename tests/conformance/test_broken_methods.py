"""`MethodConformance` catches methods that break a promise, each by the check that is meant for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from compressor.calibration.stats import SecondMoment
from compressor.decision import Kept, Outcome, Quantized
from compressor.errors import UnsupportedError
from compressor.formats.base import QuantFormat
from compressor.methods.base import Layer, MethodOptions, Stream
from compressor.methods.fp4 import FP4
from compressor.methods.rtn import RTN
from compressor.plan import WeightRef
from compressor.testing import MethodConformance
from compressor.testing.methods import failing_checks

PAGE = "test_its_page_names_every_option"  # no class of a test file has a page beside it


class Dithered(RTN):
    """Adds noise from the global generator before rounding."""

    def solve(self, layer: Layer, fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        noise = 1 + 1e-3 * torch.randn(layer.weight.shape)
        return super().solve(replace(layer, weight=layer.weight * noise), fmt, generator)


class Remembering(RTN):
    """Rounds differently with every call."""

    def solve(self, layer: Layer, fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        self.calls = getattr(self, "calls", 0) + 1
        return super().solve(replace(layer, weight=layer.weight * (1 + 0.1 * self.calls)), fmt, generator)


class Overwriting(RTN):
    """Leaves the rounded values in the weight it was lent."""

    def solve(self, layer: Layer, fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        outcome = super().solve(layer, fmt, generator)
        decision = outcome.decisions[layer.ref.name]
        assert isinstance(decision, Quantized)
        layer.weight.copy_(fmt.decode(decision.codes, decision.qparams))
        return outcome


class Centring(FP4):
    """Subtracts a mean from the statistics in place."""

    def solve_group(self, layers: Sequence[Layer], fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        outcome = super().solve_group(layers, fmt, generator)
        moment = layers[0].stats[SecondMoment()].value()
        moment.sub_(moment.mean())
        return outcome


class EachItsOwnScale(RTN):
    """Ignores the global scale that fused layers share."""

    def solve(self, layer: Layer, fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        return super().solve(replace(layer, global_scale=None), fmt, generator)


class Truncating(RTN):
    """Rounds towards minus infinity."""

    def solve(self, layer: Layer, fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        q = layer.fit(fmt)
        step = layer.weight.abs().max() / 8
        return Outcome({layer.ref.name: Quantized(fmt.encode(layer.weight - 0.4 * step, q), q)})


class Unsearched(FP4):
    """Collects statistics and does not use them."""

    def solve_group(self, layers: Sequence[Layer], fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        fits = {layer.ref.name: (layer, layer.fit(fmt)) for layer in layers}
        return Outcome({name: Quantized(fmt.encode(layer.weight, q), q) for name, (layer, q) in fits.items()})


class KeepingLate(RTN):
    """Keeps a weight after accepting it."""

    def solve(self, layer: Layer, fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        return Outcome({layer.ref.name: Kept("too sensitive")})


class RaisingRefusals(RTN):
    """Refuses with an exception instead of a reason."""

    def refuse(self, ref: WeightRef, fmt: QuantFormat) -> str | None:
        if fmt.bits > 4:
            raise UnsupportedError(f"{fmt.bits} bits")
        return None


class WideScales(RTN):
    """Returns scales that are not in the stored precision."""

    def solve(self, layer: Layer, fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        q = layer.fit(fmt)
        return Outcome(
            {layer.ref.name: Quantized(fmt.encode(layer.weight, q), replace(q, scale=q.scale.float() * 1.001))}
        )


class Undescribed(RTN):
    """Claims to use data, describes nothing, accepts any option."""

    class Options(MethodOptions):
        model_config = {"extra": "ignore"}  # noqa: RUF012 (pydantic reads it as a constant)
        strength: float = 1.0

    stream = Stream.FP
    summary = ""


ERROR = "test_output_error_is_at_most_that_of_rounding"
SEED = "test_same_seed_same_bytes"
UNTOUCHED = "test_inputs_and_random_state_are_untouched"
KNOWN = "test_known_formats_are_refused_with_a_reason_or_work"
VALID = {
    "test_every_layer_gets_a_decision_that_packs",
    "test_small_matrices_work",
    "test_dead_inputs_and_zero_weights_work",
    "test_bfloat16_weights_and_extreme_scales_stay_finite",
    KNOWN,
}


@pytest.mark.parametrize(
    ("method", "fmt", "expected"),
    [
        (RTN(), "int4", set()),
        (FP4(), "nvfp4", set()),
        (Dithered(), "int4", {SEED, UNTOUCHED, ERROR}),
        (Remembering(), "int4", {SEED, ERROR}),
        (Overwriting(), "int4", {UNTOUCHED}),
        (Centring(), "nvfp4", {UNTOUCHED}),
        (EachItsOwnScale(), "nvfp4", {"test_fused_layers_share_one_global_scale", ERROR}),
        (Truncating(), "int4", {ERROR}),
        (
            Unsearched(),
            "nvfp4",
            {
                "test_data_pays",
                "test_a_layer_without_tokens_is_decided_and_reported",
                "test_statistics_that_are_not_finite_are_refused",
            },
        ),
        (WideScales(), "int4", {*VALID, ERROR}),
        (KeepingLate(), "int4", {*VALID, SEED, ERROR, "test_fused_layers_share_one_global_scale"}),
        (RaisingRefusals(), "int4", {KNOWN}),
        (Undescribed(), "int4", {"test_it_says_what_it_is", "test_unknown_options_are_rejected"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "" if isinstance(value, set) else type(value).__name__,
)
def test_the_suite_catches(method: RTN | FP4, fmt: str, expected: set[str]) -> None:
    """A broken method fails the checks it should fail and no other; a sound one fails none."""
    failed = set(failing_checks(method, fmt))
    assert failed - ({PAGE} if type(method) not in (RTN, FP4) else set()) == expected


def test_a_suite_without_a_method_or_formats_is_an_error() -> None:
    with pytest.raises(AssertionError, match="formats is empty"):
        type("Empty", (MethodConformance,), {"method": RTN()})
    with pytest.raises(AssertionError, match="method is not set"):
        type("Without", (MethodConformance,), {"formats": ("int4",)})


def test_an_unregistered_class_under_a_known_name_is_noticed() -> None:
    suite = type("Suite", (MethodConformance,), {"method": Truncating(), "formats": ("int4",)})()
    with pytest.raises(AssertionError):
        suite.test_it_is_registered()
