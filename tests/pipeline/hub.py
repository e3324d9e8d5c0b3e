"""A hub on this machine: it answers what huggingface_hub asks to create a repository and to push files, and keeps them."""

from __future__ import annotations

import base64
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

LARGE = (".safetensors", ".parquet")
"""Files that the hub wants apart from the commit."""


@dataclass
class Hub:
    """`repos`: each repository's kind, whether it is private, and its files; `asked`: all requests, `sent` their bodies."""

    repos: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    sent: bytes = b""
    refuse: bool = False
    _objects: dict[str, bytes] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if self.refuse:
            return 403, {"error": "you may not"}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if match := re.fullmatch(r"/(?:datasets/)?\S+\.git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            actions = [{**own, "actions": {"upload": {"href": f"{self.url}/lfs/{own['oid']}"}}} for own in objects]
            return 200, {"transfer": "basic", "objects": actions}
        if match := re.fullmatch(r"/lfs/(\w+)", path):
            self._objects[match[1]] = body
            return 200, {}
        match = re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(preupload|commit)/main)?", path)
        assert match, path
        repo = self.repos[match[2]]
        assert repo["kind"] == match[1]
        if match[3] == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": own["path"], "uploadMode": _mode(own["path"]), "shouldIgnore": False} for own in files]
            return 200, {"files": modes}
        if match[3] == "commit":
            self._commit(repo["files"], [json.loads(line) for line in body.splitlines()])
            return 200, {"success": True, "commitUrl": f"{self.url}/{match[2]}/commit/{'0' * 40}", "commitOid": "0" * 40}
        return 200, {"id": match[2], "private": repo["private"], "sha": "0" * 40, "siblings": []}

    def _create(self, told: dict[str, Any]) -> tuple[int, Any]:
        name = f"{told['organization'] or 'me'}/{told['name']}"
        kind = told.get("type", "model")
        url = {"url": f"{self.url}/{'datasets/' if kind == 'dataset' else ''}{name}"}
        if name in self.repos:
            return 409, {"error": "there already", **url}
        private = told["private"] if "private" in told else told["visibility"] == "private"
        self.repos[name] = {"kind": kind, "private": private, "files": {}}
        return 200, url

    def _commit(self, files: dict[str, bytes], lines: list[dict[str, Any]]) -> None:
        for own in (line["value"] for line in lines if line["key"] == "file"):
            files[own["path"]] = base64.b64decode(own["content"])
        for own in (line["value"] for line in lines if line["key"] == "lfsFile"):
            files[own["path"]] = self._objects[own["oid"]]


def _mode(path: str) -> str:
    return "lfs" if path.endswith(LARGE) else "regular"


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def _do(self) -> None:
        body = self._body()
        path = self.path.partition("?")[0]
        self.hub.asked.append((self.command, path, self.headers.get("Authorization")))
        self.hub.sent += body
        code, told = self.hub.answer(self.command, path, body)
        text = json.dumps(told).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = do_HEAD = _do  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def log_message(self, format: str, *args: Any) -> None:
        pass
