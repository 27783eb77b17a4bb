"""A stand-in for the Hugging Face Hub: what huggingface_hub asks of it when it reads and writes models.

Commits are kept in memory. A token is what `Authorization: Bearer` says; `writers` may write.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Repository:
    """Its commits, and which commit each branch and tag is."""

    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: Files, ref: str = "main") -> str:
        content = json.dumps([ref, len(self.commits), sorted((n, _sha256(b)) for n, b in files.items())])
        name = hashlib.sha1(content.encode()).hexdigest()
        self.commits[name] = dict(files)
        self.refs[ref] = name
        return name

    def files(self, revision: str) -> Files:
        return self.commits[self.refs.get(revision, revision)]


class StandInHub:
    """The state of the server.

    Attributes:
        requests: Every request, as METHOD PATH.
        writers: Tokens that may write.
        broken: Answer this status to everything.
        cut: A file of which only half is sent.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.uploads: dict[str, bytes] = {}
        self.writers: set[str] = set()
        self.broken: int | None = None
        self.cut: str | None = None
        self.url = ""

    def put_folder(self, repo: str, folder: Path, ref: str = "main") -> str:
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return self.repositories.setdefault(repo, Repository()).commit(files, ref)

    def environment(self, cache: Path, **more: str) -> dict[str, str]:
        """What lets huggingface_hub of another process talk to this server, with a cache of its own."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", **more}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def serve() -> Iterator[StandInHub]:
    hub = StandInHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(self._read)

    def do_GET(self) -> None:
        self._answer(self._read)

    def do_POST(self) -> None:
        self._answer(self._write)

    def do_PUT(self) -> None:
        self._answer(self._upload)

    def _answer(self, action: Any) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(size)
        self.path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {self.path}")
        if self.hub.broken is not None:
            self._send(self.hub.broken, b"out of order")
        else:
            action()

    def _send(self, status: int, body: bytes | Any = b"", **headers: str) -> None:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            is_cut = self.hub.cut is not None and self.path.endswith(self.hub.cut)
            self.wfile.write(body[: len(body) // 2] if is_cut else body)
            self.close_connection = is_cut

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    @property
    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _repository(self, name: str) -> Repository | None:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self._token is None):
            self._refuse(401 if self._token is None else 404, "RepoNotFound")
            return None
        return found

    def _read(self) -> None:
        parts = self.path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._read_api("/".join(parts[2:4]), parts[4:])
        elif len(parts) > 4 and parts[2] == "resolve":
            self._read_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._refuse(404, "NotFound")

    def _read_api(self, name: str, rest: list[str]) -> None:
        found = self._repository(name)
        if found is None:
            return
        revision = "/".join(rest[1:]) or "main"
        if revision not in found.refs and revision not in found.commits:
            self._refuse(404, "RevisionNotFound")
            return
        files = found.files(revision)
        if rest[:1] == ["tree"]:
            self._send(200, [_tree_entry(path, content) for path, content in sorted(files.items())])
            return
        sha = found.refs.get(revision, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        self._send(200, {"id": name, "modelId": name, "sha": sha, "siblings": siblings, "private": False})

    def _read_file(self, name: str, revision: str, path: str) -> None:
        found = self._repository(name)
        if found is None:
            return
        if found.gated and self._token is None:
            self._refuse(401, "GatedRepo")
            return
        commit = found.refs.get(revision, revision)
        content = found.commits.get(commit, {}).get(path)
        if content is None:
            self._refuse(404, "EntryNotFound" if commit in found.commits else "RevisionNotFound")
            return
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        status = 206 if start else 200
        headers = {"ETag": f'"{_sha256(content)}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(status, content[start:], **headers)

    def _write(self) -> None:
        parts = self.path.strip("/").split("/")
        content = json.loads(self.body) if self.body[:1] == b"{" and b"\n{" not in self.body else {}
        if parts == ["api", "validate-yaml"]:
            self._send(200, {"errors": [], "warnings": []})
            return
        if self._token not in self.hub.writers:
            self._send(401 if self._token is None else 403, {"error": "This token may not write."})
        elif parts == ["api", "repos", "create"]:
            name = (
                f"{content['organization']}/{content['name']}"
                if content.get("organization")
                else content["name"]
            )
            if name in self.hub.repositories:
                self._send(409, {"error": "there already", "url": f"{self.hub.url}/{name}"})
                return
            private = bool(content.get("private")) or content.get("visibility") == "private"
            self.hub.repositories[name] = Repository(private=private)
            self.hub.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
            self._send(200, {"url": f"{self.hub.url}/{name}", "name": name})
        elif parts[-2:] == ["objects", "batch"]:
            objects = [self._lfs_object(o) for o in content["objects"]]
            self._send(200, {"transfer": "basic", "objects": objects})
        else:
            self._write_repository("/".join(parts[2:4]), parts[4], "/".join(parts[5:]), content)

    def _lfs_object(self, wanted: dict[str, Any]) -> dict[str, Any]:
        oid = wanted["oid"]
        if oid in self.hub.uploads:
            return wanted
        href = f"{self.hub.url}/upload/{oid}"
        return {**wanted, "authenticated": True, "actions": {"upload": {"href": href, "header": {}}}}

    def _write_repository(self, name: str, what: str, revision: str, content: dict[str, Any]) -> None:
        repository = self.hub.repositories[name]
        if what == "branch":
            repository.refs.setdefault(revision, repository.refs["main"])
            self._send(200, {})
        elif what == "preupload":
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith((".safetensors", ".onnx")) else "regular",
                    "shouldIgnore": False,
                }
                for f in content["files"]
            ]
            self._send(200, {"files": files})
        elif what == "commit":
            files = dict(repository.files(revision))
            for line in self.body.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = self.hub.uploads[value["oid"]]
                elif entry["key"] == "deletedFile":
                    files.pop(value["path"])
            oid = repository.commit(files, revision)
            url = f"{self.hub.url}/{name}/commit/{oid}"
            self._send(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})
        else:
            self._refuse(404, "NotFound")

    def _upload(self) -> None:
        oid = self.path.rpartition("/")[2]
        assert _sha256(self.body) == oid
        self.hub.uploads[oid] = self.body
        self._send(200, ETag=oid)


def _tree_entry(path: str, content: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(content).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": oid}
    if path.endswith(".safetensors"):
        entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 100}
    return entry
