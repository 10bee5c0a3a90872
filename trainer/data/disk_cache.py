"""Keep data sets that are costly to make on disk: whole or absent, verified whenever they are read.

An entry is a folder named after a fingerprint of all that decides its content. It holds Arrow files, each with its checksum, and is
written to a temporary folder and renamed: two runs may share a cache, and the first to finish an entry makes it for both. Small files
are not flushed to the disk one by one: what a power cut takes of them, their checksums tell.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import datasets

from trainer.checksums import verify_checksum, write_checksum
from trainer.errors import UserError
from trainer.files import fsync_path, temporary_folder

FULL = (errno.ENOSPC, errno.EDQUOT)
SMALL = 2**20  # bytes of a file that is soon made anew


def cached_files(cache_dir: str | None, kind: str, fingerprint: str, make: Callable[[Path], None]) -> list[Path]:
    """Return the verified Arrow files of a fingerprint, made now unless the cache has them.

    `make` writes Arrow files anywhere in the folder that it gets, in the order of their names. `cache_dir` defaults to the cache of
    `datasets`. An entry that is damaged is made anew, which is said in a line.
    """
    cache = Path(cache_dir or datasets.config.HF_DATASETS_CACHE)
    folder = cache / kind
    entry = folder / fingerprint
    if entry.exists():
        try:
            return _verified(entry)
        except (OSError, ValueError) as error:
            print(f"data: the cache {entry} is damaged and made anew: {error}", flush=True)
            shutil.rmtree(entry)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary_folder(cache, "making") as tmp:  # not among the entries, which may be many
            make(tmp)
            _publish(sorted(tmp.rglob("*.arrow")), tmp / "entry", entry)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(f"data.cache_dir: cannot write the cache {folder}: {os.strerror(error.errno)}; free space, or choose another "
                        "data.cache_dir") from None
    return _verified(entry)


@functools.cache
def code_hash(*modules: ModuleType) -> str:
    """Return a hash of the modules' source, for the fingerprint of what they make."""
    return hashlib.sha256(b"".join(Path(module.__file__).read_bytes() for module in modules)).hexdigest()


def _publish(files: list[Path], tmp: Path, entry: Path) -> None:
    """Move files into an entry, with their checksums; leave that of another process, if it was faster."""
    tmp.mkdir()
    for file, name in zip(files, _names(len(files))):
        file.rename(tmp / name)
        write_checksum(tmp / name, durable=False)
        if (tmp / name).stat().st_size > SMALL:
            fsync_path(tmp / name)
    try:
        tmp.rename(entry)
    except OSError:
        if not entry.exists():
            raise


def _verified(entry: Path) -> list[Path]:
    """Return the files of an entry in order. Raises ValueError or OSError where one is damaged."""
    files = sorted(entry.glob("*.arrow"))
    if not files or [file.name for file in files] != _names(len(files)):
        raise ValueError("files are missing")
    for file in files:
        verify_checksum(file)
    return files


def _names(count: int) -> list[str]:
    return [f"{i:05}-of-{count:05}.arrow" for i in range(count)]
