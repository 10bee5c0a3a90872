"""Scales of judges by hand, and recovery of planted ones."""

import random

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from synth.judging.calibration import JudgeScale, ScoreSums, combine_scores, fit_scales


def cells(scores):
    """Cells of {(judge, author): scores}."""
    return [ScoreSums(judge, author, len(s), sum(s), sum(x * x for x in s)) for (judge, author), s in scores.items()]


def test_scales_by_hand():
    """Two judges of the same two authors, one a point stricter and twice as wide."""
    found = fit_scales(cells({("a", "x"): [3, 5], ("a", "y"): [2, 4], ("b", "x"): [2, 4, 2, 4], ("b", "y"): [1, 3, 1, 3]}))
    assert found["a"].severity - found["b"].severity == pytest.approx(1) and found["a"].spread == pytest.approx(1)
    found = fit_scales(cells({("a", "x"): [3, 5], ("a", "y"): [3, 5], ("b", "x"): [1, 5], ("b", "y"): [1, 5]}))
    assert [found[j][:2] for j in "ab"] == [pytest.approx((4, 1)), pytest.approx((3, 2))]
    # level 3.5, unit 1.5
    assert found["a"].calibrate(5) == pytest.approx(3.5 + 1.5) and found["b"].calibrate(5) == pytest.approx(3.5 + 1.5 * 2 / 2)


def test_planted_judges_are_found_though_none_sees_its_own_answers():
    """score = quality of the author + of the answer, seen with the judge's severity and width; the plain mean would be off by .3."""
    rng, quality = random.Random(0), {"x": 0.6, "y": 0.0, "z": -0.6}
    severity, width = {"x": -0.8, "y": 0.1, "z": 0.7}, {"x": 0.5, "y": 1.0, "z": 1.5}
    answers = {author: [rng.gauss(0, 1) for _ in range(4000)] for author in quality}
    scores = {(j, a): [3 + severity[j] + quality[a] + width[j] * rest for rest in answers[a]] for j in severity for a in quality if a != j}
    found = fit_scales(cells(scores))
    severities = {judge: scale.severity for judge, scale in found.items()}
    for judge in severity:
        assert severities[judge] - severities["y"] == pytest.approx(severity[judge] - severity["y"], abs=0.03)
        assert found[judge].spread == pytest.approx(width[judge], rel=0.03)
    plain = {judge: sum(sum(s) for (j, _), s in scores.items() if j == judge) / 8000 for judge in severity}
    assert abs(plain["x"] - plain["y"] - (severity["x"] - severity["y"])) > 0.25
    # points of the rubric still: the level and unit are the judges' means
    assert sum(severities.values()) / 3 == pytest.approx(3.0, abs=0.03)
    for judge, scale in found.items():
        assert scale.calibrate(severities[judge]) == pytest.approx(3.0, abs=0.03)
        assert scale.calibrate(severities[judge] + width[judge]) == pytest.approx(4.0, abs=0.05)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.tuples(st.sampled_from("abc"), st.sampled_from("wxyz")), st.lists(st.integers(1, 5), min_size=1, max_size=6),
                       min_size=1), st.sampled_from("abc"), st.integers(-3, 3))
def test_cells_fit_like_the_scores_themselves(scores, judge, stricter):
    """Spreads are those of least squares over single scores, whatever the counts; a stricter judge has a lower severity and that is all."""
    found = fit_scales(cells(scores))
    rows = [(j, a, score) for (j, a), of_pair in scores.items() for score in of_pair]
    names = sorted({j for j, *_ in rows}) + sorted({a for _, a, _ in rows})
    design = np.array([[float(name in (j, a)) for name in names] for j, a, _ in rows])
    values = np.array([score for *_, score in rows], float)
    rest = values - design @ np.linalg.lstsq(design, values)[0]
    for j, scale in found.items():
        assert scale.spread == pytest.approx(np.sqrt(np.mean(rest[[row[0] == j for row in rows]] ** 2)), abs=1e-6)
    shifted = fit_scales(cells({(j, a): [score + stricter * (j == judge) for score in of_pair] for (j, a), of_pair in scores.items()}))
    level = {j: scale.calibrate(scale.severity) for j, scale in found.items()}
    for j, scale in shifted.items():
        assert scale.spread == pytest.approx(found[j].spread, abs=1e-6)
        assert scale.severity - found[j].severity == pytest.approx(stricter * (j == judge), abs=1e-6)
        assert scale.calibrate(scale.severity + 1) - scale.calibrate(scale.severity) == pytest.approx(found[j].factor, rel=1e-4)
    assert fit_scales(cells(scores)[::-1]).keys() == found.keys() and all(np.isfinite(list(level.values())))


def test_judges_with_no_author_in_common_keep_their_own_level():
    """Two models that judge each other: a lenient judge and a good author look the same, so neither is taken for the other."""
    found = fit_scales(cells({("a", "b"): [4, 5], ("b", "a"): [1, 3]}))
    assert found["a"].calibrate(4.5) == pytest.approx(4.5) and found["b"].calibrate(2) == pytest.approx(2)
    assert found["a"].calibrate(5) - found["a"].calibrate(4) == pytest.approx(1.5)
    assert found["b"].calibrate(3) - found["b"].calibrate(1) == pytest.approx(1.5)


def test_a_constant_judge_has_no_say_and_shifts_nobody():
    found = fit_scales(cells({("a", "x"): [1, 5], ("a", "y"): [1, 5], ("c", "x"): [4.7] * 2, ("c", "y"): [4.7] * 2}))
    assert not found["c"].varies and found["a"].varies
    assert found["a"].calibrate(5) == pytest.approx(5) and found["c"].calibrate(4.7) == pytest.approx(3)
    key = (0, "x", 0)
    assert combine_scores(key, [(found["a"], 5), (found["c"], 4.7)], True) == (*key, pytest.approx(5), None, 2)
    assert combine_scores(key, [(found["c"], 4.7)], True) == (*key, pytest.approx(3), None, 1)
    assert combine_scores(key, [(found["a"], 5), (found["c"], 4.7)], False)[3:] == (pytest.approx((5 + 3) / 2), pytest.approx(1), 2)


def test_where_all_judges_are_constant_their_severities_still_meet():
    found = fit_scales(cells({("a", "x"): [4, 4], ("b", "x"): [2, 2]}))
    assert [found["a"].calibrate(4), found["b"].calibrate(2)] == pytest.approx([3, 3])


def test_a_constant_judge_of_many_scores_counts_as_constant():
    third = 4.1 / 3
    found = fit_scales([ScoreSums("a", "x", 900_000, 900_000 * third, 900_000 * third * third), *cells({("b", "x"): [1, 2]})])
    assert not found["a"].varies and found["b"].varies


def test_a_rating_is_the_mean_and_the_spread_of_its_judges():
    plain = JudgeScale(0, 1)
    key = (3, "x", 1)
    assert combine_scores(key, [(plain, 2), (plain, 5), (plain, 5)], True) == (*key, 4.0, pytest.approx(2**0.5), 3)
    assert combine_scores(key, [(plain, 2)], True) == (*key, 2.0, None, 1)
    assert combine_scores(key, [(plain, 2), (plain, None)], True) == (*key, None, None, 1)
    assert combine_scores(key, [(None, None)], True) == (*key, None, None, 0)
