"""Convert the rows of data files to records.

A record is {"messages": [...]} (trainer/data/messages.py) or {"text": ...}, with id, source and weight; `inputs`, as JSON, holds what its
chat template gets beside the messages; `unread` names the columns that nothing reads.

    format              columns                                         becomes
    chat                messages: [{role, content}]                     itself
    sharegpt            conversations: [{from, value}], system?         these turns; human is user, gpt is assistant
    alpaca              instruction, output, input?, system?            user: instruction, input; assistant: output
    prompt_completion   prompt, completion, system?                     user, assistant; or messages themselves
    text                text                                            plain text, every token trained on

All but text may have tools, documents and chat_template_kwargs, as objects or as their JSON text, and lists of turns' weights.
A column may be any of the file's, by mapping, and reach into nested values: {output: instances.0.output}.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trainer.data.messages import make_message, read_messages
from trainer.data.tool_calls import read_tools
from trainer.data.turn_weights import row_flags
from trainer.data.values import RecordError, as_text, as_weight, is_given, read_json, show

REQUIRED = {
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
COMMON = ("id", "source", "weight")
TEMPLATE_INPUTS = ("tools", "functions", "documents", "chat_template_kwargs")
OPTIONAL = ("input", "system", *TEMPLATE_INPUTS, *COMMON)
FIELDS = [field for fields in REQUIRED.values() for field in fields] + list(OPTIONAL)
# Of `apply_chat_template`, or of the template's own messages: no keywords of a row.
RESERVED = {"messages", "conversation", "conversations", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
            "return_assistant_tokens_mask", "tools", "documents"}


@dataclass(frozen=True)
class Format:
    """The format of a file's rows."""

    name: str
    paths: dict[str, str]  # of each field in a row: a column, or a dotted path into one

    @cached_property
    def read_paths(self) -> dict[str, str]:
        """Return the paths of the fields that this format reads."""
        of_chats = () if self.name == "text" else ("system", *TEMPLATE_INPUTS, *(["input"] if self.name == "alpaca" else []))
        return {field: self.paths[field] for field in (*REQUIRED[self.name], *of_chats, *COMMON) if field in self.paths}

    def record(self, row: dict) -> dict:
        """Convert a row to a record.

        Raises RecordError if content is missing, empty or no Unicode, a role is unknown, flags contradict, tool calls or tools are no
        objects, or the weight is no positive number.
        """
        paths, columns = self.read_paths, self._columns
        fields = {field: look_up(row, path) for field, path in paths.items()}
        if fields.get("documents") is not None and not _documents(fields["documents"]):
            paths = {field: path for field, path in paths.items() if field != "documents"}
            columns = _columns_of(paths)
        flags = {} if self.name == "text" else row_flags(row, [path for field, path in paths.items() if field != "weight"])
        weight = None if paths.get("weight") in flags else fields.get("weight")
        common = {field: None if fields.get(field) is None else str(fields[field]) for field in ("id", "source")}
        common["weight"] = as_weight(weight, "weight") if is_given(weight) else 1.0
        unread = [column for column, value in row.items() if column not in columns and column not in flags and is_given(value)]
        common["unread"] = ", ".join(unread) or None
        if self.name == "text":
            return _unicode({"text": as_text(fields["text"], self.paths["text"]), **common})
        inputs = read_inputs(fields, paths)
        common["inputs"] = json.dumps(inputs, ensure_ascii=False, default=str) if inputs else None
        return _unicode({"messages": self._messages(fields, flags), **common})

    @cached_property
    def _columns(self) -> set[str]:
        return _columns_of(self.read_paths)

    def _messages(self, fields: dict[str, Any], flags: dict[str, Any]) -> list[dict]:
        def text(field: str) -> str:
            return as_text(fields[field], self.paths[field])

        def turns(field: str, role: str) -> list:
            """Return the messages in a prompt or completion: a list of them, or one with its text."""
            value = fields[field]
            first = value[0] if isinstance(value, list) and value else None
            is_chat = isinstance(first, dict) and first.get("type") != "text"
            return value if is_chat else [make_message(role, text(field))]

        system = [make_message("system", text("system"))] if is_given(fields.get("system")) else []
        if self.name in ("chat", "sharegpt"):
            column, = REQUIRED[self.name]
            return system + read_messages(fields[column], self.paths[column], flags)
        if self.name == "alpaca":
            question = text("instruction") + ("\n\n" + text("input") if is_given(fields.get("input")) else "")
            return system + read_messages([make_message("user", question), make_message("assistant", text("output"))], "output", flags)
        both = [*turns("prompt", "user"), *turns("completion", "assistant")]
        return system + read_messages(both, self.paths["completion"], flags)


def read_inputs(fields: dict[str, Any], paths: dict[str, str]) -> dict:
    """Return what the template gets beside the messages: tools, documents and the row's keywords.

    `paths` are the columns of the fields, for errors. Raises RecordError for values that are none.
    """
    given = {field: fields.get(field) for field in TEMPLATE_INPUTS}
    if not any(map(is_given, given.values())):
        return {}
    keywords = read_json(given["chat_template_kwargs"])
    keywords = keywords if is_given(keywords) else {}
    if not isinstance(keywords, dict):
        raise RecordError(f"{paths['chat_template_kwargs']}: expected an object of keywords, found {show(keywords)}; correct it")
    inputs = dict(keywords)
    if reserved := sorted(RESERVED & inputs.keys()):
        raise RecordError(f"{paths['chat_template_kwargs']}: expected keywords of the template, found {reserved[0]}; remove it")
    if documents := _documents(given["documents"]):
        inputs["documents"] = documents
    name = "tools" if is_given(given["tools"]) else "functions"
    tools = read_tools(given[name], paths.get(name, name))
    return inputs | ({"tools": tools} if tools else {})


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
                     "map them where the file is named: [{path: FILE, columns: {prompt: question, completion: answer}}]")


def look_up(row: Any, path: str) -> Any:
    """Return the value at a column, or at a dotted path of keys and list indices; None if there is none."""
    if isinstance(row, dict) and (path in row or "." not in path):
        return row.get(path)
    for key in path.split("."):
        if isinstance(row, dict):
            row = row.get(key)
        elif isinstance(row, list) and key.isdigit() and int(key) < len(row):
            row = row[int(key)]
        else:
            return None
    return row


def _documents(value: Any) -> list[dict] | None:
    """Return the documents in a list of objects or texts, or its JSON text; None for any other value."""
    documents = read_json(value)
    if not (is_given(documents) and isinstance(documents, list) and all(isinstance(part, (dict, str)) for part in documents)):
        return None
    return [{"text": part} if isinstance(part, str) else part for part in documents]


def _columns_of(paths: dict[str, str]) -> set[str]:
    """Return the columns that paths reach into."""
    return {*paths.values(), *(path.partition(".")[0] for path in paths.values())}


def _unicode(record: dict) -> dict:
    """Return the record, or raise RecordError if it holds half a surrogate pair (a JSON escape \\ud83d)."""
    try:
        for part in (*record.get("messages", ()), record):
            for text in part.values():
                if isinstance(text, str):
                    text.encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise RecordError(f"expected Unicode text, found {half}, half of a surrogate pair; complete or remove the record") from None
    return record
