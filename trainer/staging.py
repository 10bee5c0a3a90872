"""A step's packs, collated on the CPU and queued for the device ahead of the step before them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from trainer.distributed import World
from trainer.metrics import Phases
from trainer.packing import Batch, collate
from trainer.plan import Plan, Step
from trainer.samples import Samples


@dataclass
class Counts:
    """Host-side sums over steps."""

    tokens: int = 0
    supervised: int = 0
    squared_lengths: int = 0
    capacity: int = 0  # tokens that the packs could have held

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.tokens + other.tokens, self.supervised + other.supervised,
                      self.squared_lengths + other.squared_lengths, self.capacity + other.capacity)


@dataclass
class Work:
    """One step's packs for this rank, on the device, and the whole step's host-side counts."""

    step: int
    batches: list[Batch]
    weight: float
    counts: Counts
    sources: list[str]


def stage(plan: Plan, samples: Samples, first: int, world: World, device: torch.device, phases: Phases) -> Iterator[Work]:
    """The work of steps first .. total - 1 for this rank, each one's copy started before the step before it runs."""
    upcoming = None
    for step in range(first, plan.total):
        with phases("data"):
            following = prepare(plan, samples, step, world, device)
        if upcoming:
            yield upcoming
        upcoming = following
    if upcoming:
        yield upcoming


def prepare(plan: Plan, samples: Samples, step: int, world: World, device: torch.device) -> Work:
    """Collate this rank's packs of a step; count the whole step."""
    packs = plan[step]
    indices = np.concatenate(packs)
    lengths = samples.lengths[indices].astype(np.int64)
    counts = Counts(tokens=int(lengths.sum()), supervised=int(samples.supervised[indices].sum()),
                    squared_lengths=int((lengths**2).sum()), capacity=len(packs) * plan.batch.tokens_per_pack)
    sources = [samples.names[s] for s in np.unique(samples.sources[indices])]
    mine = batches(samples, packs[world.rank :: world.size], device)
    return Work(step, mine, max(supervised_weight(samples, indices), 1e-8), counts, sources)


def supervised_weight(samples: Samples, indices: np.ndarray) -> float:
    """Sum of the weights of the supervised tokens of these samples."""
    return float((samples.supervised[indices] * samples.weights[indices].astype(np.float64)).sum())


def batches(samples: Samples, packs: Step, device: torch.device) -> list[Batch]:
    collated = (collate([(*samples[i], samples.weights[i], samples.sources[i]) for i in pack]) for pack in packs)
    if device.type == "cpu":
        return list(collated)
    return [batch.pin_memory().to(device, non_blocking=True) for batch in collated]
