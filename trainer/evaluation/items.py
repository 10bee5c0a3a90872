"""Item files to items: what is asked, and what is right. All that is wrong with a file is said before a model is loaded.

    metric     columns                                          right
    exact      prompt, answer                                   what is generated equals an answer
    regex      prompt, answer                                   what the pattern finds in both is equal
    choice     prompt, choices, answer (index, text, letter)    the likeliest choice is the answer
    logprob    messages, or prompt and answer, or text          nothing: its log-prob is the measure

A prompt may also be the column question or instruction (with input and system); an answer the column answers (a list of which each is
right), completion, output, target or response. `messages` stand for a prompt, and for the answer too where they end with the assistant's
turn. Any other column by mapping: {prompt: stem, answer: key}.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from trainer.config import Source
from trainer.data.formats import Format, RecordError, look_up
from trainer.data.sources import open_source, rows_of
from trainer.errors import UserError
from trainer.evaluation.config import Data, Items
from trainer.evaluation.scoring import reference

COLUMNS = {
    "prompt": ("prompt", "question", "instruction"),
    "answer": ("answer", "answers", "completion", "output", "target", "response"),
    "choices": ("choices", "options"),
    "messages": ("messages", "conversations"),
    "text": ("text",),
    "input": ("input",), "system": ("system",), "id": ("id",),
}

Role = Literal["general", "domain"]
Message = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """One question with its right answers, or a text to be likely."""

    id: str
    place: str  # "gsm8k.jsonl, line 3"
    prompt: tuple[Message, ...] = ()  # the chat up to what is asked; none for held-out text
    answers: tuple[str, ...] = ()  # the right ones; the first is the one whose log-prob is measured
    choices: tuple[str, ...] = ()
    chat: tuple[Message, ...] = ()  # a held-out chat
    text: str | None = None  # a held-out text

    @property
    def right(self) -> int:
        """The index of the right choice."""
        return self.choices.index(self.answers[0])


@dataclass(frozen=True)
class ItemFile:
    """The items of one file, and how they are scored."""

    name: str
    role: Role
    settings: Items  # with the metric and regex that hold
    items: tuple[Item, ...]

    @property
    def metric(self) -> str:
        return self.settings.metric


def read_files(data: Data) -> list[ItemFile]:
    """All item files, general ones first. UserError names the file, line and remedy."""
    files = []
    for role, given in (("general", data.general), ("domain", data.domain)):
        for entry in [given] if isinstance(given, (str, Items)) else given:
            settings = Items(entry) if isinstance(entry, str) else entry
            files.append(_read(settings, role, data))
    return [replace(file, name=name) for file, name in zip(files, _distinct([file.name for file in files]))]


def _distinct(names: list[str]) -> list[str]:
    """The names, a number added to those that came before."""
    return [name if name not in names[:i] else f"{name} ({names[:i].count(name) + 1})" for i, name in enumerate(names)]


def _read(settings: Items, role: Role, data: Data) -> ItemFile:
    settings = replace(settings, regex=settings.regex or data.regex)
    source = Source(settings.path, split=settings.split, subset=settings.subset)
    rows = islice(rows_of(open_source(source)), settings.max_records)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{settings.path}: expected items, found an empty file")
    columns = _find_columns(first[1], settings)
    metric = settings.metric if settings.metric != "auto" else data.metric
    settings = replace(settings, metric=_auto_metric(columns, settings) if metric == "auto" else metric)
    _check(settings, columns, first[1])
    items = []
    for place, row in (first, *rows):
        place = f"{settings.path}, {place}"
        try:
            items.append(_item(row, columns, settings, place, len(items) + 1))
        except RecordError as error:
            raise UserError(f"{place}: {error}") from None
    return ItemFile(settings.name or Path(settings.path).stem, role, settings, tuple(items))


def _find_columns(row: dict, settings: Items) -> dict[str, str]:
    """Our name -> the file's column, of what the first row has. UserError for a mapping that names what is not there."""
    mapped = settings.columns or {}
    if unknown := [name for name in mapped if name not in COLUMNS]:
        raise UserError(f"{settings.path}: columns: expected some of {', '.join(COLUMNS)}, found {', '.join(unknown)}")
    if absent := [path for path in mapped.values() if path not in row and look_up(row, path) is None]:
        raise UserError(f"{settings.path}: columns: expected {', '.join(absent)} in the file, found the columns {', '.join(row)}")
    there = {ours: next((name for name in names if name in row), None) for ours, names in COLUMNS.items()}
    return {ours: column for ours, column in there.items() if column} | mapped


def _auto_metric(columns: dict[str, str], settings: Items) -> str:
    if "choices" in columns:
        return "choice"
    if "answer" in columns:
        return "regex" if settings.regex else "exact"
    return "logprob"


def _check(settings: Items, columns: dict[str, str], row: dict) -> None:
    """UserError unless the metric fits the file's columns."""
    def refuse(expected: str, remedy: str):
        found = ", ".join(row) or "none"
        raise UserError(f"{settings.path}: metric {settings.metric} expects {expected}, found the columns {found}; {remedy}")

    if settings.metric == "logprob":
        if not {"messages", "text"} & set(columns) and not {"prompt", "answer"} <= set(columns):
            refuse("messages, text, or prompt and answer", "map them, as in columns: {text: body}")
        return
    if not {"prompt", "messages"} & set(columns):
        refuse("a prompt or messages", "map it, as in columns: {prompt: stem}" + ("; or use metric logprob" if "text" in columns else ""))
    if settings.metric == "choice" and "choices" not in columns:
        refuse("choices", "map them, as in columns: {choices: options}, or use metric exact")
    if "answer" not in columns and (settings.metric == "choice" or "messages" not in columns):
        refuse("answers", "map them, as in columns: {answer: solution}, or use metric logprob")
    if settings.metric == "regex":
        for name in ("regex", "answer_regex"):
            _check_pattern(settings.path, name, getattr(settings, name))


def _check_pattern(path: str, name: str, pattern: str | None) -> None:
    if name == "answer_regex" and not pattern:
        return
    example = "such as '#### (-?[\\d,.]+)'"
    if not pattern:
        raise UserError(f"{path}: metric regex expects a pattern with a group, found none; set data.regex, {example}")
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise UserError(f"{path}: {name}: {pattern!r} is not a regular expression: {error}") from None
    if not groups:
        raise UserError(f"{path}: {name}: expected a group in {pattern!r}, {example}, found none; put the answer's part in parentheses")


# ---------------------------------------------------------------- one row


def _item(row: dict, columns: dict[str, str], settings: Items, place: str, number: int) -> Item:
    """The item of one row. RecordError says what is missing or unfit in it."""
    found = {ours: look_up(row, column) for ours, column in columns.items()}
    item = Item(str(found["id"]) if found.get("id") is not None else str(number), place)
    if settings.metric == "logprob":
        if "text" in columns and "messages" not in columns:
            return replace(item, text=Format("text", {"text": columns["text"]}).record(row)["text"])
        return replace(item, chat=tuple(_heldout_chat(found)))
    prompt, last = _prompt(found)
    if settings.metric == "choice":
        choices, answer = _choices(found["choices"]), found.get("answer")
        if settings.path.endswith(".csv"):
            _check_index(answer, choices)
        return replace(item, prompt=prompt, choices=choices, answers=(choices[_right(answer, choices, found["choices"])],))
    answers = _answers(found.get("answer"), columns) if "answer" in columns else (last,)
    if answers == (None,):
        raise RecordError("expected an answer: an assistant's turn at the end, or a column answer; found neither")
    if settings.metric == "regex":
        _check_extracts(answers, settings)
    return replace(item, prompt=prompt, answers=answers)


def _prompt(found: dict[str, Any]) -> tuple[tuple[Message, ...], str | None]:
    """What is asked, as a chat, and the assistant's answer where the chat ends with one."""
    turns = _turns(found, None)
    if turns[-1]["role"] != "assistant":
        return tuple(turns), None
    if len(turns) == 1:
        raise RecordError("expected a question before the assistant's turn, found none")
    return tuple(turns[:-1]), turns[-1]["content"]


def _turns(found: dict[str, Any], answer: str | None) -> list[Message]:
    """The row's chat, with system prompt, input and answer where it has them, checked by the reader of training data."""
    turns = found.get("messages")
    if turns is None:
        more = found.get("input")
        asked = found.get("prompt")
        turns = asked if isinstance(asked, list) else [{"role": "user", "content": f"{asked}\n\n{more}" if asked and more else asked}]
    if isinstance(turns, list) and answer is not None:
        turns = [*turns, {"role": "assistant", "content": answer}]
    row = {"messages": turns, "system": found.get("system")}
    record = Format("chat", {"messages": "messages", "system": "system"}).record(row)
    return [{"role": m["role"], "content": m["content"]} | (json.loads(m["extra"]) if m["extra"] else {}) for m in record["messages"]]


def _heldout_chat(found: dict[str, Any]) -> list[Message]:
    answer = found.get("answer") if found.get("messages") is None else None
    turns = _turns(found, answer[0] if isinstance(answer, list) and answer else answer)
    if not any(turn["role"] == "assistant" for turn in turns):
        raise RecordError("expected an assistant's turn, whose log-prob is measured, found none")
    return turns


def _answers(value: Any, columns: dict[str, str]) -> tuple[str, ...]:
    answers = value if isinstance(value, list) else [value]
    texts = [_plain(answer) for answer in answers]
    if not texts or not all(texts):
        raise RecordError(f"expected an answer in column {columns['answer']}, found {'none' if value is None else repr(value)}")
    return tuple(texts)


def _plain(value: Any) -> str:
    """A string as it is, a number as it is written; anything else is no text."""
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else str(value) if isinstance(value, (int, float)) else ""


def _choices(value: Any) -> tuple[str, ...]:
    """Two or more different texts: a list, JSON of one (as in CSV), or {"text": [...], "label": [...]} as ARC has them."""
    value = value.get("text") if isinstance(value, dict) else value
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise RecordError(f'expected choices as a list, such as ["yes", "no"], found {value!r}') from None
    choices = tuple(_plain(choice) for choice in value) if isinstance(value, list) else ()
    if len(choices) < 2:
        raise RecordError(f"expected two choices or more, found {len(choices)}")
    if not all(choices) or len(set(choices)) < len(choices):
        raise RecordError(f"expected choices that are different texts, found {list(choices)!r}")
    return choices


def _right(answer: Any, choices: tuple[str, ...], given: Any) -> int:
    """The index that an answer means: an index from 0, a choice's text, its label, or its letter (A is the first)."""
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    labels = [str(label) for label in given.get("label") or ()] if isinstance(given, dict) else []
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices) and not labels:
        return answer
    text = _plain(answer)
    if not text:
        raise RecordError(f"expected an answer: an index from 0, or the text or letter of a choice; found {answer!r}")
    if text in choices:
        return choices.index(text)
    if text in labels:
        return labels.index(text)
    if text.isdecimal() and int(text) < len(choices) and not labels:
        return int(text)
    letter = ord(text.upper()) - ord("A") if len(text) == 1 else -1
    if not 0 <= letter < len(choices):
        raise RecordError(f"expected the answer among the choices {list(choices)!r}, found {answer!r}")
    return letter


def _check_index(answer: Any, choices: tuple[str, ...]) -> None:
    """In CSV nothing tells a number from its text. RecordError where that matters."""
    if answer in choices and answer.isdecimal() and int(answer) < len(choices) and choices.index(answer) != int(answer):
        letter = chr(ord("A") + choices.index(answer))
        raise RecordError(f"the answer {answer} is the text of one choice and the index of another; write the letter of the one that is "
                          f"meant ({letter} for the text)")


def _check_extracts(answers: tuple[str, ...], settings: Items) -> None:
    for answer in answers:
        if reference(answer, settings) is None:
            pattern = settings.answer_regex or settings.regex
            raise RecordError(f"the pattern {pattern!r} finds nothing in the answer {answer[-60:]!r}; "
                              'mend it, or set answer_regex to one for answers ("" takes them as they stand)')

