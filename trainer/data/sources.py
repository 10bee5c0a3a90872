"""Load files, saved folders and hub data sets as chat records, cached on disk as a `datasets.Dataset`.

Files are read by `trainer/data/readers.py`, not by `datasets`' own readers: those guess types (a column of "2020-01-01" becomes
a column of dates, "NA" a missing value) and do not say which line they cannot read. `Dataset.from_generator` gets the
records with their types known and writes them as Arrow. The cache key is the file's path, size and time, our options, and the
code that reads.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import datasets
from datasets import Dataset, Features, List, Value

from trainer.config import Source
from trainer.data import formats, readers
from trainer.data.formats import RecordError, choose_format
from trainer.errors import UserError

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
COMMON = {"id": Value("string"), "source": Value("string"), "weight": Value("float32")}
MESSAGE = {"role": Value("string"), "content": Value("string"), "extra": Value("string")}

Sources = list[tuple[Source, Dataset]]


def load_sources(sources: str | list[str | Source], default_name: str, cache_dir: str | None = None) -> Sources:
    """Load each source's records, with the columns `messages` (or `text`), `id`, `source` and `weight`.

    A source without a name gets its file's stem, or `default_name`. `cache_dir` defaults to the cache of `datasets`.
    Raises UserError with the file, line or record that cannot be read, the reason, and the remedy.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    loaded = []
    for entry in [sources] if isinstance(sources, (str, Source)) else sources:
        source = entry if isinstance(entry, Source) else Source(entry)
        source = replace(source, name=source.name or Path(source.path).stem or default_name)
        loaded.append((source, _load(source, cache_dir)))
    return loaded


def _load(source: Source, cache_dir: str | None) -> Dataset:
    """Load the records of one source from the cache, or read them."""
    opened = open_source(source)
    rows = rows_of(opened)
    first = next(rows, None)
    if first is None or source.max_records == 0:
        raise UserError(f"{source.path}: expected records, found an empty data set; check the file, and max_records")
    try:
        _, columns = first
        record_format = choose_format(columns, source.format, source.columns)
    except ValueError as error:
        raise UserError(f"{source.path}: {error}") from None

    def records() -> Iterator[dict]:
        for place, row in islice(chain([first], rows), source.max_records):
            try:
                yield record_format.record(row)
            except RecordError as error:
                raise UserError(f"{source.path}, {place}: {error}") from None

    code = [Path(module.__file__).read_bytes() for module in (formats, readers)]
    key = (_stamp(opened), record_format.name, sorted(record_format.paths.items()), source.max_records, code)
    fingerprint = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    content = {"text": Value("string")} if record_format.name == "text" else {"messages": List(MESSAGE)}
    try:
        return Dataset.from_generator(records, features=Features(content | COMMON), cache_dir=cache_dir, fingerprint=fingerprint)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, (UserError, OSError)):
            raise error.__cause__ from None
        raise


def rows_of(opened: Path | Dataset) -> Iterator[readers.Row]:
    """Yield the rows of an opened source unchanged, each with its place in it."""
    return readers.read_rows(opened) if isinstance(opened, Path) else ((f"record {n}", row) for n, row in enumerate(opened, 1))


def open_source(source: Source) -> Path | Dataset:
    """Open a source: return its file, or its saved or hub data set. Raises UserError if there is none."""
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _load_folder(source, path)
    endings = ", ".join(readers.SUFFIXES)
    if path.exists():
        if path.suffix not in readers.SUFFIXES:
            raise UserError(f"{source.path}: expected a file that ends in {endings}, found {path.suffix or 'none'}; "
                            "convert or rename it")
        return path
    if path.suffix in readers.SUFFIXES or not HUB_NAME.fullmatch(source.path):
        raise UserError(f"{source.path}: expected a file ({endings}), a folder or a hub data set, found no such file; "
                        "check the path")
    try:
        return datasets.load_dataset(source.path, source.subset, split=source.split)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source.path}: expected a file, a folder or a hub data set, found no such file, and no hub "
                        f"data set of that name could be loaded: {reason}") from None


def _load_folder(source: Source, path: Path) -> Dataset:
    """Load a folder that `save_to_disk` wrote, of one data set or of several splits."""
    if not ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        raise UserError(f"{source.path}: expected a folder written by save_to_disk, found neither state.json nor "
                        "dataset_dict.json in it; give the path of the data file itself")
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, Dataset):
        return saved
    if source.split not in saved:
        raise UserError(f"{source.path}: expected the split '{source.split}', found {', '.join(saved)}; set split")
    return saved[source.split]


def _stamp(opened: Path | Dataset) -> tuple:
    """Return what identifies the present content of a source, for the cache key."""
    if isinstance(opened, Dataset):
        return (opened._fingerprint,)
    status = opened.stat()
    return (str(opened.resolve()), status.st_mtime_ns, status.st_size)
