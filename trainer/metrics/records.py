"""Read the records of metrics.jsonl, whatever a kill or a bad disk has made of some lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAPPINGS = {("step", "seconds"), ("forgetting", "files")}  # kind and key of the entries that are figures by name


def read_records(path: Path) -> Iterator[dict | None]:
    """Yield the records of a file, and None in the place of lines that hold none.

    Records are dicts with `kind` and `step`. A file that does not exist has none.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in filter(bytes.strip, file):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # torn, not UTF-8, a number of thousands of digits, brackets a thousand deep
                record = None
            yield record if _is_record(record) else None


def _is_record(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str) or type(value.get("step")) is not int:
        return False
    if value["kind"] == "end" and type(value.get("steps")) is not int:
        return False
    return all(_fits(value["kind"], key, entry) for key, entry in value.items())


def _fits(kind: str, key: str, entry: Any) -> bool:
    """Return whether an entry of a record is of its type.

    It is text, figures by name, an interval, or one figure.
    """
    if key in ("kind", "reason"):
        return isinstance(entry, str)
    if (kind, key) in MAPPINGS:
        return isinstance(entry, dict) and all(map(_is_figure, entry.values()))
    if key.endswith("_interval"):
        return isinstance(entry, list) and len(entry) == 2 and all(map(_is_figure, entry))
    return _is_figure(entry)


def _is_figure(value: Any) -> bool:
    return value is None or isinstance(value, float) or isinstance(value, int) and abs(value) < 1 << 63
