"""The upload half of the test server: creating a repository, large files, the commit that makes them visible.

Speaks what `huggingface_hub` says with Xet off: `repos/create`, `validate-yaml`, `preupload`, the LFS batch and
its PUTs, `commit` with its lines of JSON. It can cut a connection in the middle of a file, or around a commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from compressor.testing.hub import Hub, Repo

LARGE = (".safetensors", ".bin", ".gguf")
"""Files with these endings are large, whatever their size."""

_STEP = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/([^/]+)")
_BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")


@dataclass
class Faults:
    """What goes wrong with uploads; each number counts down as it happens.

    Attributes:
        cut_files: Large files whose connection is cut after half of their bytes.
        cut_before_commit: Commits that are not carried out and not answered.
        cut_after_commit: Commits that are carried out and not answered.
        busy: Commits that are answered with status 503.
        race: Commits before which somebody else commits a file.
    """

    cut_files: int = 0
    cut_before_commit: int = 0
    cut_after_commit: int = 0
    busy: int = 0
    race: int = 0

    def happens(self, name: str) -> bool:
        """Return whether one is left, and count it."""
        left = getattr(self, name)
        setattr(self, name, max(left - 1, 0))
        return bool(left)


def git_hash(content: bytes) -> str:
    """Return the SHA-1 that git calls a file by."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Uploads:
    """Mixed into the handler of the server."""

    hub: Hub

    def do_POST(self: Any) -> None:
        """Answer a POST request."""
        self._note()
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := _BATCH.fullmatch(path):
            if self._writable(found[1]) is not None:
                self._batch(json.loads(body)["objects"])
        elif found := _STEP.fullmatch(path):
            repo = self._writable(found[1])
            if repo is not None and found[2] == "preupload":
                self._preupload(repo, json.loads(body)["files"])
            elif repo is not None:
                self._commit(found[1], repo, [json.loads(line) for line in body.splitlines()])
        else:
            self._refuse(404, "NotFound")

    def do_PUT(self: Any) -> None:
        """Take a large file."""
        self._note()
        digest = urlsplit(self.path).path.removeprefix("/upload/")
        if self.hub.faults.happens("cut_files"):
            self.rfile.read(int(self.headers.get("Content-Length") or 2) // 2)
            self._hang_up()
            return
        content = self._body()
        if hashlib.sha256(content).hexdigest() != digest:
            self._refuse(400, "BadDigest")
            return
        self.hub.uploaded[digest] = content
        self._send(200, b"", {})

    def _note(self: Any) -> None:
        from compressor.testing.hub import Request

        header = self.headers.get
        self.hub.requests.append(Request(self.command, self.path, None, header("Authorization")))

    def _body(self: Any) -> bytes:
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return bytes(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        pieces = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _may_write(self: Any, owner: str | None) -> bool:
        """Return whether the request's token may write for an owner; otherwise refuse and return False."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in self.hub.writers:
            self._refuse(401, "InvalidToken")
            return False
        if owner not in self.hub.writers[token]:
            self._refuse(403, "Forbidden")
            return False
        return True

    def _writable(self: Any, name: str) -> Repo | None:
        if not self._may_write(name.partition("/")[0]):
            return None
        if name not in self.hub.repos:
            self._refuse(404, "RepoNotFound")
            return None
        repo: Repo = self.hub.repos[name]
        return repo

    def _create(self: Any, wanted: dict[str, Any]) -> None:
        from compressor.testing.hub import Repo

        if not self._may_write(wanted["organization"]):
            return
        name = f"{wanted['organization']}/{wanted['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.repos:
            self._send_json({**url, "error": "You already created this model repo"}, 409)
            return
        self.hub.repos[name] = Repo({".gitattributes": b"* lfs"}, private=wanted.get("visibility") == "private")
        self._send_json(url)

    def _validate(self: Any, content: str) -> None:
        import yaml

        block = content.split("---")[1] if content.startswith("---") else ""
        good = isinstance(yaml.safe_load(block), dict)
        self._send_json({"errors": [] if good else [{"message": "no metadata"}], "warnings": []}, 200 if good else 400)

    def _preupload(self: Any, repo: Repo, files: list[dict[str, Any]]) -> None:
        self._send_json({"files": [_mode(repo, entry["path"]) for entry in files]})

    def _batch(self: Any, objects: list[dict[str, Any]]) -> None:
        def action(wanted: dict[str, Any]) -> dict[str, Any]:
            if wanted["oid"] in self.hub.uploaded:
                return wanted
            place = self.hub.endpoint.replace("127.0.0.1", "localhost")
            return {
                **wanted,
                "actions": {"upload": {"href": f"{place}/upload/{wanted['oid']}?signature=signed-and-secret"}},
            }

        self._send_json({"transfer": "basic", "objects": [action(wanted) for wanted in objects]})

    def _commit(self: Any, name: str, repo: Repo, lines: list[dict[str, Any]]) -> None:
        faults = self.hub.faults
        if faults.happens("busy"):
            self._refuse(503, "Busy")
            return
        if faults.happens("cut_before_commit"):
            self._hang_up()
            return
        if faults.happens("race"):
            repo.files["other.txt"] = b"somebody else was here"
        if (parent := lines[0]["value"].get("parentCommit")) and parent != repo.commit:
            self._refuse(412, "PreconditionFailed")
            return
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                del repo.files[value["path"]]
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.hub.uploaded[value["oid"]]
            else:
                repo.files[value["path"]] = base64.b64decode(value["content"])
        repo.commits.append(lines[0]["value"]["summary"])
        if faults.happens("cut_after_commit"):
            self._hang_up()
            return
        url = f"{self.hub.endpoint}/{name}/commit/{repo.commit}"
        self._send_json({"commitUrl": url, "commitOid": repo.commit, "pullRequestUrl": None})


def _mode(repo: Repo, path: str) -> dict[str, Any]:
    """Say how a file is to be sent, and what is there under its name."""
    there = repo.files.get(path)
    large = path.endswith(LARGE)
    oid = None if there is None else hashlib.sha256(there).hexdigest() if large else git_hash(there)
    return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
