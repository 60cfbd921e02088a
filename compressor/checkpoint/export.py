"""The files around the weights: `config.json` with its quantization section, tokenizer, recipe.

The container is compressed-tensors, which stock transformers and vLLM read; what its config must say, and which keys
make loading fail or silently go wrong, is what this file knows.
"""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from compressor.checkpoint.source import INDEX, Source
from compressor.errors import UnsupportedError, disk_error
from compressor.formats.base import QuantFormat
from compressor.plan import Kind, Plan

WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".pb",
    ".tflite",
)
NOT_COPIED = ("config.json", INDEX, "README.md", ".gitattributes")
MAX_SIDE_FILE_BYTES = 256 << 20


def quantization_config(plan: Plan, fmt: QuantFormat, model: nn.Module) -> dict[str, Any]:
    """Return the `quantization_config` of a result with one format.

    Args:
        plan: What was done.
        fmt: The format of the compressed layers.
        model: The model (on meta): every linear layer it has must be either compressed or ignored by name.

    Raises:
        UnsupportedError: The container cannot express the format.
    """
    scheme = fmt.scheme()
    if scheme is None or fmt.container is None:
        raise UnsupportedError(f"format {fmt.name} has no place in a compressed-tensors checkpoint")
    compressed = {layer.ref.module for layer in plan.compressed}
    in_memory = {layer.ref.param.removesuffix(".weight") for layer in plan.compressed}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - in_memory
    kept = {
        layer.ref.module for layer in plan.layers if not layer.format and layer.ref.kind in (Kind.LINEAR, Kind.ROUTER)
    }
    return {
        "quant_method": "compressed-tensors",
        "version": version("compressed-tensors"),
        "format": fmt.container,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": fmt.container,
                "weights": scheme,
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": sorted((linears | kept) - compressed),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def copy_side_files(source: Source, out: Path) -> list[str]:
    """Copy tokenizer, processor, chat template, generation config and licence; returns their names.

    Weights, pickles and code are left behind.

    Raises:
        ResourceError: The disk is full.
    """
    copied = []
    for path in sorted(source.path.iterdir()):
        skip = (
            not path.is_file()
            or path.name in NOT_COPIED
            or path.suffix in (*WEIGHT_SUFFIXES, ".py")
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
