"""A server that speaks OpenAI's protocol badly, by script: each POST takes the next behaviour.

Where that is None, and after the last one, all is well.
"""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

MODELS = {"object": "list", "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "t", "root": "r", "max_model_len": 99}]}


class Answer(NamedTuple):
    """What one request gets."""

    status: int = 200
    body: object = None  # a dict, sent as JSON; or bytes, sent as they are
    headers: tuple[tuple[str, str], ...] = ()
    delay: float = 0.0


LISTED = Answer(200, MODELS)


def said(text: str | None, finish: str = "stop", tokens: tuple[int, int] = (7, 3), **more) -> dict:
    """A chat completion."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text} | more.pop("message", {})} | more
    return {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice],
            "usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}}


def fault(status: int, message: str, code: str | None = None, **headers: str) -> Answer:
    return Answer(status, {"error": {"message": message, "type": "t", "code": code}},
                  tuple((name.replace("_", "-"), value) for name, value in headers.items()))


class Scripted:
    """`with Scripted([Answer, ...]) as server`: server.url, and what was asked of it: server.asked [(time, path, headers, body)]."""

    def __init__(self, script=(), otherwise=None, models=LISTED):
        self.script, self.asked, self.lock = list(script), [], threading.Lock()
        self.otherwise = otherwise or (lambda body: Answer(200, said("echo " + body["messages"][-1]["content"])))
        self.models, self.flying, self.most = models, 0, 0

    def __enter__(self) -> Scripted:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                self.send(outer.models)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer.lock:
                    outer.asked.append((time.monotonic(), self.path, {name.lower(): value for name, value in self.headers.items()}, body))
                    answer = (outer.script.pop(0) if outer.script else None) or outer.otherwise(body)
                    outer.flying += 1
                    outer.most = max(outer.most, outer.flying)
                time.sleep(answer.delay)
                with outer.lock:
                    outer.flying -= 1
                self.send(answer)

            def send(self, answer: Answer):
                content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
                try:
                    self.send_response(answer.status)
                    headers = {"content-type": "application/json", "content-length": str(len(content))} | dict(answer.headers)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:  # nobody waits for it any more
                    pass
                self.close_connection |= "connection" in dict(answer.headers)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *request: None  # clients that go away
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()
