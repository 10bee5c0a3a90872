"""Attack synthesis with a server: any bytes, statuses and fields, drips, resets, half answers."""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import shutil
import socket
import sqlite3
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import yaml

from tests.campaign.forked import complete
from tests.campaign.material import Material
from tests.campaign.odd_values import JUNK, damaged, json_text, mutated, odd_text, odd_value
from tests.campaign.oracle import Outcome, Verdict, judge
from tests.helpers.scripted_server import MODELS, chat_completion

TOP = [{"token": str(digit), "logprob": -float(digit), "bytes": None} for digit in (1, 2, 3, 4, 5)]
STATUSES = (100, 101, 199, 201, 204, 206, 301, 302, 307, 308, 400, 401, 403, 404, 408, 409, 413, 418, 422, 425, 429, 500, 501, 502, 503,
            504, 529, 599, 999)
HEADERS = ("retry-after: 0", "retry-after: -5", "retry-after: nan", "retry-after: Fri, 31 Dec 99999 23:59:59 GMT", "retry-after: x" * 50,
           "content-type: text/html",
           "content-encoding: gzip", "content-encoding: br", "content-encoding: x", "transfer-encoding: chunked",
           "location: http://example.com/", "location: /v1/x",
           "location: ://", "connection: close", "set-cookie: a=b", "x-a: \x01", "content-length: 5", "content-length: -1",
           "content-length: 99999999999", ": x", "x",
           "content-type: application/json; charset=utf-16", "date: x")
MESSAGES = ("maximum context length is 5 tokens", "max_tokens must be at most -3", "logprobs not supported",
            "Unrecognized request argument supplied: seed",
            "top_logprobs must be <= 5", "unsupported parameter: 'temperature'", "\x1b[2J\nstep 1", "x" * 5000, "")


# Of a good server after one that listed another model.
RIGHTLY_REFUSED = ("this pool was made with",)


class OddServer:
    """A server that answers by a request's body, its count and a seed, whatever the order of requests.

    `share` of the requests get an odd answer, the others a good one.
    """

    def __init__(self, seed: str, share: float):
        self.seed, self.share, self.asked = seed, share, Counter()
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, ValueError), connection.makefile("rb") as file:
            while line := file.readline():
                length = 0
                while (header := file.readline().strip()):
                    if header.lower().startswith(b"content-length:"):
                        length = int(header.split(b":")[1])
                body = file.read(length)
                self.asked[line + body] += 1
                dice = Random(f"{self.seed} {line!r} {body!r} {self.asked[line + body]}")
                good = good_answer(line, body)
                if dice.random() >= self.share:
                    connection.sendall(http(200, json_text(good)))
                elif not odd_answer(dice, connection, good):
                    return


@contextlib.contextmanager
def serving(seed: str, share: float) -> Iterator[OddServer]:
    """Run an OddServer in a thread of this process."""
    server = OddServer(seed, share)
    threading.Thread(target=server.serve, daemon=True).start()
    try:
        yield server
    finally:
        with contextlib.suppress(OSError):
            server.socket.shutdown(socket.SHUT_RDWR)
        server.socket.close()


def http(status: int, body: bytes, *headers: str) -> bytes:
    head = [f"HTTP/1.1 {status} x", f"content-length: {len(body)}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + body


def good_answer(line: bytes, body: bytes) -> dict:
    if line.startswith(b"GET"):
        return MODELS
    request = json.loads(body)
    words = request["messages"][-1]["content"]
    if request.get("logprobs"):
        return chat_completion("1", "length", logprobs={"content": [{"token": "1", "logprob": -1.0, "bytes": None, "top_logprobs": TOP}]})
    return chat_completion(f"An answer to {len(words)}.\nScore: {1 + len(words) % 5}")


def odd_answer(dice: Random, connection: socket.socket, good: dict) -> bool:
    """Send an odd answer; return whether the connection may go on."""
    way = dice.choice(("fields", "fields", "fields", "value", "text", "status", "status", "headers", "bytes", "half", "reset", "drip",
                       "silence", "gzip", "chunks", "long"))
    body = json_text(good)
    if way == "fields":
        connection.sendall(http(200, json_text(mutated(dice, good, dice.choice((1, 1, 2, 5))), dice.random() < 0.5)))
    elif way == "value":
        connection.sendall(http(200, json_text(odd_value(dice, 3))))
    elif way == "text" and "choices" in good:
        good["choices"][0]["message"]["content"] = odd_text(dice)
        connection.sendall(http(200, json_text(good, dice.random() < 0.5)))
    elif way == "status":
        error = {"error": {"message": dice.choice(MESSAGES), "type": "t", "code": None}} if dice.random() < 0.6 else odd_value(dice)
        connection.sendall(http(dice.choice(STATUSES), json_text(error), *dice.sample(HEADERS, dice.choice((0, 0, 1)))))
    elif way == "headers":
        connection.sendall(http(dice.choice((200, 200, 307, 429, 503)), body, *dice.sample(HEADERS, dice.choice((1, 2)))))
    elif way == "bytes":
        connection.sendall(dice.choice((damaged(dice, http(200, body)), dice.choice(JUNK), b"HTTP/9.9 abc\r\n\r\n", b"\r\n" * 50)))
        return False
    elif way == "half":
        connection.sendall(http(200, body)[:dice.randrange(20, 60 + len(body))])
        return False
    elif way == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False
    elif way == "drip":
        for byte in http(200, body)[:40]:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)
        return False
    elif way == "silence":
        time.sleep(3)
        return False
    elif way == "gzip":
        packed = bomb() if dice.random() < 0.3 else damaged(dice, gzip.compress(body))
        connection.sendall(http(200, packed, "content-encoding: gzip"))
    elif way == "chunks":
        chunk = dice.choice((f"{len(body):x}", "zz", "-1", "ffffffffffffffffff", "0"))
        connection.sendall(b"HTTP/1.1 200 x\r\ntransfer-encoding: chunked\r\n\r\n" + chunk.encode() + b"\r\n" + body + b"\r\n0\r\n\r\n")
    elif way == "long" and "choices" in good:
        good["choices"][0]["message"]["content"] = "word " * 10**6
        connection.sendall(http(200, json_text(good)))
    else:
        connection.sendall(http(200, body))
    return True


@functools.cache
def bomb() -> bytes:
    """Return a small body that is large once it is unpacked."""
    return gzip.compress(b" " * 2**27)


def attack(dice: Random, folder: Path, material: Material) -> Verdict:
    """Let an odd server answer and judge; then a good one, which has to bring the same run to its end."""
    out = shutil.copytree(material.pool, folder / "out")
    scoring = dice.choice(("expected_score", "generated"))
    for share, folder_of_call in ((dice.choice((0.1, 0.5, 1.0)), folder), (0.0, folder / "again")):
        folder_of_call.mkdir(exist_ok=True)
        with serving(str(dice.random()), share) as server:
            (folder_of_call / "synth.yaml").write_text(yaml.safe_dump(options(server.url, out, scoring)))
            ended = complete("synth.run", ["--config", folder_of_call / "synth.yaml"], folder_of_call, in_haste)
        verdict = judge(ended, odd_pool(out / "pool.sqlite"))
        if verdict.outcome not in (Outcome.WELL, Outcome.REFUSED):
            return verdict
    if ended.status and not any(words in ended.errors for words in RIGHTLY_REFUSED):
        return Verdict(Outcome.SILENT, f"a good server after the odd one, and yet: {verdict.detail}")
    return verdict


def options(url: str, out: Path, scoring: str) -> dict:
    """Return the configuration of the pool's run, now with a server that answers and judges."""
    remote = {"path": "m", "name": "remote", "engine": "openai", "base_url": url, "concurrency": 3}
    return Material.POOL | {"output": str(out), "responders": [remote], "judges": [remote], "stages": ["respond", "judge", "select"],
                            "judge": {"scoring": scoring, "exclude_self": False}}


def in_haste() -> None:
    """Let the base answer by a script, and the client wait for less long."""
    from synth.engines import endpoint

    endpoint.PAUSE, endpoint.MAX_PAUSE, endpoint.TIMEOUT = 0.001, 0.01, 1.0
    Material.play_base()


def odd_pool(path: Path) -> str | None:
    """Return what is wrong with a pool: its pages, numbers that are none, answers without text or reason."""
    with contextlib.closing(sqlite3.connect(path)) as pool:
        if (found := pool.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
            return f"the pool is damaged: {found}"
        for table, column in (("scores", "score"), ("scores", "mass"), ("responses", "logprob"), ("usage", "seconds"), ("usage", "cost"),
                              ("ratings", "value")):
            if pool.execute(f"SELECT 1 FROM {table} WHERE abs({column}) > 1e30").fetchone():
                return f"the pool holds a {column} that is no finite number"
        if pool.execute("SELECT 1 FROM responses WHERE reason IS NULL AND trim(text) = ''").fetchone():
            return "the pool holds an empty answer without a reason"
    return None
