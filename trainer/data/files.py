"""Find the data files that a path names, here or through fsspec elsewhere; open them decompressed.

A path is a file, a pattern such as `chats/*.jsonl.gz`, or a folder of parts; `s3://`, `gs://`, `hf://`, `https://` and all that fsspec
knows are read as they lie there. Files come sorted by name. Their contents are told by their endings, in upper or lower case.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import io
import lzma
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import fsspec
import pyarrow
from fsspec.registry import known_implementations

from trainer.errors import UserError, one_line

KINDS = {".json": ".json", ".jsonl": ".jsonl", ".ndjson": ".jsonl", ".csv": ".csv", ".parquet": ".parquet"}  # ending: kind
METADATA = ("dataset_info.json", "dataset_infos.json", "state.json")  # of a folder of parts, beside them
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "validation": "validation", "valid": "validation",
          "val": "validation", "dev": "validation", "eval": "validation", "evaluation": "validation"}  # word in a name: split
MOST_EXPANSION = 250  # times its size that a compressed file may grow, which text does not,
EXPANSION_FLOOR = 2**28  # from this many bytes on: no more of a zip bomb is read
BLOCK = 2**16  # bytes of one read
STREAMED = ("http", "https")  # read from start to end: many servers know no ranges


class Unreadable(Exception):
    """The reason, without its place, why a file's bytes cannot be read: "expected X, found Y; REMEDY"."""


class Codec(NamedTuple):
    """A way to compress files."""

    name: str
    magic: re.Pattern[bytes]  # how its files begin
    open: Callable[[BinaryIO], Any]


CODECS = {
    ".gz": Codec("gzip", re.compile(rb"\x1f\x8b"), gzip.open),
    ".bz2": Codec("bzip2", re.compile(rb"BZh"), bz2.open),
    ".xz": Codec("xz", re.compile(rb"\xfd7zXZ"), lzma.open),
    ".zst": Codec("zstd", re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", re.DOTALL),  # a frame, or one to skip
                  lambda file: pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")),
}
ENDINGS = f"{', '.join(KINDS)}, also compressed: {', '.join(CODECS)}"


@dataclass(frozen=True)
class DataFile:
    """One file of a source."""

    path: str  # as messages show it
    part: str = ""  # its name inside its source; "" where it is the whole source
    remote: fsspec.AbstractFileSystem | None = None  # None: this machine
    key: str = ""  # its name to `remote`

    @property
    def endings(self) -> str:
        """Return its last ending, with the one before that where it is compressed; "" for none."""
        name = PurePosixPath(_name(self.key or self.path))
        return "".join(name.suffixes[-2:] if self.codec else name.suffixes[-1:])

    @property
    def kind(self) -> str:
        """Return one of KINDS' values, "" for none of them."""
        return KINDS.get(PurePosixPath(_without_codec(self.key or self.path)).suffix.lower(), "")

    @property
    def codec(self) -> Codec | None:
        """Return how it is compressed."""
        return CODECS.get(PurePosixPath(_name(self.key or self.path)).suffix.lower())

    def open(self) -> io.BufferedReader:
        """Open the file's decompressed bytes.

        This, and reading, raise Unreadable where they are cut off, wrong, or a zip bomb.
        """
        file = self.open_packed()
        head = file.peek(8)[:8]
        if fault := self._fault(head):
            file.close()
            raise Unreadable(fault)
        if self.codec is None or not head:
            return file
        most = max(EXPANSION_FLOOR, MOST_EXPANSION * self.size)
        return io.BufferedReader(_Stream(self.codec.open(file), self._damaged, most, below=file), BLOCK)

    def _fault(self, head: bytes) -> str | None:
        """Return why a file that begins with `head` cannot be what its name says."""
        if self.codec:
            return None if not head or self.codec.magic.match(head) else (
                f"expected a file compressed with {self.codec.name}, found one that begins with {head!r}; "
                "correct its name, or download it again")
        for ending, codec in CODECS.items():
            if ending != ".bz2" and codec.magic.match(head):  # the header of a CSV file may begin with BZh
                return f"expected text or Parquet, found a file compressed with {codec.name}; add {ending} to its name"
        return "expected UTF-8 text, found UTF-16; convert the file" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else None

    def open_packed(self) -> io.BufferedReader:
        """Open the file's bytes as they lie there."""
        options = {"block_size": 0} if self.key.partition("://")[0] in STREAMED else {}
        try:
            if self.remote is None:
                return open(self.path, "rb")
            return io.BufferedReader(_Stream(self.remote.open(self.key, "rb", **options), self._unreachable, seeks=not options), BLOCK)
        except Exception as error:  # of any library below fsspec
            raise Unreadable(self._unreachable(error)) from None

    def require(self) -> None:
        """Raise UserError where the file has no known kind, or is a link to nothing."""
        if not self.kind:
            raise UserError(f"{self.path}: expected a file that ends in {ENDINGS}, found {self.endings or 'none'}; convert or rename it"
                            + (", or narrow the pattern" if self.part else ""))
        if self.remote is None and not os.path.exists(self.path):
            raise UserError(f"{self.path}: expected a file, found a link to nothing; remove or mend it")

    @property
    def size(self) -> int:
        """Return the bytes of the file; 1 GiB where a server does not tell."""
        return os.path.getsize(self.path) if self.remote is None else self.remote.info(self.key).get("size") or 2**30

    def stamp(self) -> tuple:
        """Return what changes with the file's content.

        It is its path, times and size, or what its server tells, or a hash of the content where that tells nothing.
        """
        if self.remote is None:
            status = os.stat(self.path)
            return (os.path.realpath(self.path), status.st_mtime_ns, status.st_ctime_ns, status.st_size)
        told = {name: str(value) for name, value in self.remote.info(self.key).items() if name not in ("name", "type", "url", "partial")}
        if set(told) - {"size", "mimetype"}:
            return (self.path, *sorted(told.items()))
        return (self.path, content_hash([self]))

    def _damaged(self, error: Exception) -> str:
        if isinstance(error, EOFError) or "Truncated" in str(error):
            return f"expected whole {self.codec.name} data, found data that is cut off; copy or download the file again"
        return (f"expected {self.codec.name} data, found bytes that cannot be decompressed: {one_line(str(error))}; "
                "copy or download the file again")

    def _unreachable(self, error: Exception) -> str:
        if self.remote is None and isinstance(error, OSError):
            return f"expected a file that can be read, found: {error.strerror}; check it and your access"
        return (f"expected a file that can be read, found {type(error).__name__}: {one_line(str(error))}; "
                "check the address, the network and your access")


class _Stream(io.RawIOBase):
    """A file's bytes as a library reads them, whose errors become Unreadable; at most `most` come."""

    def __init__(self, file: Any, describe: Callable[[Exception], str], most: int = 0, below: BinaryIO | None = None,
                 seeks: bool = False):
        self.file, self.describe, self.most, self.below, self.count, self.seeks = file, describe, most, below, 0, seeks
        self.some = getattr(file, "read1", file.read)  # all that can be decoded before an error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.seeks

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def readinto(self, buffer) -> int:
        try:
            data = self.some(len(buffer))
        except Unreadable:
            raise
        except Exception as error:  # of zlib, lzma, Arrow, or of any library below fsspec
            raise Unreadable(self.describe(error)) from None
        buffer[:len(data)] = data
        self.count += len(data)
        if self.most and self.count > self.most:
            raise Unreadable(f"expected data that grows to at most {MOST_EXPANSION} times its size, found more: a zip bomb?; "
                             "decompress it yourself if you trust it")
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self.file.close()
            if self.below is not None:
                self.below.close()
        super().close()


# ---------------------------------------------------------------- finding them


def is_remote(path: str) -> bool:
    """Return whether a path names a file system of fsspec, as `s3://` does."""
    return "://" in path or "::" in path


def find_files(path: str, split: str = "train") -> list[DataFile]:
    """Return the files that a path, pattern or folder names, sorted; none where it names nothing.

    In a folder whose files' names tell of splits, only those of `split` are taken. Raises UserError where a pattern matches nothing, a
    folder has no parts or those of several kinds, a file is of no known kind, or its file system cannot be reached.
    """
    place = _Remote(path) if is_remote(path) else _Local(path)
    if place.is_file(place.key):
        found = [place.file(place.key)]
    elif place.is_folder(place.key):
        found = _parts(path, [place.file(key, place.key) for key in sorted(place.below(place.key))], split)
    elif glob.has_magic(place.key):
        keys = {key for match in place.matches()
                for key in (filter(_is_part, place.below(match)) if place.is_folder(match) else [match])}
        found = [place.file(key, _shared_folder(keys)) for key in sorted(keys)]
        if not found:
            raise UserError(f"{path}: expected files that match this pattern, found none; check it, and quote it on the command line")
    else:
        return []
    for file in found:
        file.require()
    return found


def content_hash(files: Iterable[DataFile]) -> str:
    """Return a hash of the bytes of all files, in their order."""
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open_packed() as opened:
                while block := opened.read(2**20):
                    digest.update(block)
        except Unreadable as error:
            raise UserError(f"{file.path}: {error}") from None
    return digest.hexdigest()[:16]


def stem(path: str) -> str:
    """Return a name for a path: its last part without endings, or its folder where that is a pattern."""
    last = PurePosixPath(_without_codec(path.partition("::")[0]))
    plain = re.sub(r"[*?\[\]{}]+", "", last.stem).strip("-_. ") if glob.has_magic(last.name) else last.stem
    return plain or next((folder.name for folder in last.parents if not glob.has_magic(folder.name)), "")


class _Local:
    """A path on this machine; its keys are paths."""

    def __init__(self, path: str):
        self.key = os.path.expanduser(path)

    def file(self, key: str, folder: str | None = None) -> DataFile:
        """Return the file `key`, as a part of a folder or pattern where one is given."""
        return DataFile(key, _below(key, folder))

    def is_file(self, key: str) -> bool:
        return os.path.exists(key) and not os.path.isdir(key)

    def is_folder(self, key: str) -> bool:
        return os.path.isdir(key)

    def matches(self) -> list[str]:
        return glob.glob(self.key, recursive=True)

    def below(self, folder: str) -> list[str]:
        return [os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names]


class _Remote:
    """A path on another file system; its keys are that one's names.

    Raises UserError where its package is missing, or it cannot be reached.
    """

    def __init__(self, path: str):
        self.path, (first, *chain) = path, path.split("::")
        self.chain = "".join(f"::{link}" for link in chain)  # as in zip://rows.jsonl::s3://bucket/archive.zip
        protocol = first.partition("://")[0]
        try:
            self.filesystem, self.key = fsspec.url_to_fs(path)
        except ImportError:
            module = known_implementations[protocol]["class"].partition(".")[0]
            package = f"'fsspec[{protocol.removesuffix('s')}]'" if module == "fsspec" else module
            raise UserError(f"{path}: expected the package that reads {protocol}://, found it is not installed; "
                            f"pip install {package}") from None
        except Exception as error:  # of any library below fsspec
            raise self._refused(error) from None

    def _refused(self, error: Exception) -> UserError:
        return UserError(f"{self.path}: expected files that can be read, found {type(error).__name__}: {one_line(str(error))}; "
                         "check the address, the network and your access")

    def file(self, key: str, folder: str | None = None) -> DataFile:
        """Return the file `key`, as a part of a folder or pattern where one is given."""
        return DataFile(self.filesystem.unstrip_protocol(key) + self.chain, _below(key, folder), self.filesystem, key)

    def _type(self, key: str) -> str:
        try:
            return self.filesystem.info(key)["type"]
        except FileNotFoundError as error:
            reason = error.__cause__  # a web server that refuses us, or none
            if key.partition("://")[0] in STREAMED and getattr(reason, "status", None) != 404:
                raise self._refused(reason or error) from None
            return "none"
        except Exception as error:
            raise self._refused(error) from None

    def is_file(self, key: str) -> bool:
        return self._type(key) == "file"

    def is_folder(self, key: str) -> bool:
        return self._type(key) == "directory"

    def matches(self) -> list[str]:
        return self._list(self.filesystem.glob, self.key)

    def below(self, folder: str) -> list[str]:
        return self._list(self.filesystem.find, folder)

    def _list(self, call: Callable, key: str) -> list[str]:
        try:
            return list(call(key))
        except Exception as error:
            raise self._refused(error) from None


# ---------------------------------------------------------------- parts


def _parts(path: str, files: list[DataFile], split: str) -> list[DataFile]:
    """Return the parts among a folder's files: data files of `split`, hidden ones and metadata left out."""
    parts = [file for file in files if _is_part(file.part)]
    if not parts:
        raise UserError(f"{path}: expected a folder written by save_to_disk, or one with parts that end in {ENDINGS}, found neither; "
                        "give the path of the data file itself")
    if len(kinds := {part.kind for part in parts}) > 1:
        raise UserError(f"{path}: expected parts of one kind, found {', '.join(sorted(kinds))}; "
                        f"name those to read by a pattern, such as {path.rstrip('/')}/*{min(kinds)}")
    chosen = [part for part in parts if _split(part.part) == SPLITS.get(split, split)]
    if not chosen:
        found = ", ".join(sorted({_split(part.part) for part in parts}))
        raise UserError(f"{path}: expected parts of the split '{split}', found {found}; set split")
    return chosen


def _is_part(name: str) -> bool:
    """Return whether a file in a folder is a part of the data: of a known kind, not hidden, no metadata."""
    return bool(DataFile(name).kind) and not re.search(r"(^|/)[._][^/.]", name) and PurePosixPath(name).name not in METADATA


def _below(key: str, folder: str | None) -> str:
    """Return the name of a file below a folder; "" without a folder."""
    return "" if folder is None else key[len(folder):].lstrip("/")


def _shared_folder(keys: Iterable[str]) -> str:
    """Return the folder, with its slash, that all files share."""
    shared = os.path.commonprefix([key[:key.rfind("/") + 1] for key in keys])
    return shared[:shared.rfind("/") + 1]


def _split(part: str) -> str:
    """Return the split that a part's name begins or ends with; train without one.

    Examples are train-00000-of-00004.parquet and test/0.jsonl.
    """
    words = [re.findall(r"[a-z]+", PurePosixPath(_without_codec(step)).stem.lower()) for step in part.split("/")]
    return next((SPLITS[word] for step in words if step for word in (step[0], step[-1]) if word in SPLITS), "train")


def _name(path: str) -> str:
    """Return a path without the query of a web address."""
    return re.split("[?#]", path)[0] if path.startswith(("http://", "https://")) else path


def _without_codec(path: str) -> str:
    name = _name(path)
    ending = PurePosixPath(name).suffix
    return name[:-len(ending)] if ending.lower() in CODECS else name
