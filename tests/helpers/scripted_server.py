"""Run an OpenAI-compatible server that answers each POST by the next entry of a script.

An entry that is None, and every request after the last entry, gets a good answer. RESET breaks the connection off without one.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

MODELS = {"object": "list", "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "t", "root": "r", "max_model_len": 99}]}


class Answer(NamedTuple):
    """An HTTP answer."""

    status: int = 200
    body: object = None  # a dict, sent as JSON; or bytes, sent as they are
    headers: tuple[tuple[str, str], ...] = ()
    delay: float = 0.0


LISTED = Answer(200, MODELS)
RESET = Answer(0)


def chat_completion(text: str | None, finish: str = "stop", tokens: tuple[int, int] = (7, 3), **more) -> dict:
    """Return the body of a chat completion."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text} | more.pop("message", {})} | more
    return {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice],
            "usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}}


def error_answer(status: int, message: str, code: str | None = None, **headers: str) -> Answer:
    """Return an error in the protocol's form."""
    return Answer(status, {"error": {"message": message, "type": "t", "code": code}},
                  tuple((name.replace("_", "-"), value) for name, value in headers.items()))


class ScriptedServer:
    """`with ScriptedServer([Answer, ...]) as server`, which has server.url and its POST requests so far.

    `server.requests` is a list of (time, path, headers, body), `server.most` the largest number of requests at once. `models` answers
    requests for the list of models: an Answer, or a function that returns one.
    """

    def __init__(self, script=(), otherwise=None, models=LISTED):
        self.script, self.requests, self.lock = list(script), [], threading.Lock()
        self.otherwise = otherwise or (lambda body: Answer(200, chat_completion("echo " + body["messages"][-1]["content"])))
        self.models, self.in_flight, self.most = models, 0, 0

    def __enter__(self) -> ScriptedServer:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                self.send(outer.models() if callable(outer.models) else outer.models)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer.lock:
                    headers = {name.lower(): value for name, value in self.headers.items()}
                    outer.requests.append((time.monotonic(), self.path, headers, body))
                    answer = (outer.script.pop(0) if outer.script else None) or outer.otherwise(body)
                    outer.in_flight += 1
                    outer.most = max(outer.most, outer.in_flight)
                time.sleep(answer.delay)
                with outer.lock:
                    outer.in_flight -= 1
                self.send(answer)

            def send(self, answer: Answer):
                if answer == RESET:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.shutdown(socket.SHUT_RD)
                    self.close_connection = True
                    return
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
