"""Turn SIGTERM and Ctrl-C into a request to stop after the current step, or into an exception."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Stopped(BaseException):
    """Raised where a signal ends some work.

    Like KeyboardInterrupt it is none of the errors that code recovers from.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by signal {number}")
        self.number = number


class Interrupts:
    """Context that notes the first signal in `received`; a second signal stops the process at once."""

    def __init__(self):
        self.received: int | None = None
        self._raises = False

    def __enter__(self):
        self.previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Raise Stopped inside this context when the first signal comes, or at its start if that has come."""
        if self.received:
            raise Stopped(self.received)
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def _note(self, number, _frame) -> None:
        self.received = number
        for s in self.previous:
            signal.signal(s, signal.SIG_DFL if s == signal.SIGTERM else signal.default_int_handler)
        if self._raises:
            self._raises = False
            raise Stopped(number)
