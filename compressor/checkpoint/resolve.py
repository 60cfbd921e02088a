"""From what the user typed to a checkpoint folder: an embedded model, a local folder, a GGUF file, or a Hub id."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from compressor.checkpoint.default_model import EMBEDDED, resolve_embedded
from compressor.checkpoint.gguf_source import is_gguf, resolve_gguf
from compressor.errors import CheckpointError
from compressor.offline import forbidden_by

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def resolve_model(name: str, trust_remote_code: bool = False, allow_pickle: bool = False) -> tuple[Path, str | None]:
    """Return the folder of a model and the commit it is pinned to (Hub ids only).

    A GGUF file is converted into the cache first; the folder is that of the conversion. So is a folder of pickled
    weights, with `allow_pickle` (see `pickled`); of the Hub only safetensors are ever fetched.

    Raises:
        CheckpointError: There is no such folder, or what is there is no checkpoint.
        HubError: A download is needed and cannot be had.
        UnsupportedError: A GGUF file transformers cannot read, or a repository without safetensors.
    """
    if name in EMBEDDED:
        return resolve_embedded(name), None
    path = Path(name)
    if path.is_file() and is_gguf(path):
        return resolve_gguf(path), None
    if path.is_file():
        raise CheckpointError(f"{name}: is a file, but no GGUF file", "give the folder that holds config.json")
    if path.exists():
        if allow_pickle and path.is_dir():
            # Imported here: it takes torch, and few models are pickled.
            from compressor.checkpoint.pickled import is_pickled, resolve_pickled

            return (resolve_pickled(path) if is_pickled(path) else path), None
        return path, None
    if path.suffix == ".gguf":
        raise CheckpointError(f"{name}: no such file", "check the path")
    if HUB_ID.fullmatch(name):
        # Imported here: most models need no Hub.
        from compressor.checkpoint.hub import fetch

        repo, _, revision = name.partition("@")
        return fetch(repo, revision or None, forbidden_by(), trust_remote_code)
    close = difflib.get_close_matches(name.lower(), EMBEDDED, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else "give a checkpoint folder, a Hub id (owner/name), or one of: "
    raise CheckpointError(f"{name}: no such directory or embedded model", hint if close else hint + ", ".join(EMBEDDED))
