"""Files, saved folders and hub data sets to chat records: `datasets.Dataset`s that are kept on disk for the next run.

Files are read by `trainer/data/readers.py`, not by `datasets`' own readers: those guess types (a column of "2020-01-01" becomes
a column of dates, "NA" a missing value) and do not say which line they cannot read. `Dataset.from_generator` gets the
records with their types known and writes them as Arrow; its cache is keyed by the file's path, size and time, and by
our options.
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
KEPT = {"id": Value("string"), "source": Value("string"), "weight": Value("float32")}
MESSAGE = {"role": Value("string"), "content": Value("string"), "extra": Value("string")}

Sources = list[tuple[Source, Dataset]]


def load_sources(sources: str | list[str | Source], default_name: str, cache: str | None = None) -> Sources:
    """Each source with its records: columns `messages` (or `text`), `id`, `source` and `weight`. No sources: none.

    A source without a name gets its file's stem, or `default_name`. `cache` is a folder; default: that of `datasets`.
    UserError says which file, line or record cannot be read, why, and the remedy.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    loaded = []
    for entry in [sources] if isinstance(sources, (str, Source)) else sources:
        source = entry if isinstance(entry, Source) else Source(entry)
        source = replace(source, name=source.name or Path(source.path).stem or default_name)
        loaded.append((source, _load(source, cache)))
    return loaded


def _load(source: Source, cache: str | None) -> Dataset:
    """The records of one source, read now or in an earlier run."""
    opened = open_source(source)
    found = rows_of(opened)
    first = next(found, None)
    if first is None or source.max_records == 0:
        raise UserError(f"{source.path}: expected records, found an empty data set; check the file, and max_records")
    try:
        form = choose_format(first[1], source.format, source.columns)
    except ValueError as error:
        raise UserError(f"{source.path}: {error}") from None

    def records() -> Iterator[dict]:
        for place, row in islice(chain([first], found), source.max_records):
            try:
                yield form.record(row)
            except RecordError as error:
                raise UserError(f"{source.path}, {place}: {error}") from None

    code = [Path(module.__file__).read_bytes() for module in (formats, readers)]
    key = (_stamp(opened), form.name, sorted(form.paths.items()), source.max_records, code)
    fingerprint = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    body = {"text": Value("string")} if form.name == "text" else {"messages": List(MESSAGE)}
    try:
        return Dataset.from_generator(records, features=Features(body | KEPT), cache_dir=cache, fingerprint=fingerprint)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, (UserError, OSError)):
            raise error.__cause__ from None
        raise


def rows_of(opened: Path | Dataset) -> Iterator[readers.Row]:
    """The rows of an opened source as they stand, each with its place there."""
    return readers.read_rows(opened) if isinstance(opened, Path) else ((f"record {n}", row) for n, row in enumerate(opened, 1))


def open_source(source: Source) -> Path | Dataset:
    """The file of a source, or its saved or hub data set. UserError where there is none."""
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _load_folder(source, path)
    endings = ", ".join(readers.SUFFIXES)
    if path.exists():
        if path.suffix not in readers.SUFFIXES:
            raise UserError(f"{source.path}: expected a file that ends in {endings}, found {path.suffix or 'none'}")
        return path
    if path.suffix in readers.SUFFIXES or not HUB_NAME.fullmatch(source.path):
        raise UserError(f"{source.path}: expected a file ({endings}), a folder or a hub data set, found no such file")
    try:
        return datasets.load_dataset(source.path, source.subset, split=source.split)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source.path}: expected a file, a folder or a hub data set, found no such file, and no hub "
                        f"data set of that name could be loaded: {reason}") from None


def _load_folder(source: Source, path: Path) -> Dataset:
    """A folder that `save_to_disk` wrote, of one data set or of several splits."""
    if not ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        raise UserError(f"{source.path}: expected a folder written by save_to_disk, found neither state.json nor "
                        "dataset_dict.json in it; name the data file itself")
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, Dataset):
        return saved
    if source.split not in saved:
        raise UserError(f"{source.path}: expected the split '{source.split}', found {', '.join(saved)}; set split")
    return saved[source.split]


def _stamp(opened: Path | Dataset) -> tuple:
    """What tells this state of a source from others."""
    if isinstance(opened, Dataset):
        return (opened._fingerprint,)
    status = opened.stat()
    return (str(opened.resolve()), status.st_mtime_ns, status.st_size)
