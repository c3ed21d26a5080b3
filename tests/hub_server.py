"""A small Hugging Face hub on loopback: the routes that huggingface_hub and datasets ask of it.

Repositories are dictionaries of revisions of files. Faults are set as attributes: repositories that are gated
or private, answers of 429 before the next one, downloads that break off after some bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "hf_loopbackSecretToken"

Files = dict[str, bytes]


class Hub:
    """The repositories of the server, and what it does wrong on purpose."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Files]] = {}
        """"models/OWNER/NAME" → commit → files; the last commit is main."""
        self.names: dict[str, dict[str, str]] = {}
        """Repository → branch or tag → commit."""
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.busy = 0
        """How many of the next questions are answered with 429."""
        self.breaks: list[int] = []
        """After how many bytes each of the next downloads of content breaks off."""
        self.asked: list[tuple[str, str, str | None]] = []
        """Method, path and range of every question."""
        self.endpoint = ""

    def put(self, repository: str, files: Files, *, tag: str | None = None) -> str:
        """A new commit of a repository, which main names; returns it."""
        commits = self.repositories.setdefault(repository, {})
        whole = repr(sorted(files.items())) + str(len(commits))
        commit = hashlib.sha1(whole.encode()).hexdigest()
        commits[commit] = dict(files)
        self.names.setdefault(repository, {})["main"] = commit
        if tag is not None:
            self.names[repository][tag] = commit
        return commit

    def find(self, repository: str, revision: str) -> tuple[str, Files] | None:
        """Commit and files of a revision."""
        commit = self.names.get(repository, {}).get(revision, revision)
        files = self.repositories.get(repository, {}).get(commit)
        return None if files is None else (commit, files)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers until the context is left."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_to(hub: Hub, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Have huggingface_hub ask this hub, with its token and an empty cache."""
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "ENDPOINT", hub.endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache.with_name("token")))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setenv("HF_TOKEN", TOKEN)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        split = urlsplit(self.path)
        path, query = unquote(split.path), parse_qs(split.query)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append((self.command, path, self.headers.get("Range")))
        if self.hub.busy > 0:
            self.hub.busy -= 1
            return self._send(429, b"slow down", {"Retry-After": "0"})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        resolve = re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if resolve:
            kind, name, revision, file = resolve.groups()
            return self._resolve(f"{kind or 'models'}/{name}", revision, file)
        api = re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/([a-z-]+)(?:/([^/]+)(?:/(.*))?)?)?", path
        )
        if api:
            kind, name, what, revision, rest = api.groups()
            return self._api(
                f"{kind}/{name}", what or "revision", revision or "main", rest or "", query, body
            )
        return self._error(404, "EntryNotFound", "no such route")

    def _api(
        self, repository: str, what: str, revision: str, rest: str, query: dict[str, list[str]], body: bytes
    ) -> None:
        if not self._is_allowed(repository):
            return None
        found = self.hub.find(repository, revision)
        if what == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return self._json({"files": modes})
        if what == "commit":
            return self._commit(repository, body, (found or ("", {}))[1])
        if found is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit, files = found
        if what == "revision":
            siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            return self._json({"id": repository.partition("/")[2], "sha": commit, "siblings": siblings})
        if what == "tree":
            entries = _tree(
                files, rest.rstrip("/"), recursive="true" in query.get("recursive", ["false"])[0].lower()
            )
            if entries is None:
                return self._error(404, "EntryNotFound", f"{rest} does not exist")
            return self._json(entries)
        if what == "paths-info":
            wanted = parse_qs(body.decode()).get("paths") or json.loads(body or b"{}").get("paths", [])
            return self._json(
                [entry for entry in _tree(files, "", recursive=True) or [] if entry["path"] in wanted]
            )
        return self._error(404, "EntryNotFound", f"no {what}")

    def _is_allowed(self, repository: str) -> bool:
        """Whether it is there for who asks; else the answer was sent."""
        has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository in self.hub.gated:
            self._error(403, "GatedRepo", f"Access to {repository} is restricted: ask for it on its page")
            return False
        if repository not in self.hub.repositories or (repository in self.hub.private and not has_token):
            self._error(401, "RepoNotFound", "Repository Not Found")
            return False
        return True

    def _resolve(self, repository: str, revision: str, file: str) -> None:
        if not self._is_allowed(repository):
            return None
        found = self.hub.find(repository, revision)
        if found is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit, files = found
        if file not in files:
            return self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        content = files[file]
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
            "Content-Disposition": f'inline; filename="{file}"',
        }
        start = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if start is None:
            return self._send(200, content, headers)
        begin, end = int(start[1]), int(start[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {begin}-{min(end, len(content) - 1)}/{len(content)}"
        return self._send(206, content[begin : end + 1], headers)

    def _create(self, given: dict[str, Any]) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._error(401, "", "Invalid username or password.")
        owner, name = given.get("organization") or "me", given["name"]
        repository = f"{given.get('type') or 'model'}s/{owner}/{name}"
        if repository in self.hub.repositories:
            return self._error(409, "", "You already created this repo")
        self.hub.put(repository, {})
        if given.get("private") or given.get("visibility") == "private":
            self.hub.private.add(repository)
        return self._json({"url": f"{self.hub.endpoint}/{owner}/{name}", "id": f"{owner}/{name}"})

    def _commit(self, repository: str, body: bytes, before: Files) -> None:
        files = dict(before)
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "deletedFile":
                files.pop(entry["value"]["path"], None)
        commit = self.hub.put(repository, files)
        url = f"{self.hub.endpoint}/{repository.partition('/')[2]}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        told = {"X-Error-Code": code, "X-Error-Message": message} | (headers or {})
        self._send(status, json.dumps({"error": message}).encode(), told)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if (
            self.hub.breaks
            and status in (200, 206)
            and "ETag" in headers
            and len(content) > self.hub.breaks[0]
        ):
            self.wfile.write(content[: self.hub.breaks.pop(0)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(content)


def _tree(files: Files, under: str, *, recursive: bool) -> list[dict[str, Any]] | None:
    """The entries of a folder, as the hub lists them; None where there is no such folder."""
    prefix = f"{under}/" if under else ""
    inside = {name: content for name, content in files.items() if name.startswith(prefix)}
    if not inside and under:
        return None
    entries: dict[str, dict[str, Any]] = {}
    for name, content in inside.items():
        parts = name.removeprefix(prefix).split("/")
        for depth in range(1, len(parts)):
            folder = prefix + "/".join(parts[:depth])
            if recursive or depth == 1:
                entries[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
        if recursive or len(parts) == 1:
            oid = hashlib.sha1(content).hexdigest()
            entries[name] = {"type": "file", "path": name, "oid": oid, "size": len(content)}
    return list(entries.values())
