"""A step's packs, collated on the CPU and queued for the device ahead of the step before them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from trainer.data.batch import NO_PADDING, PackedBatch, PadTo, batches, collate, pad_batch
from trainer.data.samples import Piece, Samples
from trainer.data.step_plan import StepPlan
from trainer.metrics.timers import Phases
from trainer.retention.kl import KlToBase
from trainer.runtime.distributed import Distributed


@dataclass
class TokenCounts:
    """Host-side sums over steps."""

    tokens: int = 0
    supervised: int = 0
    squared_lengths: int = 0
    capacity: int = 0  # tokens that the packs could have held
    base_tokens: int = 0  # that the base reads beside the model, in the step itself
    base_supervised: int = 0
    base_squared_lengths: int = 0

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))


@dataclass
class StepWork:
    """One step's packs for this rank, on the device, and the whole step's host-side counts."""

    step: int
    batches: list[PackedBatch]
    weight: float
    counts: TokenCounts
    sources: list[str]
    kl_weight_sum: float = 0.0  # sum of the KL rows' weights, over all packs and ranks
    divergence: Tensor | None = field(default=None, compare=False)  # this rank's share of it, once the step has run; None: none counted


def prefetch_steps(plan: StepPlan, samples: Samples, first: int, dist: Distributed, device: torch.device, phases: Phases,
          retention: KlToBase | None = None, multiples: PadTo = NO_PADDING) -> Iterator[StepWork]:
    """The work of steps first .. total - 1 for this rank, each one's copy started before the step before it runs."""
    upcoming = None
    for step in range(first, plan.total):
        with phases("data"):
            following = prepare(plan, samples, step, dist, device, retention, multiples)
        if upcoming:
            yield upcoming
        upcoming = following
    if upcoming:
        yield upcoming


def prepare(plan: StepPlan, samples: Samples, step: int, dist: Distributed, device: torch.device, retention: KlToBase | None = None,
            multiples: PadTo = NO_PADDING) -> StepWork:
    """Collate this rank's packs of a step, filled up to `multiples`; count the whole step, without what fills it."""
    packs = plan[step]
    indices = np.concatenate(packs)
    kl_samples = indices[retention.kl_sources[samples.sources[indices]]] if retention else indices[:0]
    targets = retention.targets(samples, kl_samples) if retention else samples.supervised[kl_samples]
    read = kl_samples[:0] if retention and retention.stored else kl_samples  # what is stored meets only the head
    counts = TokenCounts(*totals(samples, indices, samples.supervised[indices]), len(packs) * plan.batch.tokens_per_pack,
                    *totals(samples, read, targets))
    sources = [samples.names[s] for s in np.unique(samples.sources[indices])]

    def lay(pieces: list[Piece]) -> PackedBatch:
        return pad_batch((retention.collate if retention else collate)(pieces), multiples, plan.batch.tokens_per_pack)

    mine = batches(samples, packs[dist.rank :: dist.size], device, lay)
    weight = max(supervised_weight(samples, indices), 1e-8)
    return StepWork(step, mine, weight, counts, sources, kl_weight_sum=weight_of(samples, kl_samples, targets))


def totals(samples: Samples, indices: np.ndarray, targets: np.ndarray) -> tuple[int, int, int]:
    """Tokens of these samples, so many targets, and sum(len^2)."""
    lengths = samples.lengths[indices].astype(np.int64)
    return int(lengths.sum()), int(targets.sum()), int((lengths**2).sum())


def supervised_weight(samples: Samples, indices: np.ndarray) -> float:
    """Sum of the weights of the supervised tokens of these samples."""
    return weight_of(samples, indices, samples.supervised[indices])


def weight_of(samples: Samples, indices: np.ndarray, targets: np.ndarray) -> float:
    return float((targets * samples.weights[indices].astype(np.float64)).sum())
