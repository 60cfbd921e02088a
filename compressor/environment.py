"""What a run needs from its surroundings: a device, a tokenizer, the versions of the libraries."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from compressor import __version__
from compressor.checkpoint.skeleton import quiet
from compressor.errors import CheckpointError, RecipeError


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


def versions() -> dict[str, str]:
    """Return the versions a result depends on."""
    names = ("torch", "transformers", "compressed-tensors", "safetensors")
    return {"compressor": __version__, "python": platform.python_version(), **{n: version(n) for n in names}}
