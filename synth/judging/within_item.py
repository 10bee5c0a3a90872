"""Answers compared within items only: what decides which one is chosen. Rank correlations are Spearman's within items, pooled:

    Σ r s / sqrt(Σ r² Σ s²)

over ranks r and s that are centred in each item, with a standard error over items, which are independent.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

SURE = 4.0  # standard errors: with ten judges and eight kinds of warning, chance alone gives one in some hundreds of pools


class Correlation(NamedTuple):
    value: float
    error: float

    def above(self, least: float) -> bool:
        return self.value - SURE * self.error > least

    def below(self, most: float) -> bool:
        return self.value + 2 * self.error < most


def rank_correlation(item: np.ndarray, x: np.ndarray, y: np.ndarray) -> Correlation:
    """Spearman's within items, pooled, over the answers that have both; its error over items. NaN where there is nothing to compare."""
    both = np.isfinite(x) & np.isfinite(y)
    item = dense(item[both])
    r, s = _ranks(item, x[both]), _ranks(item, y[both])
    size = np.sqrt((r**2).sum() * (s**2).sum())
    if not size > 0:
        return Correlation(np.nan, np.nan)
    value = (r * s).sum() / size
    # delta method: how much each item's products exceed what the pooled value makes of its ranks
    rest = np.bincount(item, r * s / size - value / 2 * (r**2 / (r**2).sum() + s**2 / (s**2).sum()))
    return Correlation(float(value), float(np.sqrt((rest**2).sum())))


def _ranks(item: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Ranks within items, equals sharing the mean of theirs, minus the item's mean rank."""
    order = np.lexsort((x, item))
    place = np.arange(len(x), dtype=float)
    new = np.r_[True, (np.diff(item[order]) != 0) | (np.diff(x[order]) != 0)][:len(x)]
    group = np.cumsum(new) - 1
    shared = np.bincount(group, place) / np.bincount(group)
    ranks = np.empty(len(x))
    ranks[order] = shared[group]
    return centred(item, ranks)


def dense(item: np.ndarray) -> np.ndarray:
    """Numbers from 0 on, without gaps, in the same order."""
    return np.unique(item, return_inverse=True)[1] if len(item) else item.astype(int)


def centred(item: np.ndarray, x: np.ndarray) -> np.ndarray:
    """x minus its item's mean; items are dense."""
    return x - (np.bincount(item, x) / np.maximum(np.bincount(item), 1))[item] if len(x) else x


def finite(x: float) -> float | None:
    """None in the place of NaN, which JSON does not have."""
    return float(x) if np.isfinite(x) else None
