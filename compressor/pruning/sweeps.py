"""Sweeps of iCBS: one block in every layer is decided, judged on held-back samples, and carried out if it counts."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from compressor.pruning.candidates import TensorState
from compressor.pruning.gradients import MaskedModel, Target
from compressor.pruning.step import Settings, Step, accepted, take_step
from compressor.pruning.view import ModelView

SHARES = (1.0, 0.5, 0.25)
"""Shares of a sweep's swaps that are tried."""


@dataclass(frozen=True)
class Sweep:
    """One sweep.

    Attributes:
        number: From 1.
        loss: Mean loss of the sweep's samples before it.
        held_back: Mean loss of the held-back samples after it.
        predicted: Change of the samples' mean loss the model expected of all swaps found.
        energy: Sum of the energies; never positive.
        found: Swaps found.
        taken: Share of them that was carried out; 0 where all were undone.
        skipped: Tensors without candidates or with gradients that are not finite.
        seconds: Wall time, the judging included.
    """

    number: int
    loss: float
    held_back: float
    predicted: float
    energy: float
    found: int
    taken: float
    skipped: int
    seconds: float


class Sweeps:
    """Sweeps over one model; a context manager.

    Args:
        states: Tensor -> its mask, replaced by what sweeps accept.
        settings: How every layer is searched.
        view: The model.
        target: What the loss measures; see `MaskedModel`.
        joint: Whether layers that come later know what those before are expected to do to each sample's loss.
        guard: Whether swaps count only if they lower the held-back loss.
    """

    def __init__(
        self,
        states: dict[str, TensorState],
        settings: Settings,
        view: ModelView,
        target: Target,
        joint: bool,
        guard: bool,
    ) -> None:
        self.states, self.settings, self.view = states, settings, view
        self.joint, self.guard = joint, guard
        self.model = MaskedModel.of(view, target=target)

    def __enter__(self) -> Sweeps:
        return self

    def __exit__(self, *_: object) -> None:
        self.model.store.drop_all_but(None)

    def losses(self, tokens: Tensor, masks: dict[str, Tensor] | None = None) -> float:
        """Return the mean loss of samples under the current masks, or others."""
        found = self._masks(masks)
        return float(self.model.losses(tokens, found).double().mean())

    def sweep(self, done: int, tokens: Tensor, held: Tensor, before: float) -> Sweep:
        """Decide one block in every layer, judge, and carry out what counts.

        Args:
            done: Sweeps before this one.
            tokens: `[samples, window]`.
            held: The held-back ones.
            before: Their mean loss.
        """
        started = time.monotonic()
        losses, layers = self.model.backward(tokens, self._masks(None))
        expected = torch.zeros(len(tokens), device=self.view.device)
        steps: dict[str, Step] = {}
        skipped, energy, n_layers = 0, 0.0, len(self.view.plan.compressed)
        for number, (layer, w0, gradient) in enumerate(layers, 1):
            name = layer.ref.name
            # What samples are to gain is spread over the layers, or those decided first would take all of it.
            share = number / n_layers if self.joint else 1.0
            step = take_step(
                _on(self.states[name], self.view.device),
                w0,
                gradient.mean(),
                gradient.columns,
                replace(self.settings, alpha=self.settings.alpha * share),
                generator(self.view.seed, name, done),
                expected if self.joint else None,
            )
            if step is None:
                skipped += 1
                continue
            energy += step.energy
            expected = expected + step.expected
            steps[name] = step
        found = sum(len(step.swaps) for step in steps.values())
        taken, after = self._judge(steps, held, before) if self.guard else (1.0, None)
        for name, step in steps.items():
            self.states[name] = _on(accepted(step, taken), torch.device("cpu"))
        if after is None:
            after = self.losses(held)
        predicted = float(expected.mean() + (expected.square().mean() / 2))
        return Sweep(
            number=done + 1,
            loss=float(losses.double().mean()),
            held_back=after,
            predicted=predicted,
            energy=energy,
            found=found,
            taken=taken,
            skipped=skipped,
            seconds=round(time.monotonic() - started, 2),
        )

    def _judge(self, steps: dict[str, Step], held: Tensor, before: float) -> tuple[float, float]:
        """Return the largest share of the swaps that lowers the held-back loss, and that loss; 0 if none does."""
        for share in SHARES:
            loss = self.losses(held, {name: step.keep(share) for name, step in steps.items()})
            if loss < before:
                return share, loss
        return 0.0, before

    def _masks(self, changed: dict[str, Tensor] | None) -> Any:
        states = self.states
        return lambda name: changed[name] if changed and name in changed else states[name].keep


def _on(state: TensorState, device: torch.device) -> TensorState:
    """Return the state with its masks on a device; lists of weights at rest stay where they are."""
    return TensorState(state.keep.to(device), state.free.to(device), state.rested_pruned, state.rested_kept)


def generator(seed: int, *parts: object) -> torch.Generator:
    """Return a generator that depends on the seed and these parts only."""
    digest = sha256("\0".join(str(part) for part in (seed, *parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
