"""A Hub on the loopback interface, as far as huggingface_hub's client needs one; commits are whole or not there."""

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

TOKEN, USER = "hf_loopback", "ada"
Files = dict[str, bytes]


@dataclass
class Repo:
    private: bool
    commits: list[tuple[str, str, Files]] = field(default_factory=list)  # id, message, all files

    @property
    def head(self) -> tuple[str, str, Files]:
        return self.commits[-1]

    def commit(self, message: str, files: Files) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append((oid, message, files))
        return oid

    def at(self, revision: str) -> tuple[str, str, Files] | None:
        if revision == "main":
            return self.head
        return next((commit for commit in self.commits if commit[0] == revision), None)


@dataclass
class Fault:
    """What goes wrong: on requests that match, after `skip` of them, `times` of them get `status`, or a closed line."""

    method: str
    path: str
    status: int | None  # None closes the connection without an answer
    skip: int = 0
    times: int = 100
    late: bool = False  # the request has its effect first

    def strikes(self, method: str, path: str) -> bool:
        if method != self.method or not re.search(self.path, path):
            return False
        self.skip -= 1
        if self.skip >= 0:
            return False
        self.times -= 1
        return self.times >= 0


class Hub:
    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.validated: set[str] = set()
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def files(self, repo: str) -> Files:
        return self.repos[repo].head[2]


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        fault = next((f for f in self.hub.faults if f.strikes(self.command, path)), None)
        if fault is not None and not fault.late and fault.status is None and self.command == "PUT":
            self.rfile.read(16)  # in the middle of the body
        if fault is not None and not fault.late:
            return self.fail(fault)
        body = self.read_body()
        with self.hub.lock:
            status, headers, answer = self.route(path, body)
        if fault is not None:
            return self.fail(fault)
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        return None

    def fail(self, fault: Fault) -> None:
        self.close_connection = True
        if fault.status is not None:
            if not fault.late:
                self.read_body()
            self.send_response(fault.status)
            self.send_header("Content-Length", "0")
            self.send_header("Connection", "close")
            self.end_headers()

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    @property
    def is_owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def route(self, path: str, body: bytes) -> tuple[int, dict[str, str], Any]:
        post = json.loads(body) if self.command == "POST" and body[:1] == b"{" and "/commit/" not in path else {}
        if path == "/api/validate-yaml":
            self.hub.validated.add(post["content"])
            return 200, {}, {"errors": [], "warnings": []}
        if found := re.fullmatch(r"/lfs/(\w+)", path):
            assert hashlib.sha256(body).hexdigest() == found[1]
            self.hub.objects[found[1]] = body
            return 200, {}, {}
        if path in ("/api/whoami-v2", "/api/repos/create") and not self.is_owner:
            return 401, {}, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            return 200, {}, {"name": USER, "type": "user"}
        if path == "/api/repos/create":
            return self.create(f"{post.get('organization') or USER}/{post['name']}", post)
        if found := re.fullmatch(r"/(?:api/models/)?([\w.-]+/[\w.-]+?)(?:\.git)?((?:/.*)?)", path):
            repo = self.hub.repos.get(found[1])
            if repo is None or (repo.private and not self.is_owner):
                return (404 if self.is_owner else 401), {"X-Error-Code": "RepoNotFound"}, {"error": "not found"}
            return self.repository(found[1], repo, found[2], post, body)
        return 404, {}, {"error": "not found"}

    def create(self, name: str, post: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        if name in self.hub.repos:
            return 409, {}, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
        private = post.get("private") or post.get("visibility") == "private"
        self.hub.repos[name] = Repo(bool(private))
        self.hub.repos[name].commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return 200, {}, {"url": f"{self.hub.url}/{name}", "name": name, "id": name}

    def repository(
        self, name: str, repo: Repo, rest: str, post: dict[str, Any], body: bytes
    ) -> tuple[int, dict[str, str], Any]:
        writes = re.match(r"/(preupload|commit|info/lfs)/", rest)
        if writes and not self.is_owner:
            return 401, {}, {"error": "Invalid credentials"}
        if rest.startswith("/preupload/"):
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in post["files"]
            ]
            return 200, {}, {"files": modes}
        if rest == "/info/lfs/objects/batch":
            return 200, {}, {"transfer": "basic", "objects": [self.upload_of(o) for o in post["objects"]]}
        if rest.startswith("/commit/"):
            return self.commit(name, repo, rest.removeprefix("/commit/"), body)
        parts = rest.strip("/").split("/")
        revision = parts[1] if len(parts) > 1 else "main"
        if (commit := repo.at(revision)) is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, {"error": "no such revision"}
        oid, _, files = commit
        if parts[0] in ("", "revision"):
            siblings = [{"rfilename": path} for path in sorted(files)]
            return 200, {}, {"id": name, "modelId": name, "sha": oid, "private": repo.private, "siblings": siblings}
        if parts[0] == "tree":
            return 200, {}, [{"type": "file", "path": p, "oid": oid, "size": len(d)} for p, d in sorted(files.items())]
        if parts[0] == "resolve":
            path = "/".join(parts[2:])
            if path not in files:
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid}, {"error": "no such file"}
            etag = hashlib.sha256(files[path]).hexdigest()
            return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": oid, "Accept-Ranges": "none"}, files[path]
        return 404, {}, {"error": "not found"}

    def upload_of(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.hub.objects:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}}}}

    def commit(self, name: str, repo: Repo, revision: str, body: bytes) -> tuple[int, dict[str, str], Any]:
        if revision != "main":
            return 404, {"X-Error-Code": "RevisionNotFound"}, {"error": "no such revision"}
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, repo.head[0]):
            return 412, {}, {"error": "A commit has happened since"}
        files = dict(repo.head[2])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(header["summary"], files)
        return 200, {}, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "hookOutput": ""}
