"""Tell the layers of a model where the samples of the running pack begin.

The bounds are set around a call of the decoder and read by attention, by mixers and by the last layer. They are no keyword arguments of
the model's call: many models drop those on their way to the layers, and some have arguments of the same names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention import packed_attention


class Branches(NamedTuple):
    """Samples that begin alike, in a pack that has their common tokens once.

    Attention runs on the samples written out, E tokens in all; every other layer runs on the T tokens of the pack.
    """

    tokens: Tensor  # int64[E], the token of the pack at each place of the samples written out
    places: Tensor  # int64[T], a place of each token
    cu_seqlens: Tensor  # int32, where the samples written out begin; the last entry is E
    max_seqlen: int  # tokens of the longest


@dataclass
class Pack:
    """Bounds of n samples that lie end to end in one sequence of T tokens."""

    cu_seqlens: Tensor  # int32[n + 1], where samples begin; the last entry is T
    longest: Tensor  # [max_seqlen, 0], without memory: torch.compile keeps sizes symbolic, but compiles again for each value of an int
    rows: Tensor | None = None  # int64[S], the tokens that are asked for; None: all
    rows_are_selected: bool = False  # a last layer of ours has left the others out
    branches: Branches | None = None  # None: no samples share tokens

    @property
    def max_seqlen(self) -> int:
        """Return the number of tokens of the longest sample."""
        return self.longest.shape[0]


class _Running:
    pack: Pack | None = None


_running = _Running()  # not per thread: a GPU's backward pass, which may recompute layers, runs in a thread of its own


def running_pack() -> Pack | None:
    """Return the pack whose forward is running, or None where each row of a batch is one sample."""
    return _running.pack


@contextmanager
def run_pack(pack: Pack | None) -> Iterator[None]:
    """Make `pack` the running one inside this context."""
    before, _running.pack = _running.pack, pack
    try:
        yield
    finally:
        _running.pack = before


def pack_of(cu_seqlens: Tensor, max_seqlen: int, rows: Tensor | None = None, branches: Branches | None = None) -> Pack:
    """Return the pack with these bounds."""
    return Pack(cu_seqlens, torch.empty(max_seqlen, 0), rows, branches=branches)


def attend(pack: Pack, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """Compute the attention of q [T,H,D] to k and v [T,Hk,D] inside the samples of `pack`; return [T,H,D].

    `options` are those of `kernels.attention.packed_attention`.
    """
    if (branches := pack.branches) is None:
        return packed_attention(q, k, v, pack.cu_seqlens, pack.max_seqlen, **options)
    written_out = (x.index_select(0, branches.tokens) for x in (q, k, v))
    return packed_attention(*written_out, branches.cu_seqlens, branches.max_seqlen, **options).index_select(0, branches.places)


def checkpoint_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return the contexts of a checkpointed layer's forward, and of its recomputation in the same pack."""
    return nullcontext(), run_pack(running_pack())
