"""Rows of a data file to records: {"messages": [{"role", "content", "extra"}, ...]} or {"text"}, id, source, weight.

    format              columns                                         becomes
    chat                messages: [{role, content}]                     itself
    sharegpt            conversations: [{from, value}], system?         the same turns; human is user, gpt is assistant
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
    """A row that is no record of its format: the reason, without the place."""


@dataclass(frozen=True)
class Format:
    """How to read rows: the format's name, and the path in a row of each field that the rows have."""

    name: str
    paths: dict[str, str]

    def record(self, row: dict) -> dict:
        """One record. RecordError: content missing, empty or no Unicode, an unknown role, a weight that is no positive number."""
        fields = {field: look_up(row, path) for field, path in self.paths.items()}
        kept = {field: None if fields.get(field) is None else str(fields[field]) for field in ("id", "source")}
        kept["weight"] = _weight(fields.get("weight"))
        if self.name == "text":
            return _unicode({"text": _text(fields["text"], self.paths["text"]), **kept})
        return _unicode({"messages": self._messages(fields), **kept})

    def _messages(self, fields: dict[str, Any]) -> list[dict]:
        def text(field: str) -> str:
            return _text(fields[field], self.paths[field])

        def turns(field: str, role: str) -> list[dict]:
            """The messages that a prompt or a completion is, or the one that it is the text of."""
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
    """The format `wanted`, or for "auto" the first whose columns `row` has, the first of the file.

    `columns`: ours -> the file's. ValueError says which columns were expected, which were found, and how to map them.
    """
    columns = columns or {}
    unknown = [field for field in columns if field not in FIELDS]
    if unknown:
        raise ValueError(f"columns: expected the names of fields ({', '.join(FIELDS)}), found {', '.join(unknown)}; "
                         "write {prompt: <column of the file>, completion: <column of the file>}")
    absent = [path for path in columns.values() if path not in row and look_up(row, path) is None]
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


def look_up(row: Any, path: str) -> Any:
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
    kept = json.dumps(extra, ensure_ascii=False, default=str) if extra else None
    return {"role": role, "content": content, "extra": kept}


def _text(value: Any, where: str) -> str:
    """`value` as text: a string, a number, a list of strings (paragraphs) or of text parts. RecordError: all else."""
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
    """`record`, unless a JSON escape in it stands for half a character, as in a text cut between \\ud83d and \\ude00."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise RecordError(f"expected Unicode text, found {half}, half of a surrogate pair; complete or remove the record") from None
    return record


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
