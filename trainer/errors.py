"""Report users' mistakes, and failures of other processes, on one line.

The text of a UserError is the whole message: commands print it on one line and exit with status 2.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

# Control characters but line feeds and tabs, marks of direction, separators of lines, and halves of surrogate pairs.
STEERING = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


class UserError(Exception):
    """Bad input, configuration or environment.

    Its text is one line: "option: expected X, got Y, at PLACE; REMEDY".
    """


def require(holds: bool, option: str, expected: str, found) -> None:
    """Raise UserError that names an option, unless the condition on its value holds."""
    if not holds:
        raise UserError(f"{option}: expected {expected}, got {found}")


def last_error_line(log: Path) -> str:
    """Return the last line of a log that names an error; without one, its last line."""
    with contextlib.suppress(OSError):
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 100_000))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if re.search(r"error|exception|fatal|killed|abort|fault", line, re.IGNORECASE)]
        return one_line((errors or lines or [""])[-1])
    return ""


def printable(text: str) -> str:
    """Return text with escapes such as \\x1b for whatever would steer a terminal or reorder a line."""
    return STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """Join text to one line of at most 240 printable characters."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= 240 else text[:237] + "..."
