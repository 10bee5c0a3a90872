"""Interleaving, medians and bootstrap intervals, on a clock that the test turns by hand."""

import math

import numpy as np
import pytest
import torch

from benchmarks.harness import timing
from benchmarks.harness.timing import Contender, Measurement, StepResult


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Collecting garbage between samples is slow in a process that has run other tests."""
    monkeypatch.setattr(timing.gc, "collect", lambda: 0)


class Clock:
    """Seconds that pass only when a step says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def steady(name: str, clock: Clock, seconds, tokens: int = 100) -> Contender:
    """A line whose every step takes `seconds` (a number, or a function that returns one) for `tokens` tokens."""
    def step() -> StepResult:
        clock.now += seconds() if callable(seconds) else seconds
        return StepResult(1.0, tokens, tokens // 2, 10, 5.0 * tokens)

    return Contender(name, step)


def samples(rates) -> list[Measurement]:
    return [Measurement(cpu=1.0, wall=2.0, steps=1, tokens=rate, supervised=0, padding=0, flops=0.0) for rate in rates]


def test_rates_are_those_of_the_clock():
    clock = Clock()
    taken = timing.interleave([steady("fast", clock, 0.5), steady("slow", clock, 2.0)], rounds=5, steps=3, cpu=clock, wall=clock)
    assert [len(line) for line in taken.values()] == [5, 5]
    assert taken["fast"][0] == Measurement(cpu=1.5, wall=1.5, steps=3, tokens=300, supervised=150, padding=30, flops=1500.0)
    assert timing.spread(taken["slow"]) == timing.Interval(50.0, 50.0, 50.0)
    assert timing.ratio(taken["fast"], taken["slow"]) == timing.Interval(4.0, 4.0, 4.0)


def test_every_round_runs_every_contender_in_an_order_of_its_own():
    seen = []

    def step_of(name):
        return lambda: seen.append(name) or StepResult(0.0, 1, 1, 0, 1.0)

    ticks = iter(range(10**6))
    names = ["a", "b", "c", "d"]
    timing.interleave([Contender(n, step_of(n)) for n in names], rounds=20, steps=1, cpu=lambda: next(ticks), wall=lambda: 0.0)
    rounds = np.array(seen[timing.WARMUP * 4 :]).reshape(20, 4)
    assert all(sorted(one) == names for one in rounds.tolist())
    assert len({tuple(one) for one in rounds.tolist()}) > 5


def test_drift_falls_on_all_contenders_alike():
    """The machine slows down to a third over the run; two equal lines still come out equal."""
    clock, noise = Clock(), np.random.default_rng(1)

    def slowing():
        return (1 + clock.now / 200) * noise.uniform(0.9, 1.1)

    line = steady("line", clock, slowing)
    taken = timing.interleave([line, timing.again(line)], rounds=60, steps=1, cpu=clock, wall=clock)
    aa = timing.ratio(taken["line"], taken["line (A/A)"])
    assert aa.low < 1 < aa.high and aa.high - aa.low < 0.5
    assert timing.spread(taken["line"]).high > 1.2 * timing.spread(taken["line"]).low  # the drift was there


def test_a_real_clock_finds_no_difference_between_a_contender_and_itself():
    one = timing.matmul(torch.float32, size=64)
    taken = timing.interleave([one, timing.again(one)], rounds=30, steps=1)
    aa = timing.ratio(*taken.values(), figure=lambda s: s.flops / s.cpu, confidence=0.999)
    assert aa.low <= 1 <= aa.high


def test_spread_is_median_and_percentiles():
    assert timing.spread(samples(range(101))) == timing.Interval(50.0, 20.0, 80.0)


def test_interval_covers_the_true_ratio_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for seed in range(100):
        ours, base = samples(rng.normal(200, 20, 25)), samples(rng.normal(100, 10, 25))
        interval = timing.ratio(ours, base, seed=seed)
        covered += interval.low <= 2 <= interval.high
    assert 85 <= covered <= 100


def test_ratio_resamples_rounds_whole():
    """Both lines' figures double in half of the rounds: their ratio does not vary at all."""
    mood = [1, 2] * 10
    assert timing.ratio(samples([300 * m for m in mood]), samples([100 * m for m in mood])) == timing.Interval(3.0, 3.0, 3.0)


def test_refusals():
    with pytest.raises(ValueError, match="different names"):
        timing.interleave([Contender("a", lambda: None), Contender("a", lambda: None)], rounds=1, steps=1)
    with pytest.raises(ValueError, match="two or more rounds"):
        timing.ratio(samples([1]), samples([1]))


def test_matmul_counts_its_flops():
    one = timing.matmul(torch.bfloat16, size=8)
    assert one.name == "matmul, bfloat16"
    assert one.step().flops == 20 * 2 * 8**3


def test_a_relative_difference_from_zero_is_no_error():
    """Losses of 0 are compared too: where every target is masked, and where kernels do not compute."""
    assert timing.relative(0.0, 0.0) == 0.0 and timing.relative(1e-9, 0.0) == math.inf and timing.relative(3.0, -2.0) == 2.5
