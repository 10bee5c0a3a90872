"""Report the versions of Python and of installed packages."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform


def versions(*names: str) -> dict[str, str]:
    """Return the versions of Python and of these distributions, those that are installed."""
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
