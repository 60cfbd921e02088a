"""The conformance suite of methods that decide a whole block at once.

class TestFlexRound(BlockMethodConformance):
    method = FlexRound(FlexRoundOptions(iters=10))
    formats = ("int4", "nvfp4")
"""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save

from compressor.decision import Outcome
from compressor.errors import NumericalError
from compressor.formats import BUILDERS
from compressor.formats.base import QuantFormat
from compressor.methods.base import Block
from compressor.testing.blocks import block_of, residual_mlp
from compressor.testing.layers import (
    assert_storable,
    correlated_inputs,
    heavy_tailed_weights,
    other_random_state,
    quantized,
    random_state,
)
from compressor.testing.stated import StatedMethod, resolved


class BlockMethodConformance(StatedMethod):
    """Checks every method of scope BLOCK must pass.

    Derive, set `method` and `formats`, and name the class `Test...`. Few iterations are enough.
    """

    def test_known_formats_are_refused_with_a_reason_or_work(self) -> None:
        """`refuse` accepts the formats it claims; any other gets a sentence, or a decision that holds."""
        claimed = [fmt.name for fmt in resolved(self.formats)]
        for fmt in resolved((*self.formats, *(name for name in BUILDERS if name not in claimed))):
            block = self._block(fmt, rows=(3,), groups=2)
            reason = self.method.refuse(block.layers[0][0].ref, fmt)
            if reason is None:
                self._check(fmt, block, self._solve(block))
            else:
                assert fmt.name not in claimed, f"{fmt.name} is refused: {reason}"
                assert isinstance(reason, str), f"{reason!r} is no reason"
                assert reason, "the reason is empty"

    def test_same_seed_same_bytes(self, fmt: QuantFormat) -> None:
        """Only the block and the seed decide: not global random state, and not what the method solved before."""
        first = _bytes(fmt, self._solve(self._block(fmt), seed=7))
        self._solve(self._block(fmt, seed=1), seed=8)
        with other_random_state():
            second = _bytes(fmt, self._solve(self._block(fmt), seed=7))
        assert first == second, "the same block and seed gave other bytes"

    def test_inputs_and_random_state_are_untouched(self, fmt: QuantFormat) -> None:
        """Weights, samples and global random state are the same afterwards, and no gradient is left behind."""
        block = self._block(fmt)
        before = copy.deepcopy([layer.weight for layer, _ in block.layers])
        samples = [block.inputs(0).clone(), block.targets(0).clone()]
        state = random_state()
        self._solve(block)
        assert random_state() == state, "global random state was used; draw from the generator given"
        for (layer, _), weight in zip(block.layers, before, strict=True):
            assert torch.equal(layer.weight, weight), "the weight changed"
            assert not layer.weight.requires_grad, "the weight was made a variable"
        assert torch.equal(block.inputs(0), samples[0]), "the inputs changed"
        assert torch.equal(block.targets(0), samples[1]), "the targets changed"

    def test_the_loss_is_at_most_that_of_rounding(self, fmt: QuantFormat) -> None:
        """On its calibration data no method is worse than rounding to nearest, prefix compressed or not."""
        for shift in (0.0, 0.1):
            block = self._block(fmt, shift=shift)
            outcome = self._solve(block)
            self._check(fmt, block, outcome)
            values = {
                name: fmt.decode(quantized(d).codes, quantized(d).qparams) for name, d in outcome.decisions.items()
            }
            nearest = {
                layer.ref.name: fmt.decode(fmt.encode(layer.weight, q), q)
                for layer, _ in block.layers
                for q in [layer.fit(fmt)]
            }
            assert _error(block, values) <= _error(block, nearest) * 1.02  # it may look at some of the samples only

    def test_a_real_block_gets_better(self, fmt: QuantFormat) -> None:
        """A residual MLP, whose layers feed each other."""
        outcome = self._solve(residual_mlp(fmt, width=2 * (fmt.group_size or 24), hidden=2 * (fmt.group_size or 48)))
        assert outcome.metrics["loss_after"] < outcome.metrics["loss_before"]

    def test_small_matrices_work(self, fmt: QuantFormat) -> None:
        """One row, one group, both, and a single token."""
        for rows, groups, tokens in (((1,), 3, 50), ((5,), 1, 50), ((1, 1), 1, 50), ((4,), 2, 1)):
            block = self._block(fmt, rows=rows, groups=groups, tokens=tokens)
            self._check(fmt, block, self._solve(block))

    def test_dead_inputs_and_zero_weights_work(self, fmt: QuantFormat) -> None:
        """Channels that are always zero, and rows or matrices of zeros, stay finite; zeros stay zero."""
        width = 2 * (fmt.group_size or 37)
        for dead in (slice(3, 4), slice(0, width // 2), slice(None)):
            x = correlated_inputs(width)
            x[:, dead] = 0
            weights = [heavy_tailed_weights(6, width), torch.zeros(3, width)]
            weights[0][2] = 0
            block = block_of(fmt, weights, x)
            outcome = self._solve(block)
            self._check(fmt, block, outcome)
            decision = quantized(outcome.decisions[block.layers[1][0].ref.name])
            assert not fmt.decode(decision.codes, decision.qparams).any(), "a matrix of zeros does not stay zero"

    def test_extreme_scales_stay_finite(self, fmt: QuantFormat) -> None:
        """Weights around 1e-20 and 1e4."""
        for magnitude in (1e-20, 1e4):
            block = self._block(fmt, magnitude=magnitude)
            self._check(fmt, block, self._solve(block))

    def test_a_layer_without_tokens_is_decided_and_reported(self, fmt: QuantFormat) -> None:
        """A weight that the block does not use, as an expert no token reached, gets a decision, and an event."""
        block = self._block(fmt)
        unused = block.layers[1][0].ref.name

        def forward(hidden: Any, params: Any) -> Any:
            return block.forward(hidden, {name: w for name, w in params.items() if name != unused})

        targets = [forward(block.inputs(i), {a.ref.name: a.weight for a, _ in block.layers}) for i in range(8)]
        outcome = self._solve(replace(block, forward=forward, targets=lambda sample: targets[sample]))
        self._check(fmt, block, outcome)
        assert any(unused in event for event in outcome.events), f"no event names {unused}"

    def test_inputs_that_are_not_finite_are_refused(self, fmt: QuantFormat) -> None:
        """NaN or Inf in the calibration data raises an error that names the block and says what to try."""
        for value in (float("nan"), float("inf")):
            block = self._block(fmt)
            broken = block.inputs(0).clone()
            broken[0, 0, 0] = value
            with pytest.raises(NumericalError) as caught:
                self._solve(replace(block, inputs=functools.partial(_always, broken)))
            assert block.name in caught.value.message
            assert caught.value.hint

    def _solve(self, block: Block, seed: int = 0) -> Outcome:
        outcome: Outcome = self.method.solve_block(block, torch.Generator().manual_seed(seed))
        return outcome

    def _block(
        self,
        fmt: QuantFormat,
        rows: tuple[int, ...] = (12, 5),
        groups: int = 4,
        seed: int = 0,
        tokens: int = 160,
        shift: float = 0.0,
        magnitude: float = 1.0,
    ) -> Block:
        width = groups * (fmt.group_size or 37)
        weights = [heavy_tailed_weights(n, width, 10 * seed + i, 0.02 * 3**i * magnitude) for i, n in enumerate(rows)]
        return block_of(fmt, weights, correlated_inputs(width, tokens, seed), shift)

    def _check(self, fmt: QuantFormat, block: Block, outcome: Outcome) -> None:
        assert_storable(fmt, [layer for layer, _ in block.layers], outcome)


def _always(value: torch.Tensor, sample: int) -> torch.Tensor:
    return value


@torch.no_grad()
def _error(block: Block, weights: dict[str, torch.Tensor]) -> float:
    return sum(
        float((block.forward(block.inputs(i), weights) - block.targets(i)).square().sum(dtype=torch.float64))
        for i in range(block.n_samples)
    )


def _bytes(fmt: QuantFormat, outcome: Outcome) -> dict[str, bytes]:
    decisions = {name: quantized(decision) for name, decision in outcome.decisions.items()}
    return {name: save(fmt.pack(d.codes, d.qparams).tensors) for name, d in decisions.items()}
