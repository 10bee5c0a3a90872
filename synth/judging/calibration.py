"""What several judges say together: every judge's scores brought to a common scale, their mean, and how far they are apart.

Judges differ in severity and spread, and where none judges its own answers they do not even judge the same ones: the best model's judge
never sees the best answers, so its mean is low through no severity of its own. So a judge's severity is fitted beside the models' quality,

    score = severity of the judge + quality of the answering model + rest        (least squares over all scores)

and a normalised score is  level + unit · (score - severity) / spread,  where spread is the judge's own standard deviation of the rest, and
level and unit are the means of all judges' severities and spreads: points of the rubric, still. Judges with no author in common, not even
through others (two models that judge each other), have nothing that tells severity from quality: each such group keeps its own level.
A judge that always says the same has no say, except where nobody else has one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from synth.config import Config, name_of
from synth.pool.run import SynthesisRun
from synth.pool.store import CLEAN
from trainer.errors import UserError

CONSTANT = 1e-4  # points of spread below which a judge always says the same
ROWS = 10_000  # of one insertion


def panel(config: Config) -> dict[str, tuple[str, ...]]:
    """Who judges whose answers: all judges; with `judge.exclude_self` all but the author, as long as somebody is left."""
    authors, judges = [name_of(model) for model in (config.base, *config.responders)], [name_of(model) for model in config.judges]
    others = {author: tuple(sorted({*judges} - {author})) for author in authors}
    return {author: others[author] if config.judge.exclude_self and others[author] else tuple(sorted({*judges})) for author in authors}


def given(config: Config) -> str:
    """SQL: what a judge says of an answer, in `scores` called s."""
    return "s.score" if config.select.statistic == "mean" else "CAST(s.text AS REAL)"


# ---------------------------------------------------------------- a common scale


class Cell(NamedTuple):
    """What one judge says of one model's answers."""

    judge: str
    author: str
    count: int
    sum: float
    squares: float  # sum of the squared scores


class Scale(NamedTuple):
    """How a judge's scores become common ones: shift + factor · score."""

    severity: float  # the score that it gives an answer of mean quality
    spread: float
    shift: float = 0.0
    factor: float = 1.0

    @property
    def varies(self) -> bool:
        return self.spread >= CONSTANT

    def __call__(self, score: float) -> float:
        return self.shift + self.factor * score


def fit(cells: Sequence[Cell]) -> dict[str, Scale]:
    """Every judge's scale, from at least one score of each."""
    judges, authors = sorted({cell.judge for cell in cells}), sorted({cell.author for cell in cells})
    row = np.array([judges.index(cell.judge) for cell in cells])
    column = np.array([authors.index(cell.author) for cell in cells])
    count, means = np.array([cell.count for cell in cells], float), np.array([cell.sum / cell.count for cell in cells])
    severity, quality, group = _effects(row, column, means, count)
    within = np.array([max(0.0, cell.squares - cell.sum**2 / cell.count) for cell in cells])
    rest = within + count * (means - severity[row] - quality[column]) ** 2
    spread = np.sqrt(np.bincount(row, rest) / np.bincount(row, count))
    varies = spread >= CONSTANT
    unit = spread[varies].mean() if varies.any() else 1.0
    scales = {}
    for j, judge in enumerate(judges):
        peers = (group == group[j]) & (varies if varies[group == group[j]].any() else True)
        factor = unit / spread[j] if varies[j] else 1.0
        scales[judge] = Scale(float(severity[j]), float(spread[j]), float(severity[peers].mean() - factor * severity[j]), float(factor))
    return scales


def _effects(row: np.ndarray, column: np.ndarray, means: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Severity of each judge, quality of each author (mean 0 over the scores of a group), and the group that each judge belongs to.

    Weighted by their counts, the means of the cells have the least-squares solution of the scores themselves.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n, m = row.max() + 1, column.max() + 1
    design = np.zeros((len(means), n + m))
    design[np.arange(len(means)), row] = design[np.arange(len(means)), n + column] = 1
    weight = np.sqrt(count)
    effects = np.linalg.lstsq(design * weight[:, None], means * weight)[0]
    group = connected_components(coo_array((np.ones(len(row)), (row, n + column)), shape=(n + m, n + m)), directed=False)[1]
    middle = np.bincount(group[row], count * effects[n + column]) / np.bincount(group[row], count)
    return effects[:n] + middle[group[:n]], effects[n:] - middle[group[n:]], group[:n]


def scales_of(run: SynthesisRun) -> dict[str, Scale]:
    """The scale of every judge that gave a score; the scores as they are without `judge.calibrate_judges`."""
    judges, score = panel(run.config), given(run.config)
    found = (Cell(*row) for row in run.pool.select(
        f"SELECT judge, model, count({score}), total({score}), total({score} * {score}) FROM scores AS s WHERE {score} IS NOT NULL "
        "GROUP BY judge, model"))
    cells = [cell for cell in found if cell.judge in judges.get(cell.author, ())]
    if not cells:
        return {}
    fitted = fit(cells)
    return fitted if run.config.judge.calibrate_judges else {judge: Scale(scale.severity, scale.spread) for judge, scale in fitted.items()}


# ---------------------------------------------------------------- ratings


class Rating(NamedTuple):
    """A row of `ratings`."""

    item: int
    model: str
    sample: int
    value: float | None  # mean of the judges' common scores; None where one of them has none
    disagreement: float | None  # their standard deviation; None where fewer than two have a say
    judges: int  # that gave a score


def rate(run: SynthesisRun) -> dict[str, Scale]:
    """Fill `ratings` anew, inside the caller's transaction; the judges' scales. UserError while scores are missing."""
    scales = scales_of(run)
    run.pool.connection.execute("DELETE FROM ratings")
    rows = _ratings(run, scales)
    while batch := list(itertools.islice(rows, ROWS)):
        run.pool.insert("ratings", batch)
    return scales


def _ratings(run: SynthesisRun, scales: dict[str, Scale]) -> Iterator[Rating]:
    judges, normalise, missing = panel(run.config), run.config.judge.calibrate_judges, 0
    # the plus keeps the answers in the order of their keys, with no sorting
    found = run.pool.connection.execute(
        f"SELECT r.item, r.model, r.sample, s.judge, {given(run.config)} FROM responses AS r LEFT JOIN scores AS s "
        "ON s.item = r.item AND s.model = r.model AND s.sample = r.sample "
        f"WHERE r.reason IS NULL AND +r.item IN (SELECT id FROM items WHERE {CLEAN}) ORDER BY r.item, r.model, r.sample")
    for key, rows in itertools.groupby(found, key=lambda row: row[:3]):
        scores = {judge: score for *_, judge, score in rows}
        expected = judges.get(key[1], ())
        missing += sum(judge not in scores for judge in expected)
        yield rating(key, [(scales.get(judge), scores.get(judge)) for judge in expected], normalise)
    if missing:
        raise UserError(f"pool {run.pool.path}: expected every judge's score of every answer, found {missing:,} missing; "
                        "run stage judge first: --stages '[judge]'")


def rating(key: tuple[int, str, int], said: Sequence[tuple[Scale | None, float | None]], normalise: bool) -> Rating:
    """One answer's rating, from each of its judges' scale and score."""
    given = [(scale, score) for scale, score in said if score is not None]
    if not given or len(given) < len(said):
        return Rating(*key, None, None, len(given))
    counted = [(scale, score) for scale, score in given if scale.varies or not normalise] or given
    scores = [scale(score) for scale, score in counted]
    mean = math.fsum(scores) / len(scores)
    apart = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / len(scores)) if len(scores) > 1 else None
    return Rating(*key, mean, apart, len(given))
