"""Tell which files of a model's or adapter's folder are its own.

Links out of it are not followed into what is published: whoever made a folder may have put a link to a private file of its reader into it,
as `README.md -> ~/.ssh/id_ed25519`. The hub's cache is all links, from `snapshots/COMMIT` to `blobs` beside it: those are its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from trainer.errors import UserError, printable

SNAPSHOTS, BLOBS = "snapshots", "blobs"
SAVED_AGAIN = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "vocab*", "additional_chat_templates/*")


def is_own(folder: Path, path: Path) -> bool:
    """Return whether a path in a folder leads to a file of that folder, or of its hub's cache."""
    home, real = folder.resolve(), path.resolve()
    roots = [home, *([home.parent.parent / BLOBS] if home.parent.name == SNAPSHOTS else [])]
    return any(real.is_relative_to(root) for root in roots)


def require_own_settings(option: str, folder: Path, patterns: Iterable[str] = SAVED_AGAIN) -> None:
    """Check that what libraries read of a folder and save with an export is its own, weights aside.

    Raises UserError for a link out of it.
    """
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        require_own(option, path, folder)


def require_own(option: str, path: Path, folder: Path) -> None:
    """Raise UserError for a path in a folder that is a link out of it."""
    if not is_own(folder, path):
        raise UserError(f"{option}: {printable(str(path))} is a link out of its folder, to {printable(str(path.resolve()))}, which would "
                        "be published with the export; if it is meant, put a copy in its place")
