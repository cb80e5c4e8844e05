"""A Hub on this machine: serves folders as repositories with revisions, as `huggingface_hub` asks for them.

What is written to it goes to `hub_writes.py`.
"""

import hashlib
import json
import re
import tempfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

from hub_writes import HubWrites


class Hub:
    """Repositories and what was asked of them.

    Attributes:
        url: for `HF_ENDPOINT`.
        unknown: requests about models that no part of the server knows; a test that leaves some has found a gap.
        repos: id to commit to the folder that holds its files.
        names: id to name of a branch, or commit, to commit.
        history: (id, branch, summary) of every commit that was pushed.
        storage: where pushed commits are kept.
        blobs: content of large files that were uploaded, by SHA-256.
        private: ids of repositories that were made private.
        drop: "upload" or "commit": connections that send such are dropped in the middle.
    """

    def __init__(self, storage: Path | None = None):
        self.url, self.unknown = "", []
        self.repos: dict[str, dict[str, Path]] = {}
        self.names: dict[str, dict[str, str]] = {}
        self.history: list[tuple[str, str, str]] = []
        self.storage, self.blobs, self.private, self.drop = storage, {}, set(), None

    def add(self, repo_id: str, folder: Path, revision: str = "main") -> str:
        """Serve a folder as a revision of a repository; its commit."""
        commit = hashlib.sha1(f"{repo_id}@{revision}".encode()).hexdigest()
        self.repos.setdefault(repo_id, {})[commit] = Path(folder)
        self.names.setdefault(repo_id, {}).update({revision: commit, commit: commit})
        return commit

    def environment(self, cache: Path) -> dict[str, str]:
        """What a process needs that is to use this Hub and an empty cache; read when its libraries are imported."""
        places = {"HF_HOME": str(cache), "HF_MODULES_CACHE": str(cache / "modules")}
        return places | {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


class Handler(HubWrites, BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self.describe(found[1], unquote(found[2] or "main"), with_body)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self.list(*map(unquote, found.groups()), with_body)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/(.+)", path):
            self.list(*map(unquote, found.groups()[:2]), with_body, within=unquote(found[3]))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/refs", path):
            self.refs(found[1])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(*map(unquote, found.groups()), with_body)
        else:
            if path.startswith("/api/models"):  # the client may ask other things too, which it can do without
                self.hub.unknown.append(f"{self.command} {self.path}")
            self.refuse("EntryNotFound")

    def describe(self, repo_id: str, revision: str, with_body: bool) -> None:
        if (commit := self.commit(repo_id, revision)) is None:
            return
        folder = self.hub.repos[repo_id][commit]
        files = [{"rfilename": str(path.relative_to(folder))} for path in sorted(folder.rglob("*")) if path.is_file()]
        content = {
            "id": repo_id,
            "modelId": repo_id,
            "sha": commit,
            "siblings": files,
            "private": repo_id in self.hub.private,
        }
        self.send(json.dumps(content).encode(), {"Content-Type": "application/json"}, with_body)

    def list(self, repo_id: str, revision: str, with_body: bool, within: str = "") -> None:
        """Every file of a revision, or of a folder in it, folders not counted."""
        if (commit := self.commit(repo_id, revision)) is None:
            return
        folder = self.hub.repos[repo_id][commit]
        if not (folder / within).is_dir():
            self.refuse("EntryNotFound")
            return
        files = [path for path in sorted((folder / within).rglob("*")) if path.is_file()]
        entries = [
            {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": digest(path)}
            for path in files
        ]
        self.send(json.dumps(entries).encode(), {"Content-Type": "application/json"}, with_body)

    def file(self, repo_id: str, revision: str, name: str, with_body: bool) -> None:
        if (commit := self.commit(repo_id, revision)) is None:
            return
        path = self.hub.repos[repo_id][commit] / name
        if not path.is_file():
            self.refuse("EntryNotFound")
            return
        self.send(path.read_bytes(), {"ETag": f'"{digest(path)}"', "X-Repo-Commit": commit}, with_body)

    def commit(self, repo_id: str, revision: str) -> str | None:
        """Commit of a revision; answers the request if there is none."""
        if repo_id not in self.hub.names:
            self.refuse("RepoNotFound")
        elif revision not in self.hub.names[repo_id]:
            self.refuse("RevisionNotFound")
        return self.hub.names.get(repo_id, {}).get(revision)

    def send(self, content: bytes, headers: dict, with_body: bool, status: int = 200) -> None:
        if status == 200 and (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers = headers | {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
            content, status = content[start : end + 1], 206
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def refuse(self, code: str) -> None:
        self.send(b"{}", {"X-Error-Code": code}, self.command != "HEAD", status=404)

    def log_message(self, *args):
        """Nothing."""


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def running_hub():
    """A `Hub` that listens on loopback while the block runs."""
    with tempfile.TemporaryDirectory() as storage:
        hub = Hub(Path(storage))
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
        hub.url = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()
            server.server_close()
