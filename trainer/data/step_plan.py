"""Plan the steps of a run: epochs of steps, steps of packs, packs of sample indices.

The plan is a function of (data, configuration, seed) and nothing else. So a resumed run, and every rank of a parallel one, finds
its place from the number of the step, with no state to save and nothing to send.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from trainer.config import BatchSize
from trainer.data.curriculum import Curriculum, steps_in_order
from trainer.data.mixture import Mixture
from trainer.data.packing import pack, settled_count

Step = list[np.ndarray]  # packs, each the indices of its samples


@dataclass(frozen=True)
class Place:
    """The place of a step in its epoch."""

    epoch: int
    step: int  # within the epoch


class StepPlan:
    """Steps 0 ... total - 1 of a run over `epochs` epochs, the last of which may be a fraction.

    With a curriculum every epoch goes from easy to hard.
    """

    def __init__(self, lengths: np.ndarray, mixture: Mixture, batch_size: BatchSize, epochs: float, max_steps: int | None, seed: int,
                 curriculum: Curriculum | None = None):
        self.lengths, self.mixture, self.batch_size, self.seed, self.curriculum = lengths, mixture, batch_size, seed, curriculum
        self._cached: tuple[int, list[Step]] | None = None
        self.packs_per_step = batch_size.tokens_per_step // batch_size.tokens_per_pack
        self._settled: dict[tuple[int, ...], int | None] = {}  # packs of an epoch with these passes over the sources
        self.starts = [0]  # first step of each epoch, then the end
        while len(self.starts) <= math.ceil(epochs) and (max_steps is None or self.starts[-1] < max_steps):
            epoch = len(self.starts) - 1
            share = min(1.0, epochs - epoch)
            self.starts.append(self.starts[-1] + max(1, round(share * self._count(epoch))))
        self.total = self.starts[-1] if max_steps is None else min(self.starts[-1], max_steps)

    def _count(self, epoch: int) -> int:
        """Count the steps of an epoch, without packing it where its number of packs is settled."""
        passes, batch_size = None if self.curriculum else self.mixture.passes(epoch), self.batch_size
        if passes is not None and passes not in self._settled:
            lengths = self.lengths[self.mixture.epoch(epoch)]
            self._settled[passes] = settled_count(lengths, batch_size.tokens_per_pack, batch_size.max_samples_per_pack)
        packs = self._settled.get(passes)
        return len(self.epoch(epoch)) if packs is None else math.ceil(packs / self.packs_per_step)

    def epoch(self, epoch: int) -> list[Step]:
        """Return all steps of one epoch; the last step may have fewer packs. The latest epoch is cached."""
        if self._cached is None or self._cached[0] != epoch:
            self._cached = epoch, self._steps(epoch)
        return self._cached[1]

    def _steps(self, epoch: int) -> list[Step]:
        indices, batch_size = self.mixture.epoch(epoch), self.batch_size
        if self.curriculum:
            indices = self.curriculum.in_order(indices)
            steps = steps_in_order(self.lengths[indices], batch_size.tokens_per_pack, batch_size.max_samples_per_pack, self.packs_per_step)
            return [[indices[members] for members in step] for step in steps]
        packs = pack(self.lengths[indices], batch_size.tokens_per_pack, batch_size.max_samples_per_pack, hash_seed(self.seed, epoch))
        packs = [indices[members] for members in packs]
        return [packs[i : i + self.packs_per_step] for i in range(0, len(packs), self.packs_per_step)]

    def place(self, step: int) -> Place:
        """Return the epoch of a step, and its number within the epoch."""
        epoch = bisect_right(self.starts, step) - 1
        return Place(epoch, step - self.starts[epoch])

    def __getitem__(self, step: int) -> Step:
        place = self.place(step)
        return self.epoch(place.epoch)[place.step]

    def seen(self) -> np.ndarray:
        """Return the indices of the samples that the steps see, ascending: int64[n]."""
        last, found = self.place(self.total - 1), np.zeros(len(self.lengths), dtype=bool)
        for epoch in range(last.epoch):
            found[self.mixture.epoch(epoch)] = True
        for step in self.epoch(last.epoch)[: last.step + 1]:
            found[np.concatenate(step)] = True
        return np.flatnonzero(found)

    def progress(self, done: int) -> float:
        """Return the number of epochs, with its fraction, that the first `done` steps complete."""
        place = self.place(done - 1)
        return place.epoch + (place.step + 1) / len(self.epoch(place.epoch))


def hash_seed(*parts: int) -> int:
    """Return an independent 32-bit seed for each tuple of numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
