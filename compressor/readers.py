"""What the readers of a checkpoint (stock transformers, vLLM) demand of a plan, and what they make of it silently."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from compressor.errors import RecipeError, UnsupportedError
from compressor.formats import ASYMMETRIC, FIXED_GROUP, get_format
from compressor.formats.pruned import PRUNED
from compressor.plan import OUTSIDE, Kind, LayerPlan


def check_fused(layers: list[LayerPlan]) -> None:
    """Refuse a plan whose fused sets mix schemes: runtimes need one for all of a set.

    Raises:
        RecipeError: Names the two layers that disagree.
    """
    first: dict[str, LayerPlan] = {}
    for layer in layers:
        if layer.ref.matrix is None or layer.ref.block == OUTSIDE:
            continue
        other = first.setdefault(layer.ref.fused_with, layer)
        if scheme_of(other) != scheme_of(layer):
            last = layer.ref.fused_with.rpartition(".")[2].split("+")
            raise RecipeError(
                f"{other.ref.module} is {scheme_of(other)} but {layer.ref.module} is {scheme_of(layer)}, and runtimes "
                "fuse them",
                "treat all of them alike: " + " ".join(f'"*.{name}"' for name in last),
            )


def check_experts(layers: list[LayerPlan]) -> None:
    """Refuse a plan whose experts mix schemes inside a layer, or packed with dense ones: readers choose one for all.

    Raises:
        RecipeError: Names the two weights that disagree.
    """
    first: dict[str, LayerPlan] = {}
    for layer in layers:
        if layer.ref.kind is not Kind.EXPERT or layer.ref.matrix is None:
            continue
        beside, start = first.setdefault(layer.ref.owner, layer), next(iter(first.values()))
        for other, alike in (
            (beside, scheme_of(beside) == scheme_of(layer)),
            (start, (start.format is None) == (layer.format is None)),
        ):
            if not alike:
                raise RecipeError(
                    f"{other.ref.module} is {scheme_of(other)} but {layer.ref.module} is {scheme_of(layer)}: readers "
                    "need one scheme for all experts",
                    'treat all experts of a layer alike: "*.experts.*"',
                )


def mixes_experts(layers: Iterable[LayerPlan]) -> bool:
    """Return whether experts of different layers have different schemes, which only this package's loader reads."""
    return len({scheme_of(layer) for layer in layers if layer.ref.kind is Kind.EXPERT and layer.format}) > 1


def check_kv_cache(model: PreTrainedModel, layers: list[LayerPlan], name: str, dtype: torch.dtype) -> None:
    """Refuse a quantized key/value cache where there is no cache, or no place to say so.

    Raises:
        RecipeError: The result would be a native checkpoint.
        UnsupportedError: The model keeps no cache.
    """
    if not model.can_generate():
        raise UnsupportedError(f"--kv-cache {name}: {type(model).__name__} keeps no cache", "leave --kv-cache out")
    for layer in layers:
        if layer.format and get_format(layer.format, layer.group_size, dtype).container is None:
            raise RecipeError(
                f"--kv-cache {name}: checkpoints with format {layer.format} cannot say so", "use another format"
            )


def scheme_of(layer: LayerPlan) -> str:
    """Return what a layer becomes, as people write it: `int4 in groups of 64`, `nvfp4`, `dense`."""
    if layer.format in (None, PRUNED):
        return "dense"  # zeros are values like any other to a reader
    inputs = f" with {layer.inputs} inputs" if layer.inputs else ""
    assert layer.format is not None
    if layer.format in FIXED_GROUP:
        return layer.format + inputs
    if isinstance(layer.group_size, int):
        return f"{layer.format} in groups of {layer.group_size}{inputs}"
    return f"{layer.format} per {layer.group_size or 'channel'}{inputs}"


def reader_notes(layers: list[LayerPlan]) -> tuple[str, ...]:
    """Return what users of stock transformers must know; `tests/e2e/test_load_matrix.py` is the proof."""
    if any(layer.ref.split and layer.format for layer in layers):
        return (
            "experts that are one tensor in the source are stored one by one, which compressor.load alone reads; "
            "stock transformers raises",
        )
    if mixes_experts(layers):
        return ("experts of different layers have different formats, which compressor.load alone reads",)
    experts = {layer.format for layer in layers if layer.ref.kind is Kind.EXPERT}
    ours = "load this checkpoint with compressor.load, or use --format mxfp4"
    if "nvfp4" in experts:
        return (
            f"stock transformers drops the global scale of NVFP4 experts without a word and computes wrong: {ours}",
        )
    if note := zero_point_note(layers):
        return (note,)
    if experts & {"fp8-block", "mxfp8", "int8-bytes"}:
        return (f"stock transformers raises on {' and '.join(sorted(map(str, experts)))} experts: {ours}",)
    if None in experts and any(layer.format not in (None, PRUNED) for layer in layers):
        return ("stock transformers raises on dense experts beside packed layers: load it with compressor.load",)
    return ()


def zero_point_note(layers: list[LayerPlan]) -> str | None:
    """Return what stock transformers makes of asymmetric integers, or None if it reads all there are.

    Its model has room for unpacked zero points alone; only those that belong to a whole matrix are stored unpacked.
    """
    remedy = "load this checkpoint with compressor.load, or use symmetric integers"
    asymmetric = [layer for layer in layers if layer.format in ASYMMETRIC]
    experts = [layer for layer in asymmetric if layer.ref.kind is Kind.EXPERT]
    if any(layer.group_size == "tensor" for layer in experts):
        return f"stock transformers drops the zero points of experts without a word and computes wrong: {remedy}"
    if experts:
        return f"stock transformers raises on experts with zero points: {remedy}"
    if all(layer.group_size == "tensor" for layer in asymmetric):
        return None
    schemes = {scheme_of(layer) for layer in layers if layer.format}
    if len(schemes) > 1 or any(layer.ref.kind is Kind.EXPERT for layer in layers):
        return f"stock transformers raises on zero points: {remedy}"
    return (
        "stock transformers raises on zero points unless it decompresses while it loads: from_pretrained(..., "
        f"quantization_config=CompressedTensorsConfig(dequantize=True)); else {remedy}"
    )
