"""Remove the nulls that Arrow puts into rows.

A column of objects has one set of keys in Arrow: every row has all of them, with null where it had none. A null that a file's author
wrote cannot be told from those, so it goes too; nulls in lists are the author's, and stay.
"""

from __future__ import annotations

from typing import Any

import pyarrow


def without_padding(row: dict, schema: pyarrow.Schema) -> dict:
    """Return a row without the keys that are null inside its columns' objects, at every depth."""
    return {name: _strip(value, schema.field(name).type) for name, value in row.items()}


def _strip(value: Any, kind: pyarrow.DataType) -> Any:
    if value is None:
        return None
    if pyarrow.types.is_struct(kind) and isinstance(value, dict):
        return {key: _strip(inner, kind.field(key).type) for key, inner in value.items() if inner is not None}
    if pyarrow.types.is_map(kind):
        return {key: _strip(inner, kind.item_type) for key, inner in (value.items() if isinstance(value, dict) else value)}
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_strip(inner, kind.value_type) for inner in value]
    return value
