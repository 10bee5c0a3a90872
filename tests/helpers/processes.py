"""Run a command of ours in a process of its own, which need not import everything anew.

A server process imports the commands once; each process is a fork of it, and has its own standard output, error, signals and exit status.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.reduction import DupFd

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["trainer.run", "trainer.evaluate", "synth.run"])


class Command:
    """A running `python -m MODULE ARGUMENTS`; `output` is what it prints, a file that can be read as it grows."""

    def __init__(self, module: str, arguments: Sequence[str], **environment: str):
        read, write = os.pipe()
        self.output = open(read, encoding="utf-8")
        self._errors = tempfile.TemporaryFile("w+")
        self._process = FORKS.Process(target=_become, args=(
            module, [*map(str, arguments)], os.getcwd(), {**os.environ, **environment}, DupFd(write), DupFd(self._errors.fileno())))
        self._process.start()
        os.close(write)

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    @property
    def errors(self) -> str:
        """What it has printed to standard error."""
        self._errors.seek(0)
        return self._errors.read()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal; one that has ended takes none."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def finish(self) -> tuple[int, str, str]:
        """Wait for its end; return its exit status, and what it printed since, to standard output and to standard error."""
        output = self.output.read()
        self._process.join()
        return self._process.exitcode, output, self.errors


def complete(module: str, arguments: Sequence[str], **environment: str) -> tuple[int, str, str]:
    """Run a command to its end; return its exit status, standard output and standard error."""
    return Command(module, arguments, **environment).finish()


def complete_ranks(module: str, arguments: Sequence[str], ranks: int = 2) -> list[tuple[int, str, str]]:
    """Run a command as the ranks of one distributed run to its end; return how each ended and what it printed."""
    return [command.finish() for command in start_ranks(module, arguments, ranks)]


def start_ranks(module: str, arguments: Sequence[str], ranks: int = 2) -> list[Command]:
    """Start a command as the ranks of one distributed run, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [Command(module, arguments, **common, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(ranks)]


def _become(module: str, arguments: list[str], folder: str, environment: dict[str, str], output: DupFd, errors: DupFd) -> None:
    for stream, file in ((1, output), (2, errors)):
        descriptor = file.detach()
        os.dup2(descriptor, stream)
        os.close(descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # it runs as __main__
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # a forked process would skip them
