"""Read data files (JSON, JSON lines, CSV, Parquet) row by row, each with its place in the file."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from io import BufferedReader, BytesIO, TextIOWrapper
from itertools import chain
from typing import Any

import pyarrow
import pyarrow.parquet

from trainer.data.arrow_rows import without_padding
from trainer.data.files import DataFile, Unreadable
from trainer.errors import UserError, one_line

Row = tuple[str, dict]  # its place in the file ("line 7"), and its columns; where asked for, the error of a line that is no row


def read_rows(data_file: DataFile, skip_bad: bool = False) -> Iterator[Row]:
    """Yield the rows of a file. Raises UserError with the line that cannot be read.

    With `skip_bad`, the error of a line of JSON lines or CSV stands in its row's place, and reading goes on.
    """
    try:
        with data_file.open() as file:
            for place, row in READERS[data_file.kind](file, data_file.path):
                if isinstance(row, UserError) and not skip_bad:
                    raise row
                yield place, row
    except Unreadable as error:
        raise UserError(f"{data_file.path}: {error}") from None


def _json_lines(file: BufferedReader, path: str) -> Iterator[Row]:
    n = 0
    try:
        for n, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if n == 1 else line
            if line.strip():
                yield f"line {n}", _row_or_error(line.rstrip(), path, n)
    except Unreadable as error:
        raise UserError(f"{path}, after line {n}: {error}") from None


def _json(file: BufferedReader, path: str) -> Iterator[Row]:
    """Read a .json file.

    It holds an array of records, {"data": [...]}, an object of records by id, one record, or JSON lines.
    """
    text = file.read()
    if not text.strip():
        return
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _json_lines(BytesIO(text), path)
            return
        content = _parse(text, path)
    except (ValueError, RecursionError):
        content = _parse(text, path)
    for n, row in enumerate(_records(content), 1):
        yield f"record {n}", _columns(row, path, f"record {n}")


def _records(content: Any) -> list:
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        return content["data"]
    if isinstance(content, dict) and content and all(isinstance(value, dict) for value in content.values()):
        return [{"id": key} | value for key, value in content.items()]
    return content if isinstance(content, list) else [content]


def _parse(text: bytes, path: str, line: int = 1) -> Any:
    """Parse JSON that begins at `line` of the file. Raises UserError with the line of the mistake."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place, reason = line + error.lineno - 1, f"malformed JSON: {error.msg} at column {error.colno}"
        raise UserError(f"{path}, line {place}: expected one JSON object, found {reason}; correct it") from None
    except UnicodeDecodeError as error:
        place, byte = line + text[:error.start].count(b"\n"), text[error.start]
        raise UserError(f"{path}, line {place}: expected UTF-8 text, found byte {byte:#x}; convert the file") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets a thousand deep
        raise UserError(f"{path}, line {line}: expected one JSON object, found JSON that cannot be read: {error}; correct it") from None


def _row_or_error(line: bytes, path: str, n: int) -> dict | UserError:
    try:
        return _columns(_parse(line, path, n), path, f"line {n}")
    except UserError as error:
        return error


def _columns(row: Any, path: str, place: str) -> dict:
    if not isinstance(row, dict):
        found = json.dumps(row, ensure_ascii=False)[:60]
        raise UserError(f"{path}, {place}: expected an object with columns, found {found}; "
                        'write each record as {"column": value, ...}')
    return row


def _csv(file: BufferedReader, path: str) -> Iterator[Row]:
    """Read comma-separated values, all as strings."""
    csv.field_size_limit(2**31 - 1)
    with TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
        try:
            names = next(reader, [])
            if duplicates := [name for name in names if names.count(name) > 1]:
                raise UserError(f"{path}, line 1: expected columns of different names, found '{duplicates[0]}' more than once; rename one")
            for values in filter(None, reader):
                place = f"line {reader.line_num}"
                fits = len(values) == len(names)
                yield place, dict(zip(names, values)) if fits else UserError(
                    f"{path}, {place}: expected {len(names)} values, found {len(values)}; put quotes around values that hold commas")
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: expected comma-separated values, found {error}; "
                            "check the quotes") from None
        except UnicodeDecodeError:
            raise UserError(f"{path}, after line {reader.line_num}: expected UTF-8 text; convert the file") from None
        except Unreadable as error:
            raise UserError(f"{path}, after line {reader.line_num}: {error}") from None


def _parquet(file: BufferedReader, path: str) -> Iterator[Row]:
    try:
        with pyarrow.parquet.ParquetFile(file if file.seekable() else pyarrow.py_buffer(file.read())) as table:
            batches = (batch.to_pylist() for batch in table.iter_batches(1000))
            for n, row in enumerate(chain.from_iterable(batches), 1):
                yield f"record {n}", without_padding(row, table.schema_arrow)
    except (pyarrow.ArrowException, OSError) as error:  # Arrow raises either for a damaged file
        raise UserError(f"{path}: expected a Parquet file, found one that cannot be read: {one_line(str(error))}; "
                        "copy or download it again") from None


READERS = {".json": _json, ".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}  # by kind
