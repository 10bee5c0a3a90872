"""Say on the console what takes long."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

from trainer.errors import printable

SECONDS = 5.0


@contextlib.contextmanager
def announce(line: str) -> Iterator[None]:
    """Print a line once what runs inside has taken some seconds; of several ranks the first does."""
    timer = threading.Timer(SECONDS, lambda: print(printable(line), flush=True))
    timer.daemon = True
    if os.environ.get("RANK", "0") == "0":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
