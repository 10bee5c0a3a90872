"""Write files and folders atomically: whoever looks finds the old one or the new one, whole, whatever interrupts the process."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from trainer.errors import UserError


def fsync_path(path: Path) -> None:
    """Make a file or folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which takes the place of `path` afterwards. An OSError passes through."""
    tmp = path.with_name(f".{path.name}.partial")
    try:
        yield tmp
        publish_file(tmp, path)
    finally:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)


def publish_file(tmp: Path, path: Path) -> None:
    """Give a file that is written completely its final name, on the disk too."""
    fsync_path(tmp)
    os.replace(tmp, path)
    fsync_path(path.parent)


@contextmanager
def atomic_folder(folder: Path | str, refusal: Callable[[Exception], str] | None = None) -> Iterator[Path]:
    """Yield an empty temporary folder to write into, which takes the place of `folder` afterwards.

    Raises UserError where the disk refuses, with the message that `refusal` makes of the error; `folder` is then as it was.
    """
    folder = Path(folder)
    tmp, old = (folder.with_name(f".{folder.name}.{what}") for what in ("partial", "old"))
    try:
        for leftover in (tmp, old):
            shutil.rmtree(leftover, ignore_errors=True)
        tmp.mkdir(parents=True)
        yield tmp
        for path in [*tmp.rglob("*"), tmp]:
            fsync_path(path)
        if folder.exists():
            folder.rename(old)
        tmp.rename(folder)
        fsync_path(folder.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(refusal(error) if refusal else f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
