"""Find instructions that also occur in an evaluation set: training on them would invalidate its score.

By words: an instruction is contaminated when it shares n words in a row (13, as in GPT-3's check) with an evaluation item, or contains
the whole of an item that is shorter. Items of fewer than 4 words count only where they are the whole instruction. Ideographs and kana
count half a word each.

By embeddings: an instruction is contaminated when the cosine between its embedding by the base and that of an evaluation item reaches a
threshold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from synth.engines.interface import Embedding, EmbeddingRequest
from synth.filters.ngrams import is_unspaced, ngram_hashes, word_hashes, words
from trainer.config import Source
from trainer.data import formats
from trainer.data.chat_columns import record_of
from trainer.data.files import content_hash
from trainer.data.sources import files_of, open_source, rows_of
from trainer.errors import UserError

TEXT_COLUMNS = ("question", "prompt", "instruction", "text")  # of evaluation files that hold no chats, in upper or lower case
MIN_WORDS = 4  # shorter items occur in anything
BLOCK = 1024  # instructions whose cosines with all items are computed at once
ROUNDING = 1e-4  # upper bound of the rounding error of a float32 cosine


class EvaluationItem(NamedTuple):
    """A text that an evaluation set asks."""

    place: str  # "exam.jsonl, line 7"
    text: str


class NgramMatch(NamedTuple):
    """Words that a text shares with an evaluation item."""

    place: str  # of the item
    words: str


# ---------------------------------------------------------------- evaluation files


def read_items(path: str) -> Iterator[EvaluationItem]:
    """Read the user turns or the text column of a file, saved folder or hub data set.

    Raises UserError where there is no such file or no such column.
    """
    for place, row in rows_of(open_source(Source(path))):
        place = f"{path}, {place}"
        for text in _row_texts({column.lower(): value for column, value in row.items()}, place):
            yield EvaluationItem(place, text)


def _row_texts(row: dict, place: str) -> list[str]:
    for column in ("messages", "conversations", "prompt"):
        if isinstance(row.get(column), list | dict) or column != "prompt" and row.get(column) is not None:
            try:
                turns = record_of(row, formats.Format("chat", {"messages": column}))["messages"]
            except formats.RecordError as error:
                raise UserError(f"{place}: {error}") from None
            return [turn["content"] for turn in turns if turn["role"] == "user"]
    columns = [column for column in TEXT_COLUMNS if isinstance(row.get(column), str)]
    if not columns:
        raise UserError(f"{place}: expected one of the columns messages, conversations, {', '.join(TEXT_COLUMNS)}, "
                        f"got {', '.join(row) or 'none'}; rename one")
    extra = row.get("input") if columns[0] == "instruction" else None
    return [row[columns[0]] + ("\n\n" + extra if isinstance(extra, str) and extra.strip() else "")]


def fingerprint(path: str) -> str:
    """Return a hash of the content of evaluation files; for a saved folder or hub data set just its name."""
    files = files_of(Source(path))
    return content_hash(files) if files else path


# ---------------------------------------------------------------- by words


class NgramIndex:
    """The hashes of all n-grams of words in the evaluation items, one sorted array for each n."""

    def __init__(self, items: Iterable[EvaluationItem], n: int):
        self.places: list[str] = []  # of the items
        self.short: dict[tuple[str, ...], int] = {}  # items below MIN_WORDS: words -> index of the item
        hashes_by_length: dict[int, list[tuple[np.ndarray, int]]] = defaultdict(list)
        for number, item in enumerate(items):
            self.places.append(item.place)
            item_words = words(item.text)
            units = 2 if is_unspaced(item_words) else 1  # that count as a word
            if MIN_WORDS * units <= len(item_words):
                length = min(n * units, len(item_words))
                hashes_by_length[length].append((ngram_hashes(word_hashes(item_words), length), number))
            elif item_words:
                self.short.setdefault(tuple(item_words), number)
        self.tables = {length: _sorted_table(hashes_by_length[length]) for length in sorted(hashes_by_length, reverse=True)}

    def find(self, text: str) -> NgramMatch | None:
        """Return the first evaluation item that shares an n-gram with the text; None without one."""
        text_words = words(text)
        if tuple(text_words) in self.short:
            return NgramMatch(self.places[self.short[tuple(text_words)]], " ".join(text_words))
        hashes = word_hashes(text_words)
        for length, (known, items) in self.tables.items():
            if length > len(text_words):
                continue
            wanted = ngram_hashes(hashes, length)
            position = np.searchsorted(known, wanted)
            hits = np.flatnonzero(known[np.minimum(position, len(known) - 1)] == wanted)
            if len(hits):
                start = hits[0]
                return NgramMatch(self.places[items[position[start]]], " ".join(text_words[start:start + length]))
        return None


def _sorted_table(hashes_of_items: Sequence[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct hashes in ascending order, and the first item that has each."""
    known, first = np.unique(np.concatenate([hashes for hashes, _ in hashes_of_items]), return_index=True)
    item = np.repeat(np.array([number for _, number in hashes_of_items], np.int32), [len(hashes) for hashes, _ in hashes_of_items])
    return known, item[first]


# ---------------------------------------------------------------- by embeddings

Embed = Callable[[Iterable[EmbeddingRequest]], Iterator]  # of an engine: Embedding or Failure for each request, in any order


class EmbeddingMatch(NamedTuple):
    """An instruction and the evaluation item that is nearest to it."""

    key: int  # of the instruction
    item: int  # index of the evaluation item
    cosine: float


def find_similar(embed: Embed, items: Sequence[tuple[int, ...]], instructions: Iterable[tuple[int, tuple[int, ...]]],
                 min_cosine: float) -> Iterator[EmbeddingMatch]:
    """Yield the instructions whose nearest evaluation item has a cosine of `min_cosine` or more.

    `items` are token ids; `instructions` are keys with token ids. A text that cannot be embedded matches nothing.
    """
    results = (result for result in embed(EmbeddingRequest((n,), ids) for n, ids in enumerate(items)) if isinstance(result, Embedding))
    embedded = sorted(((result.key[0], _vector(result)) for result in results), key=lambda pair: pair[0])
    if not embedded:
        return
    numbers, matrix = [n for n, _ in embedded], np.stack([vector for _, vector in embedded])  # (items, width)
    block: list[tuple[int, np.ndarray]] = []
    for result in embed(EmbeddingRequest((key,), ids) for key, ids in instructions):
        block += [(result.key[0], _vector(result))] if isinstance(result, Embedding) else []
        if len(block) == BLOCK:
            yield from _matches(block, matrix, numbers, min_cosine)
            block = []
    yield from _matches(block, matrix, numbers, min_cosine)


def _vector(result: Embedding) -> np.ndarray:
    return np.array(result.vector, np.float32)


def _matches(block: Sequence[tuple[int, np.ndarray]], matrix: np.ndarray, numbers: Sequence[int],
             min_cosine: float) -> Iterator[EmbeddingMatch]:
    cosines = np.stack([vector for _, vector in block]) @ matrix.T if block else np.empty((0, 1))  # (block, items)
    for (key, vector), nearest, approximate in zip(block, cosines.argmax(1), cosines.max(1)):
        if approximate < min_cosine - ROUNDING:
            continue
        # the rounding of a matmul depends on what else is in the block, so the cosine that decides is computed by itself
        cosine = float(np.dot(vector.astype(np.float64), matrix[nearest].astype(np.float64)))
        if cosine >= min_cosine:
            yield EmbeddingMatch(key, numbers[nearest], cosine)
