"""Diagnose judges from their scores, and warn of unreliable ones.

The figures are spread, ties, agreement, and preference for length or for their own responses. Only comparisons within an item count,
because only they decide which response is selected.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from synth.judging.score_parsing import finite_or_none
from synth.judging.self_preference import SelfPreference, estimate_self_preference
from synth.judging.within_item import SIGMAS, RankCorrelation, center_by_group, dense_ids, rank_correlation
from synth.pool.store import Pool

READ_ROWS = 50_000  # of the pool at a time
HISTOGRAM_BINS = np.arange(0.75, 5.5, 0.5)  # half points, with whole ones in the middle of a bin
# Thresholds of the warnings. Each is far from what honest judges show, and large enough to change which responses are selected.
MIN_SPREAD = 0.29  # points, 1/sqrt(12): what rounding to whole points alone makes
MIN_AGREEMENT = 0.2  # rank correlation below which one judge explains less than 4% of the other's order
MAX_LENGTH = 0.5  # rank correlation with length beyond which length is the greater part of the judgement
MAX_EXTRA_LENGTH = 0.25  # by which a judge follows length more than any judge that agrees with another one
MAX_SELF_PREFERENCE = 0.3  # standard deviations of a judge's scores: a response overtakes one in eight of its equals
MAX_LOW_MASS = 0.1  # share of scores read from less than half of the judge's probability
MAX_UNREADABLE = 0.05  # share of scores: with three judges, one response in seven is incomplete
MAX_TIES = 0.8  # share of items: in four of five the judge does not say which response is the best

RESPONSES = """
    SELECT item, model, sample, length(text), text FROM responses WHERE reason IS NULL ORDER BY item, model, sample"""
SCORES = "SELECT item, model, sample, judge, score FROM scores WHERE score IS NOT NULL"
REQUESTED_SCORES = "SELECT judge, count(*), avg(mass), avg(mass < 0.5) FROM scores GROUP BY judge ORDER BY judge"
UNREADABLE_SCORES = """
    SELECT judge, coalesce(reason, 'no reason given'), count(*) FROM scores WHERE score IS NULL
    GROUP BY 1, 2 ORDER BY 1, 3 DESC, 2"""


class UsableResponse(NamedTuple):
    """A row of the query RESPONSES."""

    item: int
    model: str
    sample: int
    length: int  # characters
    text: str


class ReadScore(NamedTuple):
    """A row of the query SCORES."""

    item: int
    model: str
    sample: int
    judge: str
    score: float


@dataclass
class JudgeScores:
    """All scores of a pool as arrays, with responses in the order of their items."""

    judges: list[str]
    authors: list[str]
    scores: np.ndarray  # [response, judge]; NaN: none
    item: np.ndarray  # [response]
    author: np.ndarray  # [response], index into `authors`
    length: np.ndarray  # [response], characters
    text_hash: np.ndarray  # [response], equal for equal texts
    mass: dict[str, tuple[float, float]] = field(default_factory=dict)  # by judge: mean, and share of scores below one half
    unreadable: dict[str, dict[str, int]] = field(default_factory=dict)  # by judge: count by reason
    requested: dict[str, int] = field(default_factory=dict)  # by judge: number of scores requested

    @functools.cached_property
    def distinct(self) -> np.ndarray:
        """Return the index of the first response with each distinct text in an item."""
        order = np.lexsort((self.text_hash, self.item))
        same = (np.diff(self.item[order]) == 0) & (np.diff(self.text_hash[order]) == 0)
        return np.sort(order[np.r_[True, ~same][:len(order)]])


class JudgeWarning(NamedTuple):
    """A reason not to trust a judge."""

    judge: str  # empty: all of them
    kind: str
    text: str


def read_scores(pool: Pool) -> JudgeScores | None:
    """Read all scores of a pool; None where there are none."""
    judges = [judge for judge, in pool.select("SELECT DISTINCT judge FROM scores ORDER BY judge")]
    if not judges:
        return None
    authors = [model for model, in pool.select("SELECT DISTINCT model FROM responses ORDER BY model")]
    author_index, judge_index = {name: i for i, name in enumerate(authors)}, {name: i for i, name in enumerate(judges)}
    (max_sample,), = pool.select("SELECT max(sample) FROM responses")

    def response_id(row: UsableResponse | ReadScore) -> int:
        """Number responses in the order of their keys; samples count from -1."""
        return (row.item * len(authors) + author_index[row.model]) * (max_sample + 2) + row.sample + 1

    def response_numbers(row: UsableResponse) -> tuple:
        return response_id(row), row.item, author_index[row.model], row.length, zlib.crc32(row.text.encode())

    def score_numbers(row: ReadScore) -> tuple:
        return response_id(row), judge_index[row.judge], row.score

    responses = _read_columns(pool, RESPONSES, lambda row: response_numbers(UsableResponse._make(row)), 5)
    found = _read_columns(pool, SCORES, lambda row: score_numbers(ReadScore._make(row)), 3)
    response_ids, item, author, length, text_hash = responses.T
    score_ids, score_judge, score_value = found.T
    position = np.searchsorted(response_ids, score_ids)
    known = position < len(response_ids)
    known[known] &= response_ids[position[known]] == score_ids[known]
    scores = np.full((len(response_ids), len(judges)), np.nan)
    scores[position[known], score_judge[known].astype(int)] = score_value[known]
    mass, unreadable, requested = _read_counts(pool)
    return JudgeScores(judges, authors, scores, *(column.astype(np.int64) for column in (item, author, length, text_hash)),
                       mass, unreadable, requested)


def _read_columns(pool: Pool, query: str, to_numbers: Callable[[tuple], tuple], columns: int) -> np.ndarray:
    """Read a query's rows as an array [row, column].

    Rows are read a page at a time, because millions of tuples at once would not fit in memory.
    """
    cursor, pages = pool.connection.execute(query), []
    while rows := cursor.fetchmany(READ_ROWS):
        pages.append(np.array([to_numbers(row) for row in rows], dtype=float))
    return np.concatenate(pages) if pages else np.zeros((0, columns))


def _read_counts(pool: Pool) -> tuple[dict, dict, dict]:
    """Read the fields mass, unreadable and requested of JudgeScores."""
    mass, unreadable, requested = {}, {}, {}
    for judge, count, mean_mass, low_mass in pool.select(REQUESTED_SCORES):
        requested[judge], unreadable[judge] = count, {}
        if mean_mass is not None:
            mass[judge] = (mean_mass, low_mass)
    for judge, reason, count in pool.select(UNREADABLE_SCORES):
        unreadable[judge][reason] = count
    return mass, unreadable, requested


# ---------------------------------------------------------------- all figures


def diagnose(scores: JudgeScores) -> dict:
    """Compute everything that the report says about judges, warnings included."""
    judges, count = scores.judges, len(scores.judges)
    pairs = {}
    for j in range(count):
        for k in range(j):
            pairs[j, k] = pairs[k, j] = rank_correlation(scores.item, scores.scores[:, j], scores.scores[:, k])
    lengths = [rank_correlation(scores.item, column, scores.length) for column in scores.scores.T]
    preference = estimate_self_preference(judges, scores.authors, scores.scores, scores.item, scores.author)
    by_judge = {name: _judge_figures(scores, j, lengths[j]) for j, name in enumerate(judges)}
    mean, std = _by_judge(np.nanmean, scores.scores), _by_judge(np.nanstd, scores.scores)
    z_scores = (scores.scores - mean) / np.maximum(std, 1e-9)
    return {
        "judges": by_judge,
        "correlation": [[1.0 if j == k else finite_or_none(pairs[j, k].value) for k in range(count)] for j in range(count)],
        "alpha": krippendorff_alpha(scores.scores), "alpha_normalised": krippendorff_alpha(z_scores),
        "self_preference": None if preference is None else {"authors": scores.authors, **preference._asdict()},
        "warnings": [warning._asdict() for warning in judge_warnings(scores, by_judge, pairs, lengths, preference)],
    }


def _judge_figures(scores: JudgeScores, j: int, length: RankCorrelation) -> dict:
    name, column = scores.judges[j], scores.scores[:, j]
    found = column[np.isfinite(column)]
    requested = scores.requested.get(name, len(found))
    mean_mass, low_mass = scores.mass.get(name, (None, None))
    return {
        "requested": requested, "read": len(found), "unreadable": 1 - len(found) / requested if requested else 0.0,
        "reasons": scores.unreadable.get(name, {}),
        "mean": float(found.mean()) if len(found) else None, "std": float(found.std()) if len(found) else None,
        "within": _spread_within_items(scores, j), "ties": tie_rate(scores, j), "mass": mean_mass, "low_mass": low_mass,
        "histogram": np.histogram(found, HISTOGRAM_BINS)[0].tolist(),
        "length": finite_or_none(length.value), "length_error": finite_or_none(length.standard_error),
    }


def _scored_distinct(scores: JudgeScores, j: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the item (dense ids) and the judge's score of each distinct response that it scored."""
    rows = scores.distinct
    rows = rows[np.isfinite(scores.scores[rows, j])]
    return dense_ids(scores.item[rows]), scores.scores[rows, j]


def _spread_within_items(scores: JudgeScores, j: int) -> float | None:
    """Return the standard deviation of the judge's scores around their item's mean, in points.

    Equal texts of an item count once.
    """
    item, values = _scored_distinct(scores, j)
    degrees_of_freedom = len(values) - (item.max() + 1 if len(values) else 0)
    return float(np.sqrt((center_by_group(item, values)**2).sum() / degrees_of_freedom)) if degrees_of_freedom > 0 else None


def tie_rate(scores: JudgeScores, j: int) -> float | None:
    """Return the share of items in which several different responses have the judge's best score.

    Items with a single distinct response do not count.
    """
    item, values = _scored_distinct(scores, j)
    if not len(values):
        return None
    best = np.full(item.max() + 1, -np.inf)
    np.maximum.at(best, item, values)
    several = np.bincount(item) > 1
    tied = np.bincount(item, values >= best[item] - 1e-9) > 1
    return float(tied[several].mean()) if several.any() else None


# ---------------------------------------------------------------- agreement


def krippendorff_alpha(scores: np.ndarray) -> float | None:
    """Compute Krippendorff's α for interval data from scores [unit, judge] with gaps (NaN).

    α is 1 - observed / expected squared difference, over the values that have another one in their unit (K. Krippendorff, Computing
    Krippendorff's Alpha-Reliability, 2011, section D). None where nothing can be compared.
    """
    values = scores[np.isfinite(scores).sum(1) > 1]
    count = np.isfinite(values).sum(1)
    n = int(count.sum())
    if n < 2:
        return None
    sums, squares = np.nansum(values, 1), np.nansum(values**2, 1)
    observed = (2 * (count * squares - sums**2) / (count - 1)).sum() / n
    expected = 2 * (n * squares.sum() - sums.sum()**2) / (n * (n - 1))
    return float(1 - observed / expected) if expected > 1e-12 else None


def _by_judge(reduce: Callable, scores: np.ndarray) -> np.ndarray:
    """Reduce each judge's scores to a number; 0 for a judge without scores."""
    return np.array([reduce(column) if np.isfinite(column).any() else 0.0 for column in scores.T])


# ---------------------------------------------------------------- warnings


def judge_warnings(scores: JudgeScores, by_judge: dict[str, dict], pairs: dict[tuple[int, int], RankCorrelation],
                   lengths: Sequence[RankCorrelation], preference: SelfPreference | None) -> list[JudgeWarning]:
    """Return a warning for each reason not to trust a judge, unless another warning explains it."""
    names, warnings = scores.judges, []
    others = {j: {k: pairs[j, k] for k in range(len(names)) if k != j} for j in range(len(names))}
    agreeing = {j for j in others if any(pair.is_above(MIN_AGREEMENT) for pair in others[j].values())}
    for j, name in enumerate(names):
        figures = by_judge[name]
        if figures["within"] is not None and figures["within"] < MIN_SPREAD and j not in agreeing:
            warnings.append(JudgeWarning(name, "constant", f"{name} gives nearly the same score to all responses to an instruction: their "
                                         f"spread is {figures['within']:.2f} points; rounding to whole points alone makes {MIN_SPREAD}."))
        else:
            length = _length_warning(name, lengths[j], [lengths[k] for k in sorted(agreeing - {j})])
            warnings += [length] if length else _random_warning(name, others[j], pairs)
            items = figures["read"] / max(1, len(scores.authors))
            if figures["ties"] is not None and _exceeds(figures["ties"], items, MAX_TIES):
                warnings.append(JudgeWarning(name, "ties", f"{name} gives its best score to several responses in "
                                             f"{figures['ties']:.0%} of the items: it does not say which one is best."))
        warnings += _self_preference_warning(name, figures, preference) + _reading_warnings(name, figures)
    values = [pair for pair in pairs.values() if np.isfinite(pair.value)]
    explained = any(warning.kind in ("constant", "length-loving", "brevity-loving") for warning in warnings)
    if values and all(pair.is_below(MIN_AGREEMENT) for pair in values) and not explained:
        warnings.append(JudgeWarning("", "no agreement", "No two judges rank responses alike: the highest rank correlation is "
                                     f"{max(pair.value for pair in values):.2f}."))
    return warnings


def _self_preference_warning(name: str, figures: dict, preference: SelfPreference | None) -> list[JudgeWarning]:
    own = preference.self_preference.get(name) if preference else None
    if own is None or own <= MAX_SELF_PREFERENCE or own <= SIGMAS * preference.standard_error[name]:
        return []
    return [JudgeWarning(name, "self-preferring", f"{name} prefers its own responses: it scores them {own:.2f} standard deviations "
                         f"({own * figures['std']:.2f} points) higher than the other judges' scores explain.")]


def _reading_warnings(name: str, figures: dict) -> list[JudgeWarning]:
    """Warn of scores that could not be read, or only from a small part of the judge's probability."""
    warnings = []
    if figures["low_mass"] is not None and _exceeds(figures["low_mass"], figures["requested"], MAX_LOW_MASS):
        warnings.append(JudgeWarning(name, "digit mass", f"{name} does not answer in the requested form: in "
                                     f"{figures['low_mass']:.0%} of its judgements less than half of its probability is on a score "
                                     f"(mean {figures['mass']:.2f})."))
    if _exceeds(figures["unreadable"], figures["requested"], MAX_UNREADABLE):
        reason = next(iter(figures["reasons"]), "no reason given")
        warnings.append(JudgeWarning(name, "unreadable", f"{name} gave no readable score in {figures['unreadable']:.0%} of its judgements, "
                                     f"most often: {reason}. A response that lacks a score cannot be selected."))
    return warnings


def _length_warning(name: str, own: RankCorrelation, others: Sequence[RankCorrelation]) -> JudgeWarning | None:
    """Warn of a judge whose scores follow length.

    `others` belong to judges that agree with another one, so that more than length decides their scores.
    """
    for sign, kind, what in ((1, "length-loving", "longer"), (-1, "brevity-loving", "shorter")):
        signed, beside = own._replace(value=sign * own.value), [sign * other.value for other in others if np.isfinite(other.value)]
        excess = signed._replace(value=signed.value - max(beside)) if beside else None
        is_outlier = excess and signed.value > MAX_EXTRA_LENGTH and excess.is_above(0) and excess.value > MAX_EXTRA_LENGTH
        if signed.is_above(0) and (signed.value > MAX_LENGTH or is_outlier):
            highest = f"; at most {max(beside):.2f} for the judges that agree with another one" if beside else ""
            return JudgeWarning(name, kind, f"{name} prefers {what} responses: rank correlation {abs(own.value):.2f} with their "
                                f"{'length' if sign > 0 else 'brevity'}{highest}.")
    return None


def _random_warning(name: str, own: dict[int, RankCorrelation], pairs: dict[tuple[int, int], RankCorrelation]) -> list[JudgeWarning]:
    """Warn of a judge that agrees with nobody while two others agree."""
    others = [pair for (j, k), pair in pairs.items() if j in own and k in own and pair.is_above(MIN_AGREEMENT)]
    values = [pair for pair in own.values() if np.isfinite(pair.value)]
    if not values or not others or not all(pair.is_below(MIN_AGREEMENT) for pair in values):
        return []
    return [JudgeWarning(name, "random", f"{name} ranks responses unlike any other judge: its highest rank correlation with one is "
                         f"{max(pair.value for pair in values):.2f}, while others reach {max(pair.value for pair in others):.2f} among "
                         "themselves.")]


def _exceeds(share: float, count: float, threshold: float) -> bool:
    """Return whether a share seen in `count` cases is above the threshold by more than chance."""
    return share > threshold and share - threshold > SIGMAS * np.sqrt(threshold * (1 - threshold) / max(count, 1))
