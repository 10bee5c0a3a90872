"""Calibrate the judges' scores to a common scale and average them into one rating for each response.

Judges differ in severity and spread. Where no model judges its own responses, they do not even judge the same ones: the strongest model as
a judge never sees the strongest responses, so its mean score is low without it being severe. Severity is therefore fitted together with
the quality of the models that responded, by least squares over all scores:

    score = severity of the judge + quality of the responding model + residual

A calibrated score is  level + unit · (score - severity) / spread,  where spread is the standard deviation of the judge's residuals, and
level and unit are the means of all judges' severities and spreads, so the scale is still points of the rubric. Judges that share no
author, not even through others (two models that judge each other), give no way to tell severity from quality: each such group keeps its
own level. A judge whose spread is 0 is left out of the mean, except where no other judge scored the response.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from synth.config import Config, name_of
from synth.pool.store import ITEM_IS_CLEAN
from synth.pool.synthesis_run import SynthesisRun
from trainer.errors import UserError

CONSTANT = 1e-4  # points of spread below which a judge gives always the same score
INSERT_ROWS = 10_000  # ratings of one insertion

# SQL for a judge's score in the table `scores`, called s, by the option select.statistic
SCORE_COLUMN = {"mean": "s.score", "mode": "CAST(s.text AS REAL)"}

# Sums of the scores of each judge for each author, in the order of ScoreSums
SCORE_SUMS = """
    SELECT judge, model, count({score}), total({score}), total({score} * {score})
    FROM scores AS s WHERE {score} IS NOT NULL GROUP BY judge, model"""

# Every usable response to a clean item, with one ScoreRow for each of its scores, in the order of the responses' keys. Unary plus keeps
# SQLite from using an index for `item`, so that it walks the responses in that order and need not sort them.
SCORES_BY_ANSWER = f"""
    SELECT r.item, r.model, r.sample, s.judge, {{score}}
    FROM responses AS r LEFT JOIN scores AS s ON s.item = r.item AND s.model = r.model AND s.sample = r.sample
    WHERE r.reason IS NULL AND +r.item IN (SELECT id FROM items WHERE {ITEM_IS_CLEAN})
    ORDER BY r.item, r.model, r.sample"""


def judges_by_author(config: Config) -> dict[str, tuple[str, ...]]:
    """Return which judges score each author's responses.

    That is all judges; with `judge.exclude_self` all but the author, unless the author is the only judge.
    """
    authors, judges = [name_of(model) for model in (config.base, *config.responders)], [name_of(model) for model in config.judges]
    others = {author: tuple(sorted({*judges} - {author})) for author in authors}
    return {author: others[author] if config.judge.exclude_self and others[author] else tuple(sorted({*judges})) for author in authors}


# ---------------------------------------------------------------- a common scale


class ScoreSums(NamedTuple):
    """Sums over one judge's scores of one author's responses."""

    judge: str
    author: str
    count: int
    sum: float
    sum_of_squares: float


class JudgeScale(NamedTuple):
    """The calibration of one judge: calibrated score = shift + factor · score."""

    severity: float  # the score that it gives a response of mean quality
    spread: float  # standard deviation of its residuals, in points
    shift: float = 0.0
    factor: float = 1.0

    @property
    def varies(self) -> bool:
        """Return whether the judge gives different scores at all."""
        return self.spread >= CONSTANT

    def calibrate(self, score: float) -> float:
        """Bring a score of this judge to the common scale."""
        return self.shift + self.factor * score


def fit_scales(sums: Sequence[ScoreSums]) -> dict[str, JudgeScale]:
    """Fit the scale of every judge that has at least one score."""
    judges, authors = sorted({cell.judge for cell in sums}), sorted({cell.author for cell in sums})
    row = np.array([judges.index(cell.judge) for cell in sums])
    column = np.array([authors.index(cell.author) for cell in sums])
    count, means = np.array([cell.count for cell in sums], float), np.array([cell.sum / cell.count for cell in sums])
    severity, quality, group = _fit_effects(row, column, means, count)
    within = np.array([max(0.0, cell.sum_of_squares - cell.sum**2 / cell.count) for cell in sums])
    residual = within + count * (means - severity[row] - quality[column]) ** 2
    spread = np.sqrt(np.bincount(row, residual) / np.bincount(row, count))
    varies = spread >= CONSTANT
    unit = spread[varies].mean() if varies.any() else 1.0
    scales = {}
    for j, judge in enumerate(judges):
        peers = (group == group[j]) & (varies if varies[group == group[j]].any() else True)
        factor = unit / spread[j] if varies[j] else 1.0
        shift = severity[peers].mean() - factor * severity[j]
        scales[judge] = JudgeScale(float(severity[j]), float(spread[j]), float(shift), float(factor))
    return scales


def _fit_effects(row: np.ndarray, column: np.ndarray, means: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit severity by judge and quality by author to the mean scores of (judge `row`, author `column`).

    Weighted by their counts, these means have the least-squares solution of the single scores. Also returns the connected group of each
    judge; the quality has mean 0 over the scores of a group.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n, m = row.max() + 1, column.max() + 1
    design = np.zeros((len(means), n + m))
    design[np.arange(len(means)), row] = design[np.arange(len(means)), n + column] = 1
    weight = np.sqrt(count)
    effects = np.linalg.lstsq(design * weight[:, None], means * weight)[0]
    group = connected_components(coo_array((np.ones(len(row)), (row, n + column)), shape=(n + m, n + m)), directed=False)[1]
    mean_quality = np.bincount(group[row], count * effects[n + column]) / np.bincount(group[row], count)
    return effects[:n] + mean_quality[group[:n]], effects[n:] - mean_quality[group[n:]], group[:n]


def judge_scales(run: SynthesisRun) -> dict[str, JudgeScale]:
    """Fit the scale of every judge with a score in the pool.

    Without `judge.calibrate_judges` the scales leave scores as they are.
    """
    judges, score = judges_by_author(run.config), SCORE_COLUMN[run.config.select.statistic]
    sums = map(ScoreSums._make, run.pool.select(SCORE_SUMS.format(score=score)))
    sums = [cell for cell in sums if cell.judge in judges.get(cell.author, ())]
    if not sums:
        return {}
    scales = fit_scales(sums)
    if run.config.judge.calibrate_judges:
        return scales
    return {judge: JudgeScale(scale.severity, scale.spread) for judge, scale in scales.items()}


# ---------------------------------------------------------------- ratings


class ScoreRow(NamedTuple):
    """A usable response with one judge's score; no judge and no score where nobody scored it."""

    item: int
    model: str
    sample: int
    judge: str | None
    score: float | None

    @property
    def key(self) -> tuple[int, str, int]:
        return self.item, self.model, self.sample


class Rating(NamedTuple):
    """A row of the table `ratings`."""

    item: int
    model: str
    sample: int
    value: float | None  # mean of the judges' calibrated scores; None where one of them is missing
    disagreement: float | None  # their standard deviation; None for fewer than two scores
    judges: int  # that gave a score


def rate_responses(run: SynthesisRun) -> dict[str, JudgeScale]:
    """Recompute the table `ratings` inside the caller's transaction, and return the judges' scales.

    Raises UserError where a judge still has to score a response.
    """
    scales = judge_scales(run)
    run.pool.connection.execute("DELETE FROM ratings")
    ratings = _compute_ratings(run, scales)
    while batch := list(itertools.islice(ratings, INSERT_ROWS)):
        run.pool.insert("ratings", batch)
    return scales


def _compute_ratings(run: SynthesisRun, scales: dict[str, JudgeScale]) -> Iterator[Rating]:
    judges, calibrate, missing = judges_by_author(run.config), run.config.judge.calibrate_judges, 0
    query = SCORES_BY_ANSWER.format(score=SCORE_COLUMN[run.config.select.statistic])
    rows = map(ScoreRow._make, run.pool.connection.execute(query))
    for key, score_rows in itertools.groupby(rows, key=attrgetter("key")):
        scores = {row.judge: row.score for row in score_rows}
        _, model, _ = key
        expected = judges.get(model, ())
        missing += sum(judge not in scores for judge in expected)
        yield combine_scores(key, [(scales.get(judge), scores.get(judge)) for judge in expected], calibrate)
    if missing:
        raise UserError(f"pool {run.pool.path}: expected every judge's score of every response, got {missing:,} missing scores; "
                        "run stage judge first: --stages '[judge]'")


def combine_scores(key: tuple[int, str, int], scores: Sequence[tuple[JudgeScale | None, float | None]], calibrate: bool) -> Rating:
    """Average the scores of one response, each with its judge's scale.

    A score of None could not be read.
    """
    read = [(scale, score) for scale, score in scores if score is not None]
    if not read or len(read) < len(scores):
        return Rating(*key, None, None, len(read))
    averaged = [(scale, score) for scale, score in read if scale.varies or not calibrate] or read
    calibrated = [scale.calibrate(score) for scale, score in averaged]
    mean = math.fsum(calibrated) / len(calibrated)
    deviation = math.sqrt(math.fsum((score - mean) ** 2 for score in calibrated) / len(calibrated)) if len(calibrated) > 1 else None
    return Rating(*key, mean, deviation, len(read))
