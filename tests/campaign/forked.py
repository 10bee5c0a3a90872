"""Run a command in a fork of this process, which has its imports, in limits of time and memory."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import resource
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

CPU_SECONDS = 40
SECONDS = 150  # by the clock: a loaded machine is slow
MEMORY = 12 * 2**30  # of address space


class Ended(NamedTuple):
    """How a command ended, and what it printed; `status` is minus the signal's number where one ended it."""

    module: str
    status: int
    output: str
    errors: str
    hung: bool  # it was ended for the time it took


class Fork:
    """A running command.

    `folder` is its working folder, home and temporary folder, and holds what it prints. `prepare` runs in the fork before the command does.
    """

    def __init__(self, module: str, arguments: Sequence[str | Path], folder: Path, prepare: Callable[[], None] | None = None):
        self.module, self.folder = module, folder
        folder.mkdir(parents=True, exist_ok=True)
        self._began = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            _become(module, [*map(str, arguments)], folder, prepare)
        self._handle = os.pidfd_open(self.pid)

    def wait(self, seconds: float) -> bool:
        """Wait for its end, at most so long; return whether it has ended."""
        return bool(select.select([self._handle], [], [], max(0, seconds))[0])

    def kill(self) -> None:
        """Kill it, and whatever it has started, with SIGKILL."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):  # it may not lead its group yet
            os.kill(self.pid, signal.SIGKILL)

    def finish(self) -> Ended:
        """Wait for its end, which comes by force after SECONDS, and return how it ended."""
        in_time = self.wait(SECONDS - (time.monotonic() - self._began))
        self.kill()
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._handle)
        output, errors = ((self.folder / name).read_text(encoding="utf-8", errors="replace") if (self.folder / name).exists() else ""
                          for name in ("stdout", "stderr"))
        return Ended(self.module, status, output, errors, not in_time or status == -signal.SIGXCPU)


def complete(module: str, arguments: Sequence[str | Path], folder: Path, prepare: Callable[[], None] | None = None) -> Ended:
    """Run a command to its end."""
    return Fork(module, arguments, folder, prepare).finish()


def _become(module: str, arguments: list[str], folder: Path, prepare: Callable[[], None] | None) -> None:
    """Run a command in the place of this process, and end it with the command's status."""
    status = 1
    try:
        os.setsid()
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", closefd=False), open(2, "w", closefd=False)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(folder)
        os.environ |= {"HOME": str(folder), "TMPDIR": str(folder)}
        sys.argv, sys.orig_argv = [module, *arguments], [sys.executable, "-m", module, *arguments]
        atexit._clear()
        tqdm.set_lock(threading.RLock())  # its own is shared by all forks, and one that is killed may hold it
        if prepare:
            prepare()
        status = importlib.import_module(module).main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status or 0)
