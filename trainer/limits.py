"""Limit the time and memory of what a file's author decides: chat templates, regular expressions."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import signal
import threading
from collections.abc import Iterator

PAGE = resource.getpagesize()


class LimitError(Exception):
    """Work that takes more time or memory than it may; the text says of which."""


@contextlib.contextmanager
def limits(seconds: float, gibibytes: float) -> Iterator[None]:
    """Limit the CPU time of what runs inside, and its memory beside what the process has.

    Raises LimitError. The time is limited in the main thread alone, as signals are its own; it cannot be limited twice at once.
    """
    timed = threading.current_thread() is threading.main_thread()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = int(os.pread(_statm(os.getpid()), 64, 0).split()[0]) * PAGE + int(gibibytes * 2**30)
    lowered = soft == resource.RLIM_INFINITY or most < soft
    if timed:
        _install_timer()
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1)  # and once a second after that, should the first be caught inside
    if lowered:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    except _TimeError:
        raise LimitError(f"more than {seconds:g} s") from None
    except MemoryError:
        raise LimitError(f"more than {gibibytes:g} GiB of memory") from None
    finally:
        if lowered:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)


class _TimeError(LimitError):
    """The time is over."""


@functools.lru_cache(1)
def _statm(process: int) -> int:
    """Return a descriptor of the sizes of this process, opened once in each."""
    return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)


@functools.cache
def _install_timer() -> None:
    """Install what ends work whose time is over; a forked process has it from its parent."""

    def end(_signal, _frame):
        raise _TimeError

    signal.signal(signal.SIGVTALRM, end)
