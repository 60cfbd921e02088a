"""Uploading a result to the Hub: refused if it cannot be trusted, all in one commit, never twice.

The token is the Hub client's own: from the environment or its login. It is not looked at here, and texts of the client
and the server are not repeated in errors, as they may hold it or signed addresses.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub import utils as hub_utils
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from compressor.checkpoint.hub import CLIENTS, quiet_client
from compressor.checkpoint.source import INDEX
from compressor.errors import CheckpointError, CompressorError, HubError, RecipeError, VerificationError
from compressor.files import sha256_file
from compressor.offline import forbidden_by
from compressor.output import REPORT
from compressor.report import Progress, Silent
from compressor.ship.card import make_card
from compressor.ship.origin import CARD, Origin, origin_of
from compressor.ship.run import JOURNAL, RESOLVED
from compressor.ship.verdict import reasons_against

TRIES = 4
"""Times a commit is tried when the connection fails."""

WAIT_SECONDS = 2.0
"""Before the second try; doubled for each one after it."""

_UTILS: Any = hub_utils  # documented functions, but none that type checkers see exported
_OURS = "compress_"
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


@dataclass(frozen=True)
class Pushed:
    """An upload.

    Attributes:
        repo: `owner/name`.
        commit: The repository's commit that holds the result.
        files: How many files the folder and its card have.
        changed: How many of them the commit wrote; 0: they were all there, and no commit was made.
        tries: How often the commit was tried.
    """

    repo: str
    commit: str
    files: int
    changed: int
    tries: int


def push(
    folder: Path, repo: str, *, private: bool = False, force: bool = False, progress: Progress | None = None
) -> Pushed:
    """Upload a result, with a model card, in one commit; the same as `compress push`.

    If the connection fails, the commit is tried again, after a look whether it went through unnoticed.

    Args:
        folder: A finished result.
        repo: `owner/name`; it is created if it is not there.
        private: Whether only its owner may see it. An existing public repository is refused then.
        force: Upload what is not verified, was changed, or did not pass the gate, and into a repository that holds
            something else.
        progress: Who is told how far it is.

    Raises:
        CheckpointError: There is no such folder.
        RecipeError: Not an id the Hub can have, or the repository is public or holds another model.
        VerificationError: The folder should not be published; the message says why.
        HubError: No token, not allowed, not reachable, or somebody else writes to the repository at the same time.
    """
    progress = progress or Silent()
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such directory", "give the folder of a result")
    check_target(repo)
    if reasons := reasons_against(folder):
        said = "; ".join(reasons)
        if not force or not (folder / REPORT).is_file():
            raise VerificationError(
                f"{folder}: not uploaded: {said}", "repair it, or upload it all the same with --force"
            )
        progress.event(f"uploaded all the same: {said}")
    with _explained(repo), quiet_client(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the client's remarks on metadata
        api = HfApi()
        progress.stage(f"looking at {repo}")
        api.create_repo(repo, private=private or None, exist_ok=True)
        info = api.model_info(repo)
        names = {sibling.rfilename for sibling in info.siblings or ()}
        _check_repo(repo, names, bool(info.private), private, force)
        origin = _with_metadata(api, origin_of(folder))
        content = {path.name: path for path in _files(folder)}
        card = make_card(folder, repo, origin).encode()
        return _commit(api, repo, content, card, progress)


def check_target(repo: str) -> None:
    """Raise what can be known before anything is done: a bad id, no network wanted, no token.

    Raises:
        RecipeError: Not an id the Hub can have.
        HubError: Offline, or no token.
    """
    try:
        _UTILS.validate_repo_id(repo)
    except HFValidationError as error:
        raise RecipeError(f"{repo}: not an id the Hub can have", "give owner/name") from error
    if repo.count("/") != 1:
        raise RecipeError(f"{repo}: has no owner", "give owner/name")
    if variable := forbidden_by():
        raise HubError(f"{repo}: nothing can be uploaded, {variable} is set", f"unset {variable}")
    if not get_token():
        raise HubError(f"{repo}: there is no token to upload with", _LOGIN)


def _check_repo(repo: str, names: set[str], is_private: bool, private: bool, force: bool) -> None:
    """Refuse a repository that is public though it must not be, or holds what is not ours.

    Raises:
        RecipeError: It is.
    """
    if private and not is_private:
        raise RecipeError(f"{repo}: exists and is public, but --private was given", "make it private on its page first")
    foreign = sorted(name for name in names if name.endswith((".safetensors", ".bin", ".gguf")))
    if foreign and REPORT not in names and not force:
        raise RecipeError(
            f"{repo}: holds a model that compress did not upload ({foreign[0]})",
            "choose another name, or replace its files with --force",
        )


def _with_metadata(api: HfApi, origin: Origin) -> Origin:
    """Add licence and languages from the original's page, where the files did not say them."""
    if origin.repo is None or origin.licence is not None:
        return origin
    try:
        data = api.model_info(origin.repo, revision=origin.revision).card_data
    except (HfHubHTTPError, RepositoryNotFoundError):
        return origin  # gone, or not visible: the card then says that the licence was not found
    found: Mapping[str, Any] = dict(vars(data)) if data else {}
    languages = found.get("language") or ()
    languages = [languages] if isinstance(languages, str) else languages
    licence = found.get("license")
    return replace(origin, licence=str(licence) if licence else None, languages=tuple(map(str, languages)))


def _files(folder: Path) -> list[Path]:
    """Return the files that are uploaded: those at the top of the folder that are not hidden.

    The card is made anew, and says what the two files of `compress run` say, without places on this machine.
    """
    left = (CARD, RESOLVED, JOURNAL)
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != "." and path.name not in left)


def _commit(api: HfApi, repo: str, content: Mapping[str, Path], card: bytes, progress: Progress) -> Pushed:
    """Make the one commit. A try whose answer got lost is found by looking at what the repository holds."""
    files = len(content) + 1
    for attempt in range(1, TRIES + 1):
        try:
            head, there = _holds(api, repo)
            wanted = {name: _same(there.get(name), path) for name, path in content.items()}
            wanted[CARD] = _same(there.get(CARD), card)
            changed = sorted(name for name, same in wanted.items() if not same)
            stale = sorted(name for name in there if name not in wanted and _is_stale(name))
            if not changed and not stale:
                return Pushed(repo, head, files, 0 if attempt == 1 else files, attempt)
            progress.stage(f"uploading {len(changed)} files to {repo}")
            done = api.create_commit(
                repo,
                [
                    *(CommitOperationAdd(name, card if name == CARD else str(content[name])) for name in changed),
                    *(CommitOperationDelete(name) for name in stale),
                ],
                commit_message="Upload by compress",
                parent_commit=head,  # the Hub refuses if somebody else was faster
            )
            return Pushed(repo, str(done.oid), files, len(changed), attempt)
        except Exception as error:
            if attempt == TRIES or not _is_passing(error):
                raise
            wait = WAIT_SECONDS * 2 ** (attempt - 1)
            progress.event(f"the connection failed ({type(error).__name__}); trying again in {wait:g} s")
            time.sleep(wait)
    raise AssertionError


def _holds(api: HfApi, repo: str) -> tuple[str, dict[str, Any]]:
    """Return the repository's commit and its files at that commit."""
    head = str(api.model_info(repo).sha)
    tree = api.list_repo_tree(repo, recursive=True, revision=head)
    return head, {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}


def _same(there: Any, content: Path | bytes) -> bool:
    """Return whether the repository holds these bytes: by SHA-256 of large files, by git's hash of others."""
    if there is None:
        return False
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if there.size != size:
        return False
    if there.lfs is not None:
        digest = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256_file(content)
        return bool(there.lfs.sha256 == digest)
    data = content if isinstance(content, bytes) else content.read_bytes()
    return bool(there.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())


def _is_stale(name: str) -> bool:
    """Return whether a file would be taken for a part of the new result: shards and reports of an earlier one."""
    return "/" not in name and (name.endswith(".safetensors") or name == INDEX or name.startswith(_OURS))


def _is_passing(error: Exception) -> bool:
    """Return whether trying again may help: the connection failed, or the server could not answer."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return type(error).__module__.partition(".")[0] in CLIENTS or isinstance(error, ConnectionError | TimeoutError)


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn the client's errors into ours."""
    try:
        yield
    except CompressorError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise HubError(f"{repo}: the Hub does not accept the token (HTTP status 401)", _LOGIN) from None
        if status == 403:
            raise HubError(f"{repo}: the token may not write there (HTTP status 403)", _LOGIN) from None
        if status == 412:
            raise HubError(f"{repo}: somebody else changed it during the upload", "run this again") from None
        hint = "run this again: what was uploaded is not sent twice"
        raise HubError(f"{repo}: the Hub answered with HTTP status {status}", hint) from None
    except Exception as error:
        if not _is_passing(error):
            raise
        where = constants.ENDPOINT.partition("://")[2]
        raise HubError(
            f"{repo}: the connection to {where} failed ({type(error).__name__}), {TRIES} times at most",
            "check the network and run this again: what was uploaded is not sent twice",
        ) from None
