"""A hub on loopback that keeps what is uploaded to it, and refuses what a test tells it to."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants as constants
import pytest


class ScriptedHub:
    """`with ScriptedHub() as hub`: `hub.repos` has {name: private}, `hub.files` {(name, path): bytes}; `hub.refuses` (status, words)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.repos: dict[str, bool] = {}
        self.files: dict[tuple[str, str], bytes] = {}
        self.refuses: dict[str, tuple[int, str]] = {}  # by a part of the path
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                self.answer(b"")

            def do_POST(self):
                self.answer(self.rfile.read(int(self.headers.get("content-length") or 0)))

            def answer(self, body: bytes):
                status, content = outer.respond(self.path, body, self.headers)
                data = json.dumps(content).encode()
                self.send_response(status)
                for name, value in (("content-type", "application/json"), ("content-length", str(len(data)))):
                    self.send_header(name, value)
                if status >= 400:
                    self.send_header("x-error-message", content["error"])
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")

    def respond(self, path: str, body: bytes, headers) -> tuple[int, dict]:
        """Return the status and answer to a request."""
        for part, (status, words) in self.refuses.items():
            if part in path:
                return status, {"error": words}
        if headers.get("authorization") != "Bearer hf_of_a_test":
            return 401, {"error": "Invalid username or password."}
        name = path.removeprefix("/api/models/")
        if path.startswith("/api/whoami"):
            return 200, {"name": "me", "type": "user", "auth": {}}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            if repo in self.repos:
                return 409, {"error": "exists", "url": f"{self.url}/{repo}"}
            self.repos[repo] = bool(wanted.get("private") or wanted.get("visibility") == "private")
            return 200, {"url": f"{self.url}/{repo}", "name": repo}
        if "/preupload/" in path:
            return 200, {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                   for file in json.loads(body)["files"]]}
        if "/commit/" in path:
            repo = name.partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[repo, line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"commitUrl": f"{self.url}/{repo}/commit/1", "commitOid": "1", "success": True}
        return 200, {}

    def __enter__(self) -> ScriptedHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()
