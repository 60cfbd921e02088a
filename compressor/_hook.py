"""Registers this package with transformers when, and only when, transformers is imported.

`import compressor` must be cheap, and transformers has no entry points: so the registration waits for the two modules
it touches. If they are there already it happens at once.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

WATCHED = {
    "transformers.models.auto.configuration_auto": "compressor.plugin.configs",
    "transformers.quantizers.auto": "compressor.plugin.quantizer",
}
"""Module of transformers -> our module whose `register` adds what belongs into it."""


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the other finders find a watched module, and adds a step after its execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the module's own spec with a loader that registers afterwards; None for all other modules."""
        if fullname not in WATCHED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, fullname)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, name: str) -> None:
        self._loader, self._name = loader, name

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Create the module as its own loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then register with it."""
        self._loader.exec_module(module)
        _register(self._name)


def install() -> None:
    """Register now where transformers is imported already, else as soon as it is; calling it twice changes nothing."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for name in WATCHED:
        if name in sys.modules:
            _register(name)


def _register(name: str) -> None:
    importlib.import_module(WATCHED[name]).register(sys.modules[name])
