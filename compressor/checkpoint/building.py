"""Building a model class from a config that a stranger wrote: bounded in modules and bytes, and every failure one line.

A few digits in `config.json` can ask for a billion layers, and a name in it for kernels to be fetched from the Hub and
run. Numbers are bounded before transformers sees them, and modules and buffers are counted while they are made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as registration

from compressor.checkpoint.source import read_headers
from compressor.errors import CheckpointError, CompressorError

COUNTS = re.compile(r"layer|block|depth|expert|label|head|stage|group|repeat")
MAX_COUNT = 1 << 17
"""Of things a config can ask for so many of; the largest real ones are some 20,000 labels."""

SIZES = re.compile(r"size|dim|width|channel|position|seq_len|rank")
MAX_SIZE = 1 << 27
"""Of a width, a vocabulary or a context; one table of so many floats is half a gigabyte."""

MODULES_PER_TENSOR = 64
FREE_MODULES = 4096
"""A model has a few modules per stored tensor; the smallest one may have so many without any."""

MAX_BUFFER_BYTES = 4 << 30
"""Of tables that a model computes and does not store."""


def check_numbers(config: Mapping[str, Any], where: object) -> None:
    """Refuse numbers that no model has, in any part of a parsed `config.json`.

    Raises:
        CheckpointError: Names the key and the number.
    """
    for key, value in _numbers(config):
        leaf = key.rpartition(".")[2].lower()
        limit = MAX_COUNT if COUNTS.search(leaf) else MAX_SIZE if SIZES.search(leaf) else None
        if "dim" in leaf or leaf.endswith("size"):
            limit = MAX_SIZE  # head_dim counts no heads
        if limit is not None and abs(value) > limit:
            raise CheckpointError(
                f"{where}: {key} is {_short(value)}, at most {limit} is read", "config.json is damaged"
            )


@contextmanager
def building(path: Path) -> Iterator[None]:
    """Bound what is built inside the `with`, and turn whatever goes wrong there into one line.

    Args:
        path: The checkpoint; the number of its tensors bounds the number of modules.

    Raises:
        CheckpointError: The config describes no model that can be built, or one far larger than the checkpoint.
    """
    where = path / "config.json"
    n_tensors = _n_tensors(path)
    budget = FREE_MODULES + MODULES_PER_TENSOR * n_tensors
    modules = nbytes = 0

    def count_module(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal modules
        modules += 1
        if modules > budget:
            raise CheckpointError(
                f"{where}: describes more than {budget} modules, the checkpoint has {n_tensors} tensors",
                "does config.json belong to these weights?",
            )

    def count_buffer(parent: nn.Module, name: str, buffer: Tensor | None) -> None:
        nonlocal nbytes
        nbytes += 0 if buffer is None else buffer.numel() * buffer.element_size()
        if nbytes > MAX_BUFFER_BYTES:
            raise CheckpointError(
                f"{where}: {type(parent).__name__}.{name} and others before it take more than {MAX_BUFFER_BYTES} bytes",
                "does config.json belong to these weights?",
            )

    hooks = (
        registration.register_module_module_registration_hook(count_module),
        registration.register_module_buffer_registration_hook(count_buffer),
    )
    try:
        yield
    except CompressorError:
        raise
    except Exception as error:  # whatever the config's fields provoke
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{where}: no model can be built from it: {type(error).__name__}: {reason}", "is it a transformers config?"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    """Yield every number with the keys it stands under."""
    left: list[tuple[str, object]] = [("", config)]  # no recursion: the file decides how deep it goes
    while left:
        key, value = left.pop()
        if isinstance(value, Mapping):
            left += [(f"{key}.{name}" if key else str(name), part) for name, part in value.items()]
        elif isinstance(value, list):
            left += [(key, part) for part in value]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value


def _n_tensors(path: Path) -> int:
    try:
        return len(read_headers(path))
    except CheckpointError:
        return 0  # whoever needs the weights will say what is wrong with them


def _short(value: int | float) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"a number of {len(text)} digits"
