"""Lay out samples in packs so that what several begin with runs through the model once.

The choices of an item follow one prompt. A pack has the prompt's tokens once and each choice's after them, with positions as if it came
right after the prompt, and attention alone sees prompt and choice written out (`trainer.model.pack_context.Branches`). A sample's last
token predicts nothing that is scored, so it does not run at all: choices of one token cost no more than their prompt.

Shapes: T tokens of a pack, E tokens of its samples written out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.data.batch import PackedBatch, PadTo, collate
from trainer.data.samples import Piece
from trainer.evaluation.tokens import Sample
from trainer.model.pack_context import Branches


@dataclass
class Group:
    """Samples with one context: the tokens that all of them begin with."""

    context: np.ndarray  # int32[n]
    numbers: list[int] = field(default_factory=list)  # of the samples
    branches: list[np.ndarray] = field(default_factory=list)  # int32, what follows the context in each, without its last token

    @property
    def tokens(self) -> int:
        return len(self.context) + sum(map(len, self.branches))


class Layout(NamedTuple):
    """A pack of groups."""

    batch: PackedBatch  # its samples are the groups
    branches: Branches | None  # None: every group has one sample to run
    numbers: list[int]  # of the samples, in the order of the groups
    rows: list[np.ndarray]  # for each sample int64, the tokens of the pack that predict its scored tokens


def group_by_context(samples: Sequence[Sample], capacity: int, branch: bool) -> list[Group]:
    """Divide samples into groups of at most `capacity` tokens whose context runs once.

    With `branch` a context is all before a sample's scored end. Without it, or where other tokens than its end are scored, it is all but
    the last token, so that no branch has a token.
    """
    groups: list[Group] = []
    open_groups: dict[bytes, Group] = {}
    for i, sample in enumerate(samples):
        first = int(sample.scored.argmax())
        end = first if branch and sample.scored[first:].all() else len(sample.ids) - 1
        context, rest = sample.ids[:end], sample.ids[end:-1]
        group = open_groups.get(key := context.tobytes())
        if group is None or group.tokens + len(rest) > capacity:
            group = open_groups[key] = Group(context)
            groups.append(group)
        group.numbers.append(i)
        group.branches.append(rest)
    return groups


def lay_out(groups: Sequence[Group], samples: Sequence[Sample], capacity: int, multiples: PadTo) -> Layout:
    """Lay out groups end to end, padded to a multiple of tokens by a sample that nothing reads."""
    groups = [*groups, *_padding(sum(group.tokens for group in groups), capacity, multiples)]
    pieces, positions, written, rows, begin = [], [], [], [], 0
    for group in groups:
        ids = np.concatenate([group.context, *group.branches])
        pieces.append(Piece(ids, np.zeros(len(ids), bool)))
        length = len(group.context)
        starts = [*accumulate(map(len, group.branches), initial=length)]
        context = np.arange(length)
        places = [np.concatenate([context, np.arange(start, start + len(rest))]) for start, rest in zip(starts, group.branches)]
        rows += [begin + place[samples[i].scored[1:]] for i, place in zip(group.numbers, places)]
        positions += [context, *(length + np.arange(len(rest)) for rest in group.branches)]
        written += [begin + place for place, rest in zip(places, group.branches) if len(rest)] or [begin + context]
        begin += len(ids)
    batch = replace(collate(pieces), position_ids=torch.from_numpy(np.concatenate(positions)))
    return Layout(batch, _branches(written, begin) if len(written) > len(groups) else None,
                  [i for group in groups for i in group.numbers], rows)


def _padding(tokens: int, capacity: int, multiples: PadTo) -> list[Group]:
    """Return a group of no sample that fills `tokens` up to a multiple, or none."""
    missing = min(-tokens % multiples.tokens, capacity - tokens)
    return [Group(np.zeros(missing, np.int32))] if missing > 0 else []


def _branches(written: Sequence[np.ndarray], tokens: int) -> Branches:
    """Return the branches of a pack of `tokens` tokens, whose samples written out are these tokens of it."""
    lengths = [len(sample) for sample in written]
    order = torch.from_numpy(np.concatenate(written).astype(np.int64))
    places = torch.zeros(tokens, dtype=torch.int64)
    places[order] = torch.arange(len(order))
    return Branches(order, places, torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32), max(lengths))


def to_device(branches: Branches | None, device: torch.device) -> Branches | None:
    """Return the branches with their tensors on `device`."""
    return branches and Branches(*(part.to(device) if isinstance(part, Tensor) else part for part in branches))
