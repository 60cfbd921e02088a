"""iCBS: improve a mask step by step by swaps that a second-order model of the loss chooses.

"iCBS: iterative Combinatorial Brain Surgeon", arXiv 2411.17796. Kept weights never change; a block of weights of one
tensor is decided anew from gradients of single samples at the current pruned model (`quadratic.py`), with as many
weights pruned as before. A run can be stopped after any step and has a valid mask.

Differs from the paper:
- One sweep over the model decides a block in every layer. The layers share one quadratic model at one point: what the
  blocks decided before in the sweep are expected to do to each sample's loss enters the next one's energy, and what is
  to be gained in all is spread over the layers.
- Swaps count only if they lower the loss on samples held back from the search; if not, half of them, the best ones,
  are tried, then a quarter, then none.
- The starting Wanda mask is that of the sequential method, behind pruned blocks.
- Patterns N:M swap within groups.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from compressor.decision import Outcome
from compressor.errors import CheckpointError, RecipeError
from compressor.files import sha256_file
from compressor.formats.base import QuantFormat
from compressor.methods.base import Layer, Stream
from compressor.plan import Kind, LayerPlan, Plan
from compressor.pruning.base import PruneOptions, PruningMethod, masked
from compressor.pruning.candidates import Choice, TensorState
from compressor.pruning.gradients import Target, held_by_gradients
from compressor.pruning.mask_file import read_masks, write_masks
from compressor.pruning.starts import STARTS, Start
from compressor.pruning.step import Settings
from compressor.pruning.sweeps import Sweeps, generator
from compressor.pruning.view import ModelView

STATE = "compress_icbs.state"
"""The masks of a result, and what continuing the run needs."""

CURVE = "compress_icbs.json"
"""What every sweep did: losses, swaps, seconds."""


class ICBSOptions(PruneOptions):
    """How much goes, from which mask, and how hard to look."""

    start: str = Field(
        "wanda",
        description="the mask to begin with: wanda, magnitude, random, or the compress_icbs.state of an earlier "
        "result, whose run goes on",
    )
    sweeps: int = Field(
        6, ge=0, le=100_000, description="passes over the model, each of which decides one block per layer"
    )
    block: int = Field(4096, ge=2, le=1_048_576, description="weights of a layer that a sweep decides")
    samples: int = Field(64, ge=2, description="windows of text a sweep takes gradients of")
    window: int = Field(128, ge=8, description="tokens in one of them; calibration windows are cut into these")
    held_back: int = Field(32, ge=1, description="windows that judge a sweep and are never taken gradients of")
    target: Target = Field(
        "text",
        description="what the loss measures: text, its next tokens; original, the KL divergence to the original model",
    )
    alpha: float = Field(0.75, ge=0, le=2, description="factor of the gradient in the quadratic model")
    ridge: float = Field(0.001, ge=0, description="price of a squared change of a weight")
    restarts: int = Field(4, ge=1, le=1000, description="tries per block")
    solver: str = Field("descend", pattern="^(descend|anneal)$", description="descend, or anneal on the block's matrix")
    tabu: float = Field(0.40, ge=0, lt=1, description="share of the free weights that rest after they were looked at")
    fixed_pruned: float = Field(0.42, ge=0, lt=1, description="share of the pruned weights that stay pruned for good")
    fixed_kept: float = Field(0.35, ge=0, lt=1, description="share of the kept weights that stay kept for good")
    guard: bool = Field(True, description="swaps count only if they lower the loss on the held-back windows")
    joint: bool = Field(True, description="all layers of a sweep share one model of the loss, instead of one each")

    @field_validator("solver")
    @classmethod
    def _small_enough(cls, solver: str, info: Any) -> str:
        if solver == "anneal" and info.data.get("block", 0) > 2048:
            raise ValueError("anneal builds the block's matrix: use block=2048 or smaller")
        return solver

    @property
    def choice(self) -> Choice:
        """How blocks are chosen."""
        return Choice(self.block, self.tabu, self.fixed_pruned, self.fixed_kept)

    @property
    def settings(self) -> Settings:
        """What the steps have in common."""
        groups = self.groups.of if self.groups else None
        solver: Any = self.solver
        return Settings(self.choice, self.alpha, self.ridge, solver, self.restarts, groups=groups)


class ICBS(PruningMethod):
    """Searches masks over the whole model, then applies them layer by layer."""

    name = "icbs"
    summary = "iCBS: improve a mask by swaps that a second-order model of the loss chooses; any time, any budget"
    stream = Stream.NONE
    Options = ICBSOptions

    def __init__(self, options: ICBSOptions | None = None) -> None:
        super().__init__(options or ICBSOptions())
        self.options: ICBSOptions
        self.states: dict[str, TensorState] = {}
        self.curve: list[dict[str, Any]] = []
        self.done = 0

    def stats(self, fmt: QuantFormat) -> tuple[()]:
        """Return nothing: the search looks at the data."""
        return ()

    def memory(self, layers: Sequence[LayerPlan]) -> int:
        """Return the bytes of a block's original weights, and of its layers' inputs and output gradients."""
        gathered = 2 * self.options.block * self.options.window  # rows and columns of one sample's block
        return held_by_gradients(layers, self.options.samples * self.options.window) + 4 * gathered

    def operations(self, plan: Plan, tokens: int) -> float:
        """Return about how many operations a search takes, given the calibration tokens."""
        options = self.options
        weights = sum(layer.ref.numel for layer in plan.compressed)
        head = sum(layer.ref.numel for layer in plan.layers if layer.ref.kind is Kind.EMBEDDING)
        start = 4.0 * tokens * weights if options.start == "wanda" else 0.0  # observed, and run again when pruned
        # Forward; again in reverse; gradients of inputs; of weights. The head once each way.
        sweep = options.samples * options.window * (8.0 * weights + 6.0 * head)
        judging = options.held_back * options.window * 2.0 * (weights + head)
        return start + options.sweeps * (sweep + judging) + judging

    def fingerprint(self) -> str | None:
        """Return the hash of the file the run begins with; None if it begins with a one-shot mask."""
        if self.options.start in STARTS:
            return None
        path = Path(self.options.start)
        if not path.is_file():
            raise RecipeError(
                f"option start: {self.options.start} is neither a file nor one of {', '.join(STARTS)}",
                f"give the {STATE} of an earlier result",
            )
        return sha256_file(path)

    def solve(self, layer: Layer, fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        """Apply the mask that was found."""
        keep = self.states[layer.ref.name].keep.to(layer.weight.device)
        return Outcome({layer.ref.name: masked(layer.weight, keep)})

    def search(self, view: ModelView) -> list[str]:
        """Find masks: the starting ones, then sweep by sweep; a killed search goes on behind its last sweep."""
        windows = self._windows(view)
        held, pool = windows[: self.options.held_back], windows[self.options.held_back :]
        saved = view.work / STATE
        if saved.is_file():
            self._restore(saved, view)
            view.progress.stage(f"continuing the search: {self.done} sweeps are done")
        else:
            self._start(view)
        options, last = self.options, self._begun + self.options.sweeps
        how = options.target, options.joint, options.guard
        with Sweeps(self.states, options.settings, view, *how) as search:
            if not self.curve:
                before = search.losses(held)
                self.curve.append({"number": 0, "held_back": before, "seconds": 0.0})
                self._save(saved)
            while self.done < last:
                sweep = search.sweep(self.done, self._draw(pool, view.seed), held, float(self.curve[-1]["held_back"]))
                self.done += 1
                self.curve.append(asdict(sweep))
                self._save(saved)
                view.progress.stage(
                    f"sweep {self.done} of {last}: held-back loss {sweep.held_back:.4f}, {sweep.found} swaps, "
                    f"{sweep.taken:.0%} taken, {sweep.seconds:.1f}s"
                )
        undone = sum(1 for entry in self.curve[1:] if entry["taken"] == 0)
        skipped = sum(entry["skipped"] for entry in self.curve[1:])
        first, now = self.curve[0]["held_back"], self.curve[-1]["held_back"]
        events = [f"icbs: held-back loss {first:.4f} -> {now:.4f} in {self.done} sweeps, {undone} of them undone"]
        return events + ([f"icbs: {skipped} times a tensor had no candidates or no finite gradient"] if skipped else [])

    def publish(self, out: Path) -> None:
        """Write masks and curve into the finished folder."""
        self._save(out / STATE)

    def _windows(self, view: ModelView) -> Tensor:
        """Cut the calibration tokens into windows, in an order drawn once: held-back ones first.

        Raises:
            RecipeError: There are not enough.
        """
        tokens, width = view.tokens, self.options.window
        count = tokens.shape[1] // width
        windows = tokens[:, : count * width].reshape(-1, width) if count else tokens[:0]
        needed = self.options.held_back + self.options.samples
        if len(windows) < needed:
            raise RecipeError(
                f"icbs needs {needed} windows of {width} tokens, the calibration data are {len(windows)}",
                f"use --n-samples {-(-needed // max(count, 1))}, or fewer with --option samples=N and held_back=N",
            )
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(view.seed))
        return windows[order]

    def _draw(self, pool: Tensor, seed: int) -> Tensor:
        """Return the samples of the next sweep; every window comes once before any comes again."""
        per_round = len(pool) // self.options.samples
        turn, place = divmod(self.done, per_round)
        order = torch.randperm(len(pool), generator=generator(seed, "round", turn))
        return pool[order[place * self.options.samples : (place + 1) * self.options.samples]]

    def _start(self, view: ModelView) -> None:
        """Make the starting masks, or read them."""
        names = {layer.ref.name: layer.ref.matrix for layer in view.plan.compressed}
        if self.options.start in STARTS:
            view.progress.stage(f"starting masks: {self.options.start}")
            start = Start(self.options.start, self.options, self.options.choice)
            view.one_shot(start)
            self.states = {name: start.found[name] for name in names}
            return
        self._restore(Path(self.options.start), view)
        self._begun = self.done

    _begun = 0

    def _restore(self, path: Path, view: ModelView) -> None:
        """Read masks and curve.

        Raises:
            CheckpointError: They are of another model, or another sparsity.
        """
        self.states, notes = read_masks(path)
        self.done, self._begun, self.curve = notes["done"], notes["begun"], notes["curve"]
        seconds = path.with_name(CURVE)
        if seconds.is_file():
            told = json.loads(seconds.read_text(encoding="utf-8"))["curve"]
            self.curve = told if len(told) == len(self.curve) else self.curve
        expected = {layer.ref.name: layer.ref.matrix for layer in view.plan.compressed}
        found = {name: tuple(state.keep.shape) for name, state in self.states.items()}
        if found != expected:
            odd = sorted(set(found.items()) ^ set(expected.items()), key=str)[0]
            raise CheckpointError(
                f"{path}: its masks do not fit the model: {odd[0]} {odd[1]}", "is it another model's?"
            )
        if notes.get("target", "text") != self.options.target:
            raise CheckpointError(
                f"{path}: its losses are of target={notes.get('target', 'text')}, asked for is {self.options.target}",
                "keep the target of the run that goes on",
            )
        share = 1 - sum(int(s.keep.sum()) for s in self.states.values()) / sum(
            s.keep.numel() for s in self.states.values()
        )
        if abs(share - self.options.share) > 0.02:
            raise CheckpointError(
                f"{path}: its masks remove {share:.1%} of the weights, asked for is {self.options.share:.1%}",
                f"use --sparsity {share:.2f}, or another start",
            )

    def _save(self, path: Path) -> None:
        """Write masks, and the curve beside them; times are in the curve alone, so that equal runs have equal masks."""
        told = [{key: value for key, value in entry.items() if key != "seconds"} for entry in self.curve]
        notes = {"done": self.done, "begun": self._begun, "target": self.options.target, "curve": told}
        write_masks(path, self.states, notes)
        record = {
            "options": self.options.model_dump(),
            "curve": self.curve,
            "kept": {name: int(state.keep.sum()) for name, state in self.states.items()},
        }
        path.with_name(CURVE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
