"""Write the checksum of a file beside it, and tell by it whether the file is still what was written.

`state.safetensors` gets `state.safetensors.xxh3`, written last: a file without one was never finished. XXH3 is faster than any disk. It
finds damage; it is no proof against somebody who writes both files.
"""

from __future__ import annotations

from pathlib import Path

from trainer.files import atomic_file

PIECE = 1 << 24  # bytes read at a time


def write_checksum(path: Path, durable: bool = True) -> None:
    """Write the checksum of a complete file beside it. Lets an OSError through.

    `durable`: it is flushed to the disk, and there whole or not at all.
    """
    if not durable:
        _beside(path).write_text(_checksum(path))
        return
    with atomic_file(_beside(path)) as tmp:
        tmp.write_text(_checksum(path))


def verify_checksum(path: Path) -> None:
    """Compare a file with its checksum.

    Raises ValueError for a file that is another than the one that was written, and OSError for one that cannot be read.
    """
    if not _beside(path).is_file():
        raise ValueError(f"{_beside(path).name} is missing")
    if _beside(path).read_bytes() != _checksum(path).encode():
        raise ValueError(f"{path.name} is damaged: it differs from its checksum")


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".xxh3")


def _checksum(path: Path) -> str:
    import xxhash  # here, since a training step on a machine that has little, as in `make gpu`, imports this file and calls nothing

    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(max(1, min(PIECE, path.stat().st_size))))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
