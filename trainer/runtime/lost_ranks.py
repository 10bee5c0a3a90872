"""End all ranks when one has died, with a line that names it.

Rank 0 has a connection to every other rank. The kernel closes those of a process that ends, however it ends, so nothing has to be sent in
time, and a rank that computes for long is never taken for dead. Of a machine that has gone, the kernel learns by keepalive packets. Rank 0
tells the others which rank it was. A rank that says goodbye has not died.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch.distributed

from trainer.errors import UserError

GRACE = 30.0  # seconds for a rank to end by itself after another died: it may write a checkpoint, or an error of its own
NOTICE = 5.0  # seconds in which a rank hears of a death that made it fail
CONNECT = 300.0  # seconds in which all ranks connect to rank 0
KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))  # silent for 25 seconds: a machine has gone
FRAME = 256  # bytes of every message
GOODBYE = "goodbye"


@contextmanager
def ending_together(rank: int, size: int) -> Iterator[None]:
    """Watch the other ranks of the process group inside this context.

    Raises UserError, which names the rank, where another one's death made this one fail. A rank that goes on, or waits for a dead one,
    prints the same line, and its process ends with status 1 after GRACE seconds.
    """
    lost = _Lost()
    peers = _accept(size) if rank == 0 else [_connect(rank)]
    threading.Thread(target=_watch, args=(peers, rank == 0, lost), daemon=True).start()
    try:
        yield
    except UserError:
        _tell(peers, GOODBYE)
        raise
    except Exception as error:
        if lost.known.wait(NOTICE):
            raise UserError(lost.line) from error
        raise
    else:
        _tell(peers, GOODBYE)


class _Lost:
    """The line about a rank that has died, once one has."""

    def __init__(self):
        self.known, self.line = threading.Event(), ""

    def note(self, name: str) -> None:
        self.line = (f"{name} has ended before the others: its own output says why, unless it was killed, as where memory runs out; "
                     "all ranks end; the same command with --resume auto continues from the newest checkpoint")
        self.known.set()


def _watch(peers: Sequence[_Peer], tells: bool, lost: _Lost) -> None:
    """Wait for messages until every peer has said goodbye, or for the end of a connection without one.

    The process then ends, if it does not by itself.
    """
    by_socket = {peer.socket: peer for peer in peers}
    while by_socket:
        for ready in select.select(list(by_socket), [], [])[0]:
            peer = by_socket.pop(ready)
            if (message := peer.receive()) == GOODBYE:
                continue
            name = message or peer.name
            if tells:
                _tell(list(by_socket.values()), name)
            lost.note(name)
            time.sleep(GRACE)
            print(f"trainer.run: error: {lost.line}", file=sys.stderr, flush=True)
            os._exit(1)


def _tell(peers: Sequence[_Peer], text: str) -> None:
    for peer in peers:
        with suppress(OSError):  # it has gone too
            peer.send(text)


# ---------------------------------------------------------------- connections


class _Peer:
    """A connection to another rank, and the name of that rank."""

    def __init__(self, connected: socket.socket, name: str = ""):
        self.socket, self.name = connected, name
        connected.settimeout(None)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE:
            connected.setsockopt(socket.IPPROTO_TCP, option, value)

    def send(self, text: str) -> None:
        self.socket.sendall(text.encode()[:FRAME].ljust(FRAME))

    def receive(self) -> str:
        """Return the next message; none if the connection has ended."""
        try:
            return self.socket.recv(FRAME, socket.MSG_WAITALL).decode(errors="replace").strip()
        except OSError:
            return ""


def _accept(size: int) -> list[_Peer]:
    """Let all other ranks connect to this one, which is rank 0."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.create_server(("", 0), family=family, backlog=size, dualstack_ipv6=family == socket.AF_INET6) as server:
        server.settimeout(CONNECT)
        torch.distributed.broadcast_object_list([server.getsockname()[1], _name(0)], src=0)
        peers = [_Peer(server.accept()[0]) for _ in range(size - 1)]
    for peer in peers:
        peer.name = peer.receive()
    return peers


def _connect(rank: int) -> _Peer:
    """Connect to rank 0, at the address where the ranks met."""
    found = [None, None]
    torch.distributed.broadcast_object_list(found, src=0)
    peer = _Peer(socket.create_connection((os.environ["MASTER_ADDR"], found[0]), timeout=CONNECT), found[1])
    peer.send(_name(rank))
    return peer


def _name(rank: int) -> str:
    return f"rank {rank} (process {os.getpid()} on {socket.gethostname()})"
