"""The miniature's exam papers and what its models ask: grades by a rule, every grade equally often, and the sampled instructions."""

import re
from collections import Counter

import pytest
from transformers import LlamaForCausalLM

from benchmarks.forgetting.miniature.evaluate import evaluate
from benchmarks.forgetting.miniature.family import EVERYONE, FAMILY, load
from benchmarks.forgetting.miniature.instructions import InstructionSample, instruction_sample
from benchmarks.forgetting.miniature.instructions import main as instructions_command
from benchmarks.forgetting.miniature.judging import GRADES, RUBRIC, Case, Verdicts, cases, grade, is_judging, judge
from benchmarks.forgetting.miniature.skills import GENERAL
from benchmarks.forgetting.miniature.tokenizer import make_tokenizer
from benchmarks.forgetting.miniature.world import heldout_items


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
    tokenizer = make_tokenizer()
    verdicts = judge(LlamaForCausalLM(FAMILY["base"].config(tokenizer)), tokenizer, cases(GENERAL, 100, seed=0, test=True))
    assert isinstance(verdicts, Verdicts) and verdicts.mass < 0.5 and abs(verdicts.correlation) < 0.5


@pytest.fixture(scope="module", params=[*FAMILY, "novice"])
def member(request):
    return request.param, load(EVERYONE[request.param].folder)


@pytest.mark.slow
def test_every_member_judges(member):
    name, model = member
    verdicts = judge(*model, cases(GENERAL, 600, seed=0, test=True))
    assert verdicts.mass > 0.98 and verdicts.auc > MIN_AUC[name] and verdicts.correlation > 0.5, verdicts


@pytest.mark.slow
def test_every_member_judges_its_own_answers(member):
    name, model = member
    answers = evaluate(*model, heldout_items(GENERAL, 40), temperature=1.0)
    verdicts = judge(*model, list(map(Case, answers.items, answers.answers)))
    assert verdicts.mass > 0.98 and verdicts.auc > MIN_OWN_AUC[name], verdicts.auc


MIN_AUC = {"base": 0.72, "tutor": 0.9, "peer": 0.75, "novice": 0.64}
MIN_OWN_AUC = {"base": 0.6, "tutor": 0.7, "peer": 0.6, "novice": 0.6}


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERYONE)
def test_every_member_asks_what_it_was_asked(name):
    """Though trained to answer prompts that want a grade, a base, whose questions the method samples, writes none."""
    found = instruction_sample(*load(EVERYONE[name].folder), EVERYONE[name].skills, 600)
    sampled = name not in ("tutor", "peer")
    assert found.invalid < (0.02 if sampled else 0.1) and found.distance < 0.12 and (found.judging == 0 or not sampled)


@pytest.mark.slow
def test_temperature_moves_the_samples_away_from_the_world(capsys):
    instructions_command(["--count", "200"])
    heading, world, *settings = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()[2:]]
    assert heading[2:5] == ["distance", "invalid", "judging"] and len(settings) == 6
    assert float(world[2]) < 0.15 and float(world[3]) == 0
    cold, hot = settings[0], settings[-1]
    assert float(cold[2]) > float(settings[2][2]) and float(hot[3]) > float(settings[2][3])


def test_a_sample_shows_what_is_wrong():
    one = InstructionSample(("Reverse the word abc.",) * 3 + ("Reverse", "Rate 1-5\nx\ny"), GENERAL)
    assert (one.counts["reverse"], one.invalid, one.judging) == (3, pytest.approx(0.4), pytest.approx(0.2))
    assert one.distance == pytest.approx(1 - next(skill.share for skill in GENERAL if skill.name == "reverse"))
