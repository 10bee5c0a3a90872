"""Compute rank correlations within items.

Only comparisons within an item decide which response is selected. The correlation is Spearman's within items, pooled over them:

    Σ r s / sqrt(Σ r² Σ s²)

where r and s are ranks, centred within each item. Its standard error is taken over items, which are independent of each other.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

SIGMAS = 4.0  # standard errors that make a difference significant; high, because a report tests many judges for many kinds of fault


class RankCorrelation(NamedTuple):
    """A rank correlation within items and its standard error; both NaN where nothing can be compared."""

    value: float
    standard_error: float

    def is_above(self, threshold: float) -> bool:
        """Return whether the correlation is significantly above `threshold`."""
        return self.value - SIGMAS * self.standard_error > threshold

    def is_below(self, threshold: float) -> bool:
        """Return whether the correlation is below `threshold` by at least two standard errors."""
        return self.value + 2 * self.standard_error < threshold


def rank_correlation(item: np.ndarray, x: np.ndarray, y: np.ndarray) -> RankCorrelation:
    """Compute Spearman's correlation of `x` and `y` within items, over the responses that have both."""
    both = np.isfinite(x) & np.isfinite(y)
    item = dense_ids(item[both])
    r, s = _centered_ranks(item, x[both]), _centered_ranks(item, y[both])
    size = np.sqrt((r**2).sum() * (s**2).sum())
    if not size > 0:
        return RankCorrelation(np.nan, np.nan)
    value = (r * s).sum() / size
    # delta method: each item's contribution less its share in the pooled value
    influence = np.bincount(item, r * s / size - value / 2 * (r**2 / (r**2).sum() + s**2 / (s**2).sum()))
    return RankCorrelation(float(value), float(np.sqrt((influence**2).sum())))


def _centered_ranks(item: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return ranks within items, less the item's mean rank; equal values share their mean rank."""
    order = np.lexsort((x, item))
    position = np.arange(len(x), dtype=float)
    is_new = np.r_[True, (np.diff(item[order]) != 0) | (np.diff(x[order]) != 0)][:len(x)]
    tie_group = np.cumsum(is_new) - 1
    shared_rank = np.bincount(tie_group, position) / np.bincount(tie_group)
    ranks = np.empty(len(x))
    ranks[order] = shared_rank[tie_group]
    return center_by_group(item, ranks)


def dense_ids(ids: np.ndarray) -> np.ndarray:
    """Renumber ids as 0, 1, 2, ... without gaps, in the same order."""
    return np.unique(ids, return_inverse=True)[1] if len(ids) else ids.astype(int)


def center_by_group(group: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Subtract from each value the mean of its group; `group` holds dense ids."""
    return x - (np.bincount(group, x) / np.maximum(np.bincount(group), 1))[group] if len(x) else x
