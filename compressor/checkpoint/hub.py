"""Fetching a model from the Hub: pinned to a commit, safetensors only, refused early, continued where it was cut off.

The result is an ordinary snapshot in the Hub client's own cache, which other tools share. The client throws a partial
file away when a download fails; weights are therefore fetched here, into the place in that cache where the client
looks for them, and kept until they are complete.
"""

from __future__ import annotations

import glob
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock
from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    utils,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get, repo_folder_name

from compressor.checkpoint.custom_code import needs_code
from compressor.checkpoint.quantized import refuse_quantized
from compressor.checkpoint.source import INDEX, PICKLES, SINGLE, indexed_files, read_json
from compressor.errors import CheckpointError, CompressorError, HubError, UnsupportedError, disk_error
from compressor.files import sha256_file

SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*")
"""What is fetched besides weights: never pickles, and code only on request."""

_UTILS: Any = utils  # documented functions, but none that type checkers see exported
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
CLIENTS = ("httpx", "httpx2", "httpcore", "requests", "urllib3")
"""Packages whose errors mean that the connection failed; which of them the Hub client uses has changed before."""

_CONTINUES = "check the network and run this again: it continues where it was cut off; HF_HUB_OFFLINE=1 uses the cache"


def fetch(repo: str, revision: str | None, offline: str | None, trust_remote_code: bool) -> tuple[Path, str]:
    """Return the folder of a snapshot and its commit.

    Args:
        repo: `owner/name`.
        revision: Branch, tag or commit; None means the default branch.
        offline: The variable that forbids network access, or None.
        trust_remote_code: Fetch the checkpoint's Python files too.

    Raises:
        HubError: Gated, missing, unreachable, cut off, or offline and not cached.
        CheckpointError: The repository holds no safetensors.
        UnsupportedError: It holds GGUF files only, needs code that may not run, or is quantized in an unknown way.
        ResourceError: The disk is full.
    """
    if offline is not None:
        return _cached(repo, revision, f"{offline} is set")
    pinned = revision is not None and _COMMIT.fullmatch(revision)
    if pinned and not trust_remote_code and (folder := _complete(repo, revision)):
        return folder, folder.name  # a commit never changes: nothing to ask
    with _explained(repo, revision), quiet_client():
        info = HfApi().model_info(repo, revision=revision)
        commit, names = str(info.sha), [sibling.rfilename for sibling in info.siblings or ()]
        refuse_names(repo, names)
        config = Path(hf_hub_download(repo, "config.json", revision=revision))
        if config.parent.name != commit:
            raise HubError(f"{repo}: its revision {revision or 'main'} moved while it was read", "run this again")
        content = read_json(config)
        needs_code(content, repo, trust_remote_code)
        refuse_quantized(content, repo)
        if INDEX in names:
            hf_hub_download(repo, INDEX, revision=commit)
        weights = indexed_files(config.parent) if INDEX in names else [SINGLE]
        if absent := sorted(set(weights) - set(names)):
            raise CheckpointError(f"{repo}: the index names {absent[0]}, which is not there", "try another revision")
        sides = side_files(names, trust_remote_code)
        # Weights come last: a snapshot that has them has everything.
        snapshot_download(repo, revision=commit, allow_patterns=[glob.escape(name) for name in sides])
        for name in weights:
            _fetch_weights(repo, commit, name)
        wanted = [glob.escape(name) for name in (*sides, *weights)]
        folder = Path(snapshot_download(repo, revision=commit, allow_patterns=wanted))
    return folder, commit


def refuse_names(repo: str, names: Sequence[str]) -> None:
    """Refuse a repository by the names of its files, before any of them is fetched.

    Raises:
        CheckpointError: Pickled weights only, safetensors under names no reader looks for, or no weights at all.
        UnsupportedError: GGUF files only.
    """
    names = [name for name in names if "/" not in name]  # folders hold other models, or this one for other frameworks
    if "config.json" in names and (INDEX in names or SINGLE in names):
        return

    def ending(*suffixes: str) -> list[str]:
        return sorted(name for name in names if name.endswith(suffixes))

    if found := ending(".safetensors"):
        what = INDEX if "config.json" in names else "config.json"
        raise CheckpointError(f"{repo}: has {found[0]} but no {what}", "is this a transformers model?")
    if found := ending(".gguf"):
        raise UnsupportedError(
            f"{repo}: holds GGUF files only ({_some(found)})",
            f"download one and give its path: hf download {repo} {found[0]}",
        )
    if found := ending(*PICKLES):
        raise CheckpointError(
            f"{repo}: only pickled weights ({_some(found)}), which can run code when opened; nothing was fetched",
            "look for a revision with safetensors (id@refs/pr/N), or download it and use --allow-pickle on the folder",
        )
    raise CheckpointError(f"{repo}: no safetensors file among its {len(names)} files", "is this a transformers model?")


def side_files(names: Sequence[str], trust_remote_code: bool) -> list[str]:
    """Return the files at the top of a repository that are fetched besides weights."""
    patterns = (*SIDE_FILES, "*.py") if trust_remote_code else SIDE_FILES
    return [name for name in names if "/" not in name and any(fnmatchcase(name, pattern) for pattern in patterns)]


def _fetch_weights(repo: str, commit: str, name: str) -> None:
    """Download one file to where the client keeps it, continuing what an earlier run left, and check its hash."""
    url = hf_hub_url(repo, name, revision=commit)
    # Compressed on the way, a file could not be continued in the middle.
    headers = {**_UTILS.build_hf_headers(), "Accept-Encoding": "identity"}
    found = get_hf_file_metadata(url)
    if found.etag is None or found.size is None or found.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
        return  # left to the client, which knows other ways
    folder = repo_folder_name(repo_id=repo, repo_type="model")
    blob = Path(constants.HF_HUB_CACHE, folder, "blobs", found.etag)
    part = blob.with_name(f"{found.etag}.part")
    lock = Path(constants.HF_HUB_CACHE, ".locks", folder, f"{found.etag}.lock")  # the one the client takes
    for place in (blob.parent, lock.parent):
        place.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        if blob.exists():
            return
        if part.exists() and part.stat().st_size > found.size:
            part.unlink()
        with part.open("ab") as file:
            http_get(url, file, resume_size=file.tell(), headers=headers, expected_size=found.size)
        if _SHA256.fullmatch(found.etag) and sha256_file(part) != found.etag:
            part.unlink()
            raise HubError(f"{repo}: {name} is not what the Hub announced (SHA-256 differs)", "run this again")
        part.replace(blob)


def _cached(repo: str, revision: str | None, why: str) -> tuple[Path, str]:
    """Return a snapshot that is in the cache.

    Raises:
        HubError: It is not, or only in part.
    """
    folder = _complete(repo, revision)
    if folder is None:
        raise HubError(
            f"{repo}{f'@{revision}' if revision else ''}: not (completely) in the cache, and {why}",
            "go online once, or give a folder with the checkpoint",
        )
    return folder, folder.name


def _complete(repo: str, revision: str | None) -> Path | None:
    """Return the cached snapshot of a revision if it has its config and all its weights."""
    with _explained(repo, revision):
        try:
            config = hf_hub_download(repo, "config.json", revision=revision, local_files_only=True)
        except LocalEntryNotFoundError:
            return None
    folder = Path(config).parent
    if not (folder / INDEX).exists():
        return folder if (folder / SINGLE).exists() else None
    return folder if all((folder / name).exists() for name in indexed_files(folder)) else None


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Turn the client's errors into ours. Its texts are not repeated: they may hold signed addresses."""
    try:
        yield
    except CompressorError:
        raise
    except HFValidationError as error:
        raise HubError(f"{repo}: not an id the Hub can have", "give owner/name[@revision], or a folder") from error
    except GatedRepoError as error:
        raise HubError(f"{repo}: gated model", "accept its terms on its page and log in: hf auth login") from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo}: no revision {revision!r}", "check the part behind @") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{repo}: no such model on the Hub, or it is private; no folder of that name here either",
            "check the name, or log in: hf auth login",
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = "log in: hf auth login" if status in (401, 403) else "try again later; what was fetched is kept"
        raise HubError(f"{repo}: the Hub answered with HTTP status {status}", hint) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise HubError(
            f"{repo}: not in the cache, and no Hub answers at {urlsplit(constants.ENDPOINT).hostname}", _CONTINUES
        ) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] in CLIENTS or isinstance(error, ConnectionError | TimeoutError):
            raise HubError(f"{repo}: the connection failed ({type(error).__name__})", _CONTINUES) from error
        if not isinstance(error, OSError):
            raise
        if error.errno is None:  # the client's own: a file shorter than announced, an answer without an ETag
            raise HubError(f"{repo}: the download failed ({type(error).__name__})", _CONTINUES) from error
        raise disk_error(error, Path(constants.HF_HUB_CACHE)) from error


@contextmanager
def quiet_client() -> Iterator[None]:
    """Keep the client's notices off the terminal, and its progress bars unless a person is watching."""
    level, hidden = _UTILS.logging.get_verbosity(), _UTILS.are_progress_bars_disabled()
    _UTILS.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        _UTILS.disable_progress_bars()
    try:
        yield
    finally:
        _UTILS.logging.set_verbosity(level)
        if not hidden:
            _UTILS.enable_progress_bars()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
