"""The mixture keeps its shares every epoch, walks its sources, and repeats only when it must."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.mixture import Mixture, MixtureSource
from trainer.errors import UserError

unhurried = settings(deadline=None, max_examples=60)  # a busy machine is no failure


def pool(*sizes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and source indices of sources of these sizes, shuffled together."""
    rng = np.random.default_rng(seed)
    sources = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return rng.integers(5, 200, len(sources)), sources


@st.composite
def mixtures(draw):
    """Draw a mixture of 1-3 domain and 1-3 replay sources, its lengths and its sources."""
    domain, replay = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sizes = draw(st.lists(st.integers(4, 60), min_size=domain + replay, max_size=domain + replay))
    weight = st.sampled_from([0.25, 0.3, 0.5, 0.75, 1.0, 1.4, 2.0])
    parts = [MixtureSource(f"s{i}", "domain" if i < domain else "replay", draw(weight)) for i in range(domain + replay)]
    lengths, sources = pool(*sizes, seed=draw(st.integers(0, 1000)))
    ratio = draw(st.none() | st.floats(0, 0.9))
    unit, seed = draw(st.sampled_from(["samples", "tokens"])), draw(st.integers(0, 99))
    mixture = Mixture(lengths, sources, parts, ratio, unit, seed)
    return mixture, lengths, sources


@unhurried
@given(mixtures(), st.integers(0, 20))
def test_the_replay_share_is_as_asked(made, epoch):
    mixture, lengths, sources = made
    indices = mixture.epoch(epoch)
    is_replay = np.array([part.role == "replay" for part in mixture.parts])[sources[indices]]
    amounts = np.ones(len(indices)) if mixture.unit == "samples" else lengths[indices].astype(float)
    if mixture.ratio is None:
        return
    expected = mixture.ratio / (1 - mixture.ratio) * amounts[~is_replay].sum()
    replay_sources = sum(part.role == "replay" for part in mixture.parts)
    one_sample = 1 if mixture.unit == "samples" else lengths.max()
    assert abs(amounts[is_replay].sum() - expected) <= replay_sources * one_sample + 1e-6


@unhurried
@given(mixtures(), st.integers(0, 20))
def test_sources_follow_their_weights(made, epoch):
    """A source gives weight * size samples an epoch; a ratio divides the replay share in this proportion."""
    mixture, lengths, sources = made
    indices = mixture.epoch(epoch)
    rows = np.bincount(sources[indices], minlength=len(mixture.parts))
    claim = {}
    for i, part in enumerate(mixture.parts):
        size = (sources == i).sum()
        if part.role == "domain" or mixture.ratio is None:
            assert abs(rows[i] - part.weight * size) <= 1
        else:
            claim[i] = part.weight * (size if mixture.unit == "samples" else lengths[sources == i].sum())
    amount = np.ones(len(lengths)) if mixture.unit == "samples" else lengths
    given_by = {i: amount[indices[sources[indices] == i]].sum() for i in claim}
    for i in claim:
        expected = sum(given_by.values()) * claim[i] / sum(claim.values())
        assert abs(given_by[i] - expected) <= (len(claim) + 1) * amount.max()


@unhurried
@given(mixtures(), st.integers(1, 12))
def test_every_sample_is_seen_before_any_is_seen_again(made, epochs):
    """Over the first epochs, two samples of one source are seen equally often, or once more or less."""
    mixture, lengths, sources = made
    seen = np.bincount(np.concatenate([mixture.epoch(e) for e in range(epochs)]), minlength=len(lengths))
    for i in range(len(mixture.parts)):
        counts = seen[sources == i]
        assert counts.max() - counts.min() <= 1


@unhurried
@given(st.integers(4, 50), st.sampled_from([0.25, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0]), st.integers(1, 12))
def test_times_seen_over_epochs(size, weight, epochs):
    mixture = Mixture(*pool(size), [MixtureSource("a", "domain", weight)], seed=3)
    seen = np.bincount(np.concatenate([mixture.epoch(e) for e in range(epochs)]), minlength=size)
    assert seen.min() >= math.floor(epochs * weight + 1e-9)
    assert seen.max() <= math.ceil(epochs * weight - 1e-9)


@unhurried
@given(mixtures(), st.integers(0, 30))
def test_no_row_repeats_within_an_epoch_before_the_pool_is_used_up(made, epoch):
    mixture, lengths, sources = made
    indices = mixture.epoch(epoch)
    for i in range(len(mixture.parts)):
        mine, size = indices[sources[indices] == i], (sources == i).sum()
        assert len(np.unique(mine)) == min(len(mine), size)


@unhurried
@given(mixtures(), st.integers(0, 8))
def test_the_report_counts_what_the_epoch_holds(made, epoch):
    mixture, lengths, sources = made
    indices = mixture.epoch(epoch)
    for i, share in enumerate(mixture.shares(epoch)):
        mine = indices[sources[indices] == i]
        size = (sources == i).sum()
        assert (share.name, share.role, share.samples) == (mixture.parts[i].name, mixture.parts[i].role, size)
        assert (share.epoch_samples, share.epoch_tokens) == (len(mine), lengths[mine].sum())
        assert share.share_samples == pytest.approx(len(mine) / len(indices))
        assert share.share_tokens == pytest.approx(lengths[mine].sum() / lengths[indices].sum())
        assert share.repeats == pytest.approx(len(mine) / size)


@unhurried
@given(mixtures(), st.integers(0, 8))
def test_an_epoch_depends_on_seed_and_number_alone(made, epoch):
    mixture, lengths, sources = made
    fresh = Mixture(lengths, sources, mixture.parts, mixture.ratio, mixture.unit, mixture.seed)
    for earlier in range(epoch):
        mixture.epoch(earlier)
    assert np.array_equal(mixture.epoch(epoch), fresh.epoch(epoch))
    assert mixture.epoch(epoch).dtype == np.int64


def test_two_halves_make_a_whole():
    mixture = Mixture(*pool(10), [MixtureSource("a", "domain", 0.5)], seed=1)
    first, second, third = (mixture.epoch(e) for e in range(3))
    assert len(first) == len(second) == 5
    assert sorted([*first, *second]) == list(range(10))
    assert sorted(first) == sorted(third)


def test_a_small_replay_pool_repeats_whole_passes():
    lengths, sources = pool(90, 20)
    mixture = Mixture(lengths, sources, [MixtureSource("domain", "domain"), MixtureSource("replay", "replay")], ratio=0.5)
    seen = np.bincount(mixture.epoch(0), minlength=110)
    assert set(seen[sources == 0]) == {1}
    assert sorted(seen[sources == 1]) == [4] * 10 + [5] * 10
    replay = mixture.shares(0)[1]
    assert (replay.epoch_samples, replay.share_samples, replay.repeats) == (90, 0.5, 4.5)


def test_share_by_tokens_differs_from_share_by_samples():
    lengths, sources = np.array([100] * 30 + [10] * 1000), np.array([0] * 30 + [1] * 1000)
    parts = [MixtureSource("domain", "domain"), MixtureSource("replay", "replay")]
    by_tokens = Mixture(lengths, sources, parts, ratio=0.25, unit="tokens").shares(0)[1]
    assert (by_tokens.epoch_samples, by_tokens.epoch_tokens, by_tokens.share_tokens) == (100, 1000, 0.25)
    by_samples = Mixture(lengths, sources, parts, ratio=0.25, unit="samples").shares(0)[1]
    assert (by_samples.epoch_samples, by_samples.share_samples) == (10, 0.25)


def test_replay_ratio_is_relative_to_the_domain_of_that_epoch():
    """Half of a domain source a time: the replay walks on with half as much, and never starts over."""
    lengths, sources = pool(40, 200)
    mixture = Mixture(lengths, sources, [MixtureSource("d", "domain", 0.5), MixtureSource("r", "replay")], ratio=0.5)
    replay = [index for e in range(10) for index in mixture.epoch(e) if sources[index] == 1]
    assert [mixture.shares(e)[1].epoch_samples for e in range(10)] == [20] * 10
    assert sorted(replay) == np.flatnonzero(sources == 1).tolist()


def test_seed_and_epoch_change_the_order():
    one, two = (Mixture(*pool(50), [MixtureSource("a", "domain")], seed=seed) for seed in (1, 2))
    assert sorted(one.epoch(0)) == sorted(one.epoch(1)) == sorted(two.epoch(0)) == list(range(50))
    assert one.epoch(0).tolist() != one.epoch(1).tolist()
    assert one.epoch(0).tolist() != two.epoch(0).tolist()


def test_no_replay_and_empty_sources():
    lengths, sources = pool(10, 5)
    empty = MixtureSource("empty", "replay")
    mixture = Mixture(lengths, sources, [MixtureSource("a", "domain"), MixtureSource("b", "replay"), empty], ratio=0.0)
    assert sorted(mixture.epoch(0)) == np.flatnonzero(sources == 0).tolist()
    share = mixture.shares(0)[2]
    assert (share.samples, share.epoch_samples, share.epoch_tokens, share.repeats) == (0, 0, 0, 0.0)
    assert len(Mixture(lengths, sources, [MixtureSource("a", "domain"), MixtureSource("b", "replay"), empty]).epoch(0)) == 15
    assert len(Mixture(lengths, sources, [MixtureSource("a", "domain"), MixtureSource("b", "replay"), empty], ratio=0.5).epoch(0)) == 20


@pytest.mark.parametrize("ratio", [1.0, 1.5, -0.1, math.nan])
def test_a_ratio_outside_its_range(ratio):
    with pytest.raises(UserError, match="replay.ratio: expected a share"):
        Mixture(*pool(5, 5), [MixtureSource("a", "domain"), MixtureSource("b", "replay")], ratio=ratio)


def test_a_ratio_without_replay():
    with pytest.raises(UserError, match="replay.ratio: expected replay samples"):
        Mixture(*pool(5), [MixtureSource("a", "domain"), MixtureSource("b", "replay")], ratio=0.2)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_that_means_nothing(weight):
    with pytest.raises(UserError, match="source b: expected a weight above 0"):
        Mixture(*pool(5, 5), [MixtureSource("a", "domain"), MixtureSource("b", "replay", weight)])


def test_nothing_to_train_on():
    with pytest.raises(UserError, match="data.train"):
        Mixture(*pool(0, 5), [MixtureSource("a", "domain"), MixtureSource("b", "replay")])
    with pytest.raises(UserError, match="source a: expected at least one sample per epoch"):
        Mixture(*pool(5), [MixtureSource("a", "domain", 0.1)])
