"""A process that holds one copy of a model and answers requests: `python -m synth.engines.worker <file descriptor>`.

It is told what to open, and then gets lists of requests and sends lists of results, over a socket that its parent made. When the parent
goes, however it goes, the socket ends, and this process with everything it started ends at once: nothing is left behind.
"""

from __future__ import annotations

import gc
import os
import queue
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection

from synth.engines.interface import EngineError
from synth.engines.protocol import Held, Opening


def open_model(opening: Opening) -> Held:
    if opening.kind == "vllm":
        from synth.engines.vllm import Vllm

        return Vllm(opening)
    from synth.engines.hf import Transformers

    return Transformers(opening)


def listen(connection: Connection) -> queue.SimpleQueue:
    """A queue of the parent's messages, filled by a thread, so that the parent never waits; without a parent the process ends."""
    inbox: queue.SimpleQueue = queue.SimpleQueue()

    def read():
        try:
            while True:
                inbox.put(connection.recv())
        except (EOFError, OSError):
            os.killpg(0, signal.SIGKILL)  # our own group: this process, and what the engine started

    threading.Thread(target=read, daemon=True).start()
    return inbox


def serve(held: Held, inbox: queue.SimpleQueue, connection: Connection) -> None:
    """Answer requests for as long as the parent lives."""
    job, busy = 0, 0.0
    while True:
        results = []
        while not held.live or not inbox.empty():
            number, requests = inbox.get()
            if number != job:  # what is left of the job before is given up
                held.abort()
                job, results = number, []
            try:
                results += [failure for request in requests if (failure := held.add(request))]
            except EngineError as error:
                held.abort()
                connection.send(("refused", job, str(error)))
            if results and not held.live:
                break
        if held.live:
            began = time.perf_counter()
            results += held.step()
            busy += time.perf_counter() - began
        if results:
            connection.send(("results", job, results, busy))


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    inbox = listen(connection)
    opening: Opening = inbox.get()
    try:
        held = open_model(opening)
        gc.collect()
        gc.freeze()  # what a model is made of is not looked at again,
        gc.set_threshold(20_000, 20, 50)  # and what requests are made of not at every step
        connection.send(("ready", held.ready))
        serve(held, inbox, connection)
    except EngineError as error:
        connection.send(("failed", str(error)))
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        connection.send(("raised", type(error).__name__, " ".join(str(error).split())))
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
