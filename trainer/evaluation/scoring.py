"""When an answer is right: texts made equal where they mean the same, patterns that find an answer, the likeliest of several choices."""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from trainer.evaluation.config import Items

DIGITS = 28  # of a number that is compared by its value: as many as decimal arithmetic keeps
NORMS = ("sum", "characters", "tokens")
DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str, ignore_case: bool = False, ignore_punctuation: bool = False) -> str:
    """The text with composed characters (Unicode NFC) and single spaces, none at its ends; more is ignored where asked for."""
    text = unicodedata.normalize("NFC", text)
    if ignore_punctuation:
        text = text.translate(DROP_PUNCTUATION)
    return " ".join((text.casefold() if ignore_case else text).split())


def extract(text: str, pattern: str, take: str = "first") -> str | None:
    """What a group of the pattern's first or last match holds (the first group that holds anything); None without a match."""
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    groups = matches[0 if take == "first" else -1].groups()
    return next((group for group in groups if group), None)


def canonical(found: str, settings: Items) -> str:
    """An extracted answer as it is compared: a number by its value (1,000. is 1000.0), any other text normalised."""
    bare = found.strip().replace(",", "").rstrip(".").lstrip("$")
    try:
        value = Decimal(bare if len(bare) <= DIGITS else "nan")
    except InvalidOperation:
        value = Decimal("nan")
    if value.is_finite():
        return str(value.normalize() + 0)
    return normalise(found, settings.ignore_case, settings.ignore_punctuation)


def reference(answer: str, settings: Items) -> str | None:
    """What a regex file's answer comes to; None where the pattern finds nothing in it."""
    pattern = settings.regex if settings.answer_regex is None else settings.answer_regex
    found = extract(answer, pattern, settings.take) if pattern else answer
    return None if found is None else canonical(found, settings)


def judge(generated: str, answers: Sequence[str], settings: Items) -> tuple[bool, str | None]:
    """Whether a generated text is right, and what was found in it."""
    if settings.metric == "regex":
        found = extract(generated, settings.regex, settings.take)
        found = None if found is None else canonical(found, settings)
        return found is not None and found in {reference(answer, settings) for answer in answers}, found
    found = normalise(generated, settings.ignore_case, settings.ignore_punctuation)
    return found in {normalise(answer, settings.ignore_case, settings.ignore_punctuation) for answer in answers}, found


def choose(logprobs: Sequence[float], choices: Sequence[str], tokens: Sequence[int]) -> dict[str, int]:
    """The choice that each norm picks: the likeliest (lm-evaluation-harness's acc), that per character (its acc_norm), that per token.

    Log-probs in nats; of equals the first.
    """
    sizes = {"sum": [1] * len(choices), "characters": [len(choice) for choice in choices], "tokens": tokens}
    return {norm: max(range(len(choices)), key=lambda i: _ranked(logprobs[i] / sizes[norm][i])) for norm in NORMS}


def _ranked(value: float) -> float:
    """NaN, which compares with nothing, is the least likely."""
    return -math.inf if math.isnan(value) else value
