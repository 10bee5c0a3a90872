"""Turn an error that nobody foresaw into one line, and keep its traceback in a file to send in."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import traceback

from trainer.errors import UserError, one_line
from trainer.versions import versions

PACKAGES = ("steadfast-sft", "torch", "transformers", "peft", "datasets", "tokenizers")
MEMORY = ("out of memory", "can't allocate memory")  # in errors of torch


def as_user_error(error: Exception) -> UserError:
    """Return the line about an error: memory is used up, or Steadfast has a fault.

    The traceback of a fault is then in a file.
    """
    text = one_line(str(error))
    if isinstance(error, MemoryError) or any(words in text for words in MEMORY):
        return UserError(f"out of memory{': ' + text if text else ''}; free some, or give the command less to hold at once")
    return UserError(f"a fault of Steadfast, not of yours: {type(error).__name__}{': ' + text if text else ''}; "
                     f"please send {_kept(error)}; --traceback prints it")


def _kept(error: Exception) -> str:
    """Write the traceback, versions and command to a file of its own, and return its path."""
    about = [f"{name} {version}" for name, version in versions(*PACKAGES).items()]
    lines = [f"command: {shlex.join(sys.argv)}", f"versions: {', '.join(about)}", "", *traceback.format_exception(error)]
    try:
        handle, path = tempfile.mkstemp(prefix="steadfast-fault-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join(lines))
    except OSError:
        return "the traceback, which could not be kept in a file"
    return path
