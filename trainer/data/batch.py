"""Lay the samples of a pack end to end as one flat batch, and pad it to few shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch

from trainer.data.samples import Samples


@dataclass
class PackedBatch:
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
    reference: PackedBatch | None = None  # the samples of those alone, a pack for the base
    base_states: torch.Tensor | None = None  # instead of it, [K, W]: what the base made of it before (trainer/retention/cached_base.py)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        return self._map(torch.Tensor.pin_memory)

    def _map(self, move) -> PackedBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: move(value) for name, value in values.items() if isinstance(value, torch.Tensor)},
                       **{name: value._map(move) for name, value in values.items() if isinstance(value, PackedBatch)})


def collate(samples: Sequence[tuple]) -> PackedBatch:
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
    return PackedBatch(
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


class PadTo(NamedTuple):
    """What a batch is filled up to multiples of: its tokens, and its supervised rows."""

    tokens: int
    rows: int


NO_PADDING = PadTo(1, 1)


def pad_batch(batch: PackedBatch, multiples: PadTo, capacity: int) -> PackedBatch:
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
    return batch if batch.reference is None else replace(batch, reference=pad_batch(batch.reference, multiples, capacity))


def _longer(values: torch.Tensor, by: int) -> torch.Tensor:
    """With zeros at its end."""
    return torch.cat([values, values.new_zeros(by)])


def batches(samples: Samples, packs: Sequence[np.ndarray], device: torch.device,
            collate_fn: Callable[[list[tuple]], PackedBatch] = collate) -> list[PackedBatch]:
    """Collate packs of sample indices with `collate_fn` and copy them to the device."""
    collated = (collate_fn([samples.piece(i) for i in pack]) for pack in packs)
    if device.type == "cpu":
        return list(collated)
    return [batch.pin_memory().to(device, non_blocking=True) for batch in collated]
