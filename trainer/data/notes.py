"""Note, for each record, what a user should know of how it became tokens.

The notes of a source are summarized in a few lines.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow
import pyarrow.compute

from trainer.config import Data
from trainer.data.chat_template import EMPTY_REASONING, ChatTemplate, Rendered
from trainer.data.turn_spans import Message
from trainer.data.values import is_given

# Keys of a message that are looked after elsewhere, or that only tie a tool's result to its call.
KNOWN_KEYS = {"role", "content", "tool_calls", "reasoning_content", "id", "tool_call_id", "index", "name"}
NAMED = 5  # refused rows that are named


class Note(NamedTuple):
    """Hold what is worth telling of one record; counts are of turns."""

    refused: str | None = None  # its place, and why it is no chat
    unread: str | None = None  # columns that nothing reads
    unread_keys: str | None = None  # keys of its messages, and keywords, that the template does not read
    same_role: int = 0  # that follow one of their own role
    tools: int = 0  # tools that the row offers
    tools_unprinted: bool = False
    reasoning: int = 0
    reasoning_dropped: int = 0  # of earlier turns, that the template leaves out
    reasoning_unprinted: bool = False  # of the last turn
    bare: bool = False  # a template that prints reasoning gets an answer without any
    empty_block: bool = False  # and prints reasoning without words before it
    muted: int = 0  # with a weight of 0
    weighted: int = 0  # with another weight than 0 and 1
    special: str | None = None  # a special token in its words, with what is around it
    flagged_others: int = 0  # turns of other roles that are marked to be trained on, and are not

    def as_json(self) -> str | None:
        """Return what is not as usual; None if all is."""
        return json.dumps({key: value for key, value in self._asdict().items() if value}, ensure_ascii=False) if any(self) else None


def note_of(messages: Sequence[Message], inputs: Mapping[str, Any], weights: Sequence[float | None], rendered: Rendered,
            template: ChatTemplate, train_on: str, same_role: int, unread: str | None) -> Note:
    """Note what became of a chat's messages and inputs in its rendered text."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    last = messages[answers[-1]] if answers else {}
    is_bare = bool(last) and template.forms.reasons and not last.get("reasoning_content") and "</think>" not in last["content"] \
        and {**template.keywords, **inputs}.get("enable_thinking") is not False
    note = Note(unread=unread, special=template.special_token_in(_texts_of(messages)), same_role=same_role, bare=is_bare,
                empty_block=is_bare and EMPTY_REASONING.search(rendered.text) is not None)
    if inputs or any(len(message) > 2 for message in messages):  # more than words
        note = note._replace(**_of_inputs(messages, answers, inputs, rendered.text, template))
    if any(weight is not None for weight in weights):
        note = note._replace(
            muted=sum(weights[i] == 0 for i in answers), weighted=sum(weights[i] not in (None, 0, 1) for i in answers),
            flagged_others=sum(bool(weights[i]) for i in {*range(len(messages))} - {*answers}) if train_on != "all" else 0)
    return note


def _of_inputs(messages: Sequence[Message], answers: Sequence[int], inputs: Mapping[str, Any], text: str,
               template: ChatTemplate) -> dict[str, Any]:
    """Note what became of reasoning, tools, and keys and keywords that templates may read."""
    thoughts = {i: messages[i]["reasoning_content"].strip() for i in answers if messages[i].get("reasoning_content")}
    unprinted = [i for i, thought in thoughts.items() if thought not in text]
    last = answers[-1] if answers else None
    keys = {f"messages.{key}" for message in messages for key, value in message.items()
            if key not in KNOWN_KEYS and is_given(value) and not template.mentions(key)}
    keys |= {"messages.name" for message in messages if message["role"] != "tool" and str(message.get("name") or "") not in text}
    keys |= {name for name in inputs.keys() - {"tools"} if not template.mentions(name)}
    names = [tool["function"]["name"] for tool in inputs.get("tools", [])]
    return {"unread_keys": ", ".join(sorted(keys)) or None, "tools": len(names), "tools_unprinted": any(name not in text for name in names),
            "reasoning": len(thoughts), "reasoning_dropped": sum(i != last for i in unprinted), "reasoning_unprinted": last in unprinted}


def _texts_of(messages: Sequence[Message]) -> Iterator[str]:
    """Yield the words of messages, those of calls included."""
    for message in messages:
        yield message["content"] or ""
        yield message.get("reasoning_content") or ""
        if calls := message.get("tool_calls"):
            yield json.dumps(calls, ensure_ascii=False)


def summarize(column: pyarrow.ChunkedArray, data: Data) -> tuple[int, list[str]]:
    """Return the number of refused rows of a source, and lines that tell what its notes say."""
    counted = pyarrow.compute.value_counts(column.drop_null()).to_pylist()
    notes = [(Note(**json.loads(entry["values"])), entry["counts"]) for entry in counted]
    refused = [note.refused for note, _ in notes if note.refused]
    lines = []
    if refused:
        more = f"; and {len(refused) - NAMED:,} more" if len(refused) > NAMED else ""
        lines.append(f"{len(refused):,} of {len(column):,} rows are refused and skipped: {'; '.join(refused[:NAMED])}{more}")
    unread = Counter()
    for note, count in notes:
        for name in {*(note.unread or "").split(", "), *(note.unread_keys or "").split(", ")} - {""}:
            unread[name] += count
    if unread:
        lines.append(f"nothing reads {', '.join(f'{name} ({count:,} rows)' for name, count in sorted(unread.items()))}")

    def rows(field: str) -> int:
        return sum(count for note, count in notes if getattr(note, field))

    def turns(field: str) -> int:
        return sum(getattr(note, field) * count for note, count in notes)

    if special := [note.special for note, _ in notes if note.special]:
        lines.append(f"{rows('special'):,} samples hold special tokens in their words, tokenized as such: {min(special)!r}")
    if rows("tools"):
        unprinted = f"; WARNING: the template does not print those of {rows('tools_unprinted'):,}" if rows("tools_unprinted") else ""
        lines.append(f"{rows('tools'):,} chats offer tools, {turns('tools') / rows('tools'):.3g} each on average{unprinted}")
    if rows("muted") or rows("weighted"):
        lines.append(f"weights of turns: {turns('muted'):,} assistant turns are not trained on, {turns('weighted'):,} have another weight "
                     "than 1")
    if turns("flagged_others"):
        lines.append(f"weights of turns: {turns('flagged_others'):,} turns of users, tools or the system are marked to be trained on, "
                     f"and are not, as data.train_on={data.train_on}")
    if turns("same_role"):
        done = {"join": "joined to it", "keep": "kept apart"}[data.same_role]
        lines.append(f"{turns('same_role'):,} turns follow one of their own role, and are {done} (data.same_role={data.same_role})")
    if turns("reasoning"):
        dropped = f"; the template leaves out that of {turns('reasoning_dropped'):,} earlier turns, as it does when the model is used" \
            if turns("reasoning_dropped") else ""
        lines.append(f"reasoning: in {turns('reasoning'):,} turns of {rows('reasoning'):,} chats{dropped}")
    if rows("reasoning_unprinted"):
        lines.append(f"WARNING: the template does not print the reasoning of the last turn of {rows('reasoning_unprinted'):,} chats, "
                     "which train on their answers alone")
    if rows("bare"):
        trained = "trained on" if data.empty_reasoning == "train" else "not trained on"
        block = f"; the empty block before it is {trained} (data.empty_reasoning={data.empty_reasoning})" if rows("empty_block") else ""
        lines.append(f"WARNING: the model's template prints reasoning, and the last answer of {rows('bare'):,} chats has none{block}: the "
                     "model may unlearn to reason; give reasoning_content, or set data.template_kwargs '{enable_thinking: false}' and "
                     "use the model so")
    return len(refused), lines
