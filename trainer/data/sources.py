"""Load files, saved folders and hub data sets as chat records, cached on disk as a `datasets.Dataset`.

Files are read by `trainer/data/readers.py`, not by `datasets`' own readers: those guess types (a column of "2020-01-01" becomes
a column of dates, "NA" a missing value) and do not say which line they cannot read. The records' types are known, so they go to
Arrow batch by batch. The cache key is what tells of the files' content, our options, and the code that reads.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import datasets
import pyarrow
from datasets import Dataset, Features, List, Value
from datasets.table import MemoryMappedTable

from trainer.config import Source
from trainer.data import arrow_rows, chat_columns, files, formats, messages, readers, tool_calls, turn_weights, values
from trainer.data.arrow_rows import without_padding
from trainer.data.chat_columns import record_of
from trainer.data.disk_cache import cached_files, code_hash
from trainer.data.files import DataFile
from trainer.data.formats import choose_format
from trainer.data.values import RecordError
from trainer.errors import UserError, one_line
from trainer.hub_names import is_hub_name
from trainer.progress import announce

# Modules that decide what records a source has.
CODE = (chat_columns, formats, messages, tool_calls, turn_weights, values, arrow_rows, readers, files)
# `refused`: why the row is no record, if it is none; `unread`: the columns that nothing reads
COMMON = {**dict.fromkeys(("id", "source", "unread", "place", "refused"), Value("string")), "weight": Value("float32")}
RECORDS_PER_BATCH, CHARACTERS_PER_BATCH = 1000, 2**24  # of the Arrow file, whichever comes first
MESSAGE = {"role": Value("string"), "content": Value("string"), "extra": Value("string"), "weight": Value("float32")}

Sources = list[tuple[Source, Dataset]]


def load_sources(sources: str | list[str | Source], default_name: str, cache_dir: str | None = None, on_bad_row: str = "error") -> Sources:
    """Load each source's records: `messages` and `inputs`, or `text`, and the columns of COMMON.

    A source without a name gets its file's stem, or `default_name`. `cache_dir` defaults to the cache of `datasets`. With
    `on_bad_row="skip"` a row that is no record is left empty, with the reason as `refused`.
    Raises UserError with the file, line or record that cannot be read, the reason, and the remedy.
    """
    loaded = []
    for entry in [sources] if isinstance(sources, (str, Source)) else sources:
        source = entry if isinstance(entry, Source) else Source(entry)
        source = replace(source, name=source.name or one_line(files.stem(source.path)) or default_name)
        loaded.append((source, _load(source, cache_dir, on_bad_row)))
    return loaded


def _load(source: Source, cache_dir: str | None, on_bad_row: str) -> Dataset:
    """Load the records of one source from the cache, or read them."""
    opened = open_source(source)
    rows = rows_of(opened, on_bad_row == "skip")
    read: list[readers.Row] = []  # up to the first that is one
    while not (read and isinstance(read[-1][1], dict)):
        if (row := next(rows, None)) is None or source.max_records == 0:
            found = f"none that can be read: {read[0][1]}" if read else "an empty data set; check the file, and max_records"
            raise UserError(f"{source.path}: expected records, found {found}")
        read.append(row)
    try:
        record_format = choose_format(read[-1][1], source.format, source.columns)
    except ValueError as error:
        raise UserError(f"{source.path}: {error}") from None

    def records() -> Iterator[dict]:
        for place, row in islice(chain(read, rows), source.max_records):
            refused = None
            try:
                if isinstance(row, UserError):
                    raise RecordError(str(row).removeprefix(f"{source.path}, {place}: "))
                record = record_of(row, record_format)
            except RecordError as error:
                if on_bad_row == "error":
                    raise UserError(f"{source.path}, {place}: {error}") from None
                record, refused = empty, str(error)
            yield record | {"place": place, "refused": refused}

    key = (_stamp(opened), record_format.name, sorted(record_format.paths.items()), source.max_records, on_bad_row, code_hash(*CODE))
    fingerprint = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    content = {"text": Value("string")} if record_format.name == "text" else {"messages": List(MESSAGE), "inputs": Value("string")}
    empty = dict.fromkeys(content | COMMON) | {"weight": 1.0}

    def make(folder: Path) -> None:
        with announce(f"data: reading {source.path}"):
            _write(records(), Features(content | COMMON).arrow_schema, folder / "records.arrow")

    file, = cached_files(cache_dir, "records", fingerprint, make)
    return Dataset(MemoryMappedTable.from_file(str(file)), fingerprint=fingerprint)


def _write(records: Iterator[dict], schema: pyarrow.Schema, path: Path) -> None:
    """Write records to an Arrow file, a batch of them in memory."""
    batch, characters = [], 0
    with pyarrow.ipc.new_stream(str(path), schema) as file:
        for record in records:
            batch.append(record)
            characters += len(record.get("text") or "") + sum(len(message["content"]) for message in record.get("messages") or ())
            if len(batch) == RECORDS_PER_BATCH or characters > CHARACTERS_PER_BATCH:
                file.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema))
                batch, characters = [], 0
        if batch:
            file.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema))


def rows_of(opened: list[DataFile] | Dataset, skip_bad: bool = False) -> Iterator[readers.Row]:
    """Yield the rows of an opened source, each with its place in it.

    With `skip_bad` there are errors in the place of lines that are no rows.
    """
    if isinstance(opened, Dataset):
        schema = opened.features.arrow_schema
        yield from ((f"record {n}", without_padding(row, schema)) for n, row in enumerate(opened, 1))
        return
    for file in opened:
        if not file.part:
            yield from readers.read_rows(file, skip_bad)
            continue
        for place, row in readers.read_rows(file, skip_bad):
            yield f"{file.part}, {place}", row


def open_source(source: Source) -> list[DataFile] | Dataset:
    """Open a source: return its files, or its saved or hub data set. Raises UserError if there is none."""
    if _is_saved(source.path):
        return _load_saved(source)
    if found := files_of(source):
        return found
    if files.is_remote(source.path) or DataFile(source.path).kind or not is_hub_name(source.path):
        raise UserError(f"{source.path}: expected a file ({files.ENDINGS}), a folder or a hub data set, found no such file; "
                        "check the path")
    try:
        return datasets.load_dataset(source.path, source.subset, split=source.split)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source.path}: expected a file, a folder or a hub data set, found no such file, and no hub "
                        f"data set of that name could be loaded: {reason}") from None


def files_of(source: Source) -> list[DataFile]:
    """Return the files of a source; none for a saved folder and for a hub data set.

    Raises UserError for files that cannot be read.
    """
    return [] if _is_saved(source.path) else files.find_files(source.path, source.split)


def _is_saved(path: str) -> bool:
    """Return whether `save_to_disk` wrote the folder `path`, of one data set or of several splits."""
    folder = os.path.expanduser(path)
    return any(os.path.exists(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))


def _load_saved(source: Source) -> Dataset:
    saved = datasets.load_from_disk(os.path.expanduser(source.path))
    if isinstance(saved, Dataset):
        return saved
    if source.split not in saved:
        raise UserError(f"{source.path}: expected the split '{source.split}', found {', '.join(saved)}; set split")
    return saved[source.split]


def _stamp(opened: list[DataFile] | Dataset) -> tuple:
    """Return what identifies the present content of a source, for the cache key."""
    return (opened._fingerprint,) if isinstance(opened, Dataset) else tuple(file.stamp() for file in opened)
