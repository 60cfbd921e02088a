"""From a recipe and file headers to a plan: an action or a reason for every tensor. Reads no weights.

All refusals happen here, before any work: shapes a format cannot store, kinds of weight nothing handles yet, patterns
that match nothing, fused neighbours that would end up with different schemes.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from compressor.checkpoint.blocks import BlockSequence
from compressor.checkpoint.fused_experts import stack_of
from compressor.checkpoint.skeleton import Skeleton
from compressor.checkpoint.source import DTYPES, Source
from compressor.errors import RecipeError, UnsupportedError
from compressor.fold_plan import mark_rewritten, mark_statistics, plan_folds, rounds_routers, unfolded_notes
from compressor.formats import BUILDERS, FIXED_GROUP, get_format, parse_group_size
from compressor.formats.activations import get_attention_format
from compressor.formats.base import QuantFormat, group_setting
from compressor.input_plan import input_notes, plan_inputs, scales_inputs, stored_as, with_inputs
from compressor.methods.base import Method
from compressor.methods.scaling import moves_factors
from compressor.plan import OUTSIDE, ActivationSite, Kind, LayerPlan, Operand, Plan, WeightRef, Where
from compressor.pruning import get_method
from compressor.pruning.view import SearchMethod
from compressor.readers import check_experts, check_fused, check_kv_cache, reader_notes
from compressor.recipe import Override, Recipe
from compressor.weights import can_be_chosen, make_ref, natural_key, reason_to_keep

NOT_ASKED_FOR = {
    Operand.QUERY_KEY: "--attention was not given",
    Operand.PROBABILITY_VALUE: "--attention was not given",
    Operand.KV_CACHE: "--kv-cache was not given",
}


_SEARCHED = {"fpq4": "fp4", "fpq6": "fp6", "fpq8": "fp8-searched"}
"""LLM-FP4's formats of inputs -> those of weights with as many bits."""


def default_format(recipe: Recipe, is_moe: bool) -> str:
    """Return the format of a recipe without one: int4, for nupes power4, for fp4 nvfp4 (mxfp4 if there are experts).

    Where inputs are rounded too, it is the one that goes with them: int8, fp8, nvfp4, ...
    Stock transformers drops the global scale of NVFP4 experts without a word, so NVFP4 is not a default for them.
    """
    if recipe.inputs in _SEARCHED:
        return _SEARCHED[recipe.inputs]
    if recipe.method == "fp4":
        return "mxfp4" if is_moe else "nvfp4"
    if recipe.method == "nupes":
        return "power4"
    if recipe.inputs is None or recipe.inputs.startswith("int8"):
        return "int4" if recipe.inputs is None else "int8"
    if recipe.inputs.startswith("fp8"):
        return "fp8"
    return recipe.inputs if recipe.inputs in BUILDERS else "int4"


def make_plan(recipe: Recipe, source: Source, skeleton: Skeleton, blocks: BlockSequence) -> Plan:
    """Decide what happens to every tensor.

    Raises:
        RecipeError: Unknown names, patterns that match nothing, an impossible pair of method and format.
        UnsupportedError: The architecture is not supported, or nothing in it can be compressed.
    """
    method = get_method(recipe.method, recipe.options)
    trace = blocks.trace()
    recipe = with_inputs(recipe, method)
    format_name, group_size = stored_as(
        recipe.format or default_format(recipe, bool(trace.experts)), recipe.group_size, recipe.inputs
    )
    fmt = get_format(format_name, parse_group_size(format_name, group_size), DTYPES[source.dtype])
    targets = skeleton.targets({name: info.shape for name, info in source.tensors.items()})
    refs = [make_ref(info, targets[name], skeleton, blocks, trace) for name, info in source.tensors.items()]
    refs.sort(key=lambda ref: (ref.block if ref.block != OUTSIDE else len(blocks.names), natural_key(ref.name)))
    overrides = match_overrides(recipe.overrides, refs, skeleton.model.all_tied_weights_keys)
    layers = [plan_layer(ref, source, method, fmt, overrides.get(ref.name), recipe) for ref in refs]
    layers = rejoin_stacks(layers, source)
    if not any(layer.format for layer in layers):
        raise nothing_to_compress(layers)
    found = plan_folds(method, layers, blocks, has_kv_cache=recipe.kv_cache is not None)
    layers = plan_inputs(recipe, layers, DTYPES[source.dtype], method, found)
    scaled = {layer.ref.name for layer in layers if scales_inputs(layer)}
    found = replace(found, unfolded={name: why for name, why in found.unfolded.items() if name not in scaled})
    check_fused(layers)
    check_experts(layers)
    layers = mark_rewritten(layers, found.folds, rounds_routers(method))
    if recipe.batch_norm:
        layers = mark_statistics(layers, recipe.batch_norm)
    if recipe.kv_cache:
        check_kv_cache(skeleton.model, layers, recipe.kv_cache, DTYPES[source.dtype])
    return Plan(
        architecture=type(skeleton.model).__name__,
        layers=tuple(layers),
        sites=tuple(activation_sites(skeleton.model, blocks, recipe)),
        blocks=blocks.names,
        method=recipe.method,
        format=format_name,
        default_dtype=source.dtype,
        peak_bytes=estimate_peak(layers, method, fmt, len(blocks.names)),
        notes=(
            *reader_notes(layers),
            *outside_notes(skeleton.model, layers),
            *unfolded_notes(method, found),
            *input_notes(layers),
        ),
        folds=found.folds,
        unfolded=found.unfolded,
        inputs=recipe.inputs,
        batch_norm=recipe.batch_norm,
    )


def plan_layer(
    ref: WeightRef, source: Source, method: Method, default: QuantFormat, override: Override | None, recipe: Recipe
) -> LayerPlan:
    """Give one tensor a format or a reason."""
    before = source.tensors[ref.name].nbytes
    reason = override.keep if override and override.keep else reason_to_keep(ref)
    if reason is not None and override and override.format and can_be_chosen(ref):
        return plan_outside(ref, override, before, DTYPES[source.dtype])
    if reason is not None:
        if override and override.format:
            raise RecipeError(
                f"--set {override.match}={override.format} matches {ref.name}, which stays dense: {reason}",
                "make the pattern match layers of the blocks only",
            )
        return LayerPlan(ref, None, None, before, before, reason)
    assert ref.matrix is not None
    fmt, by_flag = default, recipe.group_size is not None
    if ref.kind is Kind.CONV:
        if why := convolution_stays(ref, method, fmt, recipe):
            return LayerPlan(ref, None, None, before, before, why)
        if not by_flag and fmt.name not in FIXED_GROUP:  # windows of 3 x 3 do not divide into usual groups
            fmt = get_format(fmt.name, None, DTYPES[source.dtype])
    if override and override.format:
        by_flag = override.group_size is not None
        name, size = stored_as(override.format, override.group_size, recipe.inputs)
        fmt = get_format(name, parse_group_size(name, size), DTYPES[source.dtype])
    check_possible(ref, method, fmt, by_flag)
    after = sum(slot.nbytes for slot in fmt.layout(ref.matrix).values())
    return LayerPlan(ref, fmt.name, group_setting(fmt), before, after, None)


def rejoin_stacks(layers: list[LayerPlan], source: Source) -> list[LayerPlan]:
    """Return the layers with experts that all stay dense as the one tensor they are stored in."""
    compressed = {layer.ref.owner for layer in layers if layer.ref.split and layer.format}
    out: dict[str, LayerPlan] = {}
    for layer in layers:
        ref, stack = layer.ref, stack_of(source, layer.ref.name)
        if stack is None or ref.owner in compressed:
            out[ref.name] = layer
            continue
        whole = replace(ref, name=stack.name, where=Where(), shape=stack.shape, matrix=None, split=False)
        whole = replace(whole, fused_with=stack.name)
        out.setdefault(stack.name, LayerPlan(whole, None, None, stack.nbytes, stack.nbytes, layer.kept_because))
    return list(out.values())


def convolution_stays(ref: WeightRef, method: Method, fmt: QuantFormat, recipe: Recipe) -> str | None:
    """Return why a convolution stays dense under this method, or None."""
    if recipe.inputs is not None:
        return "convolution: its inputs cannot be rounded"
    if moves_factors(method):
        return f"convolution: {method.name} moves factors between norms and linear layers only"
    if ref.conv_groups > 1 and method.stats(fmt):
        return f"convolution: its {ref.conv_groups} groups read channels of their own; {method.name} wants statistics"
    return None


def plan_outside(ref: WeightRef, override: Override, before: int, dtype: torch.dtype) -> LayerPlan:
    """Give a tensor outside the blocks the format its name was given.

    Raises:
        RecipeError: The format cannot store it.
    """
    assert override.format is not None
    assert ref.matrix is not None
    fmt = get_format(override.format, parse_group_size(override.format, override.group_size), dtype)
    if refusal := fmt.refuse(ref.matrix):
        raise RecipeError(f"{ref.module}: {refusal}", "give it another format or group size with --set")
    after = sum(slot.nbytes for slot in fmt.layout(ref.matrix).values())
    return LayerPlan(ref, fmt.name, group_setting(fmt), before, after, None)


def outside_notes(model: PreTrainedModel, layers: list[LayerPlan]) -> tuple[str, ...]:
    """Say what becomes of tensors outside the blocks that get a format.

    Raises:
        RecipeError: Their module does more than look up or multiply.
    """
    notes = []
    for ref in (layer.ref for layer in layers if layer.format and layer.ref.block == OUTSIDE):
        kind = type(model.get_submodule(ref.owner))
        if kind not in (nn.Embedding, nn.Linear):
            raise RecipeError(
                f"{ref.module}: its class {kind.__name__} is no plain table or linear layer", "leave it out of --set"
            )
        tied = [name for name, other in model.all_tied_weights_keys.items() if other == ref.param]
        shared = f", which {', '.join(tied)} shares" if tied else ""
        notes.append(f"{ref.name}{shared}: rounded by itself, without calibration data")
    return tuple(notes)


def check_possible(ref: WeightRef, method: Method, fmt: QuantFormat, group_size_by_flag: bool) -> None:
    """Raise if the method or the format refuses this weight: nothing is left out without the user saying so.

    Raises:
        RecipeError: The method never works with this format, or a group size from a flag does not divide.
        UnsupportedError: The format's own group size does not divide what the checkpoint holds.
    """
    refusal = method.refuse(ref, fmt)
    if refusal:
        raise RecipeError(refusal, "see: compress list methods, compress list formats")
    refusal = fmt.refuse(ref.matrix or ref.shape)
    if not refusal:
        return
    width = (ref.matrix or ref.shape)[-1]
    fits = [str(size) for size in (128, 64, 32, 16, 8) if width % size == 0]
    ways = [f'--skip "*.{ref.module.rpartition(".")[2]}"']
    if fmt.name not in FIXED_GROUP:
        ways.insert(0, f"--group-size {' or '.join([*fits[:2], 'channel'])}")
    error = RecipeError if group_size_by_flag else UnsupportedError
    raise error(f"{ref.module}: {refusal}", f"use {', or '.join(ways)}")


def match_overrides(
    overrides: Iterable[Override], refs: list[WeightRef], tied: Mapping[str, str] | None = None
) -> dict[str, Override]:
    """Return the last override that matches, by tensor name; a glob may match the tensor's or the module's name.

    Args:
        overrides: In the order in which they were given.
        refs: All tensors on disk.
        tied: Parameters that are not stored -> those they share values with.

    Raises:
        RecipeError: A pattern matches nothing.
    """
    chosen: dict[str, Override] = {}
    for override in overrides:
        hits = [
            ref for ref in refs if any(fnmatch.fnmatchcase(name, override.match) for name in (ref.name, ref.module))
        ]
        if override.format:  # a pattern like *.mlp.* means the weights in it, not their biases and norms
            hits = [ref for ref in hits if reason_to_keep(ref) is None] or hits
        if not hits:
            for target, origin in (tied or {}).items():
                if any(fnmatch.fnmatchcase(name, override.match) for name in (target, target.removesuffix(".weight"))):
                    raise RecipeError(
                        f"{override.match!r} matches {target}, which is tied to {origin} and not stored",
                        f"--set {origin.removesuffix('.weight')}={override.format or 'fp4'} rounds the table of both",
                    )
            names = sorted({ref.module.rpartition(".")[2] for ref in refs if ref.kind in (Kind.LINEAR, Kind.EXPERT)})
            flag = "--set" if override.format else "--skip"
            raise RecipeError(
                f"{flag} {override.match!r} matches no tensor", f"names end in: {', '.join(names)}; try '*.{names[0]}'"
            )
        chosen.update({ref.name: override for ref in hits})
    return chosen


def nothing_to_compress(layers: list[LayerPlan]) -> UnsupportedError:
    """Build the error for a plan that changes nothing, naming the most common reason."""
    weights = [layer for layer in layers if layer.ref.kind is not Kind.OTHER]
    if not weights:
        return UnsupportedError("the checkpoint has no weight matrices")
    reason, count = Counter(layer.kept_because for layer in weights).most_common(1)[0]
    first = next(layer for layer in weights if layer.kept_because == reason)
    return UnsupportedError(
        f"nothing to compress: {first.ref.name}: {reason} ({count} of {len(weights)} weights)",
        "see what would happen to each tensor with --dry-run",
    )


def activation_sites(model: nn.Module, blocks: BlockSequence, recipe: Recipe) -> Iterable[ActivationSite]:
    """Yield the operands of every innermost attention module.

    Raises:
        RecipeError: Operands are to be rounded to what is no format for them; see `get_attention_format`.
    """
    if recipe.attention is not None:
        get_attention_format(recipe.attention)
    attention = [name for name, module in model.named_modules() if type(module).__name__.endswith("Attention")]
    for name in attention:
        block = blocks.index_of(name)
        if block is None or any(other.startswith(f"{name}.") for other in attention):
            continue
        for operand in Operand:
            format_name = recipe.kv_cache if operand is Operand.KV_CACHE else recipe.attention
            yield ActivationSite(name, operand, block, format_name, None if format_name else NOT_ASKED_FOR[operand])


def estimate_peak(layers: list[LayerPlan], method: Method, fmt: QuantFormat, n_blocks: int) -> int:
    """Estimate peak bytes of resident tensors: the largest block in float32 with its statistics, or the embeddings.

    Leaves out the interpreter and its libraries (about 0.5 GB).
    """
    resident = [layer.ref for layer in layers if layer.ref.block == OUTSIDE and layer.ref.part is None]
    outside = sum((4 + DTYPES[ref.dtype].itemsize) * ref.numel for ref in resident)
    largest = 0
    for index in range(n_blocks):
        block = [layer for layer in layers if layer.ref.block == index]
        weights = sum(4 * layer.ref.numel + layer.bytes_before for layer in block)
        widths = {layer.ref.fed_by: layer.ref.matrix[1] for layer in block if layer.format and layer.ref.matrix}
        statistics = sum(2 * 4 * spec.size(width) for width in widths.values() for spec in method.stats(fmt))
        # A solver holds the weight, a candidate, two errors and a product of the layer it works on.
        solver = 5 * 4 * max((layer.ref.numel for layer in block if layer.format), default=0)
        if isinstance(method, SearchMethod):
            solver += method.memory([layer for layer in block if layer.format])
        largest = max(largest, weights + statistics + solver)
    return max(largest, outside)
