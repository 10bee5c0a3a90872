"""Check that epochs go from easy to hard, in packs that fit, with the epoch's share of replay in every step."""

import numpy as np
import pytest

from trainer.config import BatchSize
from trainer.data.curriculum import Curriculum, steps_in_order
from trainer.data.mixture import Mixture, MixtureSource
from trainer.data.step_plan import StepPlan

RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(4, 33, size=600)
SOURCES = np.repeat(np.int32([0, 1]), [400, 200])
DIFFICULTY = RNG.random(600)


def plan(unit="samples", difficulty=DIFFICULTY, epochs=2.0, ratio=0.25, seed=3) -> StepPlan:
    mixture = Mixture(LENGTHS, SOURCES, [MixtureSource("a", "domain"), MixtureSource("b", "replay")], ratio, unit, seed)
    curriculum = Curriculum(difficulty, SOURCES == 1, LENGTHS if unit == "tokens" else np.ones_like(LENGTHS))
    batch = BatchSize(tokens_per_pack=128, tokens_per_step=512, max_samples_per_pack=16)
    return StepPlan(LENGTHS, mixture, batch, epochs, None, seed, curriculum)


@pytest.mark.parametrize("difficulty", [DIFFICULTY, LENGTHS], ids=["loss", "length"])
def test_every_epoch_goes_from_easy_to_hard_and_sees_what_the_mixture_chose(difficulty):
    made = plan(difficulty=difficulty)
    for epoch in (0, 1):
        steps = [np.concatenate(step) for step in made.epoch(epoch)]
        assert np.array_equal(np.sort(np.concatenate(steps)), np.sort(made.mixture.epoch(epoch)))
        domain = [difficulty[step[SOURCES[step] == 0]] for step in steps]
        assert len(domain) > 15 and all(a.max() <= b.min() for a, b in zip(domain, domain[1:]))
        packs = [p for step in made.epoch(epoch) for p in step]
        assert max(LENGTHS[p].sum() for p in packs) <= 128 and max(map(len, packs)) <= 16
        assert all(len(step) == 4 for step in made.epoch(epoch)[:-1])
        assert LENGTHS[np.concatenate(packs)].sum() > 0.8 * 128 * len(packs)


@pytest.mark.parametrize("unit", ["samples", "tokens"])
def test_every_step_has_the_share_of_replay(unit):
    made = plan(unit, difficulty=LENGTHS)
    amounts = LENGTHS if unit == "tokens" else np.ones_like(LENGTHS)
    largest = LENGTHS.max() if unit == "tokens" else 1
    given = np.zeros(2)
    for step in made.epoch(0)[:-1]:
        step = np.concatenate(step)
        given += [amounts[step[SOURCES[step] == role]].sum() for role in (0, 1)]
        assert abs(given[1] - given.sum() * 0.25) <= 2 * largest  # within a sample of each role, however short the first ones are


def test_replay_stays_in_random_order():
    made = plan(difficulty=LENGTHS)
    steps = [np.concatenate(step) for step in made.epoch(0)]
    mean = [LENGTHS[step[SOURCES[step] == 1]].mean() for step in steps]
    assert abs(np.mean(mean[: len(mean) // 2]) - np.mean(mean[len(mean) // 2 :])) < 4
    seen = [np.concatenate([step[SOURCES[step] == 1] for step in map(np.concatenate, made.epoch(epoch))]) for epoch in (0, 1)]
    assert not np.array_equal(seen[0], seen[1])


def test_steps_are_found_by_number_alone():
    made, later = plan(), plan()
    for step in (0, made.total // 2, made.total - 1):
        assert all(map(np.array_equal, later[step], made[step]))
    assert made.total == len(made.epoch(0)) + len(made.epoch(1))


def test_equals_come_in_another_order_with_another_seed():
    one, other = (plan(difficulty=np.zeros(600), seed=seed) for seed in (3, 4))
    assert not np.array_equal(np.concatenate(one[0]), np.concatenate(other[0]))


def test_a_step_ends_where_no_pack_has_room():
    steps = steps_in_order(np.array([6, 5, 4, 5, 1, 9]), capacity=10, max_samples_per_pack=2, packs_per_step=2)
    assert [[pack.tolist() for pack in step] for step in steps] == [[[0, 2], [1, 3]], [[4, 5]]]
