"""Records to samples: tokenized once, kept on disk, cut to the maximal length by arithmetic on Arrow offsets.

A sample is a window on the tokens of one record: all of them, or a part where the record is longer than `max_length`.
Tokens are memory-mapped and never copied, so another `max_length` or another choice of what to do with longer records
costs no new pass.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np


class Piece(NamedTuple):
    """One sample of a pack, as `collate` takes it."""

    input_ids: np.ndarray  # int32[length]
    supervised: np.ndarray  # bool[length]
    weight: float = 1.0
    source: int = 0
    index: int = 0  # of the sample in its `Samples`


@dataclass
class Samples:
    """n samples. Sample i is `samples[i]`: its token ids, int32, and for each whether it is supervised."""

    names: list[str]  # of the sources, each different
    length_report: dict[str, dict[str, int]]  # of each source, by name: what cutting to length did (trainer/data/tokenize.py, `_cut`)
    lengths: np.ndarray  # int64[n], tokens
    supervised: np.ndarray  # int64[n], supervised tokens that have a token before them
    weights: np.ndarray  # float32[n]
    sources: np.ndarray  # int16[n], index into `names`
    records: np.ndarray  # int64[n], the record of its source that the sample comes from
    _chunks: list[tuple[np.ndarray, np.ndarray]]  # token ids and flags of consecutive records, memory-mapped
    _chunk: np.ndarray  # int32[n], index into `_chunks`
    _begin: np.ndarray  # int64[n], where the sample begins in its chunk

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        ids, flags = self._chunks[self._chunk[i]]
        window = slice(self._begin[i], self._begin[i] + self.lengths[i])
        return ids[window], flags[window].view(np.bool_)

    def piece(self, i: int) -> Piece:
        """Return sample i as a member of a pack."""
        return Piece(*self[i], self.weights[i], self.sources[i], i)

    def select(self, indices: np.ndarray) -> Samples:
        """The samples at `indices`, in that order; `length_report` still describes all of them."""
        arrays = ("lengths", "supervised", "weights", "sources", "records", "_chunk", "_begin")
        return replace(self, **{name: getattr(self, name)[indices] for name in arrays})

    def weighted(self, indices: np.ndarray, factors: np.ndarray) -> Samples:
        """The same samples, those at `indices` weighing so many times as much."""
        weights = self.weights.copy()
        weights[indices] *= factors
        return replace(self, weights=weights)

    def supervising(self, indices: np.ndarray, keep: np.ndarray) -> Samples:
        """The same samples; of the supervised tokens of those at `indices`, one after the other, only those that `keep` marks still are.

        Costs a byte in memory for each token of all samples: flags are no longer those on disk.
        """
        flags = [np.array(own) for _, own in self._chunks]
        supervised, done = self.supervised.copy(), 0
        for i in indices:
            window = flags[self._chunk[i]][self._begin[i] + 1 : self._begin[i] + self.lengths[i]]  # nothing precedes the first token
            places = np.flatnonzero(window)
            kept = keep[done : done + len(places)]
            window[places[~kept]] = 0
            supervised[i], done = kept.sum(), done + len(places)
        return replace(self, supervised=supervised, _chunks=[(ids, own) for (ids, _), own in zip(self._chunks, flags)])

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the tokens, flags and weights of the samples in their order, however many processes made them."""
        digest = hashlib.sha256(json.dumps(self.names).encode())
        for column in zip(*self._chunks):
            for values in column:
                digest.update(np.ascontiguousarray(values))
        first = np.cumsum([0] + [len(ids) for ids, _ in self._chunks])
        for array in (first[self._chunk] + self._begin, self.lengths, self.weights, self.sources):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()[:16]


