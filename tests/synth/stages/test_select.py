"""Test ratings and choices by hand, recovery of planted judges, and independence of order."""

import json
import random

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from synth.config import Config, Judge, Respond, Select
from synth.judging.calibration import JudgeScale, ScoreSums, combine_scores, fit_scales, judges_by_author, rate_responses
from synth.stages.respond import respond
from synth.stages.select import Candidate, Comparison, choose, choose_by_rule, choose_rejected, drop_reason, preferred_response, select
from tests.helpers.synth_fakes import FakeEngine, fill, install, make_run, score
from trainer.errors import UserError


def ratings(run):
    return {row[:3]: row[3:] for row in run.pool.select("SELECT * FROM ratings")}


def selection(run):
    return {row[0]: row[1:] for row in run.pool.select("SELECT * FROM selection")}


# ---------------------------------------------------------------- scales


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


# ---------------------------------------------------------------- ratings


def test_a_rating_is_the_mean_and_the_spread_of_its_judges():
    plain = JudgeScale(0, 1)
    key = (3, "x", 1)
    assert combine_scores(key, [(plain, 2), (plain, 5), (plain, 5)], True) == (*key, 4.0, pytest.approx(2**0.5), 3)
    assert combine_scores(key, [(plain, 2)], True) == (*key, 2.0, None, 1)
    assert combine_scores(key, [(plain, 2), (plain, None)], True) == (*key, None, None, 1)
    assert combine_scores(key, [(None, None)], True) == (*key, None, None, 0)


def judged_run(folder, scores, answers=None, **options):
    """A run with models base and other, whose answers have these scores by (item, model, sample, judge)."""
    run = make_run(folder, ["base", "other"], **options)
    items = 1 + max(key[0] for key in scores)
    if answers is None:
        answers = {}
        for item, model, sample, _ in scores:
            texts = answers.setdefault(model, [[] for _ in range(items)])[item]
            texts.extend(f"{model} {k}" for k in range(len(texts), sample + 1))
    fill(run, [f"Question {i}?" for i in range(items)], answers)
    score(run, scores)
    return run


def test_incomplete_answers_have_no_value_and_missing_scores_stop_the_stage(tmp_path):
    scores = {(0, "base", 0, "base"): 4, (0, "base", 0, "other"): None, (0, "other", 0, "base"): 2, (0, "other", 0, "other"): 3}
    lines, plain = [], Judge(exclude_self=False, calibrate_judges=False)
    run = judged_run(tmp_path / "a", scores, judge=plain, say=lines.append)
    select(run)
    assert ratings(run) == {(0, "base", 0): (None, None, 1), (0, "other", 0): (2.5, 0.5, 2)}
    assert lines[0] == ("select: 1 items selected, 0 of them with a rejected response; 1 of 2 responses lack a score and were left out")
    del scores[0, "base", 0, "base"], scores[0, "other", 0, "other"]
    run = judged_run(tmp_path / "b", scores, judge=plain)
    before = run.pool.dump()
    with pytest.raises(UserError, match=r"got 2 missing scores; run stage judge first: --stages '\[judge\]'"):
        select(run)
    assert run.pool.dump() == before


def test_selection_waits_for_judges_and_refuses_other_ones(tmp_path):
    run = make_run(tmp_path, ["base"])
    fill(run, ["a?"], {"base": [["b"]]})
    with pytest.raises(UserError, match="expected stage judge to have ended"):
        select(run)
    score(run, {(0, "base", 0, "base"): 3})
    run.config.judge.scoring = "generated"
    with pytest.raises(UserError, match="judge.max_tokens: this pool was made with None"):
        select(run)


def test_own_verdicts_may_be_left_out_later_and_asked_for_later(tmp_path):
    """Scores of all judges hold those of the others: only what is missing has to be asked for."""
    scores = {(0, "base", 0, "base"): 5, (0, "base", 0, "other"): 1, (0, "other", 0, "base"): 2, (0, "other", 0, "other"): 4}
    run = judged_run(tmp_path / "a", scores, judge=Judge(exclude_self=False, calibrate_judges=False))
    select(run)
    assert [row[0] for row in ratings(run).values()] == [3, 3]
    run.config.judge.exclude_self = True
    select(run)
    assert [row[0] for row in ratings(run).values()] == [1, 2]
    del scores[0, "base", 0, "base"], scores[0, "other", 0, "other"]
    run = judged_run(tmp_path / "b", scores, judge=Judge(calibrate_judges=False))
    select(run)
    run.config.judge.exclude_self = False
    with pytest.raises(UserError, match="got 2 missing scores; run stage judge first"):
        select(run)


def test_own_verdicts_that_are_left_out_do_not_move_the_scales(tmp_path):
    scores = {(item, author, 0, judge): item % 2 + 2 + (author == judge) * 2 for item in range(4) for author in ("base", "other")
              for judge in ("base", "other")}
    whole = judged_run(tmp_path / "a", scores, judge=Judge(exclude_self=False))
    whole.config.judge.exclude_self = True
    part = judged_run(tmp_path / "b", {key: value for key, value in scores.items() if key[1] != key[3]}, judge=Judge())
    with whole.pool.transaction(), part.pool.transaction():
        assert rate_responses(whole) == rate_responses(part)
    assert ratings(whole) == ratings(part)


def test_integers_are_the_likeliest_digits(tmp_path):
    """The mean prefers the first answer, the likeliest digit the second."""
    run = judged_run(tmp_path, {(0, "base", 0, "other"): 3.9, (0, "base", 1, "other"): 3.6}, judge=Judge(calibrate_judges=False))
    run.pool.connection.execute("UPDATE scores SET text = CASE sample WHEN 0 THEN '4' ELSE '5' END")
    run.config.select = Select(rule="best")
    select(run)
    assert selection(run)[0][:3] == ("base", 0, 3.9)
    run.config.select = Select(rule="best", statistic="mode")
    select(run)
    assert selection(run)[0][:3] == ("base", 1, 5.0)


# ---------------------------------------------------------------- candidates


@pytest.mark.parametrize(("among", "chosen"), [
    ([], ("other", 1)), (["base"], ("base", 1)), (["base:0"], ("base", 0)), (["base:greedy"], ("base", -1)),
    (["base:0", "other:0"], ("other", 0)), (["other"], ("other", 1))])
def test_only_the_named_answers_are_candidates(tmp_path, among, chosen):
    run = four_answers(tmp_path)
    run.config.select = Select(rule="best", candidates=among)
    select(run)
    assert selection(run)[0][:2] == chosen


@pytest.mark.parametrize(("among", "chosen"), [([], ("base", 0)), (["other", "base"], ("other", 0)), (["base:greedy"], ("base", -1)),
                                               (["base:1", "base"], ("base", 1))])
def test_the_first_answer_needs_no_judge(tmp_path, among, chosen):
    run = four_answers(tmp_path, judged=False)
    lines = []
    run.say = lines.append
    run.config.select = Select(rule="first", candidates=among)
    select(run)
    assert selection(run)[0][:3] == (*chosen, None) and ratings(run) == {}
    assert lines[0] == "select: 1 items selected, 0 of them with a rejected response; no judge was needed"


def test_a_candidate_that_the_pool_does_not_have_is_refused(tmp_path):
    run = four_answers(tmp_path)
    run.config.select.candidates = ["base:7"]
    with pytest.raises(UserError, match="select.candidates: expected names among base, other, base:0, base:1, base:2, base:greedy, "
                                        "other:0, other:1, other:2, got base:7"):
        select(run)


def test_greedy_answers_alone_make_a_replay_set_without_a_judge(tmp_path, monkeypatch):
    """The cheapest baseline: one greedy answer of the base to each instruction, and nobody asked about it."""
    run = make_run(tmp_path, ["base"], respond=Respond(num_samples=0), select=Select(rule="first"))
    fill(run, ["a?", "b?"], done=("probe", "instruct", "clean"))
    install(monkeypatch, base=FakeEngine("base", complete=lambda request: f"answer at {request.sampling.temperature:g}"))
    respond(run)
    select(run)
    rows = [json.loads(line) for line in (tmp_path / "replay.jsonl").open()]
    assert [row["messages"][-1]["content"] for row in rows] == ["answer at 0"] * 2


def four_answers(tmp_path, judged=True):
    """Two answers and a greedy one of the base, two of another model, each better than the one before."""
    run = make_run(tmp_path, ["base", "other"])
    fill(run, ["a?"], {"base": [["b", "c"]], "other": [["d", "e"]]})
    run.pool.connection.execute("INSERT INTO responses SELECT item, model, -1, 'g', tokens, finish, logprob, base_logprob, base_tokens, "
                                "seed, reason FROM responses WHERE model = 'base' AND sample = 0")
    if judged:
        keys = [("base", -1), ("base", 0), ("base", 1), ("other", 0), ("other", 1)]
        score(run, {(0, *key, judge): place + 0.1 for place, key in enumerate(keys) for judge in ("base", "other") if judge != key[0]})
    return run


def test_ratings_take_out_what_judges_differ_by(tmp_path):
    """b is stricter by 2 points: as raw scores the base's first answer, seen by `other` alone, would look best."""
    scores = {}
    for item, (x, y) in enumerate([(3, 4), (4, 3), (2, 3), (5, 4)]):
        scores |= {(item, "base", 0, "base"): x, (item, "other", 0, "base"): y,
                   (item, "base", 0, "other"): x - 1.5, (item, "other", 0, "other"): y - 1.5}
    run = judged_run(tmp_path, scores, judge=Judge(exclude_self=False))
    with run.pool.transaction():
        scales = rate_responses(run)
    assert scales["base"].severity - scales["other"].severity == pytest.approx(1.5)
    assert scales["base"].calibrate(4) == pytest.approx(scales["other"].calibrate(2.5))
    assert [row[1] for row in ratings(run).values()] == pytest.approx([0.0] * 8)


# ---------------------------------------------------------------- rules


def config(rule="best", within=0.5, seed=0, floor=0.0):
    return Config(select=Select(rule=rule, margin=within, min_score=floor), seed=seed)


A, B = Candidate("x", 0, "a", 4.0, -1.0), Candidate("x", 1, "b", 3.6, -0.2)
C, D = Candidate("y", 0, "c", 3.4, -0.1), Candidate("y", 1, "d", None, 0.0)


def test_the_best_or_the_likeliest_near_it():
    assert choose_by_rule(config("best"), 0, [A, B, C]) == A
    assert choose_by_rule(config("base_likelihood"), 0, [A, B, C]) == B
    assert choose_by_rule(config("base_likelihood", within=0.6), 0, [A, B, C]) == C
    assert choose_by_rule(config("base_likelihood", within=0.0), 0, [A, B, C]) == A
    assert choose(config("base_likelihood"), 0, [A, B, C, D]).chosen == B


def test_of_those_near_the_best_what_most_say_wins():
    """Alone, c is likelier than b; two that say b outweigh that, and what they say is judged well enough. Far below, nobody is asked."""
    again, far = B._replace(model="y", sample=2), [Candidate("z", k, "d", 1.0, -0.1) for k in range(3)]
    assert choose_by_rule(config("majority", within=0.6), 0, [A, B, C]) == C
    assert choose_by_rule(config("majority", within=0.6), 0, [A, B, C, again, *far]) in (B, again)
    assert choose_by_rule(config("base_likelihood", within=0.6), 0, [A, B, C, again]) == C
    assert choose_by_rule(config("majority", within=0.0), 0, [A, B, C, again]) == A


def test_where_the_base_read_none_of_the_near_ones_the_best_is_taken():
    unread = [answer._replace(likelihood=None) for answer in (A, B)]
    assert choose_by_rule(config("base_likelihood"), 0, [*unread, C]) == unread[0]
    assert choose_by_rule(config("base_likelihood"), 0, [unread[0], B, C]) == B


def test_likelihoods_count_per_token_and_unread_answers_have_none(tmp_path):
    run = make_run(tmp_path, ["base"], select=Select(rule="base_likelihood", margin=1.0))
    fill(run, ["q"], {"base": [["short", "a much longer answer", "unread"]]}, likelihoods={(0, "base", 0): -0.9, (0, "base", 1): -0.5})
    run.pool.connection.execute("UPDATE responses SET base_logprob = NULL, base_tokens = 0 WHERE sample = 2")
    score(run, {(0, "base", 0, "base"): 4, (0, "base", 1, "base"): 4, (0, "base", 2, "base"): 4})
    select(run)
    assert selection(run)[0][:2] == ("base", 1)


def test_ties_are_broken_by_the_seed_evenly_and_whatever_the_order():
    tied = [Candidate(model, sample, f"{model}{sample}", 4.0) for model in "xy" for sample in range(2)]
    picks = [choose_by_rule(config(), item, tied) for item in range(2000)]
    for answer in tied:
        assert 430 < picks.count(answer) < 570  # 500 +- 3.6 standard deviations of 19.4
    assert picks == [choose_by_rule(config(), item, tied[::-1]) for item in range(2000)]
    assert picks != [choose_by_rule(config(seed=1), item, tied) for item in range(2000)]


def test_the_rejected_answer_is_clearly_worse_and_reads_otherwise():
    low, lower = Candidate("y", 2, "e", 3.5), Candidate("y", 3, "f", 2.0)
    assert choose_rejected(config(), 0, [A, low], A) is None  # 0.5 below is near
    assert choose_rejected(config(within=0.4), 0, [A, low], A) == low
    assert choose_rejected(config(), 0, [A, low, lower], A) == lower
    assert choose_rejected(config(), 0, [A, low, lower._replace(text="a")], A) is None
    assert choose_rejected(config(within=0.0), 0, [A, A._replace(sample=5, text="z")], A) is None
    assert choose(config(), 0, [A, lower, D]).row == ("x", 0, 4.0, "y", 3, 2.0)
    assert choose(config(), 0, [A]).row == ("x", 0, 4.0, None, None, None)


def test_reasons_to_drop_an_item():
    assert drop_reason([A, B], 1.0, 0.0) is None and drop_reason([A, B], 1.0, 4.0) is None
    assert drop_reason([B, C, D], 1.0, 4.0) == ("below min_score", "3.600")
    assert drop_reason([], 1.0, 0.0) == ("no usable response", None)
    assert drop_reason([D], 1.0, 0.0) == ("no response with all scores", None)
    assert drop_reason([A], 0.0, 0.0) == ("weight 0", None)


# ---------------------------------------------------------------- pairs that were compared


def test_a_preference_is_over_both_orders_and_all_judges():
    x, y = ("x", 0), ("y", 1)

    def preferred(comparisons):
        return preferred_response([Comparison(0, *row) for row in comparisons])

    assert preferred([("j", *x, *y, 0.9), ("j", *y, *x, 0.3)]) == x  # (.9 + .7) / 2
    assert preferred([("j", *x, *y, 0.9), ("j", *y, *x, 0.95)]) == y  # each time the first shown: a bias, which cancels
    assert preferred([("j", *x, *y, 0.9), ("j", *y, *x, 0.9)]) is None
    assert preferred([("j", *x, *y, 0.6), ("j", *y, *x, 0.5), ("k", *x, *y, 0.2), ("k", *y, *x, 0.6)]) == y
    assert preferred([("j", *x, *y, 0.6), ("j", *y, *x, 0.5), ("k", *x, *y, 0.0), ("k", *y, *x, None)]) == x
    assert preferred([("k", *x, *y, 0.9), ("k", *y, *x, None)]) is None and preferred([]) is None


def test_the_preferred_of_the_two_best_wins(tmp_path):
    scores = {(i, "base", s, "base"): v for i in range(3) for s, v in enumerate((4.0, 3.9, 1.0))}
    run = judged_run(tmp_path, scores, judge=Judge(pairwise=True, exclude_self=False), judges=[make_run(tmp_path / "x").base])
    with run.pool.transaction():
        run.pool.insert("comparisons", [(item, "base", first, "base", 1 - first, "base", share, 1.0, None)
                                        for item, shares in ((0, (0.2, 0.6)), (1, (0.2, None))) for first, share in enumerate(shares)])
    run.config.select.rule = "best"
    select(run)
    assert {item: row[1] for item, row in selection(run).items()} == {0: 1, 1: 0, 2: 0}
    run.config.judge.pairwise = False
    select(run)
    assert {item: row[1] for item, row in selection(run).items()} == {0: 0, 1: 0, 2: 0}


# ---------------------------------------------------------------- the stage


def random_pool(folder, order=None, **options):
    rng = random.Random(5)
    answers = {model: [[f"{model} {item} {k}" for k in range(3)] for item in range(40)] for model in ("base", "other", "third")}
    run = make_run(folder, list(answers), **options)
    likelihoods = {(i, m, k): -rng.random() for i in range(40) for m in answers for k in range(3)}
    fill(run, [f"Question {i}?" for i in range(40)], answers, likelihoods=likelihoods)
    drawn = {(i, m, k, j): rng.choice([1, 2, 3, 4, 5, 5, None]) for i in range(40) for m in answers for k in range(3)
             for j in judges_by_author(run.config)[m]}
    keys = list(drawn)
    random.Random(order).shuffle(keys) if order else None
    score(run, {key: drawn[key] for key in keys})
    return run


def test_the_order_of_scores_and_earlier_selections_leave_no_trace(tmp_path):
    run = random_pool(tmp_path / "a", select=Select(min_score=4.4))
    select(run)
    dump = run.pool.dump()
    files = {path.name: path.read_bytes() for path in tmp_path.glob("a/*.json*")}
    assert set(files) == {"replay.jsonl", "pairs.jsonl", "manifest.json"}
    assert {row[1] for row in dump["drops"]} == {"select"} and len(dump["selection"]) + len(dump["drops"]) == 40
    other = random_pool(tmp_path / "b", order=3, select=Select(rule="best", min_score=4.6))
    select(other)
    assert other.pool.dump() != dump
    other.config.select = run.config.select
    for _ in range(2):
        select(other)
        assert other.pool.dump() == dump
        assert {path.name: path.read_bytes() for path in tmp_path.glob("b/*.json*")} == files


def test_what_other_stages_dropped_stays_so(tmp_path):
    run = random_pool(tmp_path)
    with run.pool.transaction():
        run.pool.insert("drops", [(3, "clean", "too short", None), (4, "select", "below min_score", "1")])
    select(run)
    assert 3 not in selection(run) and 4 in selection(run)
    assert run.pool.select("SELECT * FROM drops WHERE item = 3") == [(3, "clean", "too short", None)]
    assert not run.pool.select("SELECT 1 FROM ratings WHERE item = 3")


def test_items_without_a_choice_are_dropped_with_their_reason(tmp_path):
    run = make_run(tmp_path, ["base"], select=Select(rule="best", min_score=2.0))
    fill(run, ["a", "b", "c", "d", "e"], {"base": [["x"], [ValueError("empty")], ["y"], ["z"], ["w"]]}, weights={4: 0.0})
    score(run, {(0, "base", 0, "base"): 4, (2, "base", 0, "base"): None, (3, "base", 0, "base"): 1, (4, "base", 0, "base"): 4})
    select(run)
    assert set(selection(run)) == {0} and run.done("select")
    assert run.pool.select("SELECT * FROM drops ORDER BY item") == [
        (1, "select", "no usable response", None), (2, "select", "no response with all scores", None),
        (3, "select", "below min_score", "1.000"), (4, "select", "weight 0", None)]


def test_an_empty_replay_set_is_an_error_that_says_who_dropped_what(tmp_path):
    run = make_run(tmp_path, ["base"], select=Select(min_score=5.0))
    fill(run, ["a", "b", "c"], {"base": [["x"], ["y"], []]})
    with run.pool.transaction():
        run.pool.insert("drops", [(2, "clean", "too short", None)])
    score(run, {(0, "base", 0, "base"): 4, (1, "base", 0, "base"): 3})
    message = r"got none: of 3 planned items none is left \(select dropped 2: below min_score; clean dropped 1: too short\)"
    with pytest.raises(UserError, match=message) as refused:
        select(run)
    assert "\n" not in str(refused.value) and not run.done("select")
    run.config.select.min_score = 4.0
    run.config.judge.calibrate_judges = False
    select(run)
    assert set(selection(run)) == {0} and run.done("select")
