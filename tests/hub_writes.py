"""What the Hub on this machine does when something is written to it: repositories, branches, uploads, commits.

As `huggingface_hub` asks for it without its Xet storage (`HF_HUB_DISABLE_XET`): large files are uploaded one by one and
named by a commit, which comes last and holds the small ones. A commit is whole or not there.
"""

import base64
import hashlib
import json
import re
import shutil
import socket
from urllib.parse import unquote

import yaml

LARGE = (".safetensors", ".bin", ".png")
REPO_ID = r"\w[\w.-]*/\w[\w.-]*"


class HubWrites:
    """POST and PUT of the handler; `self.hub` is the `Hub`."""

    def do_POST(self):
        path = self.path.partition("?")[0]
        if "/commit/" in path and self.is_dropped("commit"):
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.headers.get("Authorization", "").startswith("Bearer "):
            self.send(b'{"error": "Invalid username or password."}', {}, True, status=401)
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.validate(json.loads(body)["content"])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            self.preupload(*map(unquote, found.groups()), json.loads(body))
        elif found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.batch(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", path):
            self.branch(*map(unquote, found.groups()))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            self.take_commit(*map(unquote, found.groups()), [json.loads(line) for line in body.splitlines()])
        else:
            self.hub.unknown.append(f"{self.command} {self.path}")
            self.refuse("EntryNotFound")

    def do_PUT(self):
        """A large file, under the SHA-256 that it has to have."""
        if self.is_dropped("upload"):
            return
        content = self.rfile.read(int(self.headers["Content-Length"]))
        name = self.path.removeprefix("/lfs/")
        if hashlib.sha256(content).hexdigest() != name:
            self.send(b"{}", {}, True, status=400)
            return
        self.hub.blobs[name] = content
        self.answer_json({})

    def is_dropped(self, kind: str) -> bool:
        """Whether the connection was dropped after half of what it was to bring."""
        if self.hub.drop != kind:
            return False
        self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
        return True

    def create(self, wanted: dict) -> None:
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "id": repo_id}
        if repo_id in self.hub.names:
            self.answer_json(answer, status=409)
            return
        if wanted.get("visibility") == "private":
            self.hub.private.add(repo_id)
        commit, folder = self.new_commit(repo_id, "main", None)
        (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        self.set_commit(repo_id, "main", commit, folder)
        self.answer_json(answer)

    def validate(self, card: str) -> None:
        """The head of a card, as far as the Hub checks it: ids are ids, results are whole."""
        errors = []
        try:
            data = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else {}
        except yaml.YAMLError as error:
            data, errors = {}, [str(error)]
        bases = data.get("base_model") or []
        for base in [bases] if isinstance(bases, str) else bases:
            errors += [] if re.fullmatch(REPO_ID, base) else [f'"base_model" with value "{base}" is not valid']
        for model in data.get("model-index") or []:
            for result in model["results"]:
                whole = (
                    result["task"].get("type") and {"type", "name"} <= result["dataset"].keys() and result["metrics"]
                )
                errors += [] if model.get("name") and whole else ['"model-index" is not valid']
        found = [{"message": error} for error in errors]
        self.answer_json({"errors": found, "warnings": []}, status=400 if found else 200)

    def preupload(self, repo_id: str, revision: str, asked: dict) -> None:
        if (commit := self.commit(repo_id, revision)) is None:
            return
        folder, files = self.hub.repos[repo_id][commit], []
        for file in asked["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            there = folder / file["path"]
            oid = content_id(there.read_bytes(), mode) if there.is_file() else None
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer_json({"files": files})

    def batch(self, asked: dict) -> None:
        objects = []
        for one in asked["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}", "header": {}}}}
            objects.append({"oid": one["oid"], "size": one["size"]} | ({} if one["oid"] in self.hub.blobs else upload))
        self.answer_json({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def branch(self, repo_id: str, name: str) -> None:
        if (commit := self.commit(repo_id, "main")) is None:
            return
        if name in self.hub.names[repo_id]:
            self.answer_json({"error": "Reference already exists"}, status=409)
            return
        self.hub.names[repo_id][name] = commit
        self.answer_json({})

    def refs(self, repo_id: str) -> None:
        if self.commit(repo_id, "main") is None:
            return
        names = self.hub.names[repo_id].items()
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": to} for name, to in names if name != to]
        self.answer_json({"branches": branches, "tags": [], "converts": []})

    def take_commit(self, repo_id: str, branch: str, lines: list[dict]) -> None:
        """All of a commit, or an error and nothing."""
        if (parent := self.commit(repo_id, branch)) is None:
            return
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", parent) != parent:
            self.answer_json({"error": "A commit has happened since. Please refresh and try again."}, status=412)
            return
        if lost := [line for line in lines if line["key"] == "lfsFile" and line["value"]["oid"] not in self.hub.blobs]:
            self.answer_json({"error": f"{lost[0]['value']['path']} was not uploaded"}, status=400)
            return
        commit, folder = self.new_commit(repo_id, branch, self.hub.repos[repo_id][parent])
        for line in lines:
            if line["key"] == "header":
                continue
            path = folder / line["value"]["path"]
            if line["key"] == "deletedFile":
                path.unlink()
            elif line["key"] == "file":
                write(path, base64.b64decode(line["value"]["content"]))
            elif line["key"] == "lfsFile":
                write(path, self.hub.blobs[line["value"]["oid"]])
        self.set_commit(repo_id, branch, commit, folder)
        self.hub.history.append((repo_id, branch, header["summary"]))
        self.answer_json(
            {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit}"}
        )

    def new_commit(self, repo_id: str, branch: str, parent):
        """(commit, folder) with the files of a parent."""
        number = sum(map(len, self.hub.repos.values()))
        commit = hashlib.sha1(f"{repo_id}@{branch}#{number}".encode()).hexdigest()
        folder = self.hub.storage / commit
        if parent is None:
            folder.mkdir()
        else:
            shutil.copytree(parent, folder)
        return commit, folder

    def set_commit(self, repo_id: str, branch: str, commit: str, folder) -> None:
        self.hub.repos.setdefault(repo_id, {})[commit] = folder
        self.hub.names.setdefault(repo_id, {}).update({branch: commit, commit: commit})

    def answer_json(self, content, status: int = 200, kind: str = "application/json") -> None:
        self.send(json.dumps(content).encode(), {"Content-Type": kind}, True, status=status)


def content_id(content: bytes, mode: str) -> str:
    """What names a file's content: a blob of git, or the SHA-256 of a large file."""
    if mode == "lfs":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def write(path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
