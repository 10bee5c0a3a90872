"""Intervals and tests against values computed by hand and by closed forms."""

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.evaluation import significance
from trainer.evaluation.config import Statistics
from trainer.evaluation.results import change_figures, model_figures, paired_figures
from trainer.evaluation.score_items import Outcome
from trainer.evaluation.significance import bootstrap, chance_adjusted, mcnemar, wilson


def test_wilson_is_the_textbooks():
    z = 1.959963984540054
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0, z * z / (10 + z * z)), abs=1e-12)  # the closed form at no success
    assert wilson(10, 10) == pytest.approx((10 / (10 + z * z), 1), abs=1e-12)
    z = 1.6448536269514722
    half = z / (2 * math.sqrt(100 + z * z))  # and at a share of a half
    assert wilson(50, 100, 0.9) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-12)


@given(st.integers(1, 5000), st.floats(0, 1), st.floats(0.5, 0.99))
def test_wilson_solves_its_equation(n, share, confidence):
    """Check that at either end p the score test of the observed share is just not rejected."""
    from statistics import NormalDist

    k, z = round(n * share), NormalDist().inv_cdf((1 + confidence) / 2)
    low, high = wilson(k, n, confidence)
    assert 0 <= low <= k / n <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(k / n - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("lost, gained, p", [
    (0, 0, 1), (5, 5, 1), (0, 5, 2 / 32), (1, 8, 2 * (1 + 9) / 512), (8, 1, 2 * (1 + 9) / 512), (2, 10, 2 * (1 + 12 + 66) / 4096),
    (3, 4, 1)])
def test_mcnemar_by_hand(lost, gained, p):
    assert mcnemar(lost, gained) == pytest.approx(p, rel=1e-12)


@pytest.mark.parametrize("gained", [1001, 1003, 1100, 2000, 3000])
def test_mcnemar_of_many_items_is_that_in_integers(gained, monkeypatch):
    p = mcnemar(1001, gained)
    monkeypatch.setattr(significance, "MOST_IN_INTEGERS", 1001)
    assert p == pytest.approx(mcnemar(1001, gained), rel=1e-12)


def test_mcnemar_of_a_billion_items_takes_no_time():
    began = time.process_time()
    assert 0.999 < mcnemar(10**9, 10**9 + 3) < 1 and mcnemar(80_000, 80_003) == pytest.approx(0.9960106332960701, rel=1e-12)
    assert time.process_time() - began < 1


def test_mcnemar_of_many_items_is_near_its_normal_limit():
    z = (5200 - 4800 - 1) / 100  # continuity-corrected
    assert mcnemar(4800, 5200) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
    assert 0 < mcnemar(0, 1000) < 1e-300


def test_chance_adjusted():
    assert chance_adjusted(0.25, [4] * 8) == 0 and chance_adjusted(1, [4, 2]) == 1
    assert chance_adjusted(0.7, [4] * 10) == pytest.approx((0.7 - 0.25) / 0.75)
    assert chance_adjusted(0.5, [2, 4]) == pytest.approx((0.5 - 0.375) / 0.625)


def test_the_bootstrap_of_a_mean_is_near_the_normal_interval():
    values = np.random.default_rng(1).normal(3, 2, size=1000)
    half = 1.96 * values.std() / math.sqrt(1000)
    low, high = bootstrap(values, draws=4000)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert bootstrap(values, draws=4000) == (low, high), "the same seed gives the same interval"
    assert bootstrap(values, confidence=0.5).high < high


def test_the_bootstrap_of_a_ratio_weighs_items_by_their_tokens():
    tokens = np.array([1, 100] * 50)
    values = tokens * np.array([5.0, 1.0] * 50)
    low, high = bootstrap(values, tokens)
    assert low < values.sum() / tokens.sum() < high < 1.2, "near 1, as most tokens have it; the mean over items would be 3"
    assert bootstrap([2.0, 4.0], [1, 2]) == (2, 2)


@pytest.mark.parametrize("call", [lambda: wilson(3, 2), lambda: wilson(0, 0), lambda: mcnemar(-1, 2), lambda: bootstrap([]),
                                  lambda: bootstrap([1.0], [1.0, 2.0])])
def test_what_has_no_value_is_refused(call):
    with pytest.raises(ValueError, match="expected"):
        call()


RESAMPLE = {"confidence": 0.95, "draws": 200, "seed": 0}


def test_pairs_are_counted_by_hand():
    pairs = [(True, True)] * 5 + [(True, False)] * 2 + [(False, True)] + [(False, False)] * 2
    found = paired_figures(pairs, RESAMPLE)
    assert (found["lost"], found["gained"], found["p"]) == (2, 1, 1) and found["difference"] == pytest.approx(-0.1)
    assert found["kept"] == pytest.approx(5 / 7) and found["retention"] == pytest.approx(6 / 7)
    assert found["difference_interval"][0] < -0.1 < found["difference_interval"][1]
    assert paired_figures([(False, True)], RESAMPLE)["kept"] is None, "nothing was there to be kept"


def test_figures_are_per_token_and_per_byte_not_per_item():
    base = [Outcome(right=True, logprob=-2.0, tokens=2, bytes=8), Outcome(right=False, logprob=-4.0, tokens=8, bytes=8)]
    model = [Outcome(right=False, logprob=-3.0, tokens=2, bytes=8, kl=1.0), Outcome(right=True, logprob=-2.0, tokens=8, bytes=8, kl=0.5)]
    figures = model_figures(base, Statistics(bootstrap=200))
    assert figures["accuracy"] == 0.5 and figures["logprob_per_token"] == pytest.approx(-0.6)
    assert figures["logprob_per_byte"] == pytest.approx(-6 / 16)
    moved = change_figures(base, model, Statistics(bootstrap=200))
    assert moved["logprob_per_token"] == pytest.approx((-1 + 2) / 10) and moved["kl_per_token"] == pytest.approx(0.15)
    assert (moved["lost"], moved["gained"], moved["kl_tokens"]) == (1, 1, 10)
