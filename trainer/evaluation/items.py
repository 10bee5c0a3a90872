"""Read item files: questions with their right answers, checked before a model is loaded.

    metric         columns                                      right if
    exact          prompt, answer                               the generated text equals an answer
    regex          prompt, answer                               the pattern finds equal texts in both
    choice         prompt, choices, answer (index, text or      the likeliest choice is the answer
                   letter)
    rules          prompt, instruction_id_list, kwargs          the generated text keeps every rule, as in IFEval
    continuation   prompt, answer                               each token of the answer is the likeliest, as in LAMBADA
    logprob        messages, or prompt and answer, or text      none: its log-prob is measured

The prompt may also be in the column question or instruction (with input and system), the answer in answers (a list, each of which is
right), completion, output, target or response. `messages` replace the prompt, and the answer too if they end with an assistant turn. Other
columns are mapped: {prompt: stem, answer: key}. Choices may be beginnings, as in Winogrande: then the column continuation has what follows
each of them, whose log-prob is compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

from trainer.config import Source
from trainer.data.chat_columns import messages_of
from trainer.data.files import DataFile, stem
from trainer.data.formats import TEMPLATE_INPUTS, Format, look_up, read_inputs
from trainer.data.names import distinct
from trainer.data.sources import open_source, rows_of
from trainer.data.values import RecordError, as_text, is_given
from trainer.errors import UserError, one_line
from trainer.evaluation.config import Data, Items
from trainer.evaluation.rules.verdicts import Rule, make_rule, require_language
from trainer.evaluation.scoring import expected_answer
from trainer.evaluation.suites.table import Suite, expand
from trainer.patterns import bounded

COLUMNS = {
    "prompt": ("prompt", "question", "instruction"),
    "answer": ("answer", "answers", "completion", "output", "target", "response"),
    "choices": ("choices", "options"),
    "messages": ("messages", "conversations"),
    "text": ("text",),
    "rules": ("instruction_id_list", "rules"), "arguments": ("kwargs",), "continuation": ("continuation",),
    "input": ("input",), "system": ("system",), "id": ("id",),
    **{name: (name,) for name in TEMPLATE_INPUTS},
}

Role = Literal["general", "domain"]
Message = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """One question with its right answers, or one held-out text or chat whose log-prob is measured."""

    id: str
    place: str  # "gsm8k.jsonl, line 3"
    prompt: tuple[Message, ...] = ()  # the chat up to the question; none for held-out text
    answers: tuple[str, ...] = ()  # the right ones; the log-prob of the first is measured
    choices: tuple[str, ...] = ()
    continuation: str | None = None  # the text that is scored after each choice
    rules: tuple[Rule, ...] = ()
    chat: tuple[Message, ...] = ()  # a held-out chat
    text: str | None = None  # a held-out text
    inputs: dict = field(default_factory=dict, hash=False)  # what the template gets beside the chat: tools, documents, keywords

    @property
    def right_choice(self) -> int:
        """Return the index of the right choice, the first of equal ones."""
        return self.choices.index(self.answers[0])


@dataclass(frozen=True)
class ItemFile:
    """The items of one file, and the options to score them with."""

    name: str
    role: Role
    options: Items  # its metric and regex are the ones in use, never "auto"
    items: tuple[Item, ...]

    @property
    def metric(self) -> str:
        return self.options.metric


def read_files(data: Data) -> list[ItemFile]:
    """Read all item files, general ones first.

    Raises UserError, which names the file, the line and the remedy, if a file or one of its rows does not fit its metric.
    """
    files = []
    for role, entries in (("general", data.general), ("domain", data.domain)):
        for entry in [entries] if isinstance(entries, (str, Items)) else entries:
            options = Items(entry) if isinstance(entry, str) else entry
            files += [_read_file(suite, role, data) for suite in expand(options, data.suite_folder)]
    return [replace(file, name=name) for file, name in zip(files, distinct([file.name for file in files]))]


def _read_file(suite: Suite, role: Role, data: Data) -> ItemFile:
    options = replace(suite.items, regex=suite.items.regex or data.regex)
    rows = islice(_rows(suite), options.max_records)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{options.path}: expected items, found an empty file")
    columns = _find_columns(first[1], options)
    metric = options.metric if options.metric != "auto" else data.metric
    options = replace(options, metric=_infer_metric(columns, options) if metric == "auto" else metric)
    _check_columns(options, columns, first[1])
    items = []
    for place, row in (first, *rows):
        place = f"{options.path}, {place}"
        try:
            items.append(_parse_item(row, columns, options, place, len(items) + 1))
        except RecordError as error:
            raise UserError(f"{place}: {error}") from None
    return ItemFile(options.name or one_line(stem(options.path)), role, options, tuple(items))


def _rows(suite: Suite) -> Iterator[tuple[str, dict]]:
    """Yield place and row of each item. Raises UserError if a row is not of the suite."""
    options = suite.items
    for place, row in rows_of(open_source(Source(options.path, split=options.split, subset=options.subset))):
        try:
            yield place, suite.item(row)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{options.path}, {place}: expected a row of the suite {options.name}, found the columns {', '.join(row)}: "
                            f"{type(error).__name__} {error}") from None


def _find_columns(row: dict, options: Items) -> dict[str, str]:
    """Return our name -> the file's column for the columns of the first row.

    Raises UserError if `columns` maps an unknown name, or maps to a column that the file lacks.
    """
    mapped = options.columns or {}
    if unknown := [name for name in mapped if name not in COLUMNS]:
        raise UserError(f"{options.path}: columns: expected some of {', '.join(COLUMNS)}, found {', '.join(unknown)}")
    if absent := [path for path in mapped.values() if path not in row and look_up(row, path) is None]:
        raise UserError(f"{options.path}: columns: expected {', '.join(absent)} in the file, found the columns {', '.join(row)}")
    by_name = {ours: next((name for name in names if name in row), None) for ours, names in COLUMNS.items()}
    return {ours: column for ours, column in by_name.items() if column} | mapped


def _infer_metric(columns: dict[str, str], options: Items) -> str:
    if "choices" in columns:
        return "choice"
    if "rules" in columns:
        return "rules"
    if "answer" in columns:
        return "regex" if options.regex else "exact"
    return "logprob"


def _check_columns(options: Items, columns: dict[str, str], row: dict) -> None:
    """Check that the file has the columns and patterns of its metric; raise UserError if not."""
    def refuse(expected: str, remedy: str):
        found = ", ".join(row) or "none"
        raise UserError(f"{options.path}: metric {options.metric} expects {expected}, found the columns {found}; {remedy}")

    if options.metric == "logprob":
        if not {"messages", "text"} & set(columns) and not {"prompt", "answer"} <= set(columns):
            refuse("messages, text, or prompt and answer", "map them, as in columns: {text: body}")
        return
    needs_prompt = options.metric != "choice" or "continuation" not in columns
    if needs_prompt and not {"prompt", "messages"} & set(columns):
        refuse("a prompt or messages", "map it, as in columns: {prompt: stem}" + ("; or use metric logprob" if "text" in columns else ""))
    if options.metric == "choice" and "choices" not in columns:
        refuse("choices", "map them, as in columns: {choices: options}, or use metric exact")
    if options.metric == "rules":
        if "rules" not in columns:
            refuse("rules", "map them, as in columns: {rules: instruction_id_list, arguments: kwargs}")
        return
    if "answer" not in columns and (options.metric == "choice" or "messages" not in columns):
        refuse("answers", "map them, as in columns: {answer: solution}, or use metric logprob")
    if options.metric == "regex":
        for name in ("regex", "answer_regex"):
            _check_pattern(options.path, name, getattr(options, name))


def _check_pattern(path: str, name: str, pattern: str | None) -> None:
    if name == "answer_regex" and not pattern:
        return
    example = "such as '#### (-?[\\d,.]+)'"
    if not pattern:
        raise UserError(f"{path}: metric regex expects a pattern with a group, found none; set data.regex, {example}")
    with bounded(f"{path}: {name}", pattern):
        groups = re.compile(pattern).groups
    if not groups:
        raise UserError(f"{path}: {name}: expected a group in {pattern!r}, {example}, found none; put the answer's part in parentheses")


# ---------------------------------------------------------------- one row


def _parse_item(row: dict, columns: dict[str, str], options: Items, place: str, number: int) -> Item:
    """Return the item of one row. Raises RecordError if a value is missing or does not fit."""
    values = {ours: look_up(row, column) for ours, column in columns.items()}
    item = Item(str(values["id"]) if values.get("id") is not None else str(number), place, inputs=read_inputs(values, columns))
    if options.metric == "logprob":
        if "text" in columns and "messages" not in columns:
            return replace(item, text=Format("text", {"text": columns["text"]}).record(row)["text"])
        return replace(item, chat=tuple(_heldout_chat(values)))
    continuation = values.get("continuation") if options.metric == "choice" else None
    prompt, last_turn = _split_prompt(values) if continuation is None else ((), None)
    if options.metric == "rules":
        return replace(item, prompt=prompt, rules=_rules(values["rules"], values.get("arguments"), place))
    if options.metric == "choice":
        choices, answer = _choices(values["choices"]), values.get("answer")
        if DataFile(options.path).kind == ".csv":
            _check_csv_index(answer, choices)
        answers = (choices[_answer_index(answer, choices, values["choices"])],)
        return replace(item, prompt=prompt, choices=choices, continuation=continuation, answers=answers)
    answers = _answers(values.get("answer"), columns) if "answer" in columns else (last_turn,)
    if answers == (None,):
        raise RecordError("expected an answer: an assistant's turn at the end, or a column answer; found neither")
    if options.metric == "regex":
        _check_pattern_finds(answers, options)
    return replace(item, prompt=prompt, answers=answers)


def _split_prompt(values: dict[str, Any]) -> tuple[tuple[Message, ...], str | None]:
    """Return the prompt as a chat, and the answer if the chat ends with an assistant turn."""
    turns = _read_turns(values, None)
    if turns[-1]["role"] != "assistant":
        return tuple(turns), None
    if len(turns) == 1:
        raise RecordError("expected a question before the assistant's turn, found none")
    return tuple(turns[:-1]), turns[-1]["content"]


def _read_turns(values: dict[str, Any], answer: str | None) -> list[Message]:
    """Return the row's chat, with its system prompt, input and answer if it has them.

    The reader of training data checks it, and raises RecordError.
    """
    turns = messages_of(values.get("messages"), "messages")
    if turns is None:
        prompt, more = values.get("prompt"), values.get("input")
        if is_given(more) and is_given(prompt) and not isinstance(prompt, list):
            prompt = f"{as_text(prompt)}\n\n{as_text(more)}"
        turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if isinstance(turns, list) and answer is not None:
        turns = [*turns, {"role": "assistant", "content": answer}]
    row = {"messages": turns, "system": values.get("system")}
    record = Format("chat", {"messages": "messages", "system": "system"}).record(row)
    return [{"role": m["role"], "content": m["content"]} | (json.loads(m["extra"]) if m["extra"] else {}) for m in record["messages"]]


def _heldout_chat(values: dict[str, Any]) -> list[Message]:
    answer = values.get("answer") if values.get("messages") is None else None
    turns = _read_turns(values, answer[0] if isinstance(answer, list) and answer else answer)
    if not any(turn["role"] == "assistant" for turn in turns):
        raise RecordError("expected an assistant's turn, whose log-prob is measured, found none")
    return turns


def _answers(value: Any, columns: dict[str, str]) -> tuple[str, ...]:
    answers = value if isinstance(value, list) else [value]
    texts = [_as_text(answer) for answer in answers]
    if not texts or not all(texts):
        raise RecordError(f"expected an answer in column {columns['answer']}, found {'none' if value is None else repr(value)}")
    return tuple(texts)


def _as_text(value: Any) -> str:
    """Return a string as it is, a number or truth value as JSON writes it, and "" for anything else."""
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else str(value) if isinstance(value, (int, float)) else ""


def _choices(value: Any) -> tuple[str, ...]:
    """Return two or more texts, or raise RecordError.

    Two of them may be equal, as in one item of ARC: both are right if one is. The value is a list, JSON of a list (as in CSV), or
    {"text": [...], "label": [...]}, as in ARC.
    """
    value = value.get("text") if isinstance(value, dict) else value
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise RecordError(f'expected choices as a list, such as ["yes", "no"], found {value!r}') from None
    choices = tuple(_as_text(choice) for choice in value) if isinstance(value, list) else ()
    if len(choices) < 2:
        raise RecordError(f"expected two choices or more, found {len(choices)}")
    if not all(choices) or len(set(choices)) < 2:
        raise RecordError(f"expected two different choices or more, none of them empty, found {list(choices)!r}")
    return choices


def _answer_index(answer: Any, choices: tuple[str, ...], value: Any) -> int:
    """Return the index of the choice that an answer names, or raise RecordError.

    The answer is an index from 0, the choice's text, its label, or its letter (A is the first). `value` is the row's value of choices.
    """
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    labels = [str(label) for label in value.get("label") or ()] if isinstance(value, dict) else []
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices) and not labels:
        return answer
    text = _as_text(answer)
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


def _check_csv_index(answer: Any, choices: tuple[str, ...]) -> None:
    """Raise RecordError if an answer in CSV, which has no numbers, may mean a text or an index."""
    if answer in choices and answer.isdecimal() and int(answer) < len(choices) and choices.index(answer) != int(answer):
        letter = chr(ord("A") + choices.index(answer))
        raise RecordError(f"expected one meaning, but the answer {answer} is the text of one choice and the index of another; write the "
                          f"letter of the right one ({letter} for the text)")


def _rules(names: Any, arguments: Any, place: str) -> tuple[Rule, ...]:
    """Return the rules of a row, or raise RecordError. Without arguments no rule has any."""
    names = names if isinstance(names, list) else [names]
    arguments = [{}] * len(names) if arguments is None else arguments if isinstance(arguments, list) else [arguments]
    if not names or len(arguments) != len(names) or not all(isinstance(given, dict) for given in arguments):
        raise RecordError(f"expected one or more rules, and an object of arguments for each, found {len(names)} rules and "
                          f"{len(arguments)} of arguments")
    try:
        rules = tuple(make_rule(str(name), given) for name, given in zip(names, arguments))
    except ValueError as error:
        raise RecordError(str(error)) from None
    require_language(rules, place)
    return rules


def _check_pattern_finds(answers: tuple[str, ...], options: Items) -> None:
    pattern = options.answer_regex or options.regex
    for answer in answers:
        with bounded(f"{options.path}: {'answer_regex' if options.answer_regex else 'regex'}", pattern):
            found = expected_answer(answer, options)
        if found is None:
            raise RecordError(f"expected a match of the pattern {pattern!r} in the answer {answer[-60:]!r}, found none; "
                              'correct the pattern, or set answer_regex to one for answers ("" takes them as they are)')

