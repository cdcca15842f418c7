"""A hub on this machine: the few endpoints that huggingface_hub asks for, over HTTP, with the contents in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Files of each revision (a commit's name), and what branches and tags point at."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    refs: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    tags: set[str] = field(default_factory=set)

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.refs.get(revision, revision))

    def commit(self, changes: list[dict[str, Any]]) -> str:
        files = dict(self.commits[self.refs["main"]])
        for change in changes:
            if change["key"] == "file":
                assert change["value"]["encoding"] == "base64"
                files[change["value"]["path"]] = base64.b64decode(change["value"]["content"])
            elif change["key"] == "deletedFile":
                del files[change["value"]["path"]]
        name = hashlib.sha1(repr((sorted(files.items()), len(self.commits))).encode()).hexdigest()
        self.commits[name], self.refs["main"] = files, name
        return name


class Hub:
    """The repositories by "models/user/name" or "datasets/user/name", and every request that came."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.address = ""


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub at ``Hub.address`` while the context lasts."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_POST = do_HEAD = do_DELETE = do_GET

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path).strip("/")
        self.state.requests.append(f"{self.command} {path}")
        if path == "api/repos/create":
            return self._create(json.loads(body))
        if path == "api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        api = re.fullmatch(r"api/((?:models|datasets)/[^/]+/[^/]+)(?:/(\w+))?(?:/(.*))?", path)
        if api:
            return self._api(api[1], api[2] or "info", api[3] or "main", body)
        file = re.fullmatch(r"(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path)
        if file:
            return self._file(f"{file[1] or 'models/'}{file[2]}", file[3], file[4])
        return self._answer(404, {})

    def _create(self, asked: dict[str, Any]) -> None:
        kind, user = asked.get("type") or "model", asked.get("organization") or "user"
        name = f"{kind}s/{user}/{asked['name']}"
        there = name in self.state.repositories
        self.state.repositories.setdefault(name, Repository())
        page = name.removeprefix("models/")
        self._answer(409 if there else 200, {"url": f"{self.state.address}/{page}", "id": page})

    def _api(self, name: str, what: str, rest: str, body: bytes) -> None:
        repository = self.state.repositories.get(name)
        if repository is None:
            return self._answer(404, {}, {"X-Error-Code": "RepoNotFound"})
        if what == "refs":
            refs = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": repository.refs[tag]}
                    for tag in repository.tags]  # fmt: skip
            return self._answer(200, {"branches": [], "converts": [], "tags": refs})
        if what == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for f in json.loads(body)["files"]]  # fmt: skip
            return self._answer(200, {"files": files})
        if what == "commit":
            commit = repository.commit([json.loads(line) for line in body.splitlines()])
            return self._answer(200, {"commitUrl": f"{self.state.address}/{name}/commit/{commit}", "commitOid": commit,
                                      "pullRequestUrl": None})  # fmt: skip
        if what == "tag":
            tag = json.loads(body)["tag"] if self.command == "POST" else rest
            if self.command == "POST":
                repository.refs[tag] = repository.refs[rest]
                repository.tags.add(tag)
            else:
                repository.tags.remove(tag)
            return self._answer(200, {})
        revision = rest.split("/")[0]
        files = repository.files(revision)
        if files is None:
            return self._answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        if what == "tree":
            entries = [{"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                       for path, data in files.items()]  # fmt: skip
            return self._answer(200, entries)
        commit = repository.refs.get(revision, revision)
        self._answer(200, {"id": name.partition("/")[2], "sha": commit, "private": False, "tags": [], "downloads": 0,
                           "siblings": [{"rfilename": path} for path in files]})  # fmt: skip

    def _file(self, name: str, revision: str, path: str) -> None:
        repository = self.state.repositories.get(name)
        files = repository.files(revision) if repository else None
        if repository is None or files is None or path not in files:
            return self._answer(404, {}, {"X-Error-Code": "EntryNotFound"})
        commit = repository.refs.get(revision, revision)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(files[path]).hexdigest()}"'}
        self._answer(200, files[path], headers)

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
