"""Convert the rows of data files to records.

A record is {"messages": [{"role", "content", "extra"}, ...]} or {"text": ...}, with id, source and weight.

    format              columns                                         becomes
    chat                messages: [{role, content}]                     itself
    sharegpt            conversations: [{from, value}], system?         these turns; human is user, gpt is assistant
    alpaca              instruction, output, input?, system?            user: instruction, input; assistant: output
    prompt_completion   prompt, completion, system?                     user, assistant; or messages themselves
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
    "system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "tool": "tool", "observation": "tool",
}


class RecordError(ValueError):
    """The reason, without its place, why a row is no record of its format."""


@dataclass(frozen=True)
class Format:
    """The format of a file's rows."""

    name: str
    paths: dict[str, str]  # of each field in a row: a column, or a dotted path into one

    def record(self, row: dict) -> dict:
        """Convert a row to a record.

        Raises RecordError if content is missing, empty or no Unicode, a role is unknown, or the weight is no positive number.
        """
        fields = {field: look_up(row, path) for field, path in self.paths.items()}
        common = {field: None if fields.get(field) is None else str(fields[field]) for field in ("id", "source")}
        common["weight"] = _weight(fields.get("weight"))
        if self.name == "text":
            return _unicode({"text": _text(fields["text"], self.paths["text"]), **common})
        return _unicode({"messages": self._messages(fields), **common})

    def _messages(self, fields: dict[str, Any]) -> list[dict]:
        def text(field: str) -> str:
            return _text(fields[field], self.paths[field])

        def turns(field: str, role: str) -> list[dict]:
            """Return the messages in a prompt or completion: a list of them, or one with its text."""
            value = fields[field]
            first = value[0] if isinstance(value, list) and value else None
            is_chat = isinstance(first, dict) and first.get("type") != "text"
            return _turns(value, self.paths[field]) if is_chat else [_message(role, text(field))]

        system = [_message("system", text("system"))] if fields.get("system") else []
        if self.name in ("chat", "sharegpt"):
            column, = REQUIRED[self.name]
            return system + _turns(fields[column], self.paths[column])
        if self.name == "alpaca":
            question = text("instruction") + ("\n\n" + text("input") if fields.get("input") else "")
            return system + [_message("user", question), _message("assistant", text("output"))]
        return system + turns("prompt", "user") + turns("completion", "assistant")


def choose_format(row: dict, wanted: str, columns: dict[str, str] | None) -> Format:
    """Return the format `wanted`, or for "auto" the first format whose columns the file's first row has.

    `columns` maps our fields to the file's columns. Raises ValueError with the columns that were expected, those that were found,
    and how to map them.
    """
    columns = columns or {}
    unknown = [field for field in columns if field not in FIELDS]
    if unknown:
        raise ValueError(f"columns: expected the names of fields ({', '.join(FIELDS)}), found {', '.join(unknown)}; "
                         "write {prompt: <column of the file>, completion: <column of the file>}")
    missing = [path for path in columns.values() if path not in row and look_up(row, path) is None]
    if missing:
        raise ValueError(f"columns: expected {', '.join(missing)} in the file, found the columns {', '.join(row)}; "
                         "map fields to these")
    paths = {field: columns.get(field, field) for field in FIELDS if field in columns or field in row}
    names = [wanted] if wanted != "auto" else sorted(REQUIRED, key=lambda name: not set(REQUIRED[name]) & set(columns))
    for name in names:
        if all(field in paths for field in REQUIRED[name]):
            # Optional columns may first appear in a later row.
            return Format(name, {field: field for field in OPTIONAL} | paths)
    expected = " or ".join("+".join(REQUIRED[name]) for name in (REQUIRED if wanted == "auto" else [wanted]))
    raise ValueError(f"expected the columns {expected}, found {', '.join(row) or 'none'}; "
                     "map them, as in columns: {prompt: question, completion: answer}")


def look_up(row: Any, path: str) -> Any:
    """Return the value at a column, or at a dotted path of keys and list indices; None if there is none."""
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


def _turns(value: Any, column: str) -> list[dict]:
    """Convert a list of messages, spelled role and content, or from and value."""
    if not isinstance(value, list) or not value:
        raise RecordError(f"expected a list of messages in '{column}', found {_show(value)}")
    turns = []
    for n, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise RecordError(f"turn {n}: expected a message with role and content, found {_show(message)}")
        role = message.get("role", message.get("from"))
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise RecordError(f"turn {n}: expected a role ({', '.join(ROLES)}), found {_show(role)}")
        extra = {k: v for k, v in message.items() if k not in ("role", "content", "from", "value") and v is not None}
        content = message.get("content", message.get("value"))
        only_calls = extra.get("tool_calls") and not content
        turns.append(_message(ROLES[role.lower()], "" if only_calls else _text(content, f"turn {n}"), extra))
    return turns


def _message(role: str, content: str, extra: dict | None = None) -> dict:
    extra_json = json.dumps(extra, ensure_ascii=False, default=str) if extra else None
    return {"role": role, "content": content, "extra": extra_json}


def _text(value: Any, where: str) -> str:
    """Convert a string, a number, a list of strings (paragraphs) or of text parts to text.

    Raises RecordError for other values, and for text without words.
    """
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        value = "\n\n".join(value)
    elif isinstance(value, list) and value and all(
            isinstance(part, dict) and part.get("type") == "text" for part in value):
        value = "".join(str(part.get("text") or "") for part in value)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if value is None or isinstance(value, str) and not value.strip():
        found = "none" if value is None else "an empty string"
        raise RecordError(f"{where}: expected text, found {found}; complete or remove the record")
    if not isinstance(value, str):
        raise RecordError(f"{where}: expected text, found {_show(value)}")
    return value


def _unicode(record: dict) -> dict:
    """Return the record, or raise RecordError if it holds half a surrogate pair (a JSON escape \\ud83d)."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise RecordError(f"expected Unicode text, found {half}, half of a surrogate pair; complete or remove the record") from None
    return record


def _weight(value: Any) -> float:
    """Return a sample's weight in the loss; 1 if the row has none."""
    if value is None or value == "":
        return 1.0
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise RecordError(f"weight: expected a number above 0, found {_show(value)}; correct or remove it")
    return weight


def _show(value: Any) -> str:
    """Return a value as JSON of at most 60 characters, for error messages."""
    text = "none" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
