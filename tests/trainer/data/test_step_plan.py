"""The order of a run is a function of data, configuration and seed, and covers what the mixture chose."""

import time

import numpy as np
import pytest

from trainer.config import BatchSize
from trainer.data.mixture import Mixture, MixtureSource
from trainer.data.step_plan import StepPlan, hash_seed

LENGTHS = np.random.default_rng(0).integers(1, 65, size=500)


def plan(epochs=2.0, max_steps=None, seed=3, weight=1.0, tokens_per_step=256) -> StepPlan:
    mixture = Mixture(LENGTHS, np.zeros(500, dtype=np.int32), [MixtureSource("a", "domain", weight)], seed=seed)
    batch = BatchSize(tokens_per_pack=128, tokens_per_step=tokens_per_step, max_samples_per_pack=8)
    return StepPlan(LENGTHS, mixture, batch, epochs, max_steps, seed)


def test_an_epoch_sees_every_sample_once_in_packs_that_fit():
    made = plan()
    for epoch in (0, 1):
        packs = [p for step in made.epoch(epoch) for p in step]
        assert np.array_equal(np.sort(np.concatenate(packs)), np.arange(500))
        assert max(LENGTHS[p].sum() for p in packs) <= 128 and max(map(len, packs)) <= 8
    assert all(len(step) == 2 for step in made.epoch(0)[:-1])


def test_epochs_differ_and_seeds_repeat():
    one, same, other = plan(), plan(), plan(seed=4)
    flat = lambda made, e: np.concatenate([p for step in made.epoch(e) for p in step])  # noqa: E731
    assert np.array_equal(flat(one, 1), flat(same, 1))
    assert not np.array_equal(flat(one, 0), flat(one, 1)) and not np.array_equal(flat(one, 0), flat(other, 0))


def test_steps_are_found_by_number_alone():
    made, later = plan(), plan()
    n = len(made.epoch(0))
    for step in (0, n - 1, n, made.total - 1):
        place = made.place(step)
        assert place.epoch == step // n and all(map(np.array_equal, later[step], made.epoch(place.epoch)[place.step]))


@pytest.mark.parametrize(("epochs", "share"), [(0.5, 0.5), (1.0, 1.0), (1.25, 1.25), (3.0, 3.0)])
def test_fractions_of_epochs(epochs, share):
    made = plan(epochs=epochs)
    assert made.total == pytest.approx(share * len(plan().epoch(0)), abs=3)
    assert made.progress(made.total) == pytest.approx(epochs, abs=0.02)


def test_max_steps_bounds_the_run():
    assert plan(max_steps=5).total == 5
    assert plan(epochs=1, max_steps=10_000).total == len(plan().epoch(0))


def test_half_epochs_walk_through_all_samples():
    made = plan(weight=0.5)
    seen = [np.concatenate([p for step in made.epoch(e) for p in step]) for e in (0, 1)]
    assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(500))


def test_seeds_of_neighbours_are_unrelated():
    assert len({hash_seed(1, step, rank) for step in range(100) for rank in range(4)}) == 400


@pytest.mark.parametrize("capacity", [64, 128, 700, 4096])
@pytest.mark.parametrize("count", [1, 7, 60, 500])
def test_steps_are_counted_without_packing_as_with_it(capacity, count):
    lengths = LENGTHS[:count]
    mixture = Mixture(lengths, np.zeros(count, dtype=np.int32), [MixtureSource("a", "domain", 2.0)])
    batch = BatchSize(tokens_per_pack=capacity, tokens_per_step=2 * capacity, max_samples_per_pack=16)
    made = StepPlan(lengths, mixture, batch, 12, None, 0)
    assert made.starts == [0, *np.cumsum([len(made.epoch(epoch)) for epoch in range(12)])]


def test_a_hundred_thousand_epochs_are_planned_in_seconds():
    lengths, began = LENGTHS[:60], time.process_time()
    mixture = Mixture(lengths, np.zeros(60, dtype=np.int32), [MixtureSource("a", "domain")])
    made = StepPlan(lengths, mixture, BatchSize(tokens_per_pack=4096, tokens_per_step=4096, max_samples_per_pack=64), 100_000, None, 0)
    assert made.total == 100_000 and made.place(99_999).epoch == 99_999
    assert time.process_time() - began < 10
