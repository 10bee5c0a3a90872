"""Test diagnostics by closed forms, and that scripted judges get warnings while honest ones get none."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from synth.judging.diagnostics import JudgeScores, diagnose, krippendorff_alpha, read_scores, tie_rate
from synth.judging.self_preference import estimate_self_preference, factor_loadings
from synth.judging.within_item import rank_correlation
from tests.helpers.synth_fakes import fill, make_run

MODELS = ["base", "one", "two"]
SCRIPTS = ["constant", "self-preferring", "length-loving", "brevity-loving", "random"]


def scripted(seed: int, script: str | None = None, items: int = 400, samples: int = 3, noise=(0.5, 1.0, 1.6), whole: bool = False,
             exclude_self: bool = False) -> JudgeScores:
    """Three models of unequal strength, judged by themselves: they see an answer's quality with noise, each judge with its own.

    `script` says how the last one judges in place of that.
    """
    random = np.random.default_rng(seed)
    item = np.repeat(np.arange(items), 3 * samples)
    author = np.tile(np.repeat(np.arange(3), samples), items)
    # answers to hard questions are worse; better answers are a little longer
    quality = np.array([0.8, 0.0, -0.8])[random.permutation(3)][author] + random.normal(size=items)[item] + random.normal(size=len(item))
    length = np.round(np.exp(4 + 0.15 * quality + 0.5 * random.normal(size=len(item))))
    seen = [quality + sigma * random.normal(size=len(item)) for sigma in noise]
    seen[2] = {None: seen[2],
               "constant": 0.05 * random.normal(size=len(item)),
               "self-preferring": seen[2] + 1.5 * (author == 2),
               "length-loving": 2 * (np.log(length) - 4) + 0.5 * random.normal(size=len(item)),
               "brevity-loving": -2 * (np.log(length) - 4) + 0.5 * random.normal(size=len(item)),
               "random": random.normal(size=len(item))}[script]
    scores = np.stack([3.2 + scale * x for scale, x in zip((0.9, 0.5, 0.7), seen)], 1).clip(1, 5)
    scores = np.round(scores) if whole else scores
    if exclude_self:
        scores[author[:, None] == np.arange(3)] = np.nan
    return JudgeScores(MODELS, MODELS, scores, item, author, length, np.arange(len(item)))


def kinds(judge_scores: JudgeScores) -> list[tuple[str, str]]:
    return [(flag["judge"], flag["kind"]) for flag in diagnose(judge_scores)["warnings"]]


# ---------------------------------------------------------------- scripted judges


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_scripted_judge_is_flagged_and_no_honest_one(script, seed):
    assert kinds(scripted(seed, script, whole=seed % 2 == 0)) == [("two", script)]


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_honest_judges_are_not_flagged(seed, whole):
    """However noisy, however few items, whether they judge themselves or not."""
    random = np.random.default_rng(1000 + seed)
    noise, items = random.uniform(0.3, 2.0, 3), int(random.choice([40, 400]))
    assert kinds(scripted(seed, noise=noise, whole=whole, items=items)) == []
    assert kinds(scripted(seed, noise=noise, whole=whole, items=items, exclude_self=True)) == []


def test_without_self_judgements_the_others_are_flagged_all_the_same():
    for script in ("constant", "length-loving", "random"):
        assert kinds(scripted(3, script, exclude_self=True)) == [("two", script)]
    assert diagnose(scripted(3, exclude_self=True))["self_preference"] is None


def test_a_flag_names_the_judge_and_the_figure():
    flag, = diagnose(scripted(0, "self-preferring"))["warnings"]
    favour = diagnose(scripted(0, "self-preferring"))["self_preference"]["self_preference"]
    assert flag["text"].startswith(f"two prefers its own responses: it scores them {favour['two']:.2f} standard deviations (")
    assert favour["two"] > 0.5 and max(abs(favour["base"]), abs(favour["one"])) < 0.2


def test_low_mass_unreadable_scores_and_ties_are_flagged():
    judge_scores = scripted(1)
    rows = len(judge_scores.item)
    judge_scores.mass = {"base": (0.95, 0.01), "one": (0.6, 0.3), "two": (0.7, 0.09)}
    judge_scores.requested = {"base": rows, "one": rows, "two": rows + 400}
    judge_scores.unreadable = {"two": {"no score on the last line": 300, "empty": 100}}
    judge_scores.scores[:, 0] = np.where(judge_scores.scores[:, 0] > 2.6, 4.0, 1.0)
    found = diagnose(judge_scores)["warnings"]
    assert [(flag["judge"], flag["kind"]) for flag in found] == [("base", "ties"), ("one", "digit mass"), ("two", "unreadable")]
    assert "in 30% of its judgements less than half of its probability is on a score (mean 0.60)" in found[1]["text"]
    assert "in 10% of its judgements, most often: no score on the last line" in found[2]["text"]


def test_two_judges_that_do_not_agree():
    judge_scores = scripted(2, "random")
    judge_scores.judges, judge_scores.scores = ["base", "two"], judge_scores.scores[:, [0, 2]]
    assert kinds(judge_scores) == [("", "no agreement")]


# ---------------------------------------------------------------- closed forms


def test_krippendorff_of_the_published_example():
    """K. Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), example C: four observers, α for interval data 0.849."""
    observers = ["1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 ."]
    scores = np.array([[np.nan if x == "." else float(x) for x in row.split()] for row in observers]).T
    assert krippendorff_alpha(scores) == pytest.approx(0.849, abs=5e-4)
    assert krippendorff_alpha(np.array([[1.0, np.nan], [2.0, np.nan]])) is None


def test_rank_correlation_of_one_item_is_spearmans():
    random = np.random.default_rng(0)
    x, y = random.integers(1, 6, 200).astype(float), random.integers(1, 6, 200) + random.integers(0, 2, 200) * 1.0
    assert rank_correlation(np.zeros(200, int), x, y).value == pytest.approx(spearmanr(x, y).statistic)


def test_rank_correlation_does_not_see_what_differs_between_items():
    item, level = np.repeat(np.arange(50), 4), np.repeat(np.arange(50.0), 4)
    x = np.tile([1.0, 2.0, 3.0, 4.0], 50)
    assert rank_correlation(item, level + x, level - x).value == pytest.approx(-1)
    assert np.isnan(rank_correlation(item, level, x).value)  # no two answers of an item differ
    assert np.isnan(rank_correlation(item[:0], level[:0], x[:0]).value)


def test_the_error_of_a_rank_correlation_is_its_spread_over_pools():
    random, found = np.random.default_rng(1), []
    item = np.repeat(np.arange(100), 6)
    for _ in range(200):
        quality = random.normal(size=600)
        found.append(rank_correlation(item, quality + random.normal(size=600), quality + random.normal(size=600)))
    assert np.mean([one.standard_error for one in found]) == pytest.approx(np.std([one.value for one in found]), rel=0.15)


def test_loadings_reproduce_what_judges_have_in_common():
    strength, noise = np.array([0.9, 0.5, 1.4, 0.0]), np.array([0.3, 0.8, 0.5, 1.0])
    found, = factor_loadings(np.outer(strength, strength) + np.diag(noise**2))
    assert found == pytest.approx(strength, abs=1e-6)


def test_two_judges_say_only_the_product_of_their_factor_loadings():
    ends = factor_loadings(np.array([[1.0, 0.5], [0.5, 4.0]]))
    assert ends[0] == pytest.approx([1.0, 0.5]) and ends[1] == pytest.approx([0.25, 2.0])


def test_favour_is_what_was_added():
    """Scores without noise: severity, the judge's scale times quality, and one point of the last judge for its own answers."""
    random = np.random.default_rng(4)
    item, author = np.repeat(np.arange(200), 9), np.tile(np.repeat(np.arange(3), 3), 200)
    quality = random.normal(size=1800) + np.array([0.5, 0.0, -1.0])[author]
    scores = np.stack([3 + 0.5 * quality, 2 + quality, 2.5 + 0.8 * quality + (author == 2)], 1)
    found = estimate_self_preference(MODELS, MODELS, scores, item, author)
    assert found.self_preference == pytest.approx({"base": 0, "one": 0, "two": 1 / scores[:, 2].std()}, abs=1e-6)
    assert np.array(found.bias) - np.diag(np.diag(found.bias)) == pytest.approx(np.zeros((3, 3)), abs=1e-6)


def test_favour_needs_a_third_author():
    judge_scores = scripted(0)
    two = judge_scores.author < 2
    scores, item, author = judge_scores.scores[two], judge_scores.item[two], judge_scores.author[two]
    assert estimate_self_preference(MODELS, MODELS[:2], scores, item, author) is not None  # a judge that is no author
    assert estimate_self_preference(MODELS[:2], MODELS[:2], scores[:, :2], item, author) is None


def test_equal_answers_with_equal_scores_are_no_tie():
    def ties(texts, scores):
        n = len(texts)
        return tie_rate(JudgeScores(["j"], ["a"], np.array(scores, float)[:, None], np.zeros(n, int), np.zeros(n, int), np.ones(n),
                                 np.array(texts)), 0)

    assert ties([1, 1, 2], [5, 5, 3]) == 0
    assert ties([1, 2, 3], [5, 5, 3]) == 1
    assert ties([1, 1, 1], [5, 5, 5]) is None  # nothing to tell apart


# ---------------------------------------------------------------- a pool


def test_scores_are_read_from_a_pool(tmp_path):
    run = make_run(tmp_path, ["base", "other"])
    fill(run, ["q", "r"], {"base": [["aa", "bbb"], ["c", ValueError("empty")]], "other": [["d"], ["ee"]]})
    rows = [(0, "base", 0, "other", 4.0, 0.9, None, 0, None), (0, "base", 1, "other", 2.0, 0.3, None, 0, None),
            (0, "other", 0, "base", None, None, "?", 0, "no score"), (1, "base", 0, "other", 3.0, 0.6, None, 0, None),
            (1, "other", 0, "base", 5.0, None, "5", 0, None)]
    with run.pool.transaction():
        run.pool.insert("scores", rows)
    found, nan = read_scores(run.pool), np.nan
    assert (found.judges, found.authors) == (["base", "other"], ["base", "other"])
    np.testing.assert_array_equal(found.scores, [[nan, 4], [nan, 2], [nan, nan], [nan, 3], [5, nan]])
    assert found.item.tolist() == [0, 0, 0, 1, 1] and found.author.tolist() == [0, 0, 1, 0, 1]
    assert found.length.tolist() == [2, 3, 1, 1, 2]
    assert found.mass == {"other": pytest.approx((0.6, 1 / 3))}
    assert found.unreadable == {"base": {"no score": 1}, "other": {}} and found.requested == {"base": 2, "other": 3}


def test_a_pool_without_scores(tmp_path):
    assert read_scores(make_run(tmp_path).pool) is None
