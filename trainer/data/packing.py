"""Samples into packs, packs into flat batches, and batches filled up to few shapes.

A pack is one sequence of at most `capacity` tokens in which several samples lie end to end. Which samples share a
pack is bin packing; best-fit decreasing takes the samples from long to short and puts each where the least room is
left over. The open packs are kept in a two-level bitmap over their rooms and answer "the smallest room >= this
length" in a few operations on small integers, so the whole costs no more than the sort, O(n log n): 100,000 samples
take 0.15 to 0.5 s of one core at capacities of 4,096 and of 131,072.

Taken alone, best-fit decreasing gives almost the same packs every epoch. So lengths are blurred by about a tenth
before they are sorted, afresh for each seed: of the pairs that share a pack, 4% instead of 57% share one again in
the next epoch (5,000 log-normal lengths with median 400, capacity 4,096), for 2 packs more than 671. Where it costs
more than a hundredth in packs, the exact order is kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch

BLUR = 0.1  # standard deviation of the log of the factor on each length
BLUR_COST = 0.01  # packs that blurring may add, as a share of the packs without it


def pack(lengths: np.ndarray, capacity: int, max_documents: int, seed: int) -> list[np.ndarray]:
    """Divide samples of `lengths[n]` tokens into packs: arrays of sample indices, each index in exactly one.

    No pack holds more than `capacity` tokens or `max_documents` samples. The same seed gives the same packs; another
    seed gives other company and another order. ValueError if a sample is empty or longer than `capacity`.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if max_documents < 1:
        raise ValueError(f"pack: expected max_documents >= 1, got {max_documents}")
    unfit = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if len(unfit):
        first = unfit[0]
        raise ValueError(f"pack: expected samples of 1 to {capacity} tokens, got {lengths[first]} in sample {first}")
    if not len(lengths):
        return []

    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(lengths))  # decides between equal lengths, because the sorts below are stable
    blurred = lengths[shuffled] * np.exp(BLUR * rng.standard_normal(len(lengths)))
    exact = _best_fit(lengths, shuffled[np.argsort(-lengths[shuffled], kind="stable")], capacity, max_documents)
    mixed = _best_fit(lengths, shuffled[np.argsort(-blurred, kind="stable")], capacity, max_documents)
    pack_of = mixed if mixed.max() + 1 <= (exact.max() + 1) * (1 + BLUR_COST) else exact

    members = np.split(np.argsort(pack_of, kind="stable"), np.cumsum(np.bincount(pack_of))[:-1])
    return [members[i] for i in rng.permutation(len(members))]


def _best_fit(lengths: np.ndarray, order: np.ndarray, capacity: int, max_documents: int) -> np.ndarray:
    """Put samples, taken in `order`, each into the fullest pack that has room; returns pack_of[n]."""
    open_packs = _OpenPacks(capacity)
    documents: list[int] = []  # samples in each pack
    chosen = []
    for length in lengths[order].tolist():
        fullest, room = open_packs.take(length) or (len(documents), capacity)
        if fullest == len(documents):
            documents.append(0)
        documents[fullest] += 1
        chosen.append(fullest)
        if room > length and documents[fullest] < max_documents:
            open_packs.put(fullest, room - length)
    pack_of = np.empty(len(lengths), dtype=np.int64)
    pack_of[order] = chosen
    return pack_of


class _OpenPacks:
    """Packs by the room they have left. Bit r % w of `words[r // w]` is set while some pack has room r.

    Bit i of `summary` is set while `words[i]` is not 0.
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


@dataclass
class Batch:
    """One pack of n samples, T tokens and S supervised targets: token t predicts token t + 1 of the same sample."""

    input_ids: torch.Tensor  # int64[T]
    position_ids: torch.Tensor  # int64[T], from 0 in each sample
    cu_seqlens: torch.Tensor  # int32[n + 1], where samples begin; the last entry is T
    max_seqlen: int  # tokens of the longest sample
    supervised_rows: torch.Tensor  # int64[S], the t whose next token is supervised
    targets: torch.Tensor  # int64[S], those next tokens
    weights: torch.Tensor  # float32[S], the weight of each target's sample
    source: torch.Tensor  # int16[n]
    tokens: int  # T, without what fills the batch up
    weight_sum: float  # sum of weights, on the host, so that normalising a step needs no synchronisation
    tempered: torch.Tensor | None = None  # bool[S], targets whose loss is weighted by its own probability (retention/token_weighting.py)
    counted: torch.Tensor | None = None  # int64[K], which supervised rows, or tokens, a divergence counts (trainer/retention/kl.py)
    counted_weights: torch.Tensor | None = None  # float32[K], the weight of each one's sample
    reference: Batch | None = None  # the samples of those alone, a pack for the base
    base_states: torch.Tensor | None = None  # instead of it, [K, W]: what the base made of it before (trainer/retention/cached_base.py)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self._map(torch.Tensor.pin_memory)

    def _map(self, move) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: move(value) for name, value in values.items() if isinstance(value, torch.Tensor)},
                       **{name: value._map(move) for name, value in values.items() if isinstance(value, Batch)})


def collate(samples: Sequence[tuple]) -> Batch:
    """Lay samples (input_ids int32[len], supervised bool[len], weight, source, ...) end to end, in the order given.

    A sample's first token is never a target: nothing precedes it. S may be 0. ValueError without samples, or with an
    empty one.
    """
    lengths = np.array([len(input_ids) for input_ids, *_ in samples], dtype=np.int64)
    if not lengths.size or not lengths.all():
        raise ValueError(f"collate: expected one or more samples of at least 1 token, got lengths {lengths.tolist()}")
    input_ids = np.concatenate([sample[0] for sample in samples]).astype(np.int64)  # (T,)
    supervised = np.concatenate([sample[1] for sample in samples]).astype(bool)  # (T,)
    weights = np.array([sample[2] for sample in samples], dtype=np.float32)  # (n,)
    source = np.array([sample[3] for sample in samples], dtype=np.int16)  # (n,)

    starts = np.concatenate([[0], np.cumsum(lengths)])  # (n + 1,)
    sample_of = np.repeat(np.arange(len(lengths)), lengths)  # (T,)
    supervised[starts[:-1]] = False
    target_rows = np.flatnonzero(supervised)  # (S,)
    target_weights = weights[sample_of[target_rows]]
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(np.arange(len(input_ids)) - starts[sample_of]),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        supervised_rows=torch.from_numpy(target_rows - 1),
        targets=torch.from_numpy(input_ids[target_rows]),
        weights=torch.from_numpy(target_weights),
        source=torch.from_numpy(source),
        tokens=len(input_ids),
        weight_sum=float(target_weights.sum(dtype=np.float64)),
    )


class Multiples(NamedTuple):
    """What a batch is filled up to multiples of: its tokens, and its supervised rows."""

    tokens: int
    rows: int


UNFILLED = Multiples(1, 1)


def filled(batch: Batch, multiples: Multiples, capacity: int) -> Batch:
    """The same with one more sample that nothing reads, and with supervised rows of weight 0; of no more than `capacity` tokens. The pack
    for the base alike."""
    tokens = max(0, min(-batch.tokens % multiples.tokens, capacity - batch.tokens))
    rows = -len(batch.targets) % multiples.rows
    if tokens:
        batch = replace(
            batch, input_ids=_longer(batch.input_ids, tokens), max_seqlen=max(batch.max_seqlen, tokens),
            position_ids=torch.cat([batch.position_ids, torch.arange(tokens)]),
            cu_seqlens=torch.cat([batch.cu_seqlens, batch.cu_seqlens.new_tensor([batch.tokens + tokens])]))
    if rows:
        by_row = {name: getattr(batch, name) for name in ("supervised_rows", "targets", "weights", "tempered")}
        batch = replace(batch, **{name: None if values is None else _longer(values, rows) for name, values in by_row.items()})
    return batch if batch.reference is None else replace(batch, reference=filled(batch.reference, multiples, capacity))


def _longer(values: torch.Tensor, by: int) -> torch.Tensor:
    """With zeros at its end."""
    return torch.cat([values, values.new_zeros(by)])
