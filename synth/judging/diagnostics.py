"""What judges' scores say about the judges: spread, ties, agreement, favour for length or for their own answers; and plain warnings.

Only comparisons within an item count, because only they decide which answer is chosen.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from synth.judging.self_preference import Favour, favours
from synth.judging.within_item import SURE, Correlation, centred, dense, finite, rank_correlation
from synth.pool.store import Pool

ROWS = 50_000  # read at a time
BINS = np.arange(0.75, 5.5, 0.5)  # of the histogram of scores: half points, whole ones in the middle of a bin
# What is worth a warning. Each figure is far from what honest judges show, and large enough to change which answers are chosen.
SPREAD = 0.29  # points, 1/sqrt(12): what rounding to whole points alone makes
AGREES = 0.2  # rank correlation below which one judge explains less than 4% of the other's order
LENGTH = 0.5  # rank correlation with length beyond which length is the greater part of what is judged
LONGER = 0.25  # by which a judge follows length more than any judge does that agrees with another one
FAVOUR = 0.3  # standard deviations of a judge's scores: an answer overtakes one in eight of its equals
MASS = 0.1  # share of scores read from less than half of the judge's probability
UNREADABLE = 0.05  # share of scores: with three judges, one answer in seven is incomplete
TIES = 0.8  # share of items: in four of five the judge does not say which answer is the best


@dataclass
class Verdicts:
    """Scores [answer, judge] (NaN: none), and of every answer its item, author, characters and a number that equal texts share.

    Answers stand in the order of their items.
    """

    judges: list[str]
    authors: list[str]
    scores: np.ndarray
    item: np.ndarray
    author: np.ndarray
    length: np.ndarray
    text: np.ndarray
    mass: dict[str, tuple[float, float]] = field(default_factory=dict)  # by judge: mean, and share of scores where it is below one half
    unreadable: dict[str, dict[str, int]] = field(default_factory=dict)  # by judge: count by reason
    asked: dict[str, int] = field(default_factory=dict)  # by judge: scores asked for

    @functools.cached_property
    def distinct(self) -> np.ndarray:
        """The first of each text in an item: what a judge can tell apart."""
        order = np.lexsort((self.text, self.item))
        same = (np.diff(self.item[order]) == 0) & (np.diff(self.text[order]) == 0)
        return np.sort(order[np.r_[True, ~same][:len(order)]])


class Flag(NamedTuple):
    judge: str  # empty: all of them
    kind: str
    text: str


def read(pool: Pool) -> Verdicts | None:
    """All scores of a pool; None where there are none."""
    judges = [judge for judge, in pool.select("SELECT DISTINCT judge FROM scores ORDER BY judge")]
    if not judges:
        return None
    authors = [model for model, in pool.select("SELECT DISTINCT model FROM responses ORDER BY model")]
    number, judge_number = {name: i for i, name in enumerate(authors)}, {name: i for i, name in enumerate(judges)}
    samples = pool.select("SELECT max(sample) FROM responses")[0][0] + 2
    answers = _columns(pool, "SELECT item, model, sample, length(text), text FROM responses WHERE reason IS NULL "
                             "ORDER BY item, model, sample",
                       lambda row: (row[0], number[row[1]], row[2], row[3], zlib.crc32(row[4].encode())))
    keys = (answers[:, 0] * len(authors) + answers[:, 1]) * samples + answers[:, 2] + 1
    found = _columns(pool, "SELECT item, model, sample, judge, score FROM scores WHERE score IS NOT NULL",
                     lambda row: ((row[0] * len(authors) + number[row[1]]) * samples + row[2] + 1, judge_number[row[3]], row[4]))
    place = np.searchsorted(keys, found[:, 0])
    known = place < len(keys)
    known[known] &= keys[place[known]] == found[known, 0]
    scores = np.full((len(keys), len(judges)), np.nan)
    scores[place[known], found[known, 1].astype(int)] = found[known, 2]
    whole = answers.astype(np.int64)
    return Verdicts(judges, authors, scores, whole[:, 0], whole[:, 1], whole[:, 3], whole[:, 4], *_read_asked(pool))


def _columns(pool: Pool, query: str, numbers) -> np.ndarray:
    """Rows of a query as numbers, a page at a time: millions of tuples at once would not fit."""
    cursor, pages = pool.connection.execute(query), []
    while rows := cursor.fetchmany(ROWS):
        pages.append(np.array([numbers(row) for row in rows], dtype=float))
    return np.concatenate(pages) if pages else np.zeros((0, 5))


def _read_asked(pool: Pool) -> tuple[dict, dict, dict]:
    mass, unreadable, asked = {}, {}, {}
    for judge, count, mean, low in pool.select(
            "SELECT judge, count(*), avg(mass), avg(mass < 0.5) FROM scores GROUP BY judge ORDER BY judge"):
        asked[judge], unreadable[judge] = count, {}
        if mean is not None:
            mass[judge] = (mean, low)
    for judge, reason, count in pool.select("SELECT judge, coalesce(reason, 'no reason given'), count(*) FROM scores WHERE score IS NULL "
                                            "GROUP BY 1, 2 ORDER BY 1, 3 DESC, 2"):
        unreadable[judge][reason] = count
    return mass, unreadable, asked


# ---------------------------------------------------------------- all figures


def figures(verdicts: Verdicts) -> dict:
    """Everything the report says about judges."""
    pairs = {}
    for j in range(len(verdicts.judges)):
        for k in range(j):
            pairs[j, k] = pairs[k, j] = rank_correlation(verdicts.item, verdicts.scores[:, j], verdicts.scores[:, k])
    lengths = [rank_correlation(verdicts.item, column, verdicts.length) for column in verdicts.scores.T]
    favour = favours(verdicts.judges, verdicts.authors, verdicts.scores, verdicts.item, verdicts.author)
    judges = {name: _judge(verdicts, j) | {"length": finite(lengths[j].value), "length_error": finite(lengths[j].error)}
              for j, name in enumerate(verdicts.judges)}
    z = (verdicts.scores - _over(np.nanmean, verdicts.scores)) / np.maximum(_over(np.nanstd, verdicts.scores), 1e-9)
    names = verdicts.judges
    return {
        "judges": judges,
        "correlation": [[1.0 if j == k else finite(pairs[j, k].value) for k in range(len(names))] for j in range(len(names))],
        "alpha": krippendorff(verdicts.scores), "alpha_normalised": krippendorff(z),
        "favour": None if favour is None else {"authors": verdicts.authors, **favour._asdict()},
        "flags": [flag._asdict() for flag in flags(verdicts, judges, pairs, lengths, favour)],
    }


def _judge(verdicts: Verdicts, j: int) -> dict:
    name, scores = verdicts.judges[j], verdicts.scores[:, j]
    found = scores[np.isfinite(scores)]
    asked = verdicts.asked.get(name, len(found))
    mean_mass, low_mass = verdicts.mass.get(name, (None, None))
    return {"asked": asked, "read": len(found), "unreadable": 1 - len(found) / asked if asked else 0.0,
            "reasons": verdicts.unreadable.get(name, {}),
            "mean": float(found.mean()) if len(found) else None, "std": float(found.std()) if len(found) else None,
            "within": _spread_within(verdicts, j), "ties": tie_rate(verdicts, j), "mass": mean_mass, "low_mass": low_mass,
            "histogram": np.histogram(found, BINS)[0].tolist()}


def _spread_within(verdicts: Verdicts, j: int) -> float | None:
    """Standard deviation of the judge's scores of different texts around their item's mean, in points."""
    rows = verdicts.distinct
    rows = rows[np.isfinite(verdicts.scores[rows, j])]
    item = dense(verdicts.item[rows])
    freedom = len(rows) - (item.max() + 1 if len(rows) else 0)
    return float(np.sqrt((centred(item, verdicts.scores[rows, j])**2).sum() / freedom)) if freedom > 0 else None


def tie_rate(verdicts: Verdicts, j: int) -> float | None:
    """Share of the items with different answers in which several of them have the judge's best score."""
    rows = verdicts.distinct
    rows = rows[np.isfinite(verdicts.scores[rows, j])]
    if not len(rows):
        return None
    item, scores = dense(verdicts.item[rows]), verdicts.scores[rows, j]
    best = np.full(item.max() + 1, -np.inf)
    np.maximum.at(best, item, scores)
    several = np.bincount(item) > 1
    tied = np.bincount(item, scores >= best[item] - 1e-9) > 1
    return float(tied[several].mean()) if several.any() else None


# ---------------------------------------------------------------- agreement


def krippendorff(scores: np.ndarray) -> float | None:
    """Krippendorff's α for interval data, of scores [unit, judge] with gaps: 1 - observed / expected squared difference, over the values
    that have another one in their unit (K. Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011, section D)."""
    values = scores[np.isfinite(scores).sum(1) > 1]
    count = np.isfinite(values).sum(1)
    n = int(count.sum())
    if n < 2:
        return None
    sums, squares = np.nansum(values, 1), np.nansum(values**2, 1)
    observed = (2 * (count * squares - sums**2) / (count - 1)).sum() / n
    expected = 2 * (n * squares.sum() - sums.sum()**2) / (n * (n - 1))
    return float(1 - observed / expected) if expected > 1e-12 else None


def _over(reduce, scores: np.ndarray) -> np.ndarray:
    """By judge; 0 for one without scores."""
    return np.array([reduce(column) if np.isfinite(column).any() else 0.0 for column in scores.T])


# ---------------------------------------------------------------- warnings


def flags(verdicts: Verdicts, judges: dict[str, dict], pairs: dict, lengths: Sequence[Correlation], favour: Favour | None) -> list[Flag]:
    """A sentence for whatever should keep a reader from trusting a judge. What explains another warning stands in its place."""
    names, found = verdicts.judges, []
    others = {j: {k: pairs[j, k] for k in range(len(names)) if k != j} for j in range(len(names))}
    agreeing = {j for j in others if any(pair.above(AGREES) for pair in others[j].values())}
    for j, name in enumerate(names):
        said = judges[name]
        if said["within"] is not None and said["within"] < SPREAD and j not in agreeing:
            found.append(Flag(name, "constant", f"{name} gives nearly the same score to all answers to an instruction: their spread is "
                              f"{said['within']:.2f} points; rounding to whole points alone makes {SPREAD}."))
        else:
            length = _length_flag(name, lengths[j], [lengths[k] for k in sorted(agreeing - {j})])
            found += [length] if length else _random_flag(name, others[j], pairs)
            if said["ties"] is not None and _surely(said["ties"], said["read"] / max(1, len(verdicts.authors)), TIES):
                found.append(Flag(name, "ties", f"{name} leaves the best answer open in {said['ties']:.0%} of the items."))
        if favour and (own := favour.self_preference.get(name)) is not None and own > FAVOUR and own > SURE * favour.error[name]:
            found.append(Flag(name, "self-preferring", f"{name} scores its own answers {own:.2f} standard deviations "
                              f"({own * said['std']:.2f} points) higher than the other judges' view of them explains."))
        if said["low_mass"] is not None and _surely(said["low_mass"], said["asked"], MASS):
            found.append(Flag(name, "digit mass", f"{name} puts less than half of its probability on a score in {said['low_mass']:.0%} of "
                              f"its judgements ({said['mass']:.2f} on the mean): it does not answer in the form it is asked for."))
        if _surely(said["unreadable"], said["asked"], UNREADABLE):
            reason = next(iter(said["reasons"]), "no reason given")
            found.append(Flag(name, "unreadable", f"{name} gave no readable score in {said['unreadable']:.0%} of its judgements, most "
                              f"often: {reason}. Answers that lack a score cannot be chosen."))
    told = [pair for pair in pairs.values() if np.isfinite(pair.value)]
    explained = any(flag.kind in ("constant", "length-loving", "brevity-loving") for flag in found)
    if told and all(pair.below(AGREES) for pair in told) and not explained:
        found.append(Flag("", "no agreement", f"No two judges order answers alike: their highest rank correlation is "
                          f"{max(pair.value for pair in told):.2f}."))
    return found


def _length_flag(name: str, own: Correlation, others: Sequence[Correlation]) -> Flag | None:
    """Others: of the judges that agree with somebody, and so do not judge by length alone."""
    for sign, kind, what in ((1, "length-loving", "longer"), (-1, "brevity-loving", "shorter")):
        signed, beside = own._replace(value=sign * own.value), [sign * other.value for other in others if np.isfinite(other.value)]
        apart = signed._replace(value=signed.value - max(beside)) if beside else None
        if signed.above(0) and (signed.value > LENGTH or (apart and signed.value > LONGER and apart.above(0) and apart.value > LONGER)):
            highest = f"; of the judges that agree with another one at most {max(beside):.2f}" if beside else ""
            return Flag(name, kind, f"{name} prefers {what} answers: rank correlation {abs(own.value):.2f} with their "
                        f"{'length' if sign > 0 else 'brevity'}{highest}.")
    return None


def _random_flag(name: str, own: dict[int, Correlation], pairs: dict) -> list[Flag]:
    """Agrees with nobody, while two others agree."""
    rest = [pair for (j, k), pair in pairs.items() if j in own and k in own and pair.above(AGREES)]
    told = [pair for pair in own.values() if np.isfinite(pair.value)]
    if not told or not rest or not all(pair.below(AGREES) for pair in told):
        return []
    return [Flag(name, "random", f"{name} orders answers unlike any other judge: its highest rank correlation with one is "
                 f"{max(pair.value for pair in told):.2f}, while others reach {max(pair.value for pair in rest):.2f} among themselves.")]


def _surely(share: float, count: float, least: float) -> bool:
    """Whether a share found in `count` cases is above `least` by more than chance."""
    return share > least and share - least > SURE * np.sqrt(least * (1 - least) / max(count, 1))
