"""Turn SIGTERM and Ctrl-C into a request to stop after the current step."""

from __future__ import annotations

import signal


class Interrupts:
    """Context that notes the first signal in `received`; a second signal stops the process at once."""

    def __init__(self):
        self.received: int | None = None

    def __enter__(self):
        self.previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number, _frame) -> None:
        self.received = number
        for s in self.previous:
            signal.signal(s, signal.SIG_DFL if s == signal.SIGTERM else signal.default_int_handler)
