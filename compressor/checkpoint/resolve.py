"""From what the user typed to a checkpoint folder: an embedded model, a local folder, or a Hub id."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from compressor.checkpoint.default_model import EMBEDDED, resolve_embedded
from compressor.errors import CheckpointError, HubError
from compressor.offline import forbidden_by

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*"]
"""What is fetched: never pickles, never code."""


def resolve_model(name: str) -> tuple[Path, str | None]:
    """Return the folder of a model and the commit it is pinned to (Hub ids only).

    Raises:
        CheckpointError: There is no such folder.
        HubError: A download is needed and cannot be had.
    """
    if name in EMBEDDED:
        return resolve_embedded(name), None
    if Path(name).exists():
        return Path(name), None
    if HUB_ID.fullmatch(name):
        return _from_hub(name)
    close = difflib.get_close_matches(name.lower(), EMBEDDED, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else "give a checkpoint folder, a Hub id (owner/name), or one of: "
    raise CheckpointError(f"{name}: no such directory or embedded model", hint if close else hint + ", ".join(EMBEDDED))


def _from_hub(name: str) -> tuple[Path, str]:
    """Download a snapshot into the Hub's cache; a download that was cut off continues."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, _, revision = name.partition("@")
    offline = forbidden_by()
    try:
        folder = snapshot_download(
            repo, revision=revision or None, allow_patterns=HUB_FILES, local_files_only=offline is not None
        )
    except GatedRepoError as error:
        raise HubError(f"{repo}: gated model", "accept its terms on its page and log in: hf auth login") from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo}: no revision {revision!r}", "check the part behind @") from error
    except RepositoryNotFoundError as error:
        raise HubError(f"{repo}: no such model on the Hub, or it is private", "check the name, or log in") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        why = f"{offline} is set" if offline else "the Hub cannot be reached"
        raise HubError(
            f"{repo}: not cached, and {why}", "go online once, or give a folder with the checkpoint"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise HubError(f"{repo}: download failed: {str(error).splitlines()[0]}", "try again; it continues") from error
    return Path(folder), Path(folder).name
