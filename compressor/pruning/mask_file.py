"""Masks and what a search knows about them, in one file that is whole or not there.

A safetensors file: for each tensor its mask and its free weights, one bit each, and the weights at rest; the metadata
hold the rest as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compressor.checkpoint.sink import save_tensors
from compressor.errors import CheckpointError, disk_error
from compressor.pruning.candidates import TensorState

KIND = "compressor-masks-1"


def pack_mask(mask: Tensor) -> Tensor:
    """Return the bits of a bool tensor, row-major, uint8 `[ceil(numel / 8)]`."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1), bitorder="little"))


def unpack_mask(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the bool tensor of this shape whose bits these are."""
    count = int(np.prod(shape))
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count, bitorder="little").astype(bool)).view(shape)


def write_masks(path: Path, states: Mapping[str, TensorState], notes: Mapping[str, Any]) -> None:
    """Write states and notes, plain data, atomically.

    Raises:
        ResourceError: The disk is full.
    """
    tensors: dict[str, Tensor] = {}
    for name, state in states.items():
        tensors |= {
            f"{name}.keep": pack_mask(state.keep),
            f"{name}.free": pack_mask(state.free),
            f"{name}.rested_pruned": state.rested_pruned,
            f"{name}.rested_kept": state.rested_kept,
        }
    shapes = {name: list(state.keep.shape) for name, state in states.items()}
    # One entry: a file with several would not have the same bytes in every process.
    text = json.dumps({"kind": KIND, "shapes": shapes, **notes}, sort_keys=True, allow_nan=False)
    part = path.with_name(path.name + ".part")
    try:
        save_tensors(part, tensors, metadata={"masks": text})
        part.replace(path)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        part.unlink(missing_ok=True)


def read_masks(path: Path) -> tuple[dict[str, TensorState], dict[str, Any]]:
    """Read what `write_masks` wrote.

    Raises:
        CheckpointError: It is not such a file, or it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            notes = json.loads((file.metadata() or {}).get("masks", "{}"))
            if notes.pop("kind", None) != KIND:
                raise CheckpointError(f"{path}: holds no masks", "give the compress_icbs.state of an earlier result")
            states = {}
            for name, shape in notes.pop("shapes").items():
                parts = {key: file.get_tensor(f"{name}.{key}") for key in ("keep", "free")}
                rested = {key: file.get_tensor(f"{name}.{key}") for key in ("rested_pruned", "rested_kept")}
                states[name] = TensorState(
                    unpack_mask(parts["keep"], tuple(shape)), unpack_mask(parts["free"], tuple(shape)), **rested
                )
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: no readable masks: {error}", "give a compress_icbs.state file") from error
    return states, notes
