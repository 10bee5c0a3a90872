"""Read values of data files as text, numbers, or the JSON inside a string, and show them in errors."""

from __future__ import annotations

import json
import math
from typing import Any


class RecordError(ValueError):
    """The reason, without its place, why a row is no record of its format."""


def is_given(value: Any) -> bool:
    """Return whether a column holds something: 0 and false do; null, blank text and empty lists do not."""
    return bool(value.strip()) if isinstance(value, str) else value is not None and value not in ([], {})


def as_text(value: Any, where: str = "") -> str:
    """Convert a string, number, truth value, list of strings (paragraphs) or of text parts to text.

    Raises RecordError, which begins with `where`, for other values, and for text without words.
    """
    where = f"{where}: " if where else ""
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        value = "\n\n".join(value)
    elif is_parts(value):
        value = join_parts(value)
    elif isinstance(value, (int, float)):
        value = json.dumps(value) if isinstance(value, bool) else str(value)
    if value is None or isinstance(value, str) and not value.strip():
        found = "none" if value is None else "an empty string"
        raise RecordError(f"{where}expected text, found {found}; complete or remove the record")
    if not isinstance(value, str):
        raise RecordError(f"{where}expected text, found {show(value)}")
    return value


def is_parts(value: Any) -> bool:
    """Return whether a value is a list of text parts: {"type": "text", "text": ...}."""
    return isinstance(value, list) and bool(value) and all(
        isinstance(part, dict) and part.get("type") in ("text", "input_text", "output_text") for part in value)


def join_parts(parts: list[dict]) -> str:
    return "".join(str(part.get("text") or "") for part in parts)


def read_json(value: Any) -> Any:
    """Return what a string of JSON holds, also where it was encoded twice.

    Any other value, or other text, is returned as it is.
    """
    while isinstance(value, str) and value.strip():
        try:
            inner = json.loads(value)
        except (ValueError, RecursionError):
            return value
        if not isinstance(inner, (str, dict, list, type(None))):
            return value
        value = inner
    return value


LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6  # but 0


def as_weight(value: Any, what: str, lowest: str = "a number above 0") -> float:
    """Return a weight that sums of fp32 keep.

    Raises RecordError for anything else, and for 0 where `lowest` does not name it.
    """
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not weight >= 0 or weight == 0 and "0 or more" not in lowest:
        raise RecordError(f"{what}: expected {lowest}, found {show(value)}; correct or remove it")
    if weight and not LEAST_WEIGHT <= weight <= MOST_WEIGHT:
        raise RecordError(f"{what}: expected a weight from {LEAST_WEIGHT:,g} to {MOST_WEIGHT:,.0f}, found {show(value)}; scale the weights")
    return weight


def show(value: Any) -> str:
    """Return a value as JSON of at most 60 characters, for error messages."""
    text = "none" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
