"""Whether the user has forbidden network access, by this package's variable or by the Hub's own."""

from __future__ import annotations

import os

_VARIABLES = ("COMPRESSOR_OFFLINE", "HF_HUB_OFFLINE")
_TRUE = ("1", "on", "yes", "true")  # the values the Hub client accepts


def forbidden_by() -> str | None:
    """Return the name of the environment variable that forbids fetching, or None; read anew on each call."""
    return next((v for v in _VARIABLES if os.environ.get(v, "").strip().lower() in _TRUE), None)
