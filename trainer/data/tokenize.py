"""Tokenize records, cut them to length and join the sources into one set of samples."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import tokenizers
import transformers
from datasets import Dataset, Features, List, Value
from datasets.utils import tqdm

import trainer.data.chat_template
import trainer.data.message_forms
import trainer.data.notes
import trainer.data.turn_spans
from trainer.config import Data, Source
from trainer.data.chat_template import ChatTemplate, Encoded, Rendered
from trainer.data.disk_cache import cached_files, code_hash
from trainer.data.names import distinct
from trainer.data.notes import Note, note_of, summarize
from trainer.data.samples import Samples
from trainer.data.turn_spans import Message
from trainer.errors import UserError
from trainer.progress import announce

# `turn_weights` is empty where every turn weighs 1; `note` is JSON (trainer/data/notes.py)
TOKENS = Features({"input_ids": List(Value("int32")), "supervised": List(Value("uint8")), "turn_weights": List(Value("float32")),
                   "weight": Value("float32"), "note": Value("string")})
SCHEMA = TOKENS.arrow_schema
FLAGS = SCHEMA.field("supervised").type
# Modules that decide tokens, beside this one.
CODE = (trainer.data.chat_template, trainer.data.message_forms, trainer.data.turn_spans, trainer.data.notes)

RECORDS_PER_CALL, BYTES_PER_CALL = 500, 2**22  # of the tokenizer, whichever comes first
RECORDS_PER_PROCESS = 2000  # at least: fewer are tokenized in about the time that a process takes to start


def tokenize(sources: list[tuple[Source, Dataset]], template: ChatTemplate, data: Data, names: list[str] | None = None) -> Samples:
    """Return the samples of all sources, in order; their names are their own, made distinct, unless given.

    Raises UserError if a chat cannot be rendered or masked, a sample is too long under `on_overlong: error`, or a source has no
    sample with a supervised token.
    """
    names = names or distinct([source.name for source, _ in sources])
    tokens = [_tokens(source, records, template, data) for source, records in sources]
    cut = [_cut(own, name, data) for own, name in zip(tokens, names)]
    length_report = {name: counts for name, (_, counts) in zip(names, cut)}
    return _join([samples for samples, _ in cut], names, length_report)


def _tokens(source: Source, records: Dataset, template: ChatTemplate, data: Data) -> pyarrow.Table:
    """Return the records' tokens, from the cache if this code has made them before with these options."""
    versions = (tokenizers.__version__, transformers.__version__)
    key = (records._fingerprint, template.fingerprint, data.train_on, data.same_role, data.on_bad_row, versions,
           code_hash(*CODE, sys.modules[__name__]))
    fingerprint = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    processes = data.num_proc or min(8, os.cpu_count() or 1)
    processes = min(processes, math.ceil(len(records) / RECORDS_PER_PROCESS))
    per_call = max(1, min(RECORDS_PER_CALL, BYTES_PER_CALL * len(records) // max(records.data.nbytes, 1)))
    options = {"template": template, "data": data, "path": source.path}
    if processes > 1:
        # Threads within the processes would be too many, and would not survive the fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def make(folder: Path) -> None:
        with announce(f"data: tokenizing {len(records):,} records of {source.name}"):
            if processes <= 1:
                _write(records, per_call, options, folder / "tokens.arrow", f"tokenize {source.name}")
                return
            records.with_format("arrow").map(
                _encode, fn_kwargs=options, batched=True, batch_size=per_call, with_indices=True, features=TOKENS,
                remove_columns=records.column_names, num_proc=processes, desc=f"tokenize {source.name}",
                new_fingerprint=fingerprint, cache_file_name=str(folder / "tokens.arrow"))

    files = cached_files(data.cache_dir, "tokens", fingerprint, make)
    return pyarrow.concat_tables([pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all() for file in files])


def _write(records: Dataset, per_call: int, options: dict[str, Any], path: Path, title: str) -> None:
    """Tokenize records in this process: `Dataset.map` takes as long to begin as a hundred records do."""
    few = len(records) <= RECORDS_PER_PROCESS
    with pyarrow.ipc.new_stream(str(path), SCHEMA) as file, tqdm(total=len(records), desc=title, disable=few) as bar:
        for start in range(0, len(records), per_call):
            batch = records.data.fast_slice(start, min(per_call, len(records) - start))
            file.write_table(_encode(batch, [*range(start, start + len(batch))], **options).combine_chunks())
            bar.update(len(batch))


def _encode(batch: pyarrow.Table, indices: list[int], template: ChatTemplate, data: Data, path: str) -> pyarrow.Table:
    """Tokenize the records `indices` of the source at `path`, as `Dataset.map` wants it."""
    records = batch.to_pylist()
    rendered: list[Rendered | None] = []
    notes: list[Note] = []
    for i, record in zip(indices, records):
        chat, note = _render_or_refuse(record, f"record {i + 1}", template, data, path)
        rendered.append(chat)
        notes.append(note)
    if "text" in batch.column_names:
        given = [record["text"] for record in records]
        encoded = [(tokens, None) for tokens in template.encode_texts([text for text in given if text is not None])]
    else:
        given = rendered
        encoded = template.encode([chat for chat in rendered if chat is not None])
    following = iter(encoded)
    tokens = [(Encoded([], []), None) if one is None else next(following) for one in given]
    columns = {
        "input_ids": [own.input_ids for own, _ in tokens],
        "supervised": pyarrow.array([own.supervised for own, _ in tokens], pyarrow.list_(pyarrow.bool_())).cast(FLAGS),
        "turn_weights": [weights or [] for _, weights in tokens],
        "weight": batch["weight"],
        "note": [note.as_json() for note in notes],
    }
    return pyarrow.table(columns, SCHEMA)


def _render_or_refuse(record: dict, place: str, template: ChatTemplate, data: Data, path: str) -> tuple[Rendered | None, Note]:
    """Render a record's chat, or note why it is refused; None for a refused one and for a plain text."""
    place = record.get("place") or place
    if record.get("refused"):
        return None, Note(refused=f"{place}: {record['refused']}")
    if "text" in record:
        special = template.special_token_in([record["text"]]) if record["text"] else None
        return None, Note(special=special, unread=record.get("unread"))
    try:
        return _render(record, template, data)
    except UserError as error:
        if data.on_bad_row == "error":
            raise UserError(f"{path}, {place}: {error}") from None
        return None, Note(refused=f"{place}: {error}")


def _render(record: dict, template: ChatTemplate, data: Data) -> tuple[Rendered, Note]:
    """Render a record's chat as templates expect it, and note what is worth telling of it."""
    messages, joined, inputs = chat_of(record, data)
    weights = [message.pop("weight", None) for message in messages]
    rendered = template.render_chat(messages, data.train_on, inputs, weights)
    return rendered, note_of(messages, inputs, weights, rendered, template, data.train_on, joined, record.get("unread"))


def chat_of(record: dict, data: Data) -> tuple[list[Message], int, dict[str, Any]]:
    """Return the messages of a record, how many follow one of their own role, and the template's inputs.

    Raises UserError for messages that `data.same_role` refuses.
    """
    inputs = json.loads(record["inputs"]) if record.get("inputs") else {}
    return *join_same_role([_message(stored) for stored in record["messages"]], data.same_role), inputs


def _message(stored: dict) -> Message:
    """Return a message as templates expect it, with its weight.

    Keys that it does not have are absent, not None.
    """
    message = {"role": stored["role"], "content": stored["content"]} | (json.loads(stored["extra"]) if stored["extra"] else {})
    return message if stored.get("weight") is None else message | {"weight": stored["weight"]}


def join_same_role(messages: list[Message], choice: str) -> tuple[list[Message], int]:
    """Join messages that follow one of their own role, or refuse or keep them, by `choice`.

    Returns the messages, and how many follow one of their own role. A tool's results stay apart. Raises UserError for those that are
    refused, or cannot be joined.
    """
    joined: list[Message] = []
    count = 0
    for n, message in enumerate(messages, 1):
        before = joined[-1] if joined else None
        if before is None or before["role"] != message["role"] or message["role"] == "tool":
            joined.append(message)
            continue
        count += 1
        if choice == "refuse":
            raise UserError(f"turn {n}: expected another role than that of the turn before, found {message['role']} again; correct the "
                            "chat, or set data.same_role=join")
        if choice == "keep":
            joined.append(message)
            continue
        if before.get("weight") != message.get("weight") or before.get("tool_calls") and message["content"]:
            raise UserError(f"turn {n}: expected a turn that can be joined to the one before, of the same role, found other words after a "
                            "tool call, or another weight; correct the chat")
        texts = {key: "\n\n".join(text for text in (before.get(key), message.get(key)) if text)
                 for key in ("content", "reasoning_content") if key in before or key in message}
        calls = [*before.get("tool_calls", []), *message.get("tool_calls", [])]
        joined[-1] = message | before | texts | ({"tool_calls": calls} if calls else {})
    return joined, count


def _cut(tokens: pyarrow.Table, name: str, data: Data) -> tuple[Samples, dict]:
    """Cut one source's records to samples that have a supervised token, and count the outcomes.

    The counts are kept: samples; dropped, truncated, split: records longer than `max_length`; unsupervised: samples removed
    because nothing in them is supervised; tokens_lost: by all of these together; refused: rows that are no chats. Beside them are notes,
    lines for the console.
    """
    columns = [tokens.column(column).chunks for column in ("input_ids", "supervised", "turn_weights")]
    chunks = [tuple(column.values.to_numpy() for column in chunk) for chunk in zip(*columns)]
    offsets = [ids.offsets.to_numpy().astype(np.int64) for ids in columns[0]]
    lengths = np.concatenate([np.diff(o) for o in offsets])  # of records
    refused, notes = summarize(tokens.column("note"), data)
    overlong = _count_overlong(lengths, name, data)

    record, start, length = _windows(lengths, data)
    chunk = np.repeat(np.arange(len(chunks), dtype=np.int32), [len(o) - 1 for o in offsets])[record]
    begin = np.concatenate([o[:-1] for o in offsets])[record] + start
    supervised = _count_targets(chunks, chunk, begin, length)
    keep = np.flatnonzero(supervised)
    if not len(keep):
        raise UserError(_nothing_left(lengths[lengths > 0], name, data) if refused < len(lengths) else f"{name}: {notes[0]}")
    weights = tokens.column("weight").to_numpy().astype(np.float32)[record]
    source = np.zeros(len(record), dtype=np.int32)
    weights_begin, target_weights = _turn_weights(columns[2], chunks, record, chunk, start, length, supervised)
    samples = Samples([name], {}, length, supervised, weights, target_weights, source, record, chunks, chunk, begin,
                      weights_begin).select(keep)
    lost = int(lengths.sum() - samples.lengths.sum())
    unsupervised = int(((length > 0) & (supervised == 0)).sum())
    return samples, {"kept": len(keep), **overlong, "unsupervised": unsupervised, "tokens_lost": lost, "refused": refused, "notes": notes}


def _turn_weights(lists: list, chunks: list, record: np.ndarray, chunk: np.ndarray, start: np.ndarray, length: np.ndarray,
                  supervised: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where the turns' weights of each window begin in its chunk, and their sum.

    -1 where a window has none; the sum is over its supervised tokens.
    """
    offsets = [weights.offsets.to_numpy().astype(np.int64) for weights in lists]
    has = np.concatenate([np.diff(o) for o in offsets])[record] > 0
    begin = np.where(has, np.concatenate([o[:-1] for o in offsets])[record] + start, -1)
    sums = supervised.astype(np.float64)
    for i in np.flatnonzero(has):
        sums[i] = chunks[chunk[i]][2][begin[i] + 1 : begin[i] + length[i]].sum(dtype=np.float64)
    return begin, sums


def _count_overlong(lengths: np.ndarray, name: str, data: Data) -> dict[str, int]:
    """Count the records that `on_overlong` drops, truncates or splits; raise UserError if it forbids them."""
    too_long = np.flatnonzero(lengths > data.max_length)
    if len(too_long) and data.on_overlong == "error":
        raise UserError(
            f"{name}: expected samples of at most data.max_length={data.max_length} tokens, found {len(too_long):,} of "
            f"{len(lengths):,} that are longer, up to {lengths.max():,} tokens, the first is record {too_long[0] + 1}; "
            "raise data.max_length, or set data.on_overlong to drop, truncate or split")
    outcomes = {"drop": "dropped", "truncate": "truncated", "split": "split"}
    return {outcome: len(too_long) if action == data.on_overlong else 0 for action, outcome in outcomes.items()}


def _windows(lengths: np.ndarray, data: Data) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the windows of records of `lengths[m]` tokens that become samples.

    A window is (record, first token in it, length), int64[n] each.
    """
    record = np.arange(len(lengths))
    if data.on_overlong == "split":
        windows = -(-lengths // data.max_length)  # of each record
        record = np.repeat(record, windows)
        start = (np.arange(len(record)) - np.repeat(np.cumsum(windows) - windows, windows)) * data.max_length
        return record, start, np.minimum(lengths[record] - start, data.max_length)
    if data.on_overlong == "drop":
        record = record[lengths <= data.max_length]
    return record, np.zeros_like(record), np.minimum(lengths[record], data.max_length)


def _count_targets(chunks: list, chunk: np.ndarray, begin: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Count each sample's supervised tokens, without its first, which nothing predicts. `chunk` ascends."""
    counts = np.zeros(len(chunk), dtype=np.int64)
    bounds = np.searchsorted(chunk, np.arange(len(chunks) + 1))
    for (_, flags, _), low, high in zip(chunks, bounds[:-1], bounds[1:]):
        before = np.concatenate([[0], np.cumsum(flags, dtype=np.int64)])
        ends = begin[low:high] + length[low:high]
        counts[low:high] = before[ends] - before[np.minimum(begin[low:high] + 1, ends)]
    return counts


def _nothing_left(lengths: np.ndarray, name: str, data: Data) -> str:
    """Say why a source has no sample to train on."""
    n, too_long, limit = len(lengths), (lengths > data.max_length).sum(), f"data.max_length={data.max_length}"
    if data.on_overlong == "drop" and too_long == n:
        return f"{name}: all {n:,} samples are longer than {limit} and were dropped; raise data.max_length"
    reason = f"{too_long:,} of them are cut off at {limit} before the answer; raise it" if too_long else \
        "none has an assistant turn with words and a weight above 0; check the roles, or set data.train_on=all"
    return (f"{name}: every label is masked: expected supervised tokens (data.train_on={data.train_on}), "
            f"found none in {n:,} samples; {reason}")


def _join(parts: list[Samples], names: list[str], length_report: dict[str, dict]) -> Samples:
    """Concatenate the samples of all sources."""
    first_chunk = np.cumsum([0] + [len(part._chunks) for part in parts])
    same = ("lengths", "supervised", "weights", "target_weights", "records", "_begin", "_weights_begin")
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in same}
    return Samples(
        names, length_report, **columns,
        sources=np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts]),
        _chunks=[chunk for part in parts for chunk in part._chunks],
        _chunk=np.concatenate([part._chunk + np.int32(first) for part, first in zip(parts, first_chunk)]))
