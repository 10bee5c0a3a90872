"""Prefetch steps: collate packs on the CPU and copy them to the device while the step before runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from trainer.data.batch import NO_PADDING, PackedBatch, PadTo, batches, collate, pad_batch
from trainer.data.samples import Piece, Samples
from trainer.data.step_plan import StepPlan
from trainer.metrics.timers import Phases
from trainer.retention.kl import KlToBase
from trainer.runtime.distributed import Distributed


@dataclass
class TokenCounts:
    """Sums over steps and ranks, known on the CPU, without padding."""

    tokens: int = 0
    supervised: int = 0
    squared_lengths: int = 0  # sum of squared sample lengths, for attention's FLOPs
    capacity: int = 0  # tokens that would fill the packs
    base_tokens: int = 0  # those that the base reads beside the model, in the step itself
    base_supervised: int = 0
    base_squared_lengths: int = 0

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass
class StepWork:
    """This rank's packs of one step, on the device, and sums over the whole step."""

    step: int
    batches: list[PackedBatch]
    weight_sum: float  # of the step's supervised tokens
    counts: TokenCounts
    sources: list[str]  # names of the sources that the step's samples are from
    kl_weight_sum: float = 0.0  # of the step's KL rows
    only_in_step: int = 0  # how many batches, at the end, belong to another rank and count nothing here

    @property
    def has_kl(self) -> bool:
        """Return whether any pack of the step, on any rank, has KL rows."""
        return self.kl_weight_sum > 0


@dataclass(frozen=True)
class StepLoader:
    """Makes the work of each step of a plan for this rank."""

    plan: StepPlan
    samples: Samples
    dist: Distributed
    device: torch.device
    kl: KlToBase | None = None
    pad_to: PadTo = NO_PADDING

    def prefetch(self, first: int, phases: Phases, end: int | None = None) -> Iterator[StepWork]:
        """Yield the work of steps first .. end - 1, up to the plan's last without an `end`.

        The copy of each to the device starts before the step ahead of it runs.
        """
        upcoming = None
        for step in range(first, min(end or self.plan.total, self.plan.total)):
            with phases("data"):
                following = self.load(step)
            if upcoming:
                yield upcoming
            upcoming = following
        if upcoming:
            yield upcoming

    def load(self, step: int) -> StepWork:
        """Collate and pad this rank's packs of a step, and count the tokens of the whole step."""
        samples, packs = self.samples, self.plan[step]
        indices = np.concatenate(packs)
        kl_indices, kl_targets = self._kl_targets(indices)
        base_reads = kl_indices[:0] if self.kl and self.kl.cached_states else kl_indices  # cached states meet only the head
        counts = TokenCounts(*totals(samples, indices, samples.supervised[indices]), len(packs) * self.plan.batch_size.tokens_per_pack,
                             *totals(samples, base_reads, kl_targets))
        own, only_in_step = self.dist.share(packs)
        return StepWork(
            step=step,
            batches=batches(samples, own, self.device, self._collate),
            weight_sum=supervised_weight(samples, self.kl.taught(samples, indices) if self.kl else indices) or 1.0,
            counts=counts,
            sources=[samples.names[source] for source in np.unique(samples.sources[indices])],
            kl_weight_sum=weight_of(samples, kl_indices, kl_targets),
            only_in_step=only_in_step)

    def _kl_targets(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return those of these samples that have KL rows, and how many each has."""
        if self.kl is None:
            return indices[:0], np.zeros(0, dtype=np.int64)
        chosen = indices[self.kl.kl_sources[self.samples.sources[indices]]]
        return chosen, self.kl.num_tokens(self.samples, chosen)

    def _collate(self, samples: Sequence[Piece]) -> PackedBatch:
        batch = self.kl.collate(samples) if self.kl else collate(samples)
        return pad_batch(batch, self.pad_to, self.plan.batch_size.tokens_per_pack)


def totals(samples: Samples, indices: np.ndarray, targets: np.ndarray) -> tuple[int, int, int]:
    """Return these samples' number of tokens, the sum of `targets`, and the sum of squared lengths."""
    lengths = samples.lengths[indices].astype(np.int64)
    return int(lengths.sum()), int(targets.sum()), int((lengths**2).sum())


def supervised_weight(samples: Samples, indices: np.ndarray) -> float:
    """Return the sum of the weights of these samples' supervised tokens."""
    return weight_of(samples, indices, samples.target_weights[indices])


def weight_of(samples: Samples, indices: np.ndarray, targets: np.ndarray) -> float:
    """Return the sum of weights of `targets[i]` tokens of each of these samples."""
    return float((targets * samples.weights[indices].astype(np.float64)).sum())
