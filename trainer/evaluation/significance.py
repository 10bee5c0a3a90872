"""Compute intervals of shares and means, and test whether two models differ on the same items.

Closed forms and resampling with NumPy, independent of the rest of the package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

MOST_IN_INTEGERS = 1000  # of the changed items that are fewer: the sum over them is quadratic
DRAWS_AT_ONCE = 4_000_000  # item numbers that one round of resampling draws


class Interval(NamedTuple):
    low: float
    high: float


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Return the score interval of a share.

    E. B. Wilson, JASA 22, 1927, p. 209; with z the normal quantile and p = successes / n:

        (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)

    Unlike p ± z·s it stays within [0, 1] and is right for shares near 0 and 1. Raises ValueError unless
    0 <= successes <= n and n >= 1.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"wilson: expected 0 <= successes <= n with n >= 1, got {successes} of {n}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / n
    centre, spread = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    low, high = ((centre + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
    return Interval(0.0 if successes == 0 else low, 1.0 if successes == n else high)


def mcnemar(lost: int, gained: int) -> float:
    """Return the exact two-sided p-value of the hypothesis that items are as likely lost as gained.

    Q. McNemar, Psychometrika 12, 1947, p. 153. Only items that changed count: under the hypothesis each was as likely lost as gained, so
    the smaller count is binomial(lost + gained, 1/2), and p = min(1, 2 P[X <= min(lost, gained)]). Exact where the smaller count is at most
    `MOST_IN_INTEGERS`, as it is computed in integers; above that to twelve digits. Raises ValueError for counts below 0.
    """
    if lost < 0 or gained < 0:
        raise ValueError(f"mcnemar: expected counts of 0 or more, got {lost} and {gained}")
    fewer, n = min(lost, gained), lost + gained
    if fewer > MOST_IN_INTEGERS:
        return min(1.0, 2 * _binomial_tail(fewer, n))
    ways, tail = 1, 0
    for i in range(fewer + 1):
        tail += ways
        ways = ways * (n - i) // (i + 1)
    return float(min(Fraction(1), Fraction(2 * tail, 2**n)))


def _binomial_tail(k: int, n: int) -> float:
    """Return P[X <= k] for X binomial(n, 1/2), k large and at most n/2.

    P[X = k] is Stirling's series of the factorials with their large terms cancelled by hand (C. Loader, 2000); the terms below it are its
    multiples, which fall at least as fast as those of a normal tail.
    """
    others, d = n - k, (n - 2 * k) / n
    corrections = sum(sign * (1 / (12 * m) - 1 / (360 * m**3)) for m, sign in ((n, 1), (k, -1), (others, -1)))
    largest = math.sqrt(n / (2 * math.pi * k * others)) * math.exp(corrections - k * math.log1p(-d) - others * math.log1p(d))
    j = np.arange(min(k, math.ceil(5 * math.sqrt(n))), dtype=np.float64)
    return largest * (1 + float(np.cumprod((k - j) / (others + 1 + j)).sum()))


def chance_adjusted(accuracy: float, choice_counts: Sequence[int]) -> float:
    """Return the accuracy adjusted for chance: 0 is guessing, 1 is perfect.

    That is (accuracy - c) / (1 - c), where c is the mean of 1/k over the items' numbers of choices k.
    """
    chance = sum(1 / k for k in choice_counts) / len(choice_counts)
    return (accuracy - chance) / (1 - chance)


def bootstrap(values: Sequence[float], weights: Sequence[float] | None = None, *, confidence: float = 0.95, draws: int = 2000,
              seed: int = 0) -> Interval:
    """Return the percentile interval of Σ values / Σ weights over resampled items.

    B. Efron, Annals of Statistics 7, 1979, p. 1. Weights of 1 give the mean; values of log-prob differences with numbers of tokens as
    weights give a mean per token. A value that is a difference on one item makes the interval a paired one: an item's two scores are drawn
    together. Raises ValueError without items.
    """
    numerators = np.asarray(values, dtype=np.float64)
    denominators = np.ones_like(numerators) if weights is None else np.asarray(weights, dtype=np.float64)
    if not numerators.size or numerators.shape != denominators.shape:
        raise ValueError(f"bootstrap: expected one or more values, each with a weight, got {numerators.size} and {denominators.size}")
    rng, ratios = np.random.default_rng(seed), []
    step = max(1, DRAWS_AT_ONCE // numerators.size)
    for start in range(0, draws, step):
        items = rng.integers(numerators.size, size=(min(step, draws - start), numerators.size))
        ratios.append(numerators[items].sum(1) / denominators[items].sum(1))
    tail = (1 - confidence) / 2
    return Interval(*map(float, np.quantile(np.concatenate(ratios), [tail, 1 - tail])))
