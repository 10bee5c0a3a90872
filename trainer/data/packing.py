"""Pack samples into sequences of equal capacity.

A pack is one sequence of at most `capacity` tokens in which several samples lie end to end. Choosing the samples of each
is bin packing; best-fit decreasing takes them from long to short and puts each where the least room is left over. The open
packs are kept in a two-level bitmap over their rooms and answer "the smallest room >= this length" in a few operations on
small integers, so the whole costs no more than the sort, O(n log n).

By itself, best-fit decreasing gives almost the same packs every epoch. So lengths are blurred by about a tenth before they
are sorted, with another blur for each seed: few samples that share a pack share one again in the next epoch, for a few
packs more. Where it costs more than BLUR_COST in packs, the exact order is kept.
"""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np

BLUR = 0.1  # standard deviation of the log of the factor on each length
BLUR_COST = 0.01  # packs that blurring may add, as a share of the packs without it


def pack(lengths: np.ndarray, capacity: int, max_samples_per_pack: int, seed: int) -> list[np.ndarray]:
    """Divide samples of `lengths[n]` tokens into packs: arrays of indices, each index in exactly one.

    No pack holds more than `capacity` tokens or `max_samples_per_pack` samples. The seed decides which samples share a pack, and
    the order of the packs. Raises ValueError if a sample is empty or longer than `capacity`.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if max_samples_per_pack < 1:
        raise ValueError(f"pack: expected max_samples_per_pack >= 1, got {max_samples_per_pack}")
    unfit = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if len(unfit):
        first = unfit[0]
        raise ValueError(f"pack: expected samples of 1 to {capacity} tokens, got {lengths[first]} in sample {first}")
    if not len(lengths):
        return []

    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(lengths))  # tie-break between equal lengths: the sorts below are stable
    blurred = lengths[shuffled] * np.exp(BLUR * rng.standard_normal(len(lengths)))
    exact = _best_fit(lengths, shuffled[np.argsort(-lengths[shuffled], kind="stable")], capacity, max_samples_per_pack)
    varied = _best_fit(lengths, shuffled[np.argsort(-blurred, kind="stable")], capacity, max_samples_per_pack)
    pack_of = varied if varied.max() + 1 <= (exact.max() + 1) * (1 + BLUR_COST) else exact

    members = np.split(np.argsort(pack_of, kind="stable"), np.cumsum(np.bincount(pack_of))[:-1])
    return [members[i] for i in rng.permutation(len(members))]


def settled_count(lengths: np.ndarray, capacity: int, max_samples_per_pack: int) -> int | None:
    """Return the number of packs that `pack` makes of these samples with any seed, or None.

    None: seeds may differ. It is settled where the exact order needs no more packs than any order must, and so few that blurring may add
    none.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if not len(lengths):
        return None
    count = int(_best_fit(lengths, np.argsort(-lengths, kind="stable"), capacity, max_samples_per_pack).max()) + 1
    fewest = max(math.ceil(int(lengths.sum()) / capacity), math.ceil(len(lengths) / max_samples_per_pack))
    return count if count == fewest and count * BLUR_COST < 1 else None


def _best_fit(lengths: np.ndarray, order: np.ndarray, capacity: int, max_samples_per_pack: int) -> np.ndarray:
    """Put samples, taken in `order`, each into the fullest pack that has room; return pack_of[n]."""
    open_packs = _OpenPacks(capacity)
    counts: list[int] = []  # samples in each pack
    chosen = []
    for length in lengths[order].tolist():
        fullest, room = open_packs.take(length) or (len(counts), capacity)
        if fullest == len(counts):
            counts.append(0)
        counts[fullest] += 1
        chosen.append(fullest)
        if room > length and counts[fullest] < max_samples_per_pack:
            open_packs.put(fullest, room - length)
    pack_of = np.empty(len(lengths), dtype=np.int64)
    pack_of[order] = chosen
    return pack_of


class _OpenPacks:
    """Open packs by the room they have left.

    Bit r % w of `words[r // w]` is set while some pack has room r; bit i of `summary` is set while `words[i]` is not 0.
    """

    def __init__(self, capacity: int):
        self.shift = capacity.bit_length() // 2  # w = 2 ** shift: as many words as a word has bits
        self.low_bits = (1 << self.shift) - 1
        self.words = [0] * ((capacity >> self.shift) + 1)
        self.summary = 0
        self.packs: defaultdict[int, list[int]] = defaultdict(list)

    def put(self, pack: int, room: int) -> None:
        self.packs[room].append(pack)
        word = room >> self.shift
        self.words[word] |= 1 << (room & self.low_bits)
        self.summary |= 1 << word

    def take(self, length: int) -> tuple[int, int] | None:
        """Remove and return (pack, room) with the smallest room >= length; None if no open pack has that much."""
        room = self._smallest_room(length)
        if room is None:
            return None
        pack = self.packs[room].pop()
        if not self.packs[room]:
            word = room >> self.shift
            self.words[word] ^= 1 << (room & self.low_bits)
            if not self.words[word]:
                self.summary ^= 1 << word
        return pack, room

    def _smallest_room(self, length: int) -> int | None:
        word = length >> self.shift
        rest = self.words[word] >> (length & self.low_bits)  # rooms >= length that share its word
        if rest:
            return length + _lowest_bit(rest)
        above = self.summary >> (word + 1)
        if not above:
            return None
        word += 1 + _lowest_bit(above)
        return (word << self.shift) + _lowest_bit(self.words[word])


def _lowest_bit(x: int) -> int:
    return (x & -x).bit_length() - 1


