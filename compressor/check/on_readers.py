"""Checks of what other programs can do with a checkpoint: stock transformers as measured, vLLM as its source says.

The table for transformers is of version 5.23 with compressed-tensors 0.20; `tests/e2e/test_load_matrix.py` executes it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from compressor.check.checkpoint import CONTAINER, Checkpoint, Module
from compressor.check.finding import Finding, error, info, warning
from compressor.check.scheme import NATIVE
from compressor.check.values import Facts
from compressor.errors import CompressorError
from compressor.formats.native import MODEL_TYPE_PREFIX

_MARLIN_GROUPS = (32, 64, 128)
_MARLIN_INPUTS = 128
_WRONG = "stock transformers drops the global scale of NVFP4 experts without a word and computes wrong"
_RAISES = "stock transformers raises on {} experts"


def transformers(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Schemes that stock transformers cannot load, or loads wrong."""
    if checkpoint.container == NATIVE:
        kind = checkpoint.config.get("model_type", f"{MODEL_TYPE_PREFIX}...")
        found = error if checkpoint.reader == "transformers" else info
        yield found("config.json", f"stock transformers raises on model_type {kind!r}", "`import compressor` first")
    if checkpoint.container != CONTAINER:
        return
    found = error if checkpoint.reader == "transformers" else warning
    plain, stacked = _by_scheme(checkpoint)
    for (group, text), modules in plain.items():
        if not _symmetric(modules[0]):
            said = "stock transformers raises on asymmetric weights (size of weight_zero_point)"
            yield found(f"config_groups.{group}", f"{text}, {len(modules)} layers: {said}", "use symmetric ones")
    for (group, text), modules in stacked.items():
        reason = _expert_problem(modules[0])
        if reason:
            hint = "load it with compressor.load, or compress the experts to mxfp4 or int4"
            yield found(f"config_groups.{group}", f"{text}, {len(modules)} expert weights: {reason}", hint)
    if (plain or stacked) and _dense_experts(checkpoint):
        yield found(
            "experts", "stock transformers raises on dense experts beside packed layers", "load it with compressor.load"
        )
    activations = [module for module in checkpoint.modules.values() if module.scheme and module.scheme.inputs]
    if activations:
        where, count = f"config_groups.{activations[0].group}", len(activations)
        yield info(
            where, f"{count} layers quantize their inputs: loading with dequantize=True drops that without a word"
        )
        if stacked:
            yield info(where, "stock transformers quantizes no inputs inside experts: scores there are weight-only")
    if len({str(module.scheme) for module in checkpoint.modules.values()}) > 1:
        yield info("config_groups", "several schemes: loading with dequantize=True fails or computes wrong")


def vllm(checkpoint: Checkpoint) -> Iterator[Finding]:
    """What vLLM needs, by its source: nothing here was run in it."""
    if checkpoint.container == NATIVE:
        yield error(
            "config.json", "vLLM cannot read native checkpoints", "compress to a format that compressed-tensors stores"
        )
    if checkpoint.container != CONTAINER:
        return
    seen: dict[tuple[str, str, str], list[Module]] = {}
    for module in checkpoint.modules.values():
        for finding in [*_vllm_module(module), *_vllm_signs(module, checkpoint.packed_facts.get(module.name))]:
            seen.setdefault((finding.severity, finding.message, finding.hint), []).append(module)
    for (severity, message, hint), modules in seen.items():
        pick = {"error": error, "warning": warning, "info": info}[severity]
        more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
        yield pick(f"{modules[0].name}{more}", message, hint)
    scheme = (checkpoint.section or {}).get("kv_cache_scheme")
    if scheme and not scheme.get("symmetric", True):
        yield error("kv_cache_scheme", "vLLM has no asymmetric key/value cache", "use a symmetric one")
    yield from _capability(checkpoint)


def _by_scheme(
    checkpoint: Checkpoint,
) -> tuple[dict[tuple[str, str], list[Module]], dict[tuple[str, str], list[Module]]]:
    """Sort modules by group and scheme: those of linear layers, and those of experts."""
    plain: dict[tuple[str, str], list[Module]] = {}
    stacked: dict[tuple[str, str], list[Module]] = {}
    model = checkpoint.model
    for module in checkpoint.modules.values():
        if module.scheme is None:
            continue
        name = f"{module.name}.weight"
        expert = ".experts." in name if isinstance(model, CompressorError) else model.stack_of(name) is not None
        part = stacked if expert else plain
        part.setdefault((str(module.group), str(module.scheme)), []).append(module)
    return plain, stacked


def _symmetric(module: Module) -> bool:
    return module.scheme is None or module.scheme.symmetric


def _dense_experts(checkpoint: Checkpoint) -> bool:
    model = checkpoint.model
    if isinstance(model, CompressorError):
        return False
    return any(checkpoint.owner(name) is None and model.stack_of(name) for name in checkpoint.tensors)


def _expert_problem(module: Module) -> str | None:
    """Return what stock transformers makes of experts stored this way, or None if it is exact."""
    scheme = module.scheme
    assert scheme is not None
    if scheme.container == "nvfp4-pack-quantized":
        return _WRONG
    if not scheme.symmetric:
        return _RAISES.format("asymmetric")
    if scheme.container == "mxfp8-quantized":
        return _RAISES.format("MXFP8")
    if scheme.container == "float-quantized" and scheme.strategy == "block":
        return _RAISES.format("block FP8")
    if scheme.container == "int-quantized":
        return _RAISES.format("INT8")
    return None


def _vllm_module(module: Module) -> Iterator[Finding]:
    scheme, shape = module.scheme, module.shape
    if scheme is None or shape is None:
        return
    if scheme.container == "pack-quantized":
        if scheme.bits not in (4, 8):
            said = f"{scheme}: releases of vLLM know 4 and 8 bits; its newest source lists 2 to 8"
            yield warning("", said, "use int4 or int8")
        if shape[1] % _MARLIN_INPUTS:
            said = f"{shape[1]} inputs: Marlin kernels want a multiple of {_MARLIN_INPUTS} on every rank"
            yield warning("", said, "another kernel may take it, or none; try it on the GPU it is for")
        if scheme.group_size is not None and scheme.group_size not in _MARLIN_GROUPS:
            said = f"{scheme}: Marlin kernels want groups of {', '.join(map(str, _MARLIN_GROUPS))}, or per channel"
            yield warning("", said, "use one of those group sizes")
        elif scheme.group_size not in (None, 128):
            yield info("", f"{scheme}: Machete kernels (Hopper) want groups of 128, or per channel; Marlin runs it")
    if scheme.container == "float-quantized" and scheme.strategy == "block":
        width = scheme.weights["block_structure"][1]
        if shape[1] % width:
            yield error("", f"{shape[1]} inputs are no multiple of the block width {width}", "use fp8 per channel")
    if scheme.container in ("mxfp6-pack-quantized", "mxfp8-quantized"):
        yield warning("", f"{scheme}: not known to run in vLLM", "try it there before relying on it")


def _vllm_signs(module: Module, facts: Facts | None) -> Iterator[Finding]:
    counts = facts.scales.get("weight_scale") if facts else None
    if counts and counts.negative and module.scheme and module.scheme.mirrors:
        said = "negative scales (mirrored grids): Marlin misreads them where VLLM_MARLIN_INPUT_DTYPE=int8 is set"
        yield info(
            "", said, "leave that variable alone (vllm-project/vllm issue 48905); other kernels only multiply by them"
        )


def _capability(checkpoint: Checkpoint) -> Iterator[Finding]:
    """What runs below full speed on which GPU."""
    schemes = {str(module.scheme): module.scheme for module in checkpoint.modules.values() if module.scheme}
    here = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    at = "" if here is None else f"; this machine has {here[0]}.{here[1]}"
    for text, scheme in schemes.items():
        if scheme.container == "float-quantized":
            yield info(text, f"needs compute capability 8.9 for FP8 products, runs weight-only below{at}")
        if scheme.container == "nvfp4-pack-quantized" and scheme.inputs is not None:
            yield info(text, f"needs compute capability 10.0 for FP4 products, runs weight-only below{at}")
