"""Files, saved folders and hub data sets to chat records, as `datasets.Dataset`s that are kept on disk for the next run.

Text files are read line by line here, not by `datasets`' own JSON and CSV readers: those guess types (a column of "2020-01-01"
becomes a column of dates, "NA" a missing value) and do not say which line they cannot read. `Dataset.from_generator` gets the
records with their types known and writes them as Arrow; its cache is keyed by the file's path, size and time, and by our options.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
from datasets import Dataset, Features, List, Value

from trainer import formats
from trainer.config import Source
from trainer.errors import UserError
from trainer.formats import Format, RecordError, choose_format

SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
KEPT = {"id": Value("string"), "source": Value("string"), "weight": Value("float32")}
MESSAGE = {"role": Value("string"), "content": Value("string"), "extra": Value("string")}

Row = tuple[str, dict]  # where it stands ("line 7"), and its columns


def load_sources(sources: str | list[str | Source], default_name: str, cache: str | None = None) -> list[tuple[Source, Dataset]]:
    """Each source with its records: columns `messages` (or `text`), `id`, `source` and `weight`. No sources: an empty list.

    Sources without a name get their file's stem, or `default_name`. `cache` is a folder; default: the cache of `datasets`.
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
    opened = _open(source)
    rows = _rows(source, opened)
    first = next(rows, None)
    if first is None or source.limit == 0:
        raise UserError(f"{source.path}: expected records, found an empty data set" + (" (limit: 0)" if source.limit == 0 else ""))
    try:
        form = choose_format(first[1], source.format, source.columns)
    except ValueError as error:
        raise UserError(f"{source.path}: {error}") from None
    body = {"text": Value("string")} if form.name == "text" else {"messages": List(MESSAGE)}
    key = (_stamp(source, opened), form.name, sorted(form.paths.items()), source.limit, Path(formats.__file__).read_bytes())

    def records() -> Iterator[dict]:
        for place, row in islice(chain([first], rows), source.limit):
            try:
                yield form.record(row)
            except RecordError as error:
                raise UserError(f"{source.path}, {place}: {error}") from None

    try:
        return Dataset.from_generator(records, features=Features(body | KEPT), cache_dir=cache, fingerprint=_hash(key))
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def _open(source: Source) -> Path | Dataset:
    """The file of a source, or its saved or hub data set."""
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _load_folder(source, path)
    if path.exists():
        if path.suffix not in SUFFIXES:
            raise UserError(f"{source.path}: expected a file that ends in {', '.join(SUFFIXES)}, found {path.suffix or 'no ending'}")
        return path
    if path.suffix in SUFFIXES or not HUB_NAME.fullmatch(source.path):
        raise UserError(f"{source.path}: expected a file, a folder or a hub data set, found no such file; check data.train and data.heldout")
    try:
        return datasets.load_dataset(source.path, source.subset, split=source.split)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source.path}: found no such file or folder, and no hub data set of that name could be loaded: {reason}") from None


def _load_folder(source: Source, path: Path) -> Dataset:
    """A folder that `save_to_disk` wrote, of one data set or of several splits."""
    if not ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        raise UserError(f"{source.path}: expected a folder written by save_to_disk, found neither state.json nor dataset_dict.json in it; "
                        "name the data file itself")
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, Dataset):
        return saved
    if source.split not in saved:
        raise UserError(f"{source.path}: expected the split '{source.split}', found {', '.join(saved)}; set split")
    return saved[source.split]


def _rows(source: Source, opened: Path | Dataset) -> Iterator[Row]:
    if isinstance(opened, Dataset):
        return ((f"record {n}", row) for n, row in enumerate(opened, 1))
    return {".json": _json, ".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}[opened.suffix](opened)


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for n, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if n == 1 else line
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {n}: expected one JSON object, found malformed JSON: {error.msg} at column {error.colno}") from None
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {n}: expected UTF-8 text, found byte {error.object[error.start]:#x}; convert the file") from None
            yield f"line {n}", _checked(path, f"line {n}", row)


def _json(path: Path) -> Iterator[Row]:
    """An array of records; {"data": [...]}; an object of records by id; one record; or JSON lines under this name."""
    try:
        content = json.loads(path.read_bytes() or b"[]")
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _json_lines(path)
            return
        raise UserError(f"{path}, line {error.lineno}: expected JSON, found malformed JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: expected UTF-8 text, found byte {error.object[error.start]:#x}; convert the file") from None
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    elif isinstance(content, dict) and content and all(isinstance(value, dict) for value in content.values()):
        content = [{"id": key} | value for key, value in content.items()]
    elif not isinstance(content, list):
        content = [content]
    for n, row in enumerate(content, 1):
        yield f"record {n}", _checked(path, f"record {n}", row)


def _csv(path: Path) -> Iterator[Row]:
    """Every value a string, as it stands."""
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="", strict=True)
        try:
            for row in reader:
                if "" in row or None in row.values():
                    found = len(reader.fieldnames) + len(row.get("", [])) - list(row.values()).count(None)
                    raise UserError(f"{path}, line {reader.line_num}: expected {len(reader.fieldnames)} values, found {found}")
                yield f"line {reader.line_num}", row
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num + 1}: expected comma-separated values, found a mistake: {error}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, after line {reader.line_num}: expected UTF-8 text, found other bytes ({error.reason}); convert the file") from None


def _parquet(path: Path) -> Iterator[Row]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(1000))
            for n, row in enumerate(chain.from_iterable(batches), 1):
                yield f"record {n}", row
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: expected a Parquet file, found one that cannot be read: {' '.join(str(error).split())[:200]}") from None


def _checked(path: Path, place: str, row) -> dict:
    if not isinstance(row, dict):
        raise UserError(f"{path}, {place}: expected an object with columns, found {json.dumps(row, ensure_ascii=False)[:60]}")
    return row


def _stamp(source: Source, opened: Path | Dataset) -> tuple:
    """What tells this state of the source from others."""
    if isinstance(opened, Dataset):
        return (opened._fingerprint,)
    status = opened.stat()
    return (str(opened.resolve()), status.st_mtime_ns, status.st_size)


def _hash(key: tuple) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()[:16]
