"""Load one copy of a model and answer requests: `python -m synth.engines.worker <file descriptor>`.

It receives a LoadRequest, then lists of requests, and sends lists of results, over a socket that its parent made. When the parent ends,
for whatever reason, the socket closes, and this process ends at once with everything it started.
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

from synth.engines.interface import AdapterRefused, EngineError
from synth.engines.protocol import LoadedModel, LoadRequest
from trainer.errors import UserError


def load_model(request: LoadRequest) -> LoadedModel:
    """Load a model with the engine that the request names."""
    if request.kind == "vllm":
        from synth.engines.vllm import VllmModel

        return VllmModel(request)
    from synth.engines.hf import TransformersModel

    return TransformersModel(request)


def start_reader(connection: Connection) -> queue.SimpleQueue:
    """Start a thread that queues the parent's messages, so that the parent never blocks; return the queue.

    Without a parent, exit.
    """
    inbox: queue.SimpleQueue = queue.SimpleQueue()

    def read():
        try:
            while True:
                inbox.put(connection.recv())
        except (EOFError, OSError):
            os.killpg(0, signal.SIGKILL)  # our own group: this process, and those that the engine started

    threading.Thread(target=read, daemon=True).start()
    return inbox


def serve(loaded: LoadedModel, inbox: queue.SimpleQueue, connection: Connection) -> None:
    """Answer requests until the parent ends.

    A message with a new job number drops the requests of the job before.
    """
    job, busy = 0, 0.0
    while True:
        results = []
        while not loaded.live or not inbox.empty():
            number, requests = inbox.get()
            if number != job:
                loaded.abort()
                job, results = number, []
            try:
                results += [failure for request in requests if (failure := loaded.add(request))]
            except EngineError as error:
                loaded.abort()
                connection.send(("refused", job, str(error)))
            if results and not loaded.live:
                break
        if loaded.live:
            began = time.perf_counter()
            results += loaded.step()
            busy += time.perf_counter() - began
        if results:
            connection.send(("results", job, results, busy))


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    inbox = start_reader(connection)
    request: LoadRequest = inbox.get()
    try:
        loaded = load_model(request)
        gc.collect()
        gc.freeze()  # never scan the model's objects again,
        gc.set_threshold(20_000, 20, 50)  # and those of requests less often
        connection.send(("ready", loaded.ready))
        serve(loaded, inbox, connection)
    except AdapterRefused as error:
        connection.send(("adapter", str(error)))
    except UserError as error:
        connection.send(("failed", str(error)))
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        connection.send(("raised", type(error).__name__, " ".join(str(error).split())))
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
