"""A small server on the loopback interface that answers the calls a Hub client makes to download and upload a model.

Enough of the protocol for `huggingface_hub`: model info, file listing, HEAD and GET of files with the Hub's own
headers, large files behind a redirect to signed addresses, byte ranges, error codes. It can refuse, and it can vanish
in the middle of a file. Uploads are in `hub_uploads.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from compressor.testing.hub_uploads import LARGE, Faults, Uploads, git_hash

SIGNATURE = "signed-and-secret"
"""Part of every redirect's address; must never reach a user."""

_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass(frozen=True)
class Request:
    """One request the server saw."""

    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Repo:
    """One model repository.

    Attributes:
        files: Name -> content, the same at every revision.
        branches: Names that point to the only commit.
        gated: Information is public, files need a permission nobody has.
        private: What its information says.
        card: Metadata its information gives.
        commits: Messages of the commits that were uploaded.
    """

    files: dict[str, bytes]
    branches: tuple[str, ...] = ("main",)
    gated: bool = False
    private: bool = False
    card: dict[str, Any] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def commit(self) -> str:
        """The commit, which depends on the content."""
        digest = hashlib.sha1()
        for name, content in sorted(self.files.items()):
            digest.update(name.encode() + b"\0" + content)
        return digest.hexdigest()


@dataclass
class Hub:
    """The server's state; change it between requests.

    Attributes:
        repos: Repositories by `owner/name`.
        requests: What was asked, in order.
        vanish_after: Bytes of a large file after which the server is gone: it closes this connection and answers no
            other; None never.
        gone: Whether that has happened.
        writers: Token -> owners it may write for; other tokens are not known.
        uploaded: Large files that were sent, by SHA-256.
        faults: What goes wrong with uploads.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    vanish_after: int | None = None
    gone: bool = False
    writers: dict[str, set[str]] = field(default_factory=dict)
    uploaded: dict[str, bytes] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)
    server: ThreadingHTTPServer | None = None

    @property
    def endpoint(self) -> str:
        """The address clients must use."""
        assert self.server is not None
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def asked_for(self, method: str, ending: str) -> list[Request]:
        """Return the requests of one method whose path ends like this."""
        return [r for r in self.requests if r.method == method and urlsplit(r.path).path.endswith(ending)]

    def large(self, digest: str) -> bytes | None:
        """Return a large file by its SHA-256."""
        for repo in self.repos.values():
            for content in repo.files.values():
                if hashlib.sha256(content).hexdigest() == digest:
                    return content
        return None


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Run the server inside a `with`, on a free loopback port or on one it had before."""
    handler = type("BoundHandler", (_Handler,), {"hub": hub})
    port = 0 if hub.server is None else hub.server.server_address[1]
    hub.server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    hub.server.daemon_threads = True
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join(10)


def folder_files(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


class _Handler(Uploads, BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        """Answer a HEAD request."""
        self._answer()

    def do_GET(self) -> None:
        """Answer a GET request."""
        self._answer()

    def _answer(self) -> None:
        if self.hub.gone:
            self._hang_up()
            return
        header = self.headers.get
        self.hub.requests.append(Request(self.command, self.path, header("Range"), header("Authorization")))
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/large/"):
            self._send_large(path.removeprefix("/large/"))
        elif found := _API.fullmatch(path):
            self._send_info(*found.groups())
        elif found := _RESOLVE.fullmatch(path):
            self._send_file(*found.groups())
        else:
            self._refuse(404, "NotFound")

    def _repo(self, name: str, revision: str | None) -> Repo | None:
        """Return a repository that has a revision; otherwise answer the request and return None."""
        repo = self.hub.repos.get(name)
        if repo is None:
            self._refuse(404, "RepoNotFound")
        elif revision is not None and revision not in (*repo.branches, repo.commit):
            self._refuse(404, "RevisionNotFound")
        else:
            return repo
        return None

    def _send_info(self, name: str, what: str | None, revision: str | None) -> None:
        repo = self._repo(name, revision)
        if repo is None:
            return
        if what == "tree":
            self._send_json([_entry(file, content) for file, content in repo.files.items()])
            return
        siblings = [{"rfilename": file} for file in repo.files]
        about = {"id": name, "modelId": name, "sha": repo.commit, "siblings": siblings, "private": repo.private}
        self._send_json({**about, "cardData": repo.card})

    def _send_file(self, name: str, revision: str, file: str) -> None:
        repo = self._repo(name, revision)
        if repo is None:
            return
        if repo.gated:
            self._refuse(401 if self.headers.get("Authorization") is None else 403, "GatedRepo")
            return
        if file not in repo.files:
            self._refuse(404, "EntryNotFound")
            return
        content = repo.files[file]
        headers = {"X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        if not file.endswith(LARGE):
            self._send(200, content, {**headers, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})
            return
        digest = hashlib.sha256(content).hexdigest()
        headers |= {
            "X-Linked-ETag": f'"{digest}"',
            "X-Linked-Size": str(len(content)),
            # Another host name, as on the Hub: clients must not send their token there.
            "Location": f"{self.hub.endpoint.replace('127.0.0.1', 'localhost')}/large/{digest}?signature={SIGNATURE}",
        }
        self._send(302, b"", headers)

    def _send_large(self, digest: str) -> None:
        content = self.hub.large(digest)
        if content is None:
            self._refuse(404, "EntryNotFound")
            return
        start, status = 0, 200
        headers = {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start, status = int(found[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        limit = self.hub.vanish_after
        if limit is None or self.command == "HEAD":
            self._send(status, content[start:], headers)
            return
        self._send_headers(status, len(content) - start, headers)
        self.wfile.write(content[start : start + limit])
        self.wfile.flush()
        self.hub.gone = True
        self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send_json(self, data: object, status: int = 200) -> None:
        self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": f"the server says {code}"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self._send_headers(status, len(body), headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_headers(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(key, value)
        self.end_headers()


def _entry(name: str, content: bytes) -> dict[str, Any]:
    """Return a file's line in a listing."""
    entry: dict[str, Any] = {
        "type": "file",
        "path": name,
        "size": len(content),
        "oid": git_hash(content),
    }
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry
