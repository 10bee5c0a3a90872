"""From what a judge says to a number: the mean of the digit's distribution, a score on the last line, a preference of two."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

# "Score: 4", and with it only emphasis, a full stop, or the scale: "**Score:** 4", "Score: 4/5."; not "4", "Score: 4.5", "Score: 4/10".
SCORE_LINE = re.compile(r"[*_ ]*score[*_ ]*:[*_ ]*([1-5])(?: ?/ ?5)?[*_ ]*\.?[*_ ]*", re.IGNORECASE)
NO_SCORE = "no 'Score: N' from 1 to 5 on the last line"
NO_MASS = "no probability on any choice"


def parsed_score(text: str) -> int | None:
    """The score on the last line that is not blank; None where that line says anything else."""
    lines = text.strip().splitlines()
    found = SCORE_LINE.fullmatch(lines[-1].strip()) if lines else None
    return int(found[1]) if found else None


def total(probabilities: Sequence[float]) -> float | None:
    """The mass of the choices together; None where there is none, or it is no number."""
    mass = math.fsum(probabilities) if all(map(math.isfinite, probabilities)) else math.nan
    return mass if mass > 0 else None


def expected_score(probabilities: Sequence[float]) -> float | None:
    """The mean of 1, 2, ... n under their renormalised probabilities (arXiv 2503.03064); None without mass."""
    mass = total(probabilities)
    return None if mass is None else math.fsum(grade * p for grade, p in enumerate(probabilities, 1)) / mass


def likeliest_score(probabilities: Sequence[float]) -> int | None:
    """What the judge would say if it had to say one of 1, 2, ... n: the likeliest, the lowest of several; None without mass."""
    return None if total(probabilities) is None else 1 + max(range(len(probabilities)), key=probabilities.__getitem__)


def preference(probabilities: Sequence[float]) -> float | None:
    """The first choice's share of two; None without mass."""
    mass = total(probabilities)
    return None if mass is None else probabilities[0] / mass
