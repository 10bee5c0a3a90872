"""Time several contenders in one process, in interleaved rounds.

A round runs each contender once, for an equal number of steps, in a freshly shuffled order, so that drift (clock speed, caches,
other processes) affects all of them alike. A contender's rate is the median over rounds, its spread the 20th and 80th percentiles.
The ratio of two contenders is that of their medians; its interval comes from resampling rounds, with both contenders' measurements
of a round kept together (paired bootstrap, Efron and Tibshirani 1993). The ratio of a contender to itself (A/A) shows the noise.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.gpu_timing import synchronize

RESAMPLES = 4000
TokenSamples = Sequence[tuple[np.ndarray, np.ndarray]]  # input_ids int[L] and supervised bool[L] of each
AGAIN = " (A/A)"  # ends the name of a contender that is timed twice
WARMUP = 2  # steps of each contender before the first round
AGREEMENT = {"fp32": 1e-4, "bf16": 2e-2}  # largest relative difference of two contenders' losses


def dtype_of(name: str) -> torch.dtype:
    """Return torch's dtype of a name in `AGREEMENT`."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


@dataclass(frozen=True)
class StepResult:
    """The outcome of one training step.

    A real token is one of the data's own; padding is computed beside them.
    """

    loss: float | Tensor  # a tensor stays on the device: reading it is no part of a step
    tokens: int
    supervised: int
    padding: int
    flops: float  # useful ones, by the convention of `trainer.metrics.throughput`


def step_result(samples: TokenSamples, loss: float | Tensor, computed: int, size) -> StepResult:
    """Return the result of a step over `samples` that ran `computed` positions through a model of `size`."""
    lengths = [len(ids) for ids, _ in samples]
    tokens, supervised = sum(lengths), sum(int(mask[1:].sum()) for _, mask in samples)
    return StepResult(loss, tokens, supervised, computed - tokens, size.flops(tokens, supervised, sum(n * n for n in lengths)))


@dataclass
class Contender:
    """An implementation to time: `step` processes one batch and updates the weights."""

    name: str
    step: Callable[[], StepResult]


@dataclass(frozen=True)
class Measurement:
    """One contender's share of one round."""

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
    contenders: Sequence[Contender], rounds: int, steps: int, seed: int = 0,
    cpu: Callable[[], float] = time.process_time, wall: Callable[[], float] = time.perf_counter,
) -> dict[str, list[Measurement]]:
    """Run `rounds` rounds of `steps` steps of every contender, in shuffled order.

    Returns measurements by name, in order of rounds. ValueError where two contenders have one name.
    """
    if len({one.name for one in contenders}) < len(contenders):
        raise ValueError(f"interleave: expected contenders of different names, got {[one.name for one in contenders]}")
    for one in contenders:
        for _ in range(WARMUP):
            one.step()
    order = np.random.default_rng(seed)
    measurements: dict[str, list[Measurement]] = {one.name: [] for one in contenders}
    for _ in range(rounds):
        for i in order.permutation(len(contenders)):
            measurements[contenders[i].name].append(_measure(contenders[i], steps, cpu, wall))
    return measurements


def _measure(contender: Contender, steps: int, cpu: Callable[[], float], wall: Callable[[], float]) -> Measurement:
    gc.collect()  # outside the clock: the garbage is the previous contender's
    synchronize()
    cpu_start, wall_start = cpu(), wall()
    done = [contender.step() for _ in range(steps)]
    synchronize()
    cpu_end, wall_end = cpu(), wall()
    totals = {name: sum(getattr(s, name) for s in done) for name in ("tokens", "supervised", "padding", "flops")}
    return Measurement(cpu_end - cpu_start, wall_end - wall_start, steps, **totals)


def matmul(dtype: torch.dtype, size: int = 768) -> Contender:
    """Return a contender that multiplies square matrices, for a FLOP rate to be a share of the machine's."""
    a, b = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.empty_like(a)

    def step() -> StepResult:
        for _ in range(20):
            torch.mm(a, b, out=out)
        return StepResult(0.0, 0, 0, 0, 20 * 2.0 * size**3)

    return Contender(f"matmul, {str(dtype).removeprefix('torch.')}", step)


def again(contender: Contender) -> Contender:
    """Return the contender under a second name, for an A/A comparison."""
    return Contender(contender.name + AGAIN, contender.step)


def relative(value: float, other: float) -> float:
    """Return the relative difference of a value from another: 0 between equal ones, infinity from 0."""
    return abs(value - other) / abs(other) if other else math.inf if value else 0.0


def tokens_per_cpu_second(measurement: Measurement) -> float:
    return measurement.tokens / measurement.cpu


def spread(measurements: Sequence[Measurement], figure: Callable[[Measurement], float] = tokens_per_cpu_second) -> Interval:
    """Return the median of a figure over rounds, with its 20th and 80th percentiles."""
    low, middle, high = np.percentile([figure(s) for s in measurements], [20, 50, 80])
    return Interval(float(middle), float(low), float(high))


def ratio(
    ours: Sequence[Measurement], base: Sequence[Measurement], figure: Callable[[Measurement], float] = tokens_per_cpu_second,
    confidence: float = 0.95, seed: int = 0,
) -> Interval:
    """Return median(ours) / median(base), and its bootstrap interval over rounds."""
    a, b = np.array([figure(s) for s in ours]), np.array([figure(s) for s in base])
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"ratio: expected two or more rounds of both contenders, got {len(a)} and {len(b)}")
    rounds = np.random.default_rng(seed).integers(len(a), size=(RESAMPLES, len(a)))
    resampled = np.median(a[rounds], axis=1) / np.median(b[rounds], axis=1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Interval(float(np.median(a) / np.median(b)), float(low), float(high))


def raw(measurements: dict[str, list[Measurement]]) -> dict[str, list[dict]]:
    """Return measurements as plain values, for a record."""
    return {name: [asdict(one) for one in rounds] for name, rounds in measurements.items()}
