"""Collate the samples of a pack into one flat batch, and pad it to few shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.data.samples import Piece, Samples


@dataclass
class PackedBatch:
    """One pack of n samples, T tokens and S supervised targets.

    Token t predicts token t + 1 of the same sample.
    """

    input_ids: Tensor  # int64[T]
    position_ids: Tensor  # int64[T], from 0 in each sample
    cu_seqlens: Tensor  # int32[n + 1], where samples begin; the last entry is T
    max_seqlen: int  # tokens of the longest sample
    supervised_rows: Tensor  # int64[S], the t whose next token is supervised
    targets: Tensor  # int64[S], those next tokens
    weights: Tensor  # float32[S], the weight of each target's sample times that of its turn
    source: Tensor  # int32[n]
    tokens: int  # T, without padding
    weight_sum: float  # sum of weights, on the host, so that normalising a step needs no synchronisation
    dft_mask: Tensor | None = None  # bool[S], targets whose loss DFT weights by its own probability; None: no target
    eaft_mask: Tensor | None = None  # bool[S], targets whose loss EAFT weights by the entropy of the prediction; None: no target
    kl: KlRows | None = None  # None: the KL to the base counts no token of this pack

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """Return the batch with its tensors on `device`."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """Return the batch with its tensors in pinned memory, from which copies to a GPU are asynchronous."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, move: Callable[[Tensor], Tensor]) -> PackedBatch:
        return replace(
            self,
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            cu_seqlens=move(self.cu_seqlens),
            supervised_rows=move(self.supervised_rows),
            targets=move(self.targets),
            weights=move(self.weights),
            source=move(self.source),
            dft_mask=None if self.dft_mask is None else move(self.dft_mask),
            eaft_mask=None if self.eaft_mask is None else move(self.eaft_mask),
            kl=None if self.kl is None else self.kl.with_tensors(move),
        )


@dataclass
class KlRows:
    """The K rows of a pack at which the KL to the base is computed, and the base's side of it.

    The base's hidden states are computed from `reference`, or come from the cache as `cached_states`: one of the two is set
    (trainer/retention/kl.py).
    """

    rows: Tensor  # int64[K], indices into `supervised_rows`; with `retention.kl_positions: all`, into the pack's tokens
    weights: Tensor  # float32[K], the weight of each row's sample
    targets: Tensor | None = None  # int64[K], the supervised token that each row predicts, -1 for none; with `retention.kl_mask_target`
    reference: PackedBatch | None = None  # the samples that these rows are in, packed for the base
    reference_rows: Tensor | None = None  # int64[K], the rows as tokens of `reference`
    cached_states: Tensor | None = None  # [K, W], the base's last hidden states at the rows

    def with_tensors(self, move: Callable[[Tensor], Tensor]) -> KlRows:
        """Return the rows with every tensor replaced by what `move` returns for it."""
        return KlRows(
            rows=move(self.rows),
            weights=move(self.weights),
            targets=None if self.targets is None else move(self.targets),
            reference=None if self.reference is None else self.reference._with_tensors(move),
            reference_rows=None if self.reference_rows is None else move(self.reference_rows),
            cached_states=None if self.cached_states is None else move(self.cached_states),
        )


def collate(samples: Sequence[Piece]) -> PackedBatch:
    """Concatenate samples into one batch, in the order given.

    A sample's first token is never a target: nothing precedes it. S may be 0. Raises ValueError without samples, or with an empty one.
    """
    lengths = np.array([len(sample.input_ids) for sample in samples], dtype=np.int64)
    if not lengths.size or not lengths.all():
        raise ValueError(f"collate: expected one or more samples of at least 1 token, got lengths {lengths.tolist()}")
    input_ids = np.concatenate([sample.input_ids for sample in samples]).astype(np.int64)  # (T,)
    supervised = np.concatenate([sample.supervised for sample in samples]).astype(bool)  # (T,)
    weights = np.array([sample.weight for sample in samples], dtype=np.float32)  # (n,)
    source = np.array([sample.source for sample in samples], dtype=np.int32)  # (n,)

    starts = np.concatenate([[0], np.cumsum(lengths)])  # (n + 1,)
    sample_of = np.repeat(np.arange(len(lengths)), lengths)  # (T,)
    supervised[starts[:-1]] = False
    target_rows = np.flatnonzero(supervised)  # (S,)
    target_weights = weights[sample_of[target_rows]]
    if any(sample.turn_weights is not None for sample in samples):
        of_turns = [np.ones(n, np.float32) if sample.turn_weights is None else sample.turn_weights for sample, n in zip(samples, lengths)]
        target_weights = target_weights * np.concatenate(of_turns)[target_rows]
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
    """Multiples to which a batch's sizes are padded."""

    tokens: int
    rows: int  # supervised rows


NO_PADDING = PadTo(1, 1)


def pad_batch(batch: PackedBatch, multiples: PadTo, capacity: int) -> PackedBatch:
    """Pad a batch, and the KL reference in it, to multiples of tokens and rows.

    Appends one dummy sample that no row reads, up to `capacity` tokens in all, and supervised rows of weight 0. A batch that needs no
    padding is returned itself.
    """
    tokens = max(0, min(-batch.tokens % multiples.tokens, capacity - batch.tokens))
    rows = -len(batch.targets) % multiples.rows
    if tokens:
        batch = replace(
            batch,
            input_ids=_pad(batch.input_ids, tokens),
            position_ids=torch.cat([batch.position_ids, torch.arange(tokens)]),
            cu_seqlens=torch.cat([batch.cu_seqlens, batch.cu_seqlens.new_tensor([batch.tokens + tokens])]),
            max_seqlen=max(batch.max_seqlen, tokens),
        )
    if rows:
        batch = replace(
            batch,
            supervised_rows=_pad(batch.supervised_rows, rows),
            targets=_pad(batch.targets, rows),
            weights=_pad(batch.weights, rows),
            dft_mask=None if batch.dft_mask is None else _pad(batch.dft_mask, rows),
            eaft_mask=None if batch.eaft_mask is None else _pad(batch.eaft_mask, rows),
        )
    if batch.kl is None or batch.kl.reference is None:
        return batch
    return replace(batch, kl=replace(batch.kl, reference=pad_batch(batch.kl.reference, multiples, capacity)))


def _pad(values: Tensor, count: int) -> Tensor:
    """Append `count` zeros."""
    return torch.cat([values, values.new_zeros(count)])


def batches(samples: Samples, packs: Sequence[np.ndarray], device: torch.device,
            collate_fn: Callable[[Sequence[Piece]], PackedBatch] = collate) -> list[PackedBatch]:
    """Collate packs of sample indices with `collate_fn` and copy them to the device."""
    collated = (collate_fn([samples.piece(i) for i in pack]) for pack in packs)
    if device.type == "cpu":
        return list(collated)
    return [batch.pin_memory().to(device, non_blocking=True) for batch in collated]
