"""Choose the samples of each epoch from any number of domain and replay sources.

Each source is one fixed permutation of its samples, repeated without end, and an epoch is the interval of it between
two boundaries. Consecutive epochs take consecutive intervals: a source that gives half of itself gives the other half
next time, every sample is seen before any is seen again, and a pool smaller than its share repeats as whole passes.

    domain source i, n_i samples, weight w_i    epoch e begins at sample  b_i(e) = round(e w_i n_i)
    replay source j, share s_j, ratio r         epoch e begins where j has given  r / (1 - r) s_j D(e)  samples or tokens

where D(e) is what the domain has given before epoch e, and s_j is proportional to weight times size. Boundaries come
from totals since the first epoch, so rounding never adds up (a source is within one sample of its share) and any epoch
is computed directly, without those before it. Without a ratio, replay sources follow the domain's rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from trainer.errors import UserError


@dataclass(frozen=True)
class MixtureSource:
    """The role and the weight of a source in the mixture."""

    name: str
    role: Literal["domain", "replay"]
    weight: float = 1.0  # times each sample is seen per epoch; under a ratio, weighs replay sources against each other


@dataclass(frozen=True)
class SourceShare:
    """The contribution of one source to one epoch."""

    name: str
    role: str
    samples: int  # of the source
    epoch_samples: int  # that the epoch sees
    epoch_tokens: int
    share_samples: float  # of the epoch's samples
    share_tokens: float  # of the epoch's tokens
    repeats: float  # passes over the source: 0.5 is half of it, 2.0 all of it twice


class Mixture:
    """The samples of all sources, mixed for each epoch as `seed` decides.

    lengths[n]: tokens of each sample; sources[n]: its index into `parts`. `ratio` is the replay share of each epoch's
    samples or tokens (`unit`); None takes every replay sample `weight` times. Raises UserError if no such mix exists.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        sources: np.ndarray,
        parts: Sequence[MixtureSource],
        ratio: float | None = None,
        unit: Literal["samples", "tokens"] = "samples",
        seed: int = 0,
    ):
        self.parts, self.ratio, self.unit, self.seed = list(parts), ratio, unit, seed
        lengths, sources = np.asarray(lengths, dtype=np.int64), np.asarray(sources)
        by_source = np.argsort(sources, kind="stable")  # their samples in order, source after source
        bounds = np.searchsorted(sources[by_source], np.arange(len(self.parts) + 1))
        self.streams = [
            _Stream(lengths, by_source[low:high], np.random.default_rng([seed, 0, i]))
            for i, (low, high) in enumerate(zip(bounds, bounds[1:]))
        ]
        self._check()

    def epoch(self, epoch: int) -> np.ndarray:
        """Return the indices of the samples of epoch `epoch` (from 0), in a random order: int64[samples]."""
        starts, ends = self._boundaries(epoch), self._boundaries(epoch + 1)
        seen = [stream.between(start, end) for stream, start, end in zip(self.streams, starts, ends)]
        return np.random.default_rng([self.seed, 1, epoch]).permutation(np.concatenate(seen))

    def passes(self, epoch: int) -> tuple[int, ...] | None:
        """Return how often an epoch sees each source; None where some of a source's samples come once more."""
        lengths = [end - start for start, end in zip(self._boundaries(epoch), self._boundaries(epoch + 1))]
        passes = [divmod(length, max(stream.size, 1)) for length, stream in zip(lengths, self.streams)]
        return None if any(rest for _, rest in passes) else tuple(whole for whole, _ in passes)

    def shares(self, epoch: int) -> list[SourceShare]:
        """Return each source's share of epoch `epoch`, in the order of the parts."""
        starts, ends = self._boundaries(epoch), self._boundaries(epoch + 1)
        samples = [end - start for start, end in zip(starts, ends)]
        tokens = [stream.tokens(b) - stream.tokens(a) for stream, a, b in zip(self.streams, starts, ends)]
        return [
            SourceShare(
                name=part.name,
                role=part.role,
                samples=stream.size,
                epoch_samples=samples[i],
                epoch_tokens=tokens[i],
                share_samples=samples[i] / sum(samples),
                share_tokens=tokens[i] / sum(tokens),
                repeats=samples[i] / max(stream.size, 1),
            )
            for i, (part, stream) in enumerate(zip(self.parts, self.streams))
        ]

    def _boundaries(self, epoch: int) -> list[int]:
        """Count the samples that each source has given before epoch `epoch` begins."""
        boundaries = [_round(epoch * part.weight * stream.size) for part, stream in zip(self.parts, self.streams)]
        if self.ratio is None:
            return boundaries
        domain = sum(self.streams[i].measure(boundaries[i], self.unit) for i in self._indices("domain"))
        claims = {
            i: self.parts[i].weight * self.streams[i].measure(self.streams[i].size, self.unit)
            for i in self._indices("replay")
        }
        replay = self.ratio / (1 - self.ratio) * domain
        for i, claim in claims.items():
            boundaries[i] = self.streams[i].position(replay * claim / sum(claims.values()), self.unit)
        return boundaries

    def _indices(self, role: str) -> list[int]:
        """Return the indices of the sources of this role that have samples."""
        return [i for i, part in enumerate(self.parts) if part.role == role and self.streams[i].size]

    def _check(self) -> None:
        for part in self.parts:
            if not 0 < part.weight < math.inf:
                raise UserError(f"source {part.name}: expected a weight above 0, got {part.weight}; "
                                "to train without this source, remove it")
        domain = self._indices("domain")
        if not domain:
            raise UserError("data.train: expected at least one domain sample to train on, found none; "
                            "check the path, and how many samples were dropped")
        largest = max(domain, key=lambda i: self.parts[i].weight * self.streams[i].size)
        part, size = self.parts[largest], self.streams[largest].size
        if part.weight * size < 1:
            raise UserError(f"source {part.name}: expected at least one sample per epoch, "
                            f"got weight {part.weight} of {size} samples; raise the weight")
        if self.ratio is None:
            return
        if not 0 <= self.ratio < 1:
            raise UserError(f"replay.ratio: expected a share of the mix, 0 <= ratio < 1, got {self.ratio}")
        if self.ratio > 0 and not self._indices("replay"):
            raise UserError(f"replay.ratio: expected replay samples for a share of {self.ratio}, found none; "
                            "set replay.data, or remove the ratio")


class _Stream:
    """One source's samples in an order fixed by the seed, repeated without end.

    A position in it is a number of samples.
    """

    def __init__(self, lengths: np.ndarray, members: np.ndarray, rng: np.random.Generator):
        self.order = rng.permutation(members).astype(np.int64)
        self.size = len(members)
        self.cumulative = np.concatenate([[0], np.cumsum(lengths[self.order])])  # tokens before each sample of a pass

    def between(self, start: int, end: int) -> np.ndarray:
        """Return the samples at positions start ... end - 1."""
        return self.order[np.arange(start, end) % max(self.size, 1)]

    def tokens(self, position: int) -> int:
        """Count the tokens before `position`."""
        passes, rest = divmod(position, max(self.size, 1))
        return int(passes * self.cumulative[-1] + self.cumulative[rest])

    def measure(self, position: int, unit: str) -> int:
        """Count the samples or tokens before `position`."""
        return position if unit == "samples" else self.tokens(position)

    def position(self, amount: float, unit: str) -> int:
        """Return the position whose measure is nearest to `amount`: a sample counts from half of it on."""
        if unit == "samples":
            return _round(amount)
        passes, rest = divmod(amount, int(self.cumulative[-1]))
        middles = (self.cumulative[:-1] + self.cumulative[1:]) / 2
        return int(passes) * self.size + int(np.searchsorted(middles, rest, side="right"))


def _round(x: float) -> int:
    """Round to the nearest whole number, halves up."""
    return math.floor(x + 0.5)
