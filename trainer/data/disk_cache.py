"""Keep data sets that are costly to make on disk: whole or absent, verified whenever they are read.

An entry is a folder named after a fingerprint of all that decides its content. It holds Arrow files, each with its checksum, and is
written to a temporary folder, synced and renamed: two runs may share a cache, and the first to finish an entry makes it for both.
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
from datasets import Dataset

from trainer.checksums import verify_checksum, write_checksum
from trainer.errors import UserError
from trainer.files import fsync_path, temporary_folder

FULL = (errno.ENOSPC, errno.EDQUOT)


def cached_dataset(cache_dir: str | None, kind: str, fingerprint: str, make: Callable[[Path], None]) -> Dataset:
    """Return the data set of a fingerprint, made now unless the cache has it.

    `make` writes Arrow files anywhere in the folder that it gets, in the order of their names. `cache_dir` defaults to the cache of
    `datasets`. An entry that is damaged is made anew, which is said in a line.
    """
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / kind
    entry = folder / fingerprint
    if entry.exists():
        try:
            return _read(entry)
        except (OSError, ValueError) as error:
            print(f"data: the cache {entry} is damaged and made anew: {error}", flush=True)
            shutil.rmtree(entry)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder, "making") as tmp:
            make(tmp)
            _publish(sorted(tmp.rglob("*.arrow")), tmp / "entry", entry)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(f"data.cache_dir: cannot write the cache {folder}: {os.strerror(error.errno)}; free space, or choose another "
                        "data.cache_dir") from None
    return _read(entry)


@functools.cache
def code_hash(*modules: ModuleType) -> str:
    """Return a hash of the modules' source, for the fingerprint of what they make."""
    return hashlib.sha256(b"".join(Path(module.__file__).read_bytes() for module in modules)).hexdigest()


def _publish(files: list[Path], tmp: Path, entry: Path) -> None:
    """Move files into an entry, with their checksums; leave that of another process, if it was faster."""
    tmp.mkdir()
    for file, name in zip(files, _names(len(files))):
        file.rename(tmp / name)
        write_checksum(tmp / name)
        fsync_path(tmp / name)
    try:
        tmp.rename(entry)
    except OSError:
        if not entry.exists():
            raise
    fsync_path(entry.parent)


def _read(entry: Path) -> Dataset:
    """Read an entry, memory-mapped. Raises ValueError or OSError where it is damaged."""
    files = sorted(entry.glob("*.arrow"))
    if not files or [file.name for file in files] != _names(len(files)):
        raise ValueError("files are missing")
    for file in files:
        verify_checksum(file)
    parts = [Dataset.from_file(str(file)) for file in files]
    found = datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    found._fingerprint = entry.name  # not one of the files' times, so that what is made from it is found again
    return found


def _names(count: int) -> list[str]:
    return [f"{i:05}-of-{count:05}.arrow" for i in range(count)]
