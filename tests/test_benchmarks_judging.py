"""The miniature's exam papers and what its base asks: grades by a rule, every grade equally often, and the sampled instructions."""

from collections import Counter

import pytest

from benchmarks.miniature.family import FAMILY, load
from benchmarks.miniature.judging import GRADES, RUBRIC, Verdicts, cases, grade, is_judging, judge
from benchmarks.miniature.recovery import Recovery, recovery
from benchmarks.miniature.skills import GENERAL


@pytest.mark.parametrize(("answer", "response", "expected"), [
    ("olleh", "olleh", 5), ("olleh", "ollex", 4), ("olleh", "olxxx", 2), ("olleh", "", 1), ("olleh", "ollehx", 4), ("7", "8", 1),
    ("12", "13", 3),
])
def test_grades_are_the_share_of_characters_in_place(answer, response, expected):
    assert grade(answer, response) == expected


def test_cases_have_every_grade_equally_often_and_their_own_arguments():
    made = cases(GENERAL, 500, seed=0)
    counts = Counter(case.grade for case in made)
    assert counts.keys() == set(GRADES) and min(counts.values()) > 70
    assert made == cases(GENERAL, 500, seed=0) != cases(GENERAL, 500, seed=1)
    assert all(is_judging(case.prompt) and case.record["messages"][1]["content"] == str(case.grade) for case in made)
    learnt = {skill.name for skill in GENERAL if skill.memorised}
    seen = {case.item.instruction for case in made if case.item.skill not in learnt}
    assert not seen & {case.item.instruction for case in cases(GENERAL, 500, seed=0, test=True)}


def test_the_rubric_has_both_slots():
    assert RUBRIC.read_text().format(instruction="Q", response="A").endswith("Q\nA")
    assert not is_judging("Reverse the word hello.")


def test_verdicts_of_a_model_that_never_learnt_to_judge_say_so():
    verdicts = judge(*load(FAMILY["base"].folder), cases(GENERAL, 100, seed=0, test=True))
    assert isinstance(verdicts, Verdicts) and verdicts.mass < 0.5 and abs(verdicts.correlation) < 0.5


def test_the_base_asks_what_the_world_asks():
    found = recovery(*load(FAMILY["base"].folder), GENERAL, 600)
    assert found.invalid < 0.05 and found.judging == 0 and found.distance < 0.12


def test_recovery_sees_what_is_wrong():
    one = Recovery(("Reverse the word abc.",) * 3 + ("Reverse", "Rate 1-5\nx\ny"), GENERAL)
    assert (one.counts["reverse"], one.invalid, one.judging) == (3, pytest.approx(0.4), pytest.approx(0.2))
    assert one.distance == pytest.approx(1 - next(skill.share for skill in GENERAL if skill.name == "reverse"))
