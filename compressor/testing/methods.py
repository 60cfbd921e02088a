"""The conformance suite of methods: what every method must promise, checked from outside.

A plug-in author derives a test class, gives the method and names its formats; pytest collects the inherited checks:

    class TestFP4(MethodConformance):
        method = FP4()
        formats = ("nvfp4", "mxfp4")
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from compressor.decision import Decision, Outcome
from compressor.errors import CompressorError, NumericalError
from compressor.formats import BUILDERS
from compressor.formats.base import QuantFormat
from compressor.methods.base import Layer, Method, Scope
from compressor.methods.scaling import moves_factors
from compressor.testing.layers import (
    GAIN,
    assert_storable,
    correlated_inputs,
    fused_layers,
    heavy_tailed_weights,
    other_random_state,
    output_error,
    quantized,
    random_state,
    solve,
)
from compressor.testing.stated import StatedMethod, resolved

_SLACK = 1 + 1e-6
"""Float32 sums may call two nearly equal errors in either order."""


def failing_checks(method: Method, *formats: str | QuantFormat) -> list[str]:
    """Run the suite on an unregistered method without pytest; return the names of the checks that fail, in order."""
    namespace = {"method": method, "formats": formats, "registered": False}
    suite = type("Suite", (MethodConformance,), namespace)()
    failed = []
    for name in (name for name in dir(suite) if name.startswith("test_")):
        check: Callable[..., None] = getattr(suite, name)
        per_format = "fmt" in inspect.signature(check).parameters
        for arguments in [(fmt,) for fmt in resolved(formats)] if per_format else [()]:
            try:
                check(*arguments)
            except pytest.skip.Exception:
                continue
            except (AssertionError, CompressorError, pytest.fail.Exception):
                failed.append(name)
                break
    return failed


class MethodConformance(StatedMethod):
    """Checks every method of scope LAYER or GROUP must pass.

    Derive, set `method` and `formats`, and name the class `Test...`.
    """

    def test_known_formats_are_refused_with_a_reason_or_work(self) -> None:
        """`refuse` accepts the formats it claims; any other gets a sentence, or a decision that holds."""
        claimed = [fmt.name for fmt in resolved(self.formats)]
        for fmt in resolved((*self.formats, *(name for name in BUILDERS if name not in claimed))):
            layers = self._layers(fmt, rows=(3,), groups=2)
            reason = self.method.refuse(layers[0].ref, fmt)
            if reason is None:
                assert_storable(fmt, layers, solve(self.method, layers, fmt))
            else:
                assert fmt.name not in claimed, f"{fmt.name} is refused: {reason}"
                assert isinstance(reason, str), f"{reason!r} is no reason"
                assert reason, "the reason is empty"

    def test_same_seed_same_bytes(self, fmt: QuantFormat) -> None:
        """Only layers and seed decide: not global random state, and not what the method solved before."""
        first = _bytes(fmt, solve(self.method, self._layers(fmt), fmt, seed=7))
        solve(self.method, self._layers(fmt, seed=1), fmt, seed=8)
        with other_random_state():
            second = _bytes(fmt, solve(self.method, self._layers(fmt), fmt, seed=7))
        assert first == second, "the same layers and seed gave other bytes"

    def test_inputs_and_random_state_are_untouched(self, fmt: QuantFormat) -> None:
        """Weights, global scales, statistics and global random state are the same afterwards."""
        layers = self._layers(fmt)
        before = copy.deepcopy(layers)
        state = random_state()
        solve(self.method, layers, fmt)
        assert random_state() == state, "global random state was used; draw from the generator given"
        for layer, kept in zip(layers, before, strict=True):
            assert torch.equal(layer.weight, kept.weight), "the weight changed"
            if layer.global_scale is not None and kept.global_scale is not None:
                assert torch.equal(layer.global_scale, kept.global_scale), "the global scale changed"
            assert list(layer.stats) == list(kept.stats), "the statistics changed"
            for spec in layer.stats:
                assert torch.equal(layer.stats[spec].value(), kept.stats[spec].value()), "the statistics changed"
                assert layer.n_tokens == kept.n_tokens, "the statistics changed"

    def test_every_layer_gets_a_decision_that_packs(self, fmt: QuantFormat) -> None:
        """Codes lie on the grid, parameters are in stored precision, and both survive packing bit for bit."""
        for seed in range(2):
            layers = self._layers(fmt, seed=seed)
            assert_storable(fmt, layers, solve(self.method, layers, fmt, seed))

    def test_output_error_is_at_most_that_of_rounding(self, fmt: QuantFormat) -> None:
        """On its calibration data no method is worse than rounding to nearest, summed over what it decides at once."""
        for seed in range(3):
            for error, rounding in self._errors(fmt, seed):
                assert error <= rounding * _SLACK, f"{error:.6g} against {rounding:.6g} of rounding to nearest"

    def test_data_pays(self) -> None:
        """A method that uses data beats rounding to nearest on one of its formats at least."""
        formats = [fmt for fmt in resolved(self.formats) if self.method.stats(fmt)]
        if not formats:
            pytest.skip("a data-free method")
        assert any(all(error < rounding for error, rounding in self._errors(fmt, 0)) for fmt in formats)

    def test_fused_layers_share_one_global_scale(self, fmt: QuantFormat) -> None:
        """Where the format has a global scale, layers that runtimes fuse carry the same one, bit for bit."""
        outcome = solve(self.method, self._layers(fmt), fmt)
        scales = [quantized(decision).qparams.global_scale for decision in outcome.decisions.values()]
        if not fmt.has_global_scale:
            assert scales == [None] * len(scales)
            return
        values = [None if scale is None else scale.tolist() for scale in scales]
        assert all(value is not None and value == values[0] for value in values), f"global scales {values}"

    def test_small_matrices_work(self, fmt: QuantFormat) -> None:
        """One row, one group, both, and more rows than tokens."""
        for rows, groups, tokens in (((1,), 3, 50), ((5,), 1, 50), ((1, 1), 1, 50), ((4,), 2, 1)):
            layers = self._layers(fmt, rows, groups, tokens=tokens)
            assert_storable(fmt, layers, solve(self.method, layers, fmt))

    def test_dead_inputs_and_zero_weights_work(self, fmt: QuantFormat) -> None:
        """Channels, groups and whole inputs that are always zero, and rows or matrices of zeros, stay finite."""
        width = fmt.group_size or 37
        for dead in (slice(3, 4), slice(0, width), slice(None)):
            x = correlated_inputs(2 * width)
            x[:, dead] = 0
            weights = [heavy_tailed_weights(6, 2 * width), torch.zeros(3, 2 * width)]
            weights[0][2] = 0
            layers = fused_layers(self.method.stats(fmt), fmt, weights, x)
            outcome = solve(self.method, layers, fmt)
            assert_storable(fmt, layers, outcome)
            zeros = _decoded(fmt, outcome.decisions[layers[1].ref.name])
            assert not zeros.any(), "a matrix of zeros does not stay zero"

    def test_bfloat16_weights_and_extreme_scales_stay_finite(self, fmt: QuantFormat) -> None:
        """Weights that were bf16, and weights around 1e-20 and 1e4."""
        for magnitude in (1.0, 1e-20, 1e4):
            weights = [w.bfloat16().float() * magnitude for w in _weights(fmt, (6, 3), 3, seed=2)]
            x = correlated_inputs(weights[0].shape[1])
            layers = fused_layers(self.method.stats(fmt), fmt, weights, x, dtype="BF16")
            assert_storable(fmt, layers, solve(self.method, layers, fmt))

    def test_a_layer_without_tokens_is_decided_and_reported(self, fmt: QuantFormat) -> None:
        """An expert that no token reached still gets a decision, and an event names it."""
        if not self.method.stats(fmt):
            pytest.skip("a data-free method")
        layers = self._layers(fmt, tokens=0)
        outcome = solve(self.method, layers, fmt)
        assert_storable(fmt, layers, outcome)
        for layer in layers:
            assert any(layer.ref.name in event for event in outcome.events), f"no event names {layer.ref.name}"

    def test_statistics_that_are_not_finite_are_refused(self, fmt: QuantFormat) -> None:
        """One NaN, Inf or overflowing input raises an error that names a layer and says what to try."""
        if not self.method.stats(fmt):
            pytest.skip("a data-free method")
        weights = _weights(fmt, (4,), 2, seed=0)
        for value in (float("nan"), float("inf"), 1e30):
            x = correlated_inputs(weights[0].shape[1])
            x[11, 5] = value
            layers = fused_layers(self.method.stats(fmt), fmt, weights, x)
            error = _refusal(self.method, layers, fmt)
            assert error is not None, f"inputs with {value} were used"
            assert layers[0].ref.name in error.message, f"the error does not name the layer: {error.message}"
            assert error.hint, "the error lacks a hint"

    def _layers(
        self, fmt: QuantFormat, rows: Sequence[int] = (12, 5), groups: int = 4, seed: int = 0, tokens: int = 160
    ) -> list[Layer]:
        """Return fused layers; the last one's weights are three times larger, so that a shared scale matters."""
        weights = _weights(fmt, rows, groups, seed)
        x = correlated_inputs(weights[0].shape[1], tokens, seed)
        return fused_layers(self.method.stats(fmt), fmt, weights, x)

    def _errors(self, fmt: QuantFormat, seed: int) -> list[tuple[float, float]]:
        """Return squared output errors (method, rounding to nearest), one pair for each call of the method."""
        layers = self._layers(fmt, seed=seed)
        x = correlated_inputs(layers[0].weight.shape[1], seed=seed)
        calls = [layers] if self.method.scope is Scope.GROUP else [[layer] for layer in layers]
        if moves_factors(self.method):
            calls = [layers]
        pairs = []
        for call in calls:
            outcome = solve(self.method, call, fmt, seed)
            gain = outcome.rewrites.get(GAIN, torch.ones(()))  # what the input is multiplied by from now on
            decoded = {name: _decoded(fmt, decision) * gain for name, decision in outcome.decisions.items()}
            error = sum(output_error(decoded[layer.ref.name], layer, x) for layer in call)
            nearest = [(layer, layer.fit(fmt)) for layer in call]
            pairs.append((error, sum(output_error(fmt.decode(fmt.encode(a.weight, q), q), a, x) for a, q in nearest)))
        return pairs


def _weights(fmt: QuantFormat, rows: Sequence[int], groups: int, seed: int) -> list[Tensor]:
    width = groups * (fmt.group_size or 37)
    return [heavy_tailed_weights(n, width, 10 * seed + i, 0.02 * 3**i) for i, n in enumerate(rows)]


def _decoded(fmt: QuantFormat, decision: Decision) -> Tensor:
    return fmt.decode(quantized(decision).codes, quantized(decision).qparams)


def _bytes(fmt: QuantFormat, outcome: Outcome) -> dict[str, bytes]:
    decisions = {name: quantized(decision) for name, decision in outcome.decisions.items()}
    packed = {name: save(fmt.pack(d.codes, d.qparams).tensors) for name, d in decisions.items()}
    return packed | {name: save({name: value}) for name, value in outcome.rewrites.items()}


def _refusal(method: Method, layers: Sequence[Layer], fmt: QuantFormat) -> NumericalError | None:
    try:
        solve(method, layers, fmt)
    except NumericalError as error:
        return error
    return None
