"""Serve the Hub's endpoints that huggingface_hub uses to upload and to load. All content stays in memory."""

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

TOKEN = "hf_local"
LARGE = (".safetensors", ".bin", ".png", ".jpg")  # go by LFS, as the Hub's .gitattributes has it
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repository:
    """Hold commits by id, each a dict from path to content."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    head: str = ""

    def commit(self, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(repr(sorted(files)).encode() + str(len(self.commits)).encode())
        self.head = digest.hexdigest()
        self.commits[self.head] = files
        return self.head


@dataclass
class Hub:
    """Hold the content of the server and the requests that it got."""

    url: str = ""
    storage: str = ""  # where large files are: another host's name, as the Hub's, for redirects to it are not followed
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)  # "POST create", "PUT lfs", ...
    unknown: list[str] = field(default_factory=list)

    def files(self, repo: str) -> dict[str, bytes]:
        repository = self.repositories[repo]
        return repository.commits[repository.head]


class Handler(BaseHTTPRequestHandler):
    """Route requests by regular expression. `ROUTES` maps `METHOD path` to the name of a method."""

    protocol_version = "HTTP/1.1"
    hub: Hub
    ROUTES = (
        (r"POST /api/repos/create", "create"),
        (r"POST /api/validate-yaml", "validate"),
        (rf"POST /api/models/{REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
        (rf"POST /{REPO}\.git/info/lfs/objects/batch", "batch"),
        (r"PUT /lfs/(?P<oid>\w+)", "put"),
        (rf"POST /api/models/{REPO}/commit/(?P<revision>[^/]+)", "commit"),
        (rf"(GET|HEAD) /{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        (r"(GET|HEAD) /lfs/(?P<oid>\w+)", "large"),
        (rf"GET /api/models/{REPO}/tree/(?P<revision>[^/]+)(/(?P<path>.*))?", "tree"),
        (rf"GET /api/models/{REPO}(/revision/(?P<revision>[^/]+))?", "info"),
    )

    def log_message(self, *args: Any) -> None:
        """Log nothing."""

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        for pattern, name in self.ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                self.hub.asked.append(f"{self.command} {name}")
                getattr(self, name)(**match.groupdict())
                return
        self.hub.unknown.append(f"{self.command} {path}")
        self.error(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def reply(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, value: Any) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def error(self, status: int, code: str) -> None:
        self.reply(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def writes(self) -> bool:
        """Return whether the caller may write, and send an error if not."""
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.error(401, "Unauthorized")
        return False

    def found(self, repo: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        repository = self.hub.repositories.get(repo)
        if repository is None:
            self.error(404, "RepoNotFound")
            return None
        commit = repository.head if revision in (None, "main") else str(revision)
        if commit not in repository.commits:
            self.error(404, "RevisionNotFound")
            return None
        return commit, repository.commits[commit]

    def create(self) -> None:
        if not self.writes():
            return
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.repositories:
            self.reply(409, json.dumps(answer).encode(), {"Content-Type": "application/json"})
            return
        self.hub.repositories[name] = Repository()
        self.hub.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self.json(answer)

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        errors = [] if re.match(r"---\n.*?\n---", content, re.S) else [{"message": "no metadata"}]
        self.json({"errors": errors, "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(self.body)["files"]
        ]
        if self.writes():
            self.json({"files": files})

    def batch(self, repo: str) -> None:
        objects = []
        for item in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.storage}/lfs/{item['oid']}"}
            objects.append(item if item["oid"] in self.hub.large else {**item, "actions": {"upload": upload}})
        if self.writes():
            self.json({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.error(400, "BadDigest")
            return
        self.hub.large[oid] = self.body
        self.reply(200, b"")

    def commit(self, repo: str, revision: str) -> None:
        if not self.writes():
            return
        files = dict(self.hub.files(repo))
        for line in self.body.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            elif item["key"] == "lfsFile":
                files[item["value"]["path"]] = self.hub.large[item["value"]["oid"]]
        oid = self.hub.repositories[repo].commit(files)
        self.json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        there = self.found(repo, revision)
        if there is None:
            return
        commit, files = there
        headers = {"X-Repo-Commit": commit}
        if path not in files:
            self.reply(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
        elif path.endswith(LARGE):
            oid = hashlib.sha256(files[path]).hexdigest()
            linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(files[path]))}
            self.reply(302, b"", {**headers, **linked, "Location": f"{self.hub.storage}/lfs/{oid}"})
        else:
            etag = hashlib.sha1(files[path]).hexdigest()
            self.reply(200, files[path], {**headers, "ETag": f'"{etag}"'})

    def large(self, oid: str) -> None:
        self.reply(200, self.hub.large[oid], {"ETag": f'"{oid}"'})

    def tree(self, repo: str, revision: str, path: str | None = None) -> None:
        there = self.found(repo, revision)
        if there is None:
            return
        prefix = f"{path.rstrip('/')}/" if path else ""
        inside = {name: content for name, content in there[1].items() if name.startswith(prefix)}
        if prefix and not inside:
            self.error(404, "EntryNotFound")
            return
        self.json(
            [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for n, c in inside.items()
            ]
        )

    def info(self, repo: str, revision: str | None = None) -> None:
        there = self.found(repo, revision)
        if there is not None:
            commit, files = there
            siblings = [{"rfilename": name} for name in files]
            self.json({"_id": "1", "id": repo, "modelId": repo, "sha": commit, "private": False, "tags": [],
                       "siblings": siblings})  # fmt: skip


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a hub on a free port of this machine while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url, hub.storage = (f"http://{name}:{server.server_address[1]}" for name in ("127.0.0.1", "localhost"))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
