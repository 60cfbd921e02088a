"""M-FAC: what removing a weight costs and how others make up for it, by the inverse of the empirical Fisher matrix.

Frantar, Kurtic and Alistarh 2021, arXiv 2107.03356, section 4 (pruning). With gradients of single samples and `F` their
Fisher matrix (`fisher.py`), removing weight p alone costs `w_p^2 / (2 [F^-1]_pp)`; the cheapest go, and the sum of
their single updates `- w_p / [F^-1]_pp F^-1 e_p` is added to the weights that stay. As removing many together is not
the sum of removing each, it can be done in steps, with gradients at the pruned model.

Differs from the paper:
- Every matrix has a Fisher matrix of its own and loses the same share of its weights.
- The ridge is a share of the Fisher matrix's mean diagonal: gradients of a language model's loss are small, and a
  fixed ridge would hide them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from safetensors import safe_open
from torch import Tensor

from compressor.checkpoint.sink import save_tensors
from compressor.decision import Masked, Outcome
from compressor.errors import NumericalError, RecipeError, disk_error
from compressor.formats.base import QuantFormat
from compressor.methods.base import Layer, Stream
from compressor.plan import LayerPlan, Plan
from compressor.pruning.base import ScoreOptions, ScorePruningMethod
from compressor.pruning.fisher import CHUNK_BYTES, InverseFisher, OfLayer
from compressor.pruning.gradients import LayerGradient, MaskedModel, held_by_gradients
from compressor.pruning.mask_file import pack_mask, unpack_mask
from compressor.pruning.masks import keep_per_row, keep_per_tensor
from compressor.pruning.view import ModelView


class MFACOptions(ScoreOptions):
    """How much goes, and what the Fisher matrix is made of."""

    per: Literal["tensor", "row"] = Field(
        "tensor", description="among which weights the cheapest are sought; a pattern has its own groups"
    )
    samples: int = Field(64, ge=2, le=4096, description="windows of text, each of which gives one gradient")
    window: int = Field(128, ge=8, description="tokens in one of them; calibration windows are cut into these")
    block: int = Field(
        0, ge=0, description="consecutive inputs of a row that have a Fisher matrix of their own; 0: the whole matrix"
    )
    damping: float = Field(0.1, gt=0, description="ridge added to the Fisher matrix, as a share of its mean diagonal")
    steps: int = Field(1, ge=1, le=64, description="parts in which weights go, with gradients taken again each time")
    compensate: bool = Field(True, description="let the weights that stay make up for those that go")

    @model_validator(mode="after")
    def _one_step_for_a_pattern(self) -> MFACOptions:
        if self.pattern and self.steps > 1:
            raise ValueError("a pattern is chosen in one step: leave steps out")
        return self


class MFAC(ScorePruningMethod):
    """Prunes by the loss a second-order model expects, and moves the weights that stay."""

    name = "m-fac"
    summary = "M-FAC: the inverse of the empirical Fisher matrix says what a weight costs and how others make up for it"
    stream = Stream.NONE
    Options = MFACOptions

    def __init__(self, options: MFACOptions | None = None) -> None:
        super().__init__(options or MFACOptions())
        self.options: MFACOptions
        self._state: _State | None = None

    def stats(self, fmt: QuantFormat) -> tuple[()]:
        """Return nothing: the search looks at the data."""
        return ()

    def memory(self, layers: Sequence[LayerPlan]) -> int:
        """Return the bytes of a block's weights, before and after, of what gradients are made from, and of a chunk."""
        weights = sum(layer.ref.numel for layer in layers)
        largest = max((layer.ref.numel for layer in layers), default=0)
        seen = self.options.samples * self.options.window
        return held_by_gradients(layers, seen) + 4 * (weights + 4 * largest) + 2 * CHUNK_BYTES

    def operations(self, plan: Plan, tokens: int) -> float:
        """Return about how many operations the steps take."""
        weights = sum(layer.ref.numel for layer in plan.compressed)
        seen = self.options.samples * self.options.window
        # Forward; again in reverse; gradients of inputs. Gradients of weights are made up to four times.
        return self.options.steps * weights * (6.0 * seen + 4 * 2.0 * seen + 4.0 * self.options.samples**2)

    def fingerprint(self) -> None:
        """Return None: a run begins with no file."""

    def solve(self, layer: Layer, fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        """Hand out what was found."""
        assert self._state is not None
        keep, values = self._state.read(layer.ref.name)
        return Outcome({layer.ref.name: Masked(keep.to(layer.weight.device), values.to(layer.weight.device))})

    def search(self, view: ModelView) -> list[str]:
        """Prune step by step; a killed search goes on behind its last step."""
        options, windows = self.options, self._windows(view)
        state = self._state = _State(view.work / "m-fac", view.plan)
        losses: list[float] = []
        for step in range(state.done + 1, options.steps + 1):
            view.progress.stage(f"step {step} of {options.steps}: gradients of {len(windows)} windows")
            kept = (1 - options.share) ** (step / options.steps)
            losses.append(self._step(view, state, windows, step, 1 - kept))
        if not losses:
            return []
        # Each step sees the loss before it; what the last one did is seen by whoever evaluates the result.
        return [f"m-fac: loss {' -> '.join(f'{loss:.4f}' for loss in losses)} on its samples before each step"]

    def publish(self, out: Path) -> None:
        """Write nothing: all there is to know is in the weights."""

    def _step(self, view: ModelView, state: _State, windows: Tensor, step: int, sparsity: float) -> float:
        """Remove weights until their share is `sparsity`; returns the mean loss before."""
        model = MaskedModel.of(view, values=state.values)
        losses, layers = model.backward(windows, state.keep)
        block: int | None = None
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for layer, weight, gradient in layers:
            if block is not None and block != layer.ref.block:
                state.write(step, block, found)
                view.progress.stage(f"step {step} of {self.options.steps}: block {block} is decided")
                found = {}
            block = layer.ref.block
            before = state.keep(layer.ref.name).to(weight.device)
            found[layer.ref.name] = self.decide(layer.ref.name, weight, before, gradient, sparsity)
        if block is not None:
            state.write(step, block, found)
        state.finish(step)
        model.store.drop_all_but(None)
        return float(losses.double().mean())

    def decide(
        self, name: str, weight: Tensor, before: Tensor, gradient: LayerGradient, sparsity: float
    ) -> tuple[Tensor, Tensor]:
        """Remove weights of one matrix.

        Args:
            name: For messages.
            weight: `[out, in]` float32 as it is, zero where it is pruned.
            before: bool `[out, in]`, what was not pruned before.
            gradient: Of single samples at these weights.
            sparsity: Share that is to be pruned afterwards, unless the options name a pattern.

        Returns:
            The mask and the values, `[out, in]`.

        Raises:
            NumericalError: Gradients, or what comes out, are not finite.
        """
        weight = torch.where(before, weight, 0.0)
        gradients = OfLayer(gradient, None if before.all() else before)
        try:
            # No sample may reach an expert: every weight then costs what its size says.
            ridge = self.options.damping * gradients.mean_square() or 1.0
            fisher = InverseFisher.of(gradients, ridge, self.options.block or None)
            diagonal = fisher.diagonal()
        except NumericalError as error:
            raise NumericalError(f"{name}: {error.message}", error.hint) from error
        scores = (weight.square() / (2 * diagonal)).masked_fill(~before, -torch.inf)
        if self.options.groups:
            keep = self.options.groups.choose(scores)
        else:
            keep = (keep_per_row if self.options.per == "row" else keep_per_tensor)(scores, sparsity)
        values = weight
        if self.options.compensate:
            gone = before & ~keep
            values = weight + fisher.times(torch.where(gone, -weight / diagonal, 0.0))
        values = torch.where(keep, values, torch.zeros_like(values))
        if not torch.isfinite(values).all():
            raise NumericalError(f"{name}: weights that make up for others are not finite", "raise option damping")
        return keep, values

    def _windows(self, view: ModelView) -> Tensor:
        """Cut the calibration tokens into windows and pick some.

        Raises:
            RecipeError: There are not enough.
        """
        width, wanted = self.options.window, self.options.samples
        count = view.tokens.shape[1] // width
        windows = view.tokens[:, : count * width].reshape(-1, width) if count else view.tokens[:0]
        if len(windows) < wanted:
            raise RecipeError(
                f"m-fac needs {wanted} windows of {width} tokens, the calibration data are {len(windows)}",
                f"use --n-samples {-(-wanted // max(count, 1))}, or fewer with --option samples=N",
            )
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(view.seed))
        return windows[order[:wanted]]


class _State:
    """Masks and weights after the last whole step, on disk, one file per block."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder = folder
        self._block = {layer.ref.name: layer.ref.block for layer in plan.compressed}
        self._shape: dict[str, Any] = {layer.ref.name: layer.ref.matrix for layer in plan.compressed}
        self.done = max((int(p.name) for p in folder.glob("[0-9]*") if (p / "whole").is_file()), default=0)

    def keep(self, name: str) -> Tensor:
        """Return a tensor's mask; all True before the first step."""
        return self.read(name)[0] if self.done else torch.ones(self._shape[name], dtype=torch.bool)

    def values(self, name: str) -> Tensor | None:
        """Return a tensor's values; None before the first step."""
        return self.read(name)[1] if self.done else None

    def read(self, name: str) -> tuple[Tensor, Tensor]:
        """Return mask and values."""
        with safe_open(self._file(self.done, self._block[name]), framework="pt") as file:
            values = file.get_tensor(f"{name}.values")
            return unpack_mask(file.get_tensor(f"{name}.keep"), tuple(values.shape)), values

    def write(self, step: int, block: int, found: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Write what a step found for one block.

        Raises:
            ResourceError: The disk is full.
        """
        path, tensors = self._file(step, block), dict[str, Tensor]()
        for name, (keep, values) in found.items():
            tensors |= {f"{name}.keep": pack_mask(keep), f"{name}.values": values.cpu().contiguous()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(path, tensors)
        except OSError as error:
            raise disk_error(error, path) from error

    def finish(self, step: int) -> None:
        """Say that a step is whole, and forget the one before."""
        (self._file(step, 0).parent / "whole").touch()
        for path in sorted((self.folder / str(self.done)).glob("*")):
            path.unlink()
        self.done = step

    def _file(self, step: int, block: int) -> Path:
        return self.folder / str(step) / f"{block}.safetensors"
