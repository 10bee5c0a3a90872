"""How sure we are: intervals of shares and of means, and a test of whether two models differ on the same items.

All of it is closed form or resampling with NumPy; nothing here knows of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

CHUNK = 4_000_000  # item numbers that one round of resampling draws


class Interval(NamedTuple):
    low: float
    high: float


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """The score interval of a share (E. B. Wilson, JASA 22, 1927, p. 209): with z the normal quantile and p = successes / n,

        (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)

    Unlike p ± z·s it stays within [0, 1] and is right for shares near 0 and 1. ValueError unless 0 <= successes <= n, n >= 1.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"wilson: expected 0 <= successes <= n with n >= 1, got {successes} of {n}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / n
    centre, spread = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    low, high = ((centre + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
    return Interval(0.0 if successes == 0 else low, 1.0 if successes == n else high)


def mcnemar(lost: int, gained: int) -> float:
    """The exact two-sided p-value that as many items are lost as gained by chance alone (Q. McNemar, Psychometrika 12, 1947, p. 153).

    Only items that changed count: under the null each was as likely lost as gained, so the smaller count is binomial(lost + gained, 1/2),
    and p = min(1, 2 P[X <= min(lost, gained)]). Exact at any size: integers throughout. ValueError for counts below 0.
    """
    if lost < 0 or gained < 0:
        raise ValueError(f"mcnemar: expected counts of 0 or more, got {lost} and {gained}")
    n, ways, tail = lost + gained, 1, 0
    for i in range(min(lost, gained) + 1):
        tail += ways
        ways = ways * (n - i) // (i + 1)
    return float(min(Fraction(1), Fraction(2 * tail, 2**n)))


def chance_adjusted(accuracy: float, options: Sequence[int]) -> float:
    """(accuracy - c) / (1 - c), where c is the mean of 1/k over the items' numbers of choices k: 0 is guessing, 1 is perfect."""
    chance = sum(1 / k for k in options) / len(options)
    return (accuracy - chance) / (1 - chance)


def bootstrap(values: Sequence[float], weights: Sequence[float] | None = None, *, confidence: float = 0.95, draws: int = 2000,
              seed: int = 0) -> Interval:
    """The percentile interval of Σ values / Σ weights over resampled items (B. Efron, Annals of Statistics 7, 1979, p. 1).

    Weights 1 give the mean; values of log-prob differences with numbers of tokens as weights give a mean per token. Paired, where a value
    is a difference on one item: an item's two scores are drawn together. ValueError without items.
    """
    top = np.asarray(values, dtype=np.float64)
    bottom = np.ones_like(top) if weights is None else np.asarray(weights, dtype=np.float64)
    if not top.size or top.shape != bottom.shape:
        raise ValueError(f"bootstrap: expected one or more values, each with a weight, got {top.size} and {bottom.size}")
    rng, found = np.random.default_rng(seed), []
    step = max(1, CHUNK // top.size)
    for start in range(0, draws, step):
        drawn = rng.integers(top.size, size=(min(step, draws - start), top.size))
        found.append(top[drawn].sum(1) / bottom[drawn].sum(1))
    tail = (1 - confidence) / 2
    return Interval(*map(float, np.quantile(np.concatenate(found), [tail, 1 - tail])))
