"""What a run needs from its surroundings: a device, a tokenizer, the versions of the libraries."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from compressor import __version__
from compressor.checkpoint.config import quiet
from compressor.checkpoint.source import read_json
from compressor.errors import CheckpointError, RecipeError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Names of `--dtype`."""


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """Load a checkpoint's tokenizer; code that comes with it runs only if it is trusted.

    Raises:
        CheckpointError: It has none, or it is unreadable.
    """
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises whatever the files provoke
        raise CheckpointError(f"{path}: no usable tokenizer: {str(error).splitlines()[0]}", "copy it there") from error


def pick_device(name: str) -> torch.device:
    """Turn `--device` into a device; `auto` is CUDA where there is one.

    Raises:
        RecipeError: Unknown or absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"--device {name}: {str(error).splitlines()[0]}", "try --device cpu") from error
    return device


def pick_dtype(name: str, folder: Path, device: torch.device) -> torch.dtype:
    """Turn `--dtype` into a dtype; `auto` is what the checkpoint says it is stored in, float32 if it says nothing.

    On a CPU `auto` takes bfloat16 for float16, which its kernels for packed weights do not multiply.

    Raises:
        RecipeError: No dtype a model computes in.
        CheckpointError: The folder has no config.json, or an unreadable one.
    """
    if name != "auto":
        if name not in DTYPES:
            raise RecipeError(f"--dtype {name}", f"choose one of: auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    config = read_json(folder / "config.json")
    places = [config, *(part for part in config.values() if isinstance(part, dict))]
    stored = next((str(place[key]) for place in places for key in ("dtype", "torch_dtype") if place.get(key)), "")
    dtype = DTYPES.get(stored.removeprefix("torch."), torch.float32)
    return torch.bfloat16 if dtype == torch.float16 and device.type == "cpu" else dtype


def versions() -> dict[str, str]:
    """Return the versions a result depends on."""
    names = ("torch", "transformers", "compressed-tensors", "safetensors")
    return {"compressor": __version__, "python": platform.python_version(), **{n: version(n) for n in names}}
