"""Read scores and preferences from a judge's probabilities or from the text it wrote."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

# "Score: 4", and with it only emphasis, a full stop, or the scale: "**Score:** 4", "Score: 4/5."; not "4", "Score: 4.5", "Score: 4/10".
SCORE_LINE = re.compile(r"[*_ ]*score[*_ ]*:[*_ ]*([1-5])(?: ?/ ?5)?[*_ ]*\.?[*_ ]*", re.IGNORECASE)
# Reasons for a missing score, as the pool keeps them.
NO_SCORE_LINE = "no 'Score: N' from 1 to 5 on the last line"
NO_PROBABILITY = "no probability on any choice"


def parse_score(text: str) -> int | None:
    """Return the score on the last line that is not blank; None where that line is not a score."""
    lines = text.strip().splitlines()
    match = SCORE_LINE.fullmatch(lines[-1].strip()) if lines else None
    return int(match[1]) if match else None


def total_probability(probabilities: Sequence[float]) -> float | None:
    """Return the sum of the choices' probabilities; None where it is 0 or not finite."""
    mass = math.fsum(probabilities) if all(map(math.isfinite, probabilities)) else math.nan
    return mass if mass > 0 else None


def expected_score(probabilities: Sequence[float]) -> float | None:
    """Return the mean of 1, 2, ... n under their renormalised probabilities; None without probability.

    Source: arXiv 2503.03064.
    """
    mass = total_probability(probabilities)
    return None if mass is None else math.fsum(grade * p for grade, p in enumerate(probabilities, 1)) / mass


def most_likely_score(probabilities: Sequence[float]) -> int | None:
    """Return the most likely of 1, 2, ... n, the lowest one of several; None without probability."""
    return None if total_probability(probabilities) is None else 1 + max(range(len(probabilities)), key=probabilities.__getitem__)


def preference_for_first(probabilities: Sequence[float]) -> float | None:
    """Return the first of two choices' share of their probability; None without probability."""
    mass = total_probability(probabilities)
    return None if mass is None else probabilities[0] / mass


def finite_or_none(x: float) -> float | None:
    """Return x as a float, or None for NaN and infinity, which neither JSON nor SQL can hold."""
    return float(x) if math.isfinite(x) else None
