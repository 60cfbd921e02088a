"""What is known before heads and neurons are measured: the model, its units, what they cost, and the budget."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compressor import __version__
from compressor import output as output_files
from compressor.calibration.dataset import CalibrationSet, build
from compressor.checkpoint.blocks import BlockSequence
from compressor.checkpoint.resolve import resolve_model
from compressor.checkpoint.skeleton import Skeleton
from compressor.checkpoint.source import Source
from compressor.environment import load_tokenizer, pick_device
from compressor.errors import RecipeError, UnsupportedError
from compressor.structured.budget import check_reach
from compressor.structured.recipe import StructuredRecipe, build_method
from compressor.structured.units import Part, Unit, count_macs, count_weights, find_parts, units_of


@dataclass(frozen=True)
class Costs:
    """What the units cost, in multiply-adds or in weights.

    Attributes:
        dense: All blocks, uncut.
        share: Of that, what may stay.
        length: Tokens of the sequence whose multiply-adds are meant; None counts weights.
    """

    dense: int
    share: float
    length: int | None

    def of(self, units: tuple[Unit, ...]) -> list[int]:
        """Return what each unit costs."""
        return [unit.weights if self.length is None else unit.macs(self.length) for unit in units]

    def limit(self, units: tuple[Unit, ...]) -> int:
        """Return what the units that stay may cost together."""
        fixed = self.dense - sum(self.of(units))
        return int(self.share * self.dense) - fixed


@dataclass(frozen=True)
class StructuredJob:
    """A planned run: what can be cut is known from headers, no weight was read."""

    recipe: StructuredRecipe
    out: Path
    source: Source
    skeleton: Skeleton
    blocks: BlockSequence
    method: Any
    parts: tuple[Part, ...]
    costs: Costs
    events: tuple[str, ...]


def prepare(
    recipe: StructuredRecipe, out: Path | None = None, *, device: str = "auto", force: bool = False
) -> StructuredJob:
    """Find out what can be cut, and whether the budget is within reach.

    Raises:
        CompressorError: Anything that can be known to be wrong before weights are read.
    """
    method = build_method(recipe)
    out = out if out is not None else default_output(recipe)
    path, revision = resolve_model(recipe.model, recipe.trust_remote_code, recipe.allow_pickle)
    output_files.check_apart(out, path)
    output_files.check_output(out, force)
    source = Source.open(path, recipe.model, revision)
    if source.decoders:
        raise UnsupportedError(f"{recipe.model}: is quantized", "remove heads and neurons first, then quantize")
    skeleton = Skeleton.build(path, pick_device(device), recipe.trust_remote_code)
    blocks = BlockSequence.find(skeleton.model)
    if skeleton.model.main_input_name != "input_ids":
        raise UnsupportedError(
            f"{recipe.model}: {type(skeleton.model).__name__} reads no text", f"{recipe.method} prunes language models"
        )
    trace = blocks.trace()
    parts = find_parts(blocks, method.options.group, recipe.skip)
    units = units_of(parts)
    if recipe.macs is not None:
        length = method.options.length
        costs = Costs(count_macs(blocks, length), recipe.macs, length)
        flag = f"--macs {recipe.macs:g}"
    else:
        assert recipe.sparsity is not None
        costs = Costs(count_weights(blocks), 1 - recipe.sparsity, None)
        flag = f"--sparsity {recipe.sparsity:g}"
    check_reach(units, costs.of(units), costs.dense - sum(costs.of(units)), costs.dense, costs.share, flag)
    _check_window(skeleton, recipe)
    events = list(source.notes)
    if trace.experts:
        events.append(f"{len(trace.experts)} stacks of experts stay whole: only what lies around them is cut")
    return StructuredJob(recipe, out, source, skeleton, blocks, method, parts, costs, tuple(events))


def calibrate(job: StructuredJob) -> CalibrationSet:
    """Read the text that is looked at.

    Raises:
        CompressorError: Unreadable, too little, or not this model's vocabulary.
    """
    tokenizer = load_tokenizer(job.source.path, job.recipe.trust_remote_code)
    vocabulary = job.skeleton.model.config.get_text_config().vocab_size
    return build(job.recipe.calibration, tokenizer, vocabulary, job.recipe.seed)


def windows(job: StructuredJob, tokens: torch.Tensor) -> torch.Tensor:
    """Cut calibration tokens `[n_samples, seq_len]` into the windows that are looked at, `[samples, window]`.

    Raises:
        RecipeError: There are not enough.
    """
    options = job.method.options
    count = tokens.shape[1] // options.window
    found = tokens[:, : count * options.window].reshape(-1, options.window) if count else tokens[:0]
    if len(found) < options.samples:
        raise RecipeError(
            f"{job.recipe.method} needs {options.samples} windows of {options.window} tokens, the calibration data are "
            f"{len(found)}",
            "raise --n-samples or --seq-len, or use fewer with --option samples=N and window=N",
        )
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(job.recipe.seed))
    return found[order[: options.samples]]


def digest_parts(job: StructuredJob, calibration: CalibrationSet) -> dict[str, Any]:
    """Return what determines the bytes of a result, by name."""
    recipe = job.recipe.model_dump(mode="json", exclude={"model", "calibration"})
    return {
        **{f"recipe.{key}": value for key, value in recipe.items()},
        "calibration": calibration.fingerprint,
        "source": job.source.fingerprint,
        "device": job.skeleton.device.type,
        "package version": __version__,
        "torch version": torch.__version__,
    }


def default_output(recipe: StructuredRecipe) -> Path:
    """Return `./<name>-<method>-macs<percent kept>`, or `...-<percent of the weights removed>`."""
    name = Path(recipe.model.partition("@")[0]).resolve().name.removesuffix(".gguf")
    name = re.sub(r"[^\w.-]+", "-", name)
    much = f"{recipe.sparsity * 100:g}" if recipe.sparsity is not None else f"macs{(recipe.macs or 0) * 100:g}"
    return Path(f"{name}-{recipe.method}-{much}")


def _check_window(skeleton: Skeleton, recipe: StructuredRecipe) -> None:
    limit = getattr(skeleton.model.config.get_text_config(), "max_position_embeddings", None)
    if limit and recipe.calibration.seq_len > limit:
        raise RecipeError(
            f"--seq-len {recipe.calibration.seq_len}: the model reads at most {limit} tokens", f"use --seq-len {limit}"
        )
