"""Fair timing of several lines of work in one process.

Every round runs each line once, for the same number of steps, in a freshly shuffled order, so that whatever drifts (clock speed,
caches, neighbours on the machine) falls on all of them alike. A line's rate is the median over rounds, its spread the 20th and
80th percentiles. The ratio of two lines is that of their medians; its interval comes from resampling rounds, both lines' samples
of a round together (paired bootstrap, Efron and Tibshirani 1993). A line timed against itself (A/A) must give 1 within it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

RESAMPLES = 4000
Samples = Sequence[tuple[np.ndarray, np.ndarray]]  # input_ids int[L] and supervised bool[L] of each
AGAIN = " (A/A)"  # ends the name of a line that is timed twice
WARMUP = 2  # steps of each line before the first round


@dataclass(frozen=True)
class StepResult:
    """What one training step did. A real token is one of the data's own; padding is what was computed beside them."""

    loss: float
    tokens: int
    supervised: int
    padding: int
    flops: float  # useful ones, by the convention of `trainer.metrics.throughput`


def counted(samples: Samples, loss: float, computed: int, size) -> StepResult:
    """The result of a step over `samples` that ran `computed` positions through a model of `size`."""
    lengths = [len(ids) for ids, _ in samples]
    tokens, supervised = sum(lengths), sum(int(mask[1:].sum()) for _, mask in samples)
    return StepResult(loss, tokens, supervised, computed - tokens, size.flops(tokens, supervised, sum(n * n for n in lengths)))


@dataclass
class Line:
    """Something to time: `step` processes one batch, updates the weights, and says what it did."""

    name: str
    step: Callable[[], StepResult]
    note: str = ""


@dataclass(frozen=True)
class Sample:
    """One line's share of one round."""

    cpu: float  # CPU-seconds of the whole process: all threads
    wall: float  # seconds
    steps: int
    tokens: int
    supervised: int
    padding: int
    flops: float


@dataclass(frozen=True)
class Interval:
    """A figure between two bounds."""

    value: float
    low: float
    high: float


def interleave(
    lines: Sequence[Line], rounds: int, steps: int, seed: int = 0,
    cpu: Callable[[], float] = time.process_time, wall: Callable[[], float] = time.perf_counter,
) -> dict[str, list[Sample]]:
    """Run `rounds` rounds of `steps` steps of every line, in shuffled order; samples by line name, in order of rounds."""
    if len({line.name for line in lines}) < len(lines):
        raise ValueError(f"interleave: expected lines of different names, got {[line.name for line in lines]}")
    for line in lines:
        for _ in range(WARMUP):
            line.step()
    order = np.random.default_rng(seed)
    samples: dict[str, list[Sample]] = {line.name: [] for line in lines}
    for _ in range(rounds):
        for i in order.permutation(len(lines)):
            samples[lines[i].name].append(_measure(lines[i], steps, cpu, wall))
    return samples


def _measure(line: Line, steps: int, cpu: Callable[[], float], wall: Callable[[], float]) -> Sample:
    gc.collect()  # what the line before left behind is not this one's to clear
    cpu_start, wall_start = cpu(), wall()
    done = [line.step() for _ in range(steps)]
    cpu_end, wall_end = cpu(), wall()
    totals = {name: sum(getattr(s, name) for s in done) for name in ("tokens", "supervised", "padding", "flops")}
    return Sample(cpu_end - cpu_start, wall_end - wall_start, steps, **totals)


def product(dtype: torch.dtype, size: int = 768) -> Line:
    """A square matrix product: what this machine can do in the same rounds, for a line's FLOP rate to be a share of."""
    a, b = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.empty_like(a)

    def step() -> StepResult:
        for _ in range(20):
            torch.mm(a, b, out=out)
        return StepResult(0.0, 0, 0, 0, 20 * 2.0 * size**3)

    return Line(f"matrix product, {str(dtype).removeprefix('torch.')}", step)


def again(line: Line) -> Line:
    """The same line under a second name, for an A/A comparison."""
    return Line(line.name + AGAIN, line.step, "the same line timed twice")


def tokens_per_cpu_second(sample: Sample) -> float:
    return sample.tokens / sample.cpu


def spread(samples: Sequence[Sample], figure: Callable[[Sample], float] = tokens_per_cpu_second) -> Interval:
    """Median of a figure over rounds, with its 20th and 80th percentiles."""
    low, middle, high = np.percentile([figure(s) for s in samples], [20, 50, 80])
    return Interval(float(middle), float(low), float(high))


def ratio(
    ours: Sequence[Sample], base: Sequence[Sample], figure: Callable[[Sample], float] = tokens_per_cpu_second,
    confidence: float = 0.95, seed: int = 0,
) -> Interval:
    """median(ours) / median(base), and its bootstrap interval over rounds."""
    a, b = np.array([figure(s) for s in ours]), np.array([figure(s) for s in base])
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"ratio: expected two or more rounds of both lines, got {len(a)} and {len(b)}")
    rounds = np.random.default_rng(seed).integers(len(a), size=(RESAMPLES, len(a)))
    resampled = np.median(a[rounds], axis=1) / np.median(b[rounds], axis=1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Interval(float(np.median(a) / np.median(b)), float(low), float(high))


def raw(samples: dict[str, list[Sample]]) -> dict[str, list[dict]]:
    """Samples as plain values, for a record."""
    return {name: [asdict(sample) for sample in line] for name, line in samples.items()}
