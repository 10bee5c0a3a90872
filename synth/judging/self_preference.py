"""Which judge favours whose answers, told from what the answers are worth with the other judges' help.

A judge's mean score of a model is

    score of judge j for model m = α_j + λ_j · β_m + favour        (β: quality, λ_j: how strongly the judge follows it, α_j: its severity)

λ comes from how scores vary together over the several answers of one model to one item, where favour for a model cannot show: one common
factor, by least squares off the diagonal (Harman and Jones, Psychometrika 31, 1966). So a noisy judge, whose gaps between models are small
beside its spread, is not taken for one that favours a weak model. α and β come from judgements of others alone. Standard errors:
jackknife over blocks of items.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from synth.judging.within_item import centred, dense, finite

BLOCKS = 20  # of the jackknife
FOLLOWS = 0.2  # correlation with what judges have in common below which a judge has no part in it


class Favour(NamedTuple):
    """By judge and author, in standard deviations of the judge's scores; None where there are no judgements or nothing to compare with."""

    matrix: list[list[float | None]]
    self_preference: dict[str, float]
    error: dict[str, float]


class Sums(NamedTuple):
    """What favour is computed from, as sums over items: by block."""

    score: np.ndarray  # [block, judge, author]
    square: np.ndarray  # [block, judge, author]
    count: np.ndarray  # [block, judge, author]
    product: np.ndarray  # [block, judge, judge] of scores centred in item and author
    pairs: np.ndarray  # [block, judge, judge]

    def without(self, block: int | None) -> Sums:
        return Sums(*(whole.sum(0) - (0 if block is None else whole[block]) for whole in self))


def favours(judges: Sequence[str], authors: Sequence[str], scores: np.ndarray, item: np.ndarray, author: np.ndarray) -> Favour | None:
    """Who favours whose answers, from scores [answer, judge] (NaN: none) and every answer's item and author (its number).

    None where no judge has judged its own answers, or quality cannot be told from favour: with fewer than three authors.
    """
    own = np.array([[judge == name for name in authors] for judge in judges])
    sums = _sums(scores, item, author, len(authors))
    if not (sums.count.sum(0) * own).any():
        return None
    found = _matrix(sums.without(None), own)
    if found is None:
        return None
    left_out = [_matrix(sums.without(block), own) for block in range(BLOCKS)]
    told = np.stack([one for one in left_out if one is not None] or [found])
    error = np.sqrt((len(told) - 1) / len(told) * ((told - told.mean(0))**2).sum(0))
    named = {judges[j]: (j, m) for j, m in np.argwhere(own & np.isfinite(found))}
    return Favour([[finite(x) for x in row] for row in found], {name: float(found[place]) for name, place in named.items()},
                  {name: float(error[place]) for name, place in named.items()})


def _sums(scores: np.ndarray, item: np.ndarray, author: np.ndarray, authors: int) -> Sums:
    judges, valid = scores.shape[1], np.isfinite(scores)
    block = dense(item) % BLOCKS
    filled, cell = np.where(valid, scores, 0.0), block * authors + author

    def by_cell(weights: np.ndarray) -> np.ndarray:
        return np.stack([np.bincount(cell, column, BLOCKS * authors).reshape(BLOCKS, authors) for column in weights.T], 1)

    group = dense(item) * authors + author
    if len(np.unique(group)) == len(group):  # one answer of each model to each item: they vary over the models alone
        group = item
    apart = np.zeros_like(filled)
    for j in range(judges):
        apart[valid[:, j], j] = centred(dense(group[valid[:, j]]), filled[valid[:, j], j])
    product, pairs = np.zeros((2, BLOCKS, judges, judges))
    for j, k in itertools.product(range(judges), repeat=2):
        both = valid[:, j] & valid[:, k]
        product[:, j, k] = np.bincount(block[both], apart[both, j] * apart[both, k], BLOCKS)
        pairs[:, j, k] = np.bincount(block[both], minlength=BLOCKS)
    return Sums(by_cell(filled), by_cell(filled**2), by_cell(valid.astype(float)), product, pairs)


def _matrix(sums: Sums, own: np.ndarray) -> np.ndarray | None:
    """Residuals [judge, author] of the model in the head of this file: where λ is not determined, what all that fit have in common."""
    with np.errstate(invalid="ignore", divide="ignore"):
        means, covariance = sums.score / sums.count, np.nan_to_num(sums.product / sums.pairs)
    total = np.maximum(sums.count.sum(1), 1)
    spread = np.sqrt(np.maximum(sums.square.sum(1) / total - (sums.score.sum(1) / total)**2, 0))
    found = [_residuals(means, strength, np.isfinite(means) & ~own) for strength in loadings(covariance)]
    if not found or any(one is None for one in found):
        return None
    found = np.stack(found) / np.maximum(spread, 1e-9)[:, None]
    least = np.take_along_axis(found, np.abs(found).argmin(0)[None], 0)[0]
    return np.where(np.sign(found).min(0) == np.sign(found).max(0), least, np.where(np.isnan(least), np.nan, 0.0))


def loadings(covariance: np.ndarray) -> list[np.ndarray]:
    """λ of one common factor whose products λ_j λ_k are nearest to the covariances off the diagonal, from 0 to the judge's spread; 0 for a
    judge that agrees with nobody. Two that agree say only what λ_1 λ_2 is: then the two ends of what it can be, all noise in one of them or
    in the other. None where fewer agree."""
    spread = np.sqrt(np.maximum(np.diag(covariance), 0))
    away = covariance * (1 - np.eye(len(covariance)))
    found = spread.copy()
    for _ in range(500):
        for j in range(len(found)):
            others = (found**2).sum() - found[j]**2
            found[j] = np.clip(away[j] @ found / others, 0.0, spread[j]) if others > 1e-12 else 0.0
    found[found <= FOLLOWS * spread] = 0
    follow = np.flatnonzero(found)
    if len(follow) != 2:
        return [found] if len(follow) > 2 else []
    ends = []
    for j, k in (follow, follow[::-1]):
        one = np.zeros(len(found))
        one[j], one[k] = spread[j], min(away[j, k] / spread[j], spread[k])
        ends.append(one)
    return ends


def _residuals(means: np.ndarray, strength: np.ndarray, told: np.ndarray) -> np.ndarray | None:
    """Mean scores less severity and what quality explains of them, both from the cells that are `told`."""
    quality = _quality(means, strength, told)
    if quality is None:
        return None
    rest = means - strength[:, None] * quality
    severity = [np.mean(row[cells]) if cells.any() else np.nan for row, cells in zip(rest, told)]
    return rest - np.array(severity)[:, None]


def _quality(means: np.ndarray, strength: np.ndarray, told: np.ndarray) -> np.ndarray | None:
    """β of every author from the cells that are `told`, by least squares; None where they do not determine it."""
    rows, columns = np.nonzero(told & (strength > 0)[:, None])
    judges, authors = means.shape
    design = np.zeros((len(rows), judges + authors))
    design[np.arange(len(rows)), rows] = 1 / strength[rows]
    design[np.arange(len(rows)), judges + columns] = 1
    unknown = len(np.unique(rows)) + authors - 1
    if len(np.unique(columns)) < authors or np.linalg.matrix_rank(design) < unknown:
        return None
    solved = np.linalg.lstsq(design, means[rows, columns] / strength[rows], rcond=None)[0]
    return solved[judges:] - solved[judges:].mean()
