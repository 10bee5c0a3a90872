"""Read chats that a column holds in another form than a list of messages.

A CSV or Parquet file may have them as JSON text, and `datasets` stores a list of structs as a dict of lists.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from trainer.data.formats import Format, look_up
from trainer.data.values import RecordError

CHAT_FIELDS = ("messages", "conversations")  # of formats whose rows hold a whole chat
DICT_FIELDS = (*CHAT_FIELDS, "prompt", "completion")  # JSON here may be what is to be learnt


def record_of(row: dict, record_format: Format) -> dict:
    """Convert a row to a record, as `Format.record` does, from chats in any form. Raises RecordError."""
    for field in DICT_FIELDS:
        column = record_format.paths.get(field)
        value = look_up(row, column) if column else None
        if isinstance(value, dict) or isinstance(value, str) and field in CHAT_FIELDS:
            row = row | {column: messages_of(value, column)}
    return record_format.record(row)


def messages_of(value: Any, column: str) -> Any:
    """Return a chat as a list of messages, from JSON of one or from a dict of lists.

    Other values stay as they are. Raises RecordError for JSON that cannot be read, and for lists of different lengths.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RecordError(f"expected a list of messages, or JSON of one, in '{column}', found JSON that cannot be read: {error}; "
                              "write it with json.dumps") from None
    if isinstance(value, dict) and value and all(isinstance(values, list) for values in value.values()):
        if len(set(map(len, value.values()))) > 1:
            lengths = ", ".join(f"{key}: {len(values)}" for key, values in value.items())
            raise RecordError(f"expected lists of one length in '{column}', found {lengths}; correct or remove the record")
        return [_without_nulls(value, turn) for turn in zip(*value.values())]
    return value


def _without_nulls(keys: Iterable[str], turn: tuple) -> dict:
    """Return one message: a list holds null where a message lacks its key."""
    return {key: value for key, value in zip(keys, turn) if value is not None or key in ("content", "value")}
