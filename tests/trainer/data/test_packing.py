"""Packs have every sample once, under the caps, about as full as possible; targets are next tokens."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.batch import NO_PADDING, PackedBatch, PadTo, collate, pad_batch
from trainer.data.packing import pack
from trainer.data.samples import Piece

unhurried = settings(deadline=None)  # a busy machine is no failure


def first_fit_decreasing(lengths, capacity, max_samples_per_pack) -> int:
    """Number of packs of the textbook algorithm, in its textbook O(n^2) form."""
    room, counts = [], []
    for length in sorted(lengths, reverse=True):
        fit = next((i for i in range(len(room)) if room[i] >= length and counts[i] < max_samples_per_pack), None)
        if fit is None:
            room.append(capacity)
            counts.append(0)
            fit = -1
        room[fit] -= length
        counts[fit] += 1
    return len(room)


@st.composite
def problems(draw):
    capacity = draw(st.integers(1, 300))
    lengths = draw(st.lists(st.integers(1, capacity), max_size=120))
    return np.array(lengths, dtype=np.int64), capacity, draw(st.integers(1, 12)), draw(st.integers(0, 2**32))


@unhurried
@given(problems())
def test_every_sample_once_and_nothing_over_the_caps(problem):
    lengths, capacity, max_samples_per_pack, seed = problem
    packs = pack(lengths, capacity, max_samples_per_pack, seed)
    assert sorted(np.concatenate(packs, dtype=np.int64).tolist() if packs else []) == list(range(len(lengths)))
    for members in packs:
        assert members.dtype == np.int64
        assert 1 <= len(members) <= max_samples_per_pack
        assert lengths[members].sum() <= capacity


@unhurried
@given(problems())
def test_same_seed_same_packs(problem):
    once, again = pack(*problem), pack(*problem)
    assert len(once) == len(again)
    assert all(np.array_equal(a, b) for a, b in zip(once, again))


@unhurried
@given(problems())
def test_best_fit_bound(problem):
    """Best fit leaves no two packs that would fit in one, whatever the order of the samples."""
    lengths, capacity, max_samples_per_pack, seed = problem
    packs = sorted(pack(lengths, capacity, max_samples_per_pack, seed), key=lambda members: lengths[members].sum())
    if len(packs) > 1:
        lightest, next_lightest = packs[:2]
        fits = lengths[lightest].sum() + lengths[next_lightest].sum() <= capacity
        assert not fits or max_samples_per_pack in (len(lightest), len(next_lightest))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("capacity", [512, 2048, 8192])
@pytest.mark.parametrize("kind", ["lognormal", "uniform", "narrow", "near thirds"])
def test_as_full_as_first_fit_decreasing(kind, capacity, seed):
    rng = np.random.default_rng(seed)
    lengths = {
        "lognormal": np.clip(rng.lognormal(5, 0.9, 1500), 1, 512),
        "uniform": rng.integers(1, 513, 1500),
        "narrow": np.clip(rng.normal(180, 30, 1500), 60, 400),
        "near thirds": capacity // 3 + rng.integers(-2, 3, 1500),
    }[kind].astype(np.int64)
    packs = pack(lengths, capacity, 1024, seed)
    assert len(packs) <= first_fit_decreasing(lengths.tolist(), capacity, 1024) * 1.01 + 1


def test_known_optimum():
    """Pairs that only fill a pack together: one pack a pair."""
    lengths = np.array([70, 60, 55, 51, 49, 45, 40, 30] * 20)
    packs = pack(lengths, 100, 10, seed=3)
    assert len(packs) == 80  # so few that blurring may add none
    assert all(lengths[members].sum() == 100 for members in packs)


def test_another_seed_gives_other_company_and_order():
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 0.8, 2000), 1, 4096).astype(np.int64)
    one, two = pack(lengths, 4096, 1024, 1), pack(lengths, 4096, 1024, 2)
    pack_of = np.empty(len(lengths), dtype=np.int64)
    for i, members in enumerate(two):
        pack_of[members] = i
    pairs = again = 0
    for members in one:
        same = pack_of[members][:, None] == pack_of[members][None, :]
        pairs += same.size - len(members)
        again += int(same.sum()) - len(members)
    assert again < 0.2 * pairs
    longest_first = [lengths[members].max() for members in one]
    assert abs(np.corrcoef(longest_first, np.arange(len(one)))[0, 1]) < 0.2  # the long ones are spread over the epoch


def test_equal_lengths_are_dealt_by_the_seed():
    one, two = pack(np.full(64, 10), 40, 8, 1), pack(np.full(64, 10), 40, 8, 2)
    assert {frozenset(members.tolist()) for members in one} != {frozenset(members.tolist()) for members in two}
    assert len(one) == len(two) == 16


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [4096, 131072])
def test_five_times_the_samples_cost_far_less_than_25_times_the_time(capacity):
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 0.8, 50_000), 1, 4096).astype(np.int64)

    def seconds(count):
        started = time.process_time()
        pack(lengths[:count], capacity, 1024, 0)
        return time.process_time() - started

    few, many = zip(*[(seconds(10_000), seconds(50_000)) for _ in range(3)], strict=True)
    assert min(many) < 12 * min(few)  # the least of three: other work on the machine only adds
    assert lengths.sum() / capacity / len(pack(lengths, capacity, 1024, 0)) > 0.99


@pytest.mark.parametrize("lengths, message", [([5, 9, 3], "9 in sample 1"), ([5, 3, 0], "0 in sample 2")])
def test_a_sample_that_cannot_be_packed_is_named(lengths, message):
    with pytest.raises(ValueError, match=message):
        pack(np.array(lengths), 8, 4, 0)


def test_packs_need_room_for_a_sample():
    with pytest.raises(ValueError, match="max_samples_per_pack"):
        pack(np.array([1]), 8, 0, 0)


@st.composite
def sample_lists(draw):
    samples = []
    for number in range(draw(st.integers(1, 8))):
        supervised = draw(st.lists(st.booleans(), min_size=1, max_size=12))
        ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=len(supervised), max_size=len(supervised)))
        weight = draw(st.floats(0.125, 8, width=32))
        samples.append(Piece(np.array(ids, np.int32), np.array(supervised, np.bool_), weight, number % 3))
    return samples


@pytest.mark.slow
@unhurried
@given(sample_lists())
def test_batch_against_a_loop_over_tokens(samples):
    ids, positions, rows, targets, weights, starts = [], [], [], [], [], [0]
    for input_ids, supervised, weight, *_ in samples:
        for t in range(len(input_ids)):
            if t + 1 < len(input_ids) and supervised[t + 1]:
                rows.append(len(ids))
                targets.append(int(input_ids[t + 1]))
                weights.append(weight)
            ids.append(int(input_ids[t]))
            positions.append(t)
        starts.append(len(ids))
    batch = collate(samples)
    assert batch.input_ids.tolist() == ids
    assert batch.position_ids.tolist() == positions
    assert batch.cu_seqlens.tolist() == starts
    assert batch.supervised_rows.tolist() == rows
    assert batch.targets.tolist() == targets
    assert batch.weights.tolist() == weights
    assert batch.source.tolist() == [sample.source for sample in samples]
    assert batch.max_seqlen == max(len(input_ids) for input_ids, *_ in samples)
    assert batch.tokens == len(ids)
    assert batch.weight_sum == pytest.approx(sum(weights), rel=1e-12)


def two_samples() -> list[Piece]:
    first = Piece(np.array([10, 11, 12], np.int32), np.array([False, True, True]), 1.0, 40_000)
    second = Piece(np.array([20, 21], np.int32), np.array([True, True]), 0.5, 2)
    return [first, second]


def test_batch_types():
    batch = collate(two_samples())
    expected = dict(
        input_ids=torch.int64, position_ids=torch.int64, cu_seqlens=torch.int32, supervised_rows=torch.int64,
        targets=torch.int64, weights=torch.float32, source=torch.int32,
    )
    assert {name: getattr(batch, name).dtype for name in expected} == expected
    assert [type(value) for value in (batch.max_seqlen, batch.tokens, batch.weight_sum)] == [int, int, float]
    assert batch.source.tolist() == [40_000, 2]


def test_targets_never_cross_samples():
    """A sample's first token may be supervised, yet the sample before does not predict it."""
    batch = collate(two_samples())
    assert batch.supervised_rows.tolist() == [0, 1, 3]
    assert batch.targets.tolist() == [11, 12, 21]
    assert batch.weights.tolist() == [1.0, 1.0, 0.5]


def test_collate_leaves_the_samples_alone():
    samples = two_samples()
    collate(samples[1:])
    assert samples[1][1].tolist() == [True, True]


def test_no_supervised_target():
    first, second = (np.array([4, 5], np.int32), np.array([True, False])), (np.array([6], np.int32), np.array([True]))
    batch = collate([Piece(*first), Piece(*second)])
    assert batch.targets.shape == batch.supervised_rows.shape == batch.weights.shape == (0,)
    assert batch.targets.dtype == torch.int64 and batch.weights.dtype == torch.float32
    assert batch.weight_sum == 0.0
    assert batch.tokens == 3


def test_empty_samples_are_refused():
    with pytest.raises(ValueError, match="collate"):
        collate([])
    with pytest.raises(ValueError, match="collate"):
        collate([*two_samples(), Piece(np.array([], np.int32), np.array([], np.bool_))])


def test_moving_keeps_host_numbers():
    batch = collate(two_samples())
    moved = batch.to("meta", non_blocking=True)
    assert isinstance(moved, PackedBatch)
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 7 and all(tensor.device.type == "meta" for tensor in tensors)
    assert (moved.tokens, moved.max_seqlen, moved.weight_sum) == (5, 3, 2.5)
    assert batch.input_ids.device.type == "cpu"


def chats(*lengths) -> list[Piece]:
    return [Piece(np.arange(5, 5 + n, dtype=np.int32), np.arange(n) >= n // 2, 0.5, 0) for n in lengths]


def test_a_filled_batch_has_one_more_sample_and_rows_without_weight():
    batch = collate(chats(5, 3))
    longer = pad_batch(batch, PadTo(tokens=8, rows=4), capacity=100)
    assert longer is batch or len(batch.targets) % 4, "8 tokens are a multiple of 8 already"
    longer = pad_batch(batch, PadTo(tokens=6, rows=7), capacity=100)
    assert longer.tokens == batch.tokens == 8 and len(longer.input_ids) == len(longer.position_ids) == 12
    assert longer.cu_seqlens.tolist() == [0, 5, 8, 12] and longer.cu_seqlens.dtype == torch.int32
    assert longer.position_ids[8:].tolist() == [0, 1, 2, 3] and longer.max_seqlen == 5
    assert len(longer.supervised_rows) == len(longer.targets) == len(longer.weights) == 7
    assert longer.weights.sum() == batch.weights.sum() and not longer.weights[len(batch.weights):].any()
    assert pad_batch(batch, NO_PADDING, capacity=100) is batch


def test_filling_stays_within_the_capacity():
    batch = collate(chats(60, 35))
    assert len(pad_batch(batch, PadTo(64, 1), capacity=100).input_ids) == 100
    assert len(pad_batch(batch, PadTo(64, 1), capacity=95).input_ids) == 95


def test_a_batch_without_targets_stays_so():
    silent = collate([sample._replace(supervised=np.zeros(5, bool)) for sample in chats(5)])
    assert not len(pad_batch(silent, PadTo(8, 32), capacity=100).targets)
