"""Instructions that an evaluation asks too: training on them would make its score mean nothing.

By words: an instruction is contaminated when it shares n words in a row (13, as GPT-3 was checked) with an evaluation item, or holds the
whole of an item that is shorter. Very short items (below 4 words) count only where they are all of the instruction. Ideographs and kana
count half a word each. By embeddings: when it lies as near to an item, in the base's own eyes, as the cosine that is asked for.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from synth.engines.interface import Embedding, EmbeddingRequest
from synth.filters.ngrams import is_unspaced, runs, word_hashes, words
from trainer.data import formats, readers, sources
from trainer.errors import UserError

FIELDS = ("question", "prompt", "instruction", "text")  # of evaluation files that hold no chats, in any case
TRIVIAL = 4  # words: shorter items occur in anything
BLOCK = 1024  # instructions whose similarities to all items are computed at once
SLACK = 1e-4  # what float32 may be wrong by


class Item(NamedTuple):
    """What an evaluation asks, and where it stands: "exam.jsonl, line 7"."""

    place: str
    text: str


# ---------------------------------------------------------------- evaluation files


def read_items(path: str) -> Iterator[Item]:
    """What a file, saved folder or hub data set asks: users' turns of chats, or a text column. UserError: no such file, no such column."""
    file = Path(path).expanduser()
    if file.is_file() and file.suffix in readers.SUFFIXES:
        found = readers.read_rows(file)
    else:
        (_, records), = sources.load_sources(path, "evaluation")  # which refuses a file of another kind, or none
        found = ((f"record {n}", record) for n, record in enumerate(records, 1))
    for place, row in found:
        for text in _asked({key.lower(): value for key, value in row.items()}, f"{path}, {place}"):
            yield Item(f"{path}, {place}", text)


def _asked(row: dict, place: str) -> list[str]:
    for column in ("messages", "conversations", "prompt"):
        if isinstance(row.get(column), list):
            try:
                turns = formats.Format("chat", {"messages": column}).record(row)["messages"]
            except formats.RecordError as error:
                raise UserError(f"{place}: {error}") from None
            return [turn["content"] for turn in turns if turn["role"] == "user"]
    columns = [column for column in FIELDS if isinstance(row.get(column), str)]
    if not columns:
        raise UserError(f"{place}: expected one of the columns messages, conversations, {', '.join(FIELDS)}, "
                        f"found {', '.join(row) or 'none'}; rename one")
    extra = row.get("input") if columns[0] == "instruction" else None
    return [row[columns[0]] + ("\n\n" + extra if isinstance(extra, str) and extra.strip() else "")]


def fingerprint(path: str) -> str:
    """What tells this state of an evaluation file from others; of a folder or hub data set: nothing but its name."""
    file = Path(path).expanduser()
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else path


# ---------------------------------------------------------------- by words


class Phrases:
    """The runs of words of all evaluation items: one sorted array of numbers for each length that occurs."""

    def __init__(self, items: Iterable[Item], n: int):
        self.places: list[str] = []
        self.whole: dict[tuple[str, ...], int] = {}  # very short items
        gathered: dict[int, list[tuple[np.ndarray, int]]] = defaultdict(list)
        for number, item in enumerate(items):
            self.places.append(item.place)
            found = words(item.text)
            worth = 2 if is_unspaced(found) else 1
            if TRIVIAL * worth <= len(found):
                length = min(n * worth, len(found))
                gathered[length].append((runs(word_hashes(found), length), number))
            elif found:
                self.whole.setdefault(tuple(found), number)
        self.tables = {length: _table(gathered[length]) for length in sorted(gathered, reverse=True)}

    def find(self, text: str) -> Item | None:
        """Where an evaluation asks what this text does, and the words they share; None where none does."""
        found = words(text)
        if tuple(found) in self.whole:
            return Item(self.places[self.whole[tuple(found)]], " ".join(found))
        hashes = word_hashes(found)
        for length, (known, numbers) in self.tables.items():
            if length > len(found):
                continue
            wanted = runs(hashes, length)
            at = np.searchsorted(known, wanted)
            hits = np.flatnonzero(known[np.minimum(at, len(known) - 1)] == wanted)
            if len(hits):
                return Item(self.places[numbers[at[hits[0]]]], " ".join(found[hits[0]:hits[0] + length]))
        return None


def _table(gathered: Sequence[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Different runs in the order of their numbers, and the first item that has each."""
    known, first = np.unique(np.concatenate([hashes for hashes, _ in gathered]), return_index=True)
    owners = np.repeat(np.array([number for _, number in gathered], np.int32), [len(hashes) for hashes, _ in gathered])
    return known, owners[first]


# ---------------------------------------------------------------- by embeddings

Embed = Callable[[Iterable[EmbeddingRequest]], Iterator]  # an engine's: results in any order, Embedding or Failure


class Nearest(NamedTuple):
    key: int
    item: int  # index of the evaluation item
    cosine: float


def nearest(embed: Embed, items: Sequence[tuple[int, ...]], asked: Iterable[tuple[int, tuple[int, ...]]],
            least: float) -> Iterator[Nearest]:
    """The instructions whose nearest evaluation item has a cosine of `least` or more.

    `items`: token ids of each item; `asked`: a key and token ids of each instruction. What cannot be embedded is near to nothing.
    """
    found = (result for result in embed(EmbeddingRequest((n,), ids) for n, ids in enumerate(items)) if isinstance(result, Embedding))
    known = sorted(((result.key[0], _vector(result)) for result in found), key=lambda pair: pair[0])
    if not known:
        return
    numbers, matrix = [n for n, _ in known], np.stack([vector for _, vector in known])  # (items, width)
    block: list[tuple[int, np.ndarray]] = []
    for result in embed(EmbeddingRequest((key,), ids) for key, ids in asked):
        block += [(result.key[0], _vector(result))] if isinstance(result, Embedding) else []
        if len(block) == BLOCK:
            yield from _near(block, matrix, numbers, least)
            block = []
    yield from _near(block, matrix, numbers, least)


def _vector(result: Embedding) -> np.ndarray:
    return np.array(result.vector, np.float32)


def _near(block: Sequence[tuple[int, np.ndarray]], matrix: np.ndarray, numbers: Sequence[int], least: float) -> Iterator[Nearest]:
    cosines = np.stack([vector for _, vector in block]) @ matrix.T if block else np.empty((0, 1))  # (block, items)
    for (key, vector), best, rough in zip(block, cosines.argmax(1), cosines.max(1)):
        # a product of matrices rounds by what else is in the block: what decides is computed alone
        if rough >= least - SLACK and (cosine := float(np.dot(vector.astype(np.float64), matrix[best].astype(np.float64)))) >= least:
            yield Nearest(key, numbers[best], cosine)
