"""Serve a page to talk to base and tuned model, on loopback, with Python's own HTTP server.

Its address has a secret, which the terminal prints: other users of the machine do not know it, and neither do other sites. Requests for
other hosts are refused, so that a name of somebody's that leads here opens nothing. The page loads nothing from elsewhere.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from trainer.errors import UserError, printable
from trainer.evaluation.conversation import SHOWN, Conversations
from trainer.evaluation.generation import Stopped
from trainer.report.answers import STYLES, Answers, compare
from trainer.report.page import render

TEMPLATE = Path(__file__).parents[1] / "report" / "chat_page.html.jinja"
LONGEST = 1_000_000  # bytes of a request
POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; base-uri 'none'; "
          "form-action 'none'; frame-ancestors 'none'")


def serve(conversations: Conversations, port: int) -> None:
    """Print the page's address, and serve it until Ctrl-C. Raises UserError for a port that is taken."""
    try:
        server = ChatServer(conversations, port)
    except OSError as error:
        raise UserError(f"port: cannot listen at {port}: {error.strerror}; choose another, or 0 for a free one") from None
    print(f"open {server.url} in a browser of this machine; Ctrl-C ends", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


class ChatServer(ThreadingHTTPServer):
    """The server of one conversation at a time."""

    daemon_threads = True

    def __init__(self, conversations: Conversations, port: int):
        super().__init__(("127.0.0.1", port), _Handler)
        self.conversations, self.secret, self.busy = conversations, secrets.token_urlsafe(16), threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{self.secret}/"

    def handle_error(self, request, client_address) -> None:
        """Say nothing of readers that go away."""


class _Handler(BaseHTTPRequestHandler):
    """Requests: GET the page; POST say, reset or save with a JSON object."""

    server: ChatServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        """Print no line for each request."""

    def do_GET(self) -> None:
        if not self._is_ours():
            return
        if not self._is_for(""):
            return self._answer(404, b"nothing is here\n")
        nonce, talk = secrets.token_urlsafe(16), self.server.conversations
        page = render(TEMPLATE, nonce=nonce, label=printable(talk.loaded.label), names=talk.names, system=talk.system or "")
        self._answer(200, page.encode("utf-8", "replace"), "text/html; charset=utf-8",
                     {"content-security-policy": POLICY.format(nonce=nonce)})

    def do_POST(self) -> None:
        if not self._is_ours():
            return
        action = next((name for name in ("say", "reset", "save") if self._is_for(name)), None)
        try:
            asked = self._body()
        except (ValueError, RecursionError):
            return self._answer(400, b"expected a JSON object\n")
        if action is None:
            return self._answer(404, b"nothing is here\n")
        if not self.server.busy.acquire(blocking=False):
            return self._answer(409, b"an answer is being written\n")
        try:
            getattr(self, f"_{action}")(asked)
        finally:
            self.server.busy.release()

    def _is_for(self, name: str) -> bool:
        return secrets.compare_digest(self.path.encode(), f"/{self.server.secret}/{name}".encode())

    def _is_ours(self) -> bool:
        """Return whether a request names this host and knows the secret; answer it if not."""
        here = {f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")}
        known = secrets.compare_digest(self.path.encode()[: len(self.server.secret) + 2], f"/{self.server.secret}/".encode())
        if self.headers.get("host") in here and known:
            return True
        self.close_connection = True
        self._answer(404, b"nothing is here\n")
        return False

    def _body(self) -> dict[str, Any]:
        length = int(self.headers.get("content-length") or 0)
        if not 0 <= length <= LONGEST:
            self.close_connection = True
            raise ValueError
        body = json.loads(self.rfile.read(length) or b"{}")
        if not isinstance(body, dict):
            raise ValueError
        return body

    def _say(self, asked: dict[str, Any]) -> None:
        """Answer a message with a JSON object on each line.

        Each has a model's text so far; the last has the words that differ.
        """
        self.send_response(200)
        self.send_header("content-type", "application/x-ndjson; charset=utf-8")
        self.send_header("connection", "close")
        self.close_connection = True
        self.end_headers()
        try:
            self.server.conversations.show(asked["who"] if asked.get("who") in [*SHOWN] else "tuned")
            self.server.conversations.say(_words(asked.get("text")), lambda names: _Answers(self, names))
        except UserError as error:
            self.line({"error": printable(str(error))})

    def _reset(self, asked: dict[str, Any]) -> None:
        self.server.conversations.reset(_words(asked.get("system")) or None)
        self._answer(200, b"")

    def _save(self, asked: dict[str, Any]) -> None:
        try:
            record = self.server.conversations.record()
        except UserError as error:
            return self._answer(409, str(error).encode())
        self._answer(200, json.dumps(record, ensure_ascii=False).encode() + b"\n", "application/jsonl")

    def line(self, content: dict[str, Any]) -> None:
        """Send a line at once; raises Stopped if nobody reads it."""
        try:
            self.wfile.write(json.dumps(content).encode() + b"\n")
            self.wfile.flush()
        except OSError:
            raise Stopped from None

    def _answer(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"content-type": kind, "content-length": str(len(body)), "cache-control": "no-store",
                            "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def _words(value: Any) -> str:
    """Return a value of a request as text, without halves of surrogate pairs, which no tokenizer takes."""
    return str(value or "").encode("utf-8", "replace").decode().strip()


class _Answers:
    """The display of answers that a page shows."""

    def __init__(self, handler: _Handler, names: Sequence[str]):
        self.handler, self.texts = handler, dict.fromkeys(names, "")

    def __enter__(self) -> _Answers:
        return self

    def __exit__(self, *error) -> None:
        pieces = {name: [(printable(text), False)] for name, text in self.texts.items()}
        if set(self.texts) == set(STYLES):
            compared = compare(Answers("held out", "", "", self.texts["base"], self.texts["tuned"]))
            pieces = {name: [(printable(text), differs) for text, differs in found]
                      for name, found in (("base", compared.base), ("tuned", compared.tuned))}
        try:
            self.handler.line({"pieces": pieces})
        except Stopped:
            pass

    def update(self, name: str, text: str) -> None:
        self.texts[name] = text
        self.handler.line({"name": name, "text": printable(text)})
