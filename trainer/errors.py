"""The one exception that a user's mistake raises: its text is the whole message, printed on one line, exit status 2.

What another process wrote before it failed is brought to one line here too.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path


class UserError(Exception):
    """Bad input, configuration or environment. Say what was expected, what was found, where, and the remedy, on one line."""


def last_error_line(log: Path) -> str:
    """The last line of a log that names an error; else its last line."""
    with contextlib.suppress(OSError):
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 100_000))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if re.search(r"error|exception|fatal|killed|abort|fault", line, re.IGNORECASE)]
        return one_line((errors or lines or [""])[-1])
    return ""


def one_line(text: str) -> str:
    """On one line, of at most 240 characters."""
    text = " ".join(text.split())
    return text if len(text) <= 240 else text[:237] + "..."
