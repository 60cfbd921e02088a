"""Planning a run from headers: what would happen, and everything known to be wrong before weights are read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from compressor import output as output_files
from compressor.checkpoint.blocks import BlockSequence
from compressor.checkpoint.fused_experts import rejoined, split_experts
from compressor.checkpoint.resolve import resolve_model
from compressor.checkpoint.skeleton import Skeleton
from compressor.checkpoint.source import Source
from compressor.environment import pick_device
from compressor.errors import RecipeError
from compressor.formats import get_format, parse_group_size
from compressor.formats.activations import get_input_format
from compressor.formats.pruned import PRUNED
from compressor.methods.base import Method, RouterMethod, Stream
from compressor.plan import Kind, Plan
from compressor.planner import make_plan
from compressor.pruning import get_method
from compressor.pruning.base import PruneOptions
from compressor.pruning.view import SearchMethod
from compressor.ranks import join
from compressor.recipe import Override, Recipe


@dataclass(frozen=True)
class Job:
    """A planned run: everything known from headers, nothing computed yet."""

    recipe: Recipe
    out: Path
    source: Source
    skeleton: Skeleton
    blocks: BlockSequence
    method: Method
    plan: Plan


def prepare(
    recipe: Recipe, out: Path | None = None, *, device: str = "auto", force: bool = False, label: str | None = None
) -> Job:
    """Plan a run from headers alone: what `--dry-run` shows.

    Args:
        recipe: What is wanted.
        out: Folder to write; None for one named after model, method and format.
        device: Where to compute.
        force: Overwrite an earlier result.
        label: What stands for the format in that name; None for the format.

    Raises:
        CompressorError: Anything that can be known to be wrong before reading weights.
    """
    method = get_method(recipe.method, recipe.options)
    if recipe.inputs is not None:
        get_input_format(recipe.inputs)
    for name, group_size in [(recipe.format, recipe.group_size), *((o.format, o.group_size) for o in recipe.overrides)]:
        if name is not None:
            get_format(name, parse_group_size(name, group_size), torch.bfloat16)
    ranks = join()
    with ranks.leader_first():
        path, revision = resolve_model(recipe.model, recipe.trust_remote_code, recipe.allow_pickle)
    if out is not None:
        output_files.check_apart(out, path)
        if ranks.leads:
            output_files.check_output(out, force)
    source = Source.open(path, recipe.model, revision)
    skeleton = Skeleton.build(path, pick_device(device), recipe.trust_remote_code)
    if not isinstance(getattr(method, "options", None), PruneOptions):  # pruned weights stay in the files they are in
        source = split_experts(source, skeleton)
    blocks = BlockSequence.find(skeleton.model)
    plan = make_plan(recipe, source, skeleton, blocks)
    source = rejoined(source, [layer.ref.name for layer in plan.layers])
    resolved = recipe.model_copy(update={"format": plan.format, "inputs": plan.inputs})
    if out is None:
        out = default_output(resolved, label or plan.format)
        if ranks.leads:
            output_files.check_output(out, force)
    job = Job(resolved, out, source, skeleton, blocks, method, plan)
    if needs_data(method, recipe):
        check_window(job)
    tokens = recipe.calibration.n_samples * recipe.calibration.seq_len
    if needs_data(method, recipe) and expert_tokens(job) > tokens:
        raise RecipeError(
            f"--min-expert-tokens {expert_tokens(job)}: there are {tokens} calibration tokens in all",
            "raise --n-samples or --seq-len",
        )
    return job


def make_overrides(formats: Mapping[str, str], skip: Sequence[str]) -> tuple[Override, ...]:
    """Turn `--set GLOB=FORMAT[:GROUP]` and `--skip GLOB` into overrides; skips come last, so they win."""
    chosen = []
    for match, text in formats.items():
        name, found, group_size = text.partition(":")
        chosen.append(Override(match=match, format=name, group_size=group_size if found else None))
    return (*chosen, *(Override(match=match, keep=f"left out by --skip {match}") for match in skip))


def needs_data(method: Method, recipe: Recipe) -> bool:
    """Return whether a run looks at calibration data."""
    static = recipe.inputs is not None and get_input_format(recipe.inputs).static
    looks = method.stream is not Stream.NONE or isinstance(method, SearchMethod)
    asked = (recipe.kv_cache, recipe.attention, recipe.batch_norm)
    return looks or any(setting is not None for setting in asked) or static


def check_window(job: Job) -> None:
    """Make sure that the model can read the windows of calibration text."""
    limit = getattr(job.skeleton.model.config.get_text_config(), "max_position_embeddings", None)
    if limit and job.recipe.calibration.seq_len > limit:
        raise RecipeError(
            f"--seq-len {job.recipe.calibration.seq_len}: the model reads at most {limit} tokens",
            f"use --seq-len {limit}",
        )


def expert_tokens(job: Job) -> int:
    """Return how many tokens every expert is to be calibrated on; 0 for models without experts.

    A method may wish for some shares of what an expert would get of one window if the router were even.
    """
    experts = [layer.ref for layer in job.plan.compressed if layer.ref.kind is Kind.EXPERT]
    if not experts:
        return 0
    spec, wish = job.recipe.calibration, 0
    top_k = getattr(job.skeleton.model.config.get_text_config(), "num_experts_per_tok", None)
    if isinstance(job.method, RouterMethod) and top_k:
        n_experts = job.skeleton.model.get_parameter(experts[0].param).shape[0]
        wish = min(int(top_k / n_experts * spec.seq_len * job.method.balance), spec.n_samples * spec.seq_len)
    return max(spec.expert_tokens, wish)


def default_output(recipe: Recipe, format_name: str) -> Path:
    """Return `./<name>-<method>-<format>`, and the format of inputs behind it if they are rounded.

    In the place of a format, pruned checkpoints say how much is gone: `50`, or `2of4`.
    """
    name = Path(recipe.model.partition("@")[0]).resolve().name.removesuffix(".gguf")
    name = re.sub(r"[^\w.-]+", "-", name)
    words = [name, recipe.method]
    pruning = getattr(get_method(recipe.method, recipe.options), "options", None)
    if isinstance(pruning, PruneOptions):
        words.append(str(pruning.groups).replace(":", "of") if pruning.groups else f"{100 * pruning.sparsity:g}")
    words += [] if format_name == PRUNED else [format_name]
    words += [recipe.inputs] if recipe.inputs else []
    return Path("-".join([*words, *([f"attention-{recipe.attention}"] if recipe.attention else [])]))
