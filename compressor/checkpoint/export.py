"""The files around the weights: `config.json` with its quantization section, tokenizer, licence.

Two containers. compressed-tensors is what stock transformers and vLLM read; which keys its config needs, and which make
loading fail or silently go wrong, is what this file knows. Results it cannot express are native: their `model_type` is
unknown to stock transformers, which then raises instead of loading random weights.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from compressor.checkpoint.cuts import CUTS, cuts_of
from compressor.checkpoint.source import INDEX, Source
from compressor.errors import disk_error
from compressor.formats.activations import INPUT_FORMATS
from compressor.formats.base import QuantFormat
from compressor.formats.native import MODEL_TYPE_PREFIX, QUANT_METHOD, native_entry
from compressor.formats.pruned import PRUNED
from compressor.formats.schemes import KV_SCHEME
from compressor.plan import Kind, LayerPlan, Operand, Plan

NOT_COPIED_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt"),
    *(".h5", ".msgpack", ".gguf", ".onnx", ".pb", ".tflite"),
)
NOT_COPIED = ("config.json", INDEX, "README.md", ".gitattributes")
MAX_SIDE_FILE_BYTES = 256 << 20

FormatOf = Callable[[LayerPlan], QuantFormat]


def result_config(source: dict[str, Any], plan: Plan, format_of: FormatOf, model: nn.Module) -> dict[str, Any]:
    """Return the `config.json` of a result.

    Args:
        source: The original's config.
        plan: What was done.
        format_of: Gives the format of a compressed layer.
        model: The model (on meta): every linear layer it has must be either compressed or ignored by name.
    """
    config = dict(source)
    section = config.pop("quantization_config", None)
    cuts = cuts_of(source)
    if all(layer.format == PRUNED for layer in plan.compressed):
        return config if cuts is None else {**config, "quantization_config": section}  # dense like its source
    if cuts is None and not is_native(plan, format_of):
        config["quantization_config"] = compressed_tensors_config(plan, format_of, model)
        return config
    base = source.get("base_model_type") or source.get("model_type")
    config["base_model_type"], config["model_type"] = base, MODEL_TYPE_PREFIX + str(base)
    config["quantization_config"] = native_config(plan, format_of)
    if cuts is not None:
        config["quantization_config"][CUTS] = dict(cuts)
    return config


def is_native(plan: Plan, format_of: FormatOf) -> bool:
    """Return whether something has no place in compressed-tensors: format, inputs, attention, convolution, table.

    Nor have experts that were one tensor on disk: stock transformers looks for no others.
    """
    if any(layer.ref.split or layer.ref.kind in (Kind.CONV, Kind.EMBEDDING) for layer in plan.compressed):
        return True
    if len({(layer.format, layer.group_size, layer.inputs) for layer in plan.compressed if layer.ref.role}) > 1:
        return True  # readers choose one scheme for the experts of all layers
    if plan.operand_format(Operand.QUERY_KEY):
        return True
    return any(format_of(layer).container is None or not is_plain(layer.steps) for layer in plan.compressed)


def is_plain(steps: Sequence[dict[str, object]]) -> bool:
    """Return whether compressed-tensors can say what happens to an input: nothing, or rounding to a format it has."""
    known = [fmt.describe() for fmt in INPUT_FORMATS.values() if not fmt.native]
    return not steps or (len(steps) == 1 and steps[0] in known)


def native_config(plan: Plan, format_of: FormatOf) -> dict[str, Any]:
    """Return the `quantization_config` of a native result: every packed module by name, with its format."""
    formats = {layer.ref.module: format_of(layer) for layer in plan.compressed}
    entries = list(dict.fromkeys(formats.values()))
    treatments = [list(layer.steps) for layer in plan.compressed if layer.steps]
    inputs = [steps for index, steps in enumerate(treatments) if steps not in treatments[:index]]
    rounded = [site for site in plan.sites if site.format and site.operand is Operand.QUERY_KEY]
    attention = {"format": rounded[0].format, "modules": [site.module for site in rounded]} if rounded else None
    return {
        **({"attention": attention} if attention else {}),
        "quant_method": QUANT_METHOD,
        "version": 1,
        "formats": [native_entry(fmt) for fmt in entries],
        "modules": {module: entries.index(fmt) for module, fmt in sorted(formats.items())},
        "inputs": inputs,
        "module_inputs": {
            layer.ref.module: inputs.index(list(layer.steps)) for layer in plan.compressed if layer.steps
        },
    }


def compressed_tensors_config(plan: Plan, format_of: FormatOf, model: nn.Module) -> dict[str, Any]:
    """Return the `quantization_config` of a result that compressed-tensors can express.

    One format: a single group that targets every linear layer, and an ignore list. Several: one group each, whose
    targets are exact names; experts go by a pattern, as readers look for the word in one.
    """
    by_scheme: dict[tuple[QuantFormat, str | None], list[LayerPlan]] = {}
    for layer in plan.compressed:
        by_scheme.setdefault((format_of(layer), layer.inputs), []).append(layer)
    # Readers give dense experts the scheme of a group that targets every Linear, whatever the ignore list says.
    by_name = len(by_scheme) > 1 or any(p.ref.kind is Kind.EXPERT and not p.format for p in plan.layers)
    groups = {}
    for index, ((fmt, inputs), layers) in enumerate(by_scheme.items()):
        groups[f"group_{index}"] = {
            "targets": target_names(layers) if by_name else ["Linear"],
            "format": fmt.container,
            "weights": fmt.scheme(),
            "input_activations": INPUT_FORMATS[inputs].arguments() if inputs else None,
            "output_activations": None,
        }
    containers = {str(fmt.container) for fmt, _ in by_scheme}
    compressed = {layer.ref.module for layer in plan.compressed}
    in_memory = {layer.ref.param.removesuffix(".weight") for layer in plan.compressed}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - in_memory
    dense = [layer.ref for layer in plan.layers if not layer.format]
    kept = {ref.module for ref in dense if ref.kind in (Kind.LINEAR, Kind.EXPERT, Kind.ROUTER)}
    return {
        "quant_method": "compressed-tensors",
        "version": version("compressed-tensors"),
        "format": containers.pop() if len(containers) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted((linears | kept) - compressed),
        "kv_cache_scheme": dict(KV_SCHEME) if plan.operand_format(Operand.KV_CACHE) else None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def target_names(layers: list[LayerPlan]) -> list[str]:
    """Return targets for exactly these layers: names, and one pattern per expert stack."""
    targets = []
    for layer in layers:
        if layer.ref.kind is Kind.EXPERT:
            targets.append("re:" + re.escape(layer.ref.name.partition("experts.")[0]) + r"experts\..*")
        else:
            targets.append(layer.ref.module)
    return list(dict.fromkeys(targets))


def copy_side_files(source: Source, out: Path, code: bool = False) -> list[str]:
    """Copy tokenizer, processor, chat template, generation config and licence; returns their names.

    Weights and pickles are left behind, and so is code, unless `code` says that the result cannot load without it.

    Raises:
        ResourceError: The disk is full.
    """
    copied = []
    for path in sorted(source.path.iterdir()):
        skip = (
            not path.is_file()
            or path.name in NOT_COPIED
            or path.suffix in NOT_COPIED_SUFFIXES
            or (path.suffix == ".py" and not code)
            or path.name.startswith((".", "compress_"))
            or path.stat().st_size > MAX_SIDE_FILE_BYTES
        )
        if skip:
            continue
        try:
            shutil.copyfile(path, out / path.name)
        except OSError as error:
            raise disk_error(error, out / path.name) from error
        copied.append(path.name)
    return copied
