"""The Hub's protocol on a local port, as huggingface_hub speaks it: create, preupload, LFS, commit, list, download."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"


def blob_id(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class FakeHub:
    """One user, `me`, with one token. `faults` go wrong once each: (method, part of the path, `500`, `drop` or `lose`).

    `drop` closes the connection in the middle of the request's body; `lose` does what was asked and never answers.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[tuple[str, str, str]] = []
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # 40 ms an answer otherwise

            def log_message(self, *arguments: Any) -> None:
                pass

            def do_GET(self) -> None:
                Exchange(hub, self).run()

            do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo: str) -> dict[str, bytes]:
        return {path: content for path, (content, _) in self.repos[repo]["files"].items()}


class Exchange:
    """One request and its answer."""

    def __init__(self, hub: FakeHub, handler: BaseHTTPRequestHandler) -> None:
        self.hub, self.handler = hub, handler
        self.method, self.path = handler.command, unquote(urlsplit(handler.path).path)
        self.silent = False

    def run(self) -> None:
        self.hub.requests.append(f"{self.method} {self.path}")
        fault = next((f for f in self.hub.faults if f[0] == self.method and f[1] in self.path), None)
        if fault is not None:
            self.hub.faults.remove(fault)
        if fault is not None and fault[2] == "drop":
            self.handler.rfile.read(min(1000, int(self.handler.headers.get("Content-Length") or 0)))
            self.hang_up()
            return
        self.body = self.read_body()
        if fault is not None and fault[2] == "500":
            self.answer(500, {"error": "out of order"})
            return
        self.silent = fault is not None and fault[2] == "lose"
        self.route()

    def read_body(self) -> bytes:
        if self.handler.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.handler.rfile.readline(), 16):
                parts.append(self.handler.rfile.read(size))
                self.handler.rfile.readline()
            self.handler.rfile.readline()
            return b"".join(parts)
        return self.handler.rfile.read(int(self.handler.headers.get("Content-Length") or 0))

    def hang_up(self) -> None:
        self.handler.close_connection = True
        self.handler.connection.close()

    def answer(self, status: int, value: Any = None, headers: dict[str, str] | None = None) -> None:
        if self.silent:
            self.hang_up()
            return
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.handler.send_response(status)
        for key, text in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.handler.send_header(key, text)
        self.handler.end_headers()
        if self.method != "HEAD":
            self.handler.wfile.write(content)

    def route(self) -> None:
        if not self.path.startswith("/lfs/") and self.handler.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid credentials"})
            return
        for method, pattern, handle in (
            ("GET", r"/api/whoami-v2", self.whoami),
            ("POST", r"/api/repos/create", self.create),
            ("POST", r"/api/validate-yaml", lambda: self.answer(200, {"errors": [], "warnings": []})),
            ("GET", r"/api/models/(.+?)/tree/[^/]+", self.tree),
            ("POST", r"/api/models/(.+?)/preupload/main", self.preupload),
            ("POST", r"/api/models/(.+?)/commit/main", self.commit),
            ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", self.info),
            ("POST", r"/(.+?)\.git/info/lfs/objects/batch", self.batch),
            ("PUT", r"/lfs/(.+)", self.put),
            ("(GET|HEAD)", r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.resolve),
        ):
            found = re.fullmatch(pattern, self.path)
            if re.fullmatch(method, self.method) and found:
                handle(*found.groups())  # type: ignore[operator]
                return
        self.answer(404, {"error": f"no {self.method} {self.path}"})

    def known(self, repo: str) -> dict[str, Any] | None:
        if repo not in self.hub.repos:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return self.hub.repos.get(repo)

    def whoami(self) -> None:
        self.answer(200, {"type": "user", "name": "me", "orgs": [{"name": "readers"}], "auth": {}})

    def create(self) -> None:
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or "me"
        repo = f"{owner}/{wanted['name']}"
        if owner != "me":
            self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        elif repo in self.hub.repos:
            self.answer(409, {"error": "You already created this repository", "url": f"{self.hub.url}/{repo}"})
        else:
            self.hub.repos[repo] = {"private": wanted["visibility"] == "private", "files": {}, "commits": 0}
            self.answer(200, {"url": f"{self.hub.url}/{repo}", "id": repo})

    def info(self, repo: str) -> None:
        if found := self.known(repo):
            files = [{"rfilename": path} for path in found["files"]]
            sha = f"{found['commits']:040x}"
            self.answer(200, {"id": repo, "private": found["private"], "sha": sha, "siblings": files})

    def preupload(self, repo: str) -> None:
        if found := self.known(repo):
            told = []
            for file in json.loads(self.body)["files"]:
                content, mode = found["files"].get(file["path"], (None, None))
                mode = "lfs" if file["path"].endswith((".safetensors", ".gguf")) else "regular"
                oid = None
                if content is not None:
                    oid = hashlib.sha256(content).hexdigest() if mode == "lfs" else blob_id(content)
                told.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self.answer(200, {"files": told})

    def batch(self, repo: str) -> None:
        told = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            told.append(entry)
        self.answer(200, {"transfer": "basic", "objects": told})

    def put(self, oid: str) -> None:
        self.hub.objects[oid] = self.body
        self.answer(200, {})

    def commit(self, repo: str) -> None:
        if found := self.known(repo):
            for line in self.body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    found["files"][value["path"]] = (base64.b64decode(value["content"]), "regular")
                elif entry["key"] == "lfsFile":
                    found["files"][value["path"]] = (self.hub.objects[value["oid"]], "lfs")
            found["commits"] += 1
            self.answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/1", "commitOid": f"{found['commits']:040x}"})

    def tree(self, repo: str) -> None:
        if found := self.known(repo):
            told = []
            for path, (content, mode) in found["files"].items():
                entry = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
                if mode == "lfs":
                    sha256 = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
                told.append(entry)
            self.answer(200, told)

    def resolve(self, repo: str, path: str) -> None:
        if found := self.known(repo):
            if path not in found["files"]:
                self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
                return
            content = found["files"][path][0]
            tags = {"ETag": f'"{blob_id(content)}"', "X-Repo-Commit": f"{found['commits']:040x}"}
            self.answer(200, content, tags)
