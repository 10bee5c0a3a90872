"""Samples: windows on memory-mapped tokens.

A sample is a window on the tokens of one record: all of them, or a part where the record is longer than `data.max_length`.
Tokens are tokenized once, kept on disk and never copied, so another `data.max_length` or `data.on_overlong` needs no new pass.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
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
    turn_weights: np.ndarray | None = None  # float32[length], of each token's turn in the loss; None: 1


@dataclass
class Samples:
    """n samples.

    `samples[i]` is the token ids of sample i, int32[length], and for each whether it is supervised, bool[length].
    """

    names: list[str]  # of the sources, each different
    length_report: dict[str, dict]  # of each source, by name: what cutting to length did, and notes (trainer/data/tokenize.py, `_cut`)
    lengths: np.ndarray  # int64[n], tokens
    supervised: np.ndarray  # int64[n], supervised tokens that have a token before them
    weights: np.ndarray  # float32[n]
    target_weights: np.ndarray  # float64[n], sum of the turns' weights over the supervised tokens: `supervised`, unless turns have weights
    sources: np.ndarray  # int32[n], index into `names`
    records: np.ndarray  # int64[n], the record of its source that the sample comes from
    _chunks: list[tuple[np.ndarray, np.ndarray, np.ndarray]]  # token ids, flags, turns' weights of consecutive records, memory-mapped
    _chunk: np.ndarray  # int32[n], index into `_chunks`
    _begin: np.ndarray  # int64[n], where the sample begins in its chunk
    _weights_begin: np.ndarray  # int64[n], where its turns' weights do; -1: every turn weighs 1

    @classmethod
    def of_tokens(cls, name: str, ids: Sequence[np.ndarray], supervised: Sequence[np.ndarray]) -> Samples:
        """Return samples of one source.

        `ids` are the token ids of each, int32[length]; `supervised` whether each token is, bool[length].
        """
        lengths = np.array([len(own) for own in ids], dtype=np.int64)
        targets = np.array([np.count_nonzero(own[1:]) for own in supervised], dtype=np.int64)
        chunk = (np.concatenate(ids), np.concatenate(supervised).astype(np.uint8), np.zeros(0, dtype=np.float32))
        none = dict.fromkeys(("dropped", "truncated", "split", "unsupervised", "tokens_lost", "refused"), 0)
        return cls([name], {name: {"kept": len(ids), **none, "notes": []}}, lengths, targets, np.ones(len(ids), dtype=np.float32),
                   targets.astype(np.float64), np.zeros(len(ids), dtype=np.int32), np.arange(len(ids)), [chunk],
                   np.zeros(len(ids), dtype=np.int32), np.cumsum(lengths) - lengths, np.full(len(ids), -1))

    def beside(self, other: Samples) -> Samples:
        """Return these samples followed by those of others, whose sources have other names."""
        columns = {name: np.concatenate([getattr(self, name), getattr(other, name)])
                   for name in ("lengths", "supervised", "weights", "target_weights", "records", "_begin", "_weights_begin")}
        return Samples(self.names + other.names, self.length_report | other.length_report, **columns,
                       sources=np.concatenate([self.sources, other.sources + np.int32(len(self.names))]),
                       _chunks=self._chunks + other._chunks,
                       _chunk=np.concatenate([self._chunk, other._chunk + np.int32(len(self._chunks))]))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        ids, flags, _ = self._chunks[self._chunk[i]]
        window = slice(self._begin[i], self._begin[i] + self.lengths[i])
        return ids[window], flags[window].view(np.bool_)

    def piece(self, i: int) -> Piece:
        """Return sample i as a member of a pack."""
        return Piece(*self[i], self.weights[i], self.sources[i], i, self._turn_weights(i))

    def _turn_weights(self, i: int) -> np.ndarray | None:
        begin = self._weights_begin[i]
        return None if begin < 0 else self._chunks[self._chunk[i]][2][begin : begin + self.lengths[i]]

    def select(self, indices: np.ndarray) -> Samples:
        """Return the samples at `indices`, in that order. `length_report` is unchanged."""
        arrays = ("lengths", "supervised", "weights", "sources", "target_weights", "records", "_chunk", "_begin", "_weights_begin")
        return replace(self, **{name: getattr(self, name)[indices] for name in arrays})

    def weighted(self, indices: np.ndarray, factors: np.ndarray) -> Samples:
        """Return all samples, with the weights of those at `indices` multiplied by `factors`."""
        weights = self.weights.copy()
        weights[indices] *= factors
        return replace(self, weights=weights)

    def supervising(self, indices: np.ndarray, keep: np.ndarray) -> Samples:
        """Return all samples, with only the tokens in `keep` supervised in those at `indices`.

        `keep` is a bool for each supervised token of the samples at `indices`, sample after sample. Costs a byte in memory for
        each token of all samples: their flags are no longer those on disk.
        """
        all_flags = [np.array(flags) for _, flags, _ in self._chunks]
        supervised, target_weights, start = self.supervised.copy(), self.target_weights.copy(), 0
        for i in indices:
            flags = all_flags[self._chunk[i]][self._begin[i] + 1 : self._begin[i] + self.lengths[i]]  # nothing precedes the first token
            places = np.flatnonzero(flags)
            kept = keep[start : start + len(places)]
            flags[places[~kept]] = 0
            supervised[i] = kept.sum()
            of_turns = self._turn_weights(i)
            target_weights[i] = supervised[i] if of_turns is None else of_turns[1:][places[kept]].sum(dtype=np.float64)
            start += len(places)
        chunks = [(ids, flags, weights) for (ids, _, weights), flags in zip(self._chunks, all_flags)]
        return replace(self, supervised=supervised, target_weights=target_weights, _chunks=chunks)

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of the samples' tokens, flags and weights, also those of turns, in their order.

        It does not depend on the number of processes that tokenized them.
        """
        digest = hashlib.sha256(json.dumps(self.names).encode())
        for column in zip(*self._chunks):
            for values in column:
                digest.update(np.ascontiguousarray(values))
        first = np.cumsum([0] + [len(ids) for ids, _, _ in self._chunks])
        for array in (first[self._chunk] + self._begin, self.lengths, self.weights, self.target_weights, self.sources):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()[:16]


