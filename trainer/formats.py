"""Rows of a data file to records: {"messages": [{"role", "content", "extra"}, ...]} or {"text"}, with id, source and weight.

    format              columns                                         becomes
    chat                messages: [{role, content}]                     itself
    sharegpt            conversations: [{from, value}], system?         the same turns; human is user, gpt is assistant
    alpaca              instruction, output, input?, system?            user: instruction, blank line, input; assistant: output
    prompt_completion   prompt, completion, system?                     user, assistant; either may be a list of messages
    text                text                                            plain text, every token trained on

A column may be any of the file's, by mapping, and reach into nested values: {output: instances.0.output}.
Keys of a message other than role and content (tool_calls, name, reasoning_content) are kept as JSON in its `extra`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

REQUIRED = {
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
OPTIONAL = ("input", "system", "id", "source", "weight")
FIELDS = [field for fields in REQUIRED.values() for field in fields] + list(OPTIONAL)

ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "chatgpt": "assistant", "model": "assistant", "tool": "tool", "observation": "tool",
}


class RecordError(ValueError):
    """A row that is no record of its format: the reason, without the place."""


@dataclass(frozen=True)
class Format:
    """How to read rows: the format's name, and the path in a row of each field that the rows have."""

    name: str
    paths: dict[str, str]

    def record(self, row: dict) -> dict:
        """One record. RecordError if content is missing or empty, a role is unknown, or a weight is no positive number."""
        fields = {field: _look_up(row, path) for field, path in self.paths.items()}
        kept = {"id": _label(fields.get("id")), "source": _label(fields.get("source")), "weight": _weight(fields.get("weight"))}
        if self.name == "text":
            return {"text": _text(fields["text"], self.paths["text"]), **kept}
        return {"messages": self._messages(fields), **kept}

    def _messages(self, fields: dict[str, Any]) -> list[dict]:
        names = self.paths
        system = [_message("system", _text(fields["system"], names["system"]))] if fields.get("system") else []
        if self.name in ("chat", "sharegpt"):
            column, = REQUIRED[self.name]
            return system + _turns(fields[column], names[column])
        if self.name == "alpaca":
            question = _text(fields["instruction"], names["instruction"])
            if fields.get("input"):
                question += "\n\n" + _text(fields["input"], names["input"])
            return system + [_message("user", question), _message("assistant", _text(fields["output"], names["output"]))]
        return system + _turns_or_text("user", fields["prompt"], names["prompt"]) + _turns_or_text(
            "assistant", fields["completion"], names["completion"])


def choose_format(row: dict, wanted: str, columns: dict[str, str] | None) -> Format:
    """The format `wanted`, or for "auto" the first whose columns `row` (the first of the file) has. `columns`: ours -> the file's.

    ValueError says which columns were expected, which were found, and how to map them.
    """
    columns = columns or {}
    unknown = [field for field in columns if field not in FIELDS]
    if unknown:
        raise ValueError(f"columns: expected the names of fields ({', '.join(FIELDS)}), found {', '.join(unknown)}; "
                         "write {prompt: <column of the file>, completion: <column of the file>}")
    absent = [path for path in columns.values() if path not in row and _look_up(row, path) is None]
    if absent:
        raise ValueError(f"columns: expected {', '.join(absent)} in the file, found the columns {', '.join(row)}")
    paths = {field: columns.get(field, field) for field in FIELDS if field in columns or field in row}
    names = [wanted] if wanted != "auto" else sorted(REQUIRED, key=lambda name: not set(REQUIRED[name]) & set(columns))
    for name in names:
        if all(field in paths for field in REQUIRED[name]):
            # Optional columns may first appear in a later row.
            return Format(name, {field: field for field in OPTIONAL} | paths)
    expected = " or ".join("+".join(REQUIRED[name]) for name in (REQUIRED if wanted == "auto" else [wanted]))
    raise ValueError(f"expected the columns {expected}, found {', '.join(row) or 'none'}; "
                     "map them, as in columns: {prompt: question, completion: answer}")


def _look_up(row: Any, path: str) -> Any:
    """The value at a column, or at a dotted path of keys and list indices; None if there is none."""
    if isinstance(row, dict) and path in row:
        return row[path]
    for key in path.split("."):
        if isinstance(row, dict):
            row = row.get(key)
        elif isinstance(row, list) and key.isdigit() and int(key) < len(row):
            row = row[int(key)]
        else:
            return None
    return row


def _turns_or_text(role: str, value: Any, column: str) -> list[dict]:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return _turns(value, column)
    return [_message(role, _text(value, column))]


def _turns(value: Any, column: str) -> list[dict]:
    """A list of messages, in either spelling: role and content, or from and value."""
    if not isinstance(value, list) or not value:
        raise RecordError(f"expected a list of messages in '{column}', found {_show(value)}")
    turns = []
    for n, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise RecordError(f"turn {n}: expected a message with role and content, found {_show(message)}")
        spoken = message.get("role", message.get("from"))
        if not isinstance(spoken, str) or spoken.lower() not in ROLES:
            raise RecordError(f"turn {n}: expected a role ({', '.join(ROLES)}), found {_show(spoken)}")
        extra = {k: v for k, v in message.items() if k not in ("role", "content", "from", "value") and v is not None}
        content = message.get("content", message.get("value"))
        silent = extra.get("tool_calls") and not content
        turns.append(_message(ROLES[spoken.lower()], "" if silent else _text(content, f"turn {n}"), extra))
    return turns


def _message(role: str, content: str, extra: dict | None = None) -> dict:
    return {"role": role, "content": content, "extra": json.dumps(extra, ensure_ascii=False, default=str) if extra else None}


def _text(value: Any, where: str) -> str:
    """`value` as text: a string, a number, a list of strings (paragraphs) or of text parts. RecordError if empty or anything else."""
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        value = "\n\n".join(value)
    elif isinstance(value, list) and value and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        value = "".join(str(part.get("text") or "") for part in value)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if value is None or isinstance(value, str) and not value.strip():
        raise RecordError(f"{where}: expected text, found {'none' if value is None else 'an empty string'}; complete or remove the record")
    if not isinstance(value, str):
        raise RecordError(f"{where}: expected text, found {_show(value)}")
    return value


def _label(value: Any) -> str | None:
    return None if value is None else str(value)


def _weight(value: Any) -> float:
    """A sample's weight in the loss; 1 where it has none."""
    if value is None or value == "":
        return 1.0
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise RecordError(f"weight: expected a number above 0, found {_show(value)}")
    return weight


def _show(value: Any) -> str:
    """A short JSON-like picture of a value, for messages."""
    text = "none" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
