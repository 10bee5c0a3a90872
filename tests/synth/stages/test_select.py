"""Test ratings and choices by hand, and independence of order."""

import json
import random

import pytest

from synth.config import Config, Judge, Respond, Select
from synth.judging.calibration import judges_by_author, rate_responses
from synth.stages.respond import respond
from synth.stages.select import Candidate, Comparison, choose, choose_by_rule, choose_rejected, drop_reason, preferred_response, select
from tests.helpers.synth_fakes import FakeEngine, fill, install, make_run, score
from trainer.errors import UserError


def ratings(run):
    return {row[:3]: row[3:] for row in run.pool.select("SELECT * FROM ratings")}


def selection(run):
    return {row[0]: row[1:] for row in run.pool.select("SELECT * FROM selection")}


# ---------------------------------------------------------------- ratings


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
