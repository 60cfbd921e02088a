"""Compress Hugging Face checkpoints: quantize, write, reload, measure.

The public API is what this module exports (`quantize`, `prune`, `evaluate`, `load`) and the errors in
`compressor.errors`.
Importing it is cheap; torch and transformers load when a function is first touched. It also lets transformers load
native checkpoints, from the moment transformers is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from compressor import _hook

__version__ = "0.1.0"

_hook.install()

if TYPE_CHECKING:
    from compressor.api import quantize
    from compressor.measure import evaluate
    from compressor.pruner import prune
    from compressor.runtime import load

_LAZY = {
    "quantize": "compressor.api",
    "prune": "compressor.pruner",
    "evaluate": "compressor.measure",
    "load": "compressor.runtime",
}

__all__ = ["__version__", "evaluate", "load", "prune", "quantize"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
