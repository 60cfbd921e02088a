"""Writing a compressed checkpoint the short way: straight from a small model in memory, whole and in one file.

The engine writes real checkpoints. This is an independent second reading of the on-disk format, for tests and for
authors of formats who want a checkpoint without a method, a plan or calibration data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressor.checkpoint.config import quiet
from compressor.checkpoint.skeleton import Skeleton
from compressor.errors import UnsupportedError
from compressor.formats.base import QuantFormat

_FUSED = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))


def write_compressed(model: PreTrainedModel, folder: Path, fmt: QuantFormat) -> list[str]:
    """Round every linear layer of the model's blocks to nearest and write a compressed-tensors checkpoint.

    One-row layers, routers, heads and layers the format refuses stay dense and are listed in `ignore`.

    Args:
        model: A small model in memory; not changed. Its dtype is the checkpoint's.
        folder: Where to write; files in it are overwritten.
        fmt: A format with a compressed-tensors scheme.

    Returns:
        Names on disk of the modules that were compressed.

    Raises:
        UnsupportedError: The container cannot express the format.
    """
    scheme = fmt.scheme()
    if scheme is None or fmt.container is None:
        raise UnsupportedError(f"{fmt.name}: compressed-tensors cannot express this format", "write it natively")
    with quiet():
        model.save_pretrained(folder)
    dense = load_file(folder / "model.safetensors")
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    owners = _owners(model, dense, linears)
    # A subclass of Linear is a router or another layer with a forward of its own.
    own = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear
    }
    chosen = [
        name.removesuffix(".weight")
        for name, owner in owners.items()
        if owner not in own and _is_candidate(name, dense[name], fmt)
    ]
    rest = linears - {owners[f"{module}.weight"] for module in chosen}
    ignore = rest | {name.removesuffix(".weight") for name, owner in owners.items() if owner in rest}
    tensors = {name: tensor for name, tensor in dense.items() if name.removesuffix(".weight") not in chosen}
    for siblings in _fused(chosen):
        weights = {module: dense[f"{module}.weight"].float() for module in siblings}
        shared = fmt.fit_global(list(weights.values()))
        for module, weight in weights.items():
            qparams = fmt.fit(weight, shared)
            for suffix, tensor in fmt.pack(fmt.encode(weight, qparams), qparams).tensors.items():
                tensors[f"{module}.{suffix}"] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = _config(fmt, scheme, sorted(ignore))
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return chosen


def _owners(model: PreTrainedModel, dense: dict[str, Tensor], linears: set[str]) -> dict[str, str]:
    """Map weights on disk of plain linear layers and experts to the module in memory they end up in."""
    targets = Skeleton(model, torch.device("cpu")).targets({name: tuple(value.shape) for name, value in dense.items()})
    owners = {}
    for name, target in targets.items():
        module = str(target.param).rpartition(".")[0]
        if name.endswith(".weight") and (module in linears or target.where.expert is not None):
            owners[name] = module
    return owners


def _is_candidate(name: str, tensor: Tensor, fmt: QuantFormat) -> bool:
    """Tell whether a linear weight lies inside a numbered block and can be stored."""
    return re.search(r"\.\d+\.", name) is not None and tensor.shape[0] > 1 and fmt.refuse(tuple(tensor.shape)) is None


def _fused(modules: list[str]) -> list[list[str]]:
    """Group modules that runtimes fuse; every other module is a group of its own."""
    groups: dict[tuple[str, str], list[str]] = {}
    for module in modules:
        head, _, leaf = module.rpartition(".")
        family = next((names[0] for names in _FUSED if leaf in names), leaf)
        groups.setdefault((head, family), []).append(module)
    return list(groups.values())


def _config(fmt: QuantFormat, scheme: dict[str, object], ignore: list[str]) -> dict[str, object]:
    """Return the `quantization_config` object."""
    group = {
        "targets": ["Linear"],
        "format": fmt.container,
        "weights": scheme,
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": fmt.container,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }


def dense_twin(model: PreTrainedModel, weights: dict[str, Tensor], folder: Path) -> None:
    """Write `model` as a dense checkpoint with some of its tensors replaced.

    Args:
        model: The model.
        weights: Name on disk -> value; shapes as in the model, any floating dtype.
        folder: Where to write.
    """
    with quiet():
        model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    unknown = sorted(set(weights) - set(tensors))
    assert not unknown, unknown
    tensors |= {name: value.to(tensors[name].dtype) for name, value in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Let `change` edit the config of a checkpoint in place."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Let `change` edit the tensors of a checkpoint of one file in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
