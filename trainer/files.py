"""Write files and folders atomically.

Readers find the old one or the new one, complete, even if the process or the machine stops in between.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from trainer.errors import UserError


def fsync_path(path: Path) -> None:
    """Flush a file or folder to the disk, so that it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which replaces `path` afterwards. Lets an OSError through."""
    tmp = path.with_name(f".{path.name}.partial")
    try:
        yield tmp
        publish_file(tmp, path)
    finally:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)


def publish_file(tmp: Path, path: Path) -> None:
    """Flush a complete file to the disk and rename it to its final path."""
    fsync_path(tmp)
    os.replace(tmp, path)
    fsync_path(path.parent)


@contextmanager
def atomic_folder(folder: Path | str, refusal: Callable[[Exception], str] | None = None) -> Iterator[Path]:
    """Yield an empty temporary folder to write into, which replaces `folder` afterwards.

    If writing fails, `folder` is unchanged; raises UserError with the message that `refusal` makes of the error.
    """
    folder = Path(folder)
    tmp, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("partial", "old"))
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


@contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield an empty hidden folder `.NAME.*` in `parent`, which is removed afterwards.

    It is locked while it is used, so that those that killed processes left are found by their locks, and removed first. Lets an OSError
    through.
    """
    for left in parent.glob(f".{name}.*"):
        with contextlib.suppress(OSError), _locked_folder(left):
            shutil.rmtree(left)
    folder = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=parent))
    try:
        with _locked_folder(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, which ends with this process and its children.

    Raises BlockingIOError if another has it.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


@contextmanager
def sole_owner(folder: Path, command: str) -> Iterator[None]:
    """Make an output folder and lock it against a second command; the lock ends with this process.

    A folder that was made here and is left empty is removed. Raises UserError if it cannot be written, or another command has it.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder / ".lock")
    except BlockingIOError:
        raise UserError(f"output: another {command} is using {folder}; wait for it, or choose another folder") from None
    except OSError as error:
        raise UserError(f"output: cannot write the folder {folder}: {error.strerror}; choose another output") from None
    with lock:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (folder / ".lock").unlink()
                if made:
                    folder.rmdir()


def _locked(path: Path) -> IO:
    """Open and lock a file, and make it anew if its last owner removed it meanwhile.

    Raises BlockingIOError if another has it.
    """
    while True:
        lock = open(path, "a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        except FileNotFoundError:
            pass
        except OSError:
            lock.close()
            raise
        lock.close()
