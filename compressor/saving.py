"""Writing a model with fewer channels so that it loads again: weights as safetensors, cuts as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressor.checkpoint.config import model_class, quiet, read_config
from compressor.checkpoint.cuts import CUTS, difference, widths
from compressor.checkpoint.export import copy_side_files
from compressor.checkpoint.sink import Sink, write_json
from compressor.checkpoint.skeleton import names_on_disk
from compressor.checkpoint.source import DTYPES, Source
from compressor.formats.base import Slot
from compressor.formats.native import MODEL_TYPE_PREFIX, QUANT_METHOD
from compressor.report import Row

KEPT = "compress_cuts.json"
"""Which of its original outputs every layer kept; for people and tools, loading does not need it."""


def uncut(path: Path, trust_remote_code: bool = False) -> nn.Module:
    """Return the model as its class builds it, parameters on meta: what cuts are counted from."""
    config = read_config(path, trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(), quiet():
        model: nn.Module = model_class(path, config, trust_remote_code)._from_config(config)
    return model


def stored_tensors(model: PreTrainedModel, source: Source) -> dict[str, Tensor]:
    """Return the model's tensors by their names on disk, in the dtypes the source stores them in."""
    tied = set(model.all_tied_weights_keys) - set(source.tensors)  # stored once, under the other name
    tensors = names_on_disk(model, {name: value for name, value in model.state_dict().items() if name not in tied})
    default = source.dtype
    out = {}
    for name, tensor in tensors.items():
        info = source.tensors.get(name)
        dtype = DTYPES[info.dtype if info is not None else default] if tensor.is_floating_point() else tensor.dtype
        out[name] = tensor.detach().to(dtype).cpu().contiguous()
    return out


def stored_shapes(model: PreTrainedModel, source: Source) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the model's tensors as it is now, by their names on disk."""
    return {name: tuple(tensor.shape) for name, tensor in stored_tensors(model, source).items()}


def rows(
    model: PreTrainedModel, source: Source, before: Mapping[str, tuple[int, ...]], uncut: tuple[str, str]
) -> list[Row]:
    """Return what a report says of every tensor of a cut model.

    Args:
        model: The cut model.
        source: What it was.
        before: Its `stored_shapes` before the cut.
        uncut: Action and reason of tensors whose shape stayed.
    """
    found = []
    for name, tensor in stored_tensors(model, source).items():
        size, was, now = tensor.element_size(), before[name], tuple(tensor.shape)
        action, reason = uncut if was == now else ("rewritten", f"{list(was)} -> {list(now)}")
        found.append(Row(name, action, reason, torch.Size(was).numel() * size, tensor.numel() * size))
    return found


def round_to_stored(model: PreTrainedModel, source: Source) -> None:
    """Give parameters and buffers the values they will have when they come back from disk."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                info = source.tensors.get(name)
                tensor.copy_(tensor.to(DTYPES[info.dtype if info is not None else source.dtype]))


def cut_config(source: Mapping[str, Any], cuts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `config.json` of a cut checkpoint: a native one, which stock transformers raises on.

    Args:
        source: The original's config; it may be cut already.
        cuts: Counted from what the class builds.
    """
    base = source.get("base_model_type") or source.get("model_type")
    return {
        **source,
        "base_model_type": base,
        "model_type": MODEL_TYPE_PREFIX + str(base),
        "quantization_config": {
            "quant_method": QUANT_METHOD,
            "version": 1,
            "formats": [],
            "modules": {},
            CUTS: dict(cuts),
        },
    }


def write(
    model: PreTrainedModel,
    source: Source,
    out: Path,
    kept: Mapping[str, list[int]],
    trust_remote_code: bool = False,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write weights, cuts and side files; `config.json`, without which nothing loads, comes last. Returns the cuts.

    Args:
        model: The cut model.
        source: What it was.
        out: The folder.
        kept: Layer -> which of its original outputs it kept.
        trust_remote_code: The result needs code that comes with the checkpoint.
        config: A `config.json` from which the class builds the model as it is, without cuts; None where there is none.

    Raises:
        ResourceError: The disk is full.
    """
    tensors = stored_tensors(model, source)
    sink = Sink(out, {name: Slot(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    sink.allocate()
    sink.write(tensors)
    sink.publish()
    copy_side_files(source, out, code=trust_remote_code)
    cuts = {} if config is not None else difference(widths(uncut(source.path, trust_remote_code)), model)
    write_json(out / KEPT, {"version": 1, "layers": {name: list(channels) for name, channels in kept.items()}})
    write_json(out / "config.json", config if config is not None else cut_config(source.config, cuts))
    return cuts
