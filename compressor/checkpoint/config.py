"""What transformers makes of a checkpoint's `config.json`: the config, the class of the model; and its silence."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel

from compressor.checkpoint.building import check_numbers
from compressor.checkpoint.custom_code import custom_class, needs_code
from compressor.checkpoint.source import read_json
from compressor.errors import CheckpointError, UnsupportedError


def model_class(path: Path, config: Any, trust_remote_code: bool = False) -> type[PreTrainedModel]:
    """Return the class named by `architectures` in a config.

    Raises:
        CheckpointError: None is named.
        UnsupportedError: transformers has no such class, and code of the checkpoint's own may not run.
    """
    names = config.architectures
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str):
        raise CheckpointError(f"{path / 'config.json'}: names no architecture", 'add "architectures": ["ClassName"]')
    content = read_json(path / "config.json")
    if needs_code(content, path, trust_remote_code):
        return custom_class(path, content)
    found = getattr(transformers, str(name), None)
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        raise UnsupportedError(
            f"{path}: architecture {name!r} is not in transformers {transformers.__version__}",
            "check `architectures` in config.json, or upgrade transformers",
        )
    return found


def read_config(path: Path, trust_remote_code: bool = False) -> Any:
    """Read a model's config with transformers; code from the checkpoint runs only if it must and may.

    Raises:
        CheckpointError: transformers rejects it.
        UnsupportedError: It needs code of the checkpoint's own, which may not run.
    """
    content = read_json(path / "config.json")
    check_numbers(content, path / "config.json")
    code = needs_code(content, path, trust_remote_code)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(path, trust_remote_code=code)
        # A file may name kernels of the Hub here, which transformers would fetch and run.
        config._attn_implementation = config._experts_implementation = None
        return config
    except Exception as error:  # transformers raises whatever the config's fields provoke
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path / 'config.json'}: {reason}", "is it a transformers config?") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and notices; errors still raise."""
    from transformers.utils import logging as hf_logging

    bars, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
