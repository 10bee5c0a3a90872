"""Estimate self-preference bias: how much too high a judge scores its own responses.

Bias is what neither the judge's severity nor the model's quality, as the other judges see it, explains. A judge's mean score of a model's
responses is

    mean score of judge j for model m = α_j + λ_j · β_m + bias_jm

with β the quality of the model, λ the judge's loading (how strongly it follows quality) and α its severity. λ comes from how scores vary
together over the several responses of one model to one item, where a bias for a model cancels: one common factor, fitted by least squares
to the off-diagonal covariances (Harman and Jones, Psychometrika 31, 1966). So a noisy judge, whose gaps between models are small beside
its spread, is not mistaken for one that prefers a weak model. α and β come from judgements of other models' responses only. Standard errors
are a jackknife over blocks of items.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from synth.judging.score_parsing import finite_or_none
from synth.judging.within_item import center_by_group, dense_ids

BLOCKS = 20  # of the jackknife
MIN_CORRELATION = 0.2  # with the common factor; a judge below it gets loading 0


class SelfPreference(NamedTuple):
    """Bias of judges for authors, in standard deviations of the judge's scores."""

    bias: list[list[float | None]]  # [judge][author]; None where there are no scores or nothing to compare them with
    self_preference: dict[str, float]  # by judge: its bias for its own responses
    standard_error: dict[str, float]


class BlockSums(NamedTuple):
    """Sums over the scores of each block of items."""

    score: np.ndarray  # [block, judge, author]
    square: np.ndarray  # [block, judge, author]
    count: np.ndarray  # [block, judge, author]
    product: np.ndarray  # [block, judge, judge], of scores centred within item and author
    pairs: np.ndarray  # [block, judge, judge], responses that both judges scored

    def without(self, block: int | None) -> BlockSums:
        """Sum over all blocks but one; over all of them for None."""
        return BlockSums(*(sums.sum(0) - (0 if block is None else sums[block]) for sums in self))


def estimate_self_preference(judges: Sequence[str], authors: Sequence[str], scores: np.ndarray, item: np.ndarray,
                             author: np.ndarray) -> SelfPreference | None:
    """Estimate every judge's bias for every author.

    `scores` is [response, judge] (NaN: none), `item` and `author` (an index into `authors`) are those of each response.
    Returns None where no judge scored its own responses, or where bias and quality cannot be separated: with fewer than three authors.
    """
    is_own = np.array([[judge == name for name in authors] for judge in judges])
    sums = _block_sums(scores, item, author, len(authors))
    if not (sums.count.sum(0) * is_own).any():
        return None
    bias = _bias(sums.without(None), is_own)
    if bias is None:
        return None
    replicates = [_bias(sums.without(block), is_own) for block in range(BLOCKS)]
    replicates = np.stack([replicate for replicate in replicates if replicate is not None] or [bias])
    error = np.sqrt((len(replicates) - 1) / len(replicates) * ((replicates - replicates.mean(0))**2).sum(0))
    own_cells = {judges[j]: (j, m) for j, m in np.argwhere(is_own & np.isfinite(bias))}
    return SelfPreference([[finite_or_none(x) for x in row] for row in bias],
                          {judge: float(bias[cell]) for judge, cell in own_cells.items()},
                          {judge: float(error[cell]) for judge, cell in own_cells.items()})


def _block_sums(scores: np.ndarray, item: np.ndarray, author: np.ndarray, authors: int) -> BlockSums:
    judges, valid = scores.shape[1], np.isfinite(scores)
    block = dense_ids(item) % BLOCKS
    filled, cell = np.where(valid, scores, 0.0), block * authors + author

    def sum_by_cell(values: np.ndarray) -> np.ndarray:
        return np.stack([np.bincount(cell, column, BLOCKS * authors).reshape(BLOCKS, authors) for column in values.T], 1)

    group = dense_ids(item) * authors + author
    if len(np.unique(group)) == len(group):  # one response of each model to each item: only the models' responses vary
        group = item
    centered = np.zeros_like(filled)
    for j in range(judges):
        centered[valid[:, j], j] = center_by_group(dense_ids(group[valid[:, j]]), filled[valid[:, j], j])
    product, pairs = np.zeros((2, BLOCKS, judges, judges))
    for j, k in itertools.product(range(judges), repeat=2):
        both = valid[:, j] & valid[:, k]
        product[:, j, k] = np.bincount(block[both], centered[both, j] * centered[both, k], BLOCKS)
        pairs[:, j, k] = np.bincount(block[both], minlength=BLOCKS)
    return BlockSums(sum_by_cell(filled), sum_by_cell(filled**2), sum_by_cell(valid.astype(float)), product, pairs)


def _bias(sums: BlockSums, is_own: np.ndarray) -> np.ndarray | None:
    """Return bias [judge, author].

    Where several loadings fit, that is the smallest of their biases, or 0 where their signs differ.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        means, covariance = sums.score / sums.count, np.nan_to_num(sums.product / sums.pairs)
    total = np.maximum(sums.count.sum(1), 1)
    spread = np.sqrt(np.maximum(sums.square.sum(1) / total - (sums.score.sum(1) / total)**2, 0))
    by_loading = [_residuals(means, loading, np.isfinite(means) & ~is_own) for loading in factor_loadings(covariance)]
    if not by_loading or any(residuals is None for residuals in by_loading):
        return None
    bias = np.stack(by_loading) / np.maximum(spread, 1e-9)[:, None]
    smallest = np.take_along_axis(bias, np.abs(bias).argmin(0)[None], 0)[0]
    same_sign = np.sign(bias).min(0) == np.sign(bias).max(0)
    return np.where(same_sign, smallest, np.where(np.isnan(smallest), np.nan, 0.0))


def factor_loadings(covariance: np.ndarray) -> list[np.ndarray]:
    """Fit the loadings λ of one common factor to the covariances of judges.

    Their products λ_j λ_k approximate the off-diagonal covariances. A loading lies between 0 and the judge's standard deviation, and is 0
    for a judge that agrees with nobody. Two judges that agree determine only the product of their loadings: then both extremes are
    returned, with all the noise in one judge or in the other. With fewer judges that agree, the list is empty.
    """
    spread = np.sqrt(np.maximum(np.diag(covariance), 0))
    off_diagonal = covariance * (1 - np.eye(len(covariance)))
    loading = spread.copy()
    for _ in range(500):
        for j in range(len(loading)):
            others = (loading**2).sum() - loading[j]**2
            loading[j] = np.clip(off_diagonal[j] @ loading / others, 0.0, spread[j]) if others > 1e-12 else 0.0
    loading[loading <= MIN_CORRELATION * spread] = 0
    agreeing = np.flatnonzero(loading)
    if len(agreeing) != 2:
        return [loading] if len(agreeing) > 2 else []
    extremes = []
    for j, k in (agreeing, agreeing[::-1]):
        extreme = np.zeros(len(loading))
        extreme[j], extreme[k] = spread[j], min(off_diagonal[j, k] / spread[j], spread[k])
        extremes.append(extreme)
    return extremes


def _residuals(means: np.ndarray, loading: np.ndarray, is_reference: np.ndarray) -> np.ndarray | None:
    """Return mean scores less severity and quality, both fitted to the reference cells [judge, author]."""
    quality = _fit_quality(means, loading, is_reference)
    if quality is None:
        return None
    residuals = means - loading[:, None] * quality
    severity = [np.mean(row[cells]) if cells.any() else np.nan for row, cells in zip(residuals, is_reference)]
    return residuals - np.array(severity)[:, None]


def _fit_quality(means: np.ndarray, loading: np.ndarray, is_reference: np.ndarray) -> np.ndarray | None:
    """Fit β of every author to the reference cells by least squares; None where they do not determine it."""
    rows, columns = np.nonzero(is_reference & (loading > 0)[:, None])
    judges, authors = means.shape
    design = np.zeros((len(rows), judges + authors))
    design[np.arange(len(rows)), rows] = 1 / loading[rows]
    design[np.arange(len(rows)), judges + columns] = 1
    unknowns = len(np.unique(rows)) + authors - 1
    if len(np.unique(columns)) < authors or np.linalg.matrix_rank(design) < unknowns:
        return None
    solution = np.linalg.lstsq(design, means[rows, columns] / loading[rows], rcond=None)[0]
    return solution[judges:] - solution[judges:].mean()
