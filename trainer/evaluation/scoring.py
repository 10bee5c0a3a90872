"""Decide whether an answer is right: normalise texts, extract answers by pattern, rank choices."""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from trainer.evaluation.config import Items

MAX_DIGITS = 28  # of a number that is compared by its value: the precision of decimal arithmetic
NORMS = ("sum", "characters", "tokens")
DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str, ignore_case: bool = False, ignore_punctuation: bool = False) -> str:
    """Return the text in Unicode NFC with single spaces, none at its ends.

    Case and punctuation go too if they are to be ignored.
    """
    text = unicodedata.normalize("NFC", text)
    if ignore_punctuation:
        text = text.translate(DROP_PUNCTUATION)
    return " ".join((text.casefold() if ignore_case else text).split())


def extract(text: str, pattern: str, take: str = "first") -> str | None:
    """Return the first group that is not empty in the first or last match; None without a match."""
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    groups = matches[0 if take == "first" else -1].groups()
    return next((group for group in groups if group), None)


def canonical(answer: str, options: Items) -> str:
    """Return an extracted answer in the form to compare.

    A number is compared by its value (1,000. is 1000.0), any other text normalised.
    """
    bare = answer.strip().replace(",", "").rstrip(".").lstrip("$")
    try:
        value = Decimal(bare if len(bare) <= MAX_DIGITS else "nan")
    except InvalidOperation:
        value = Decimal("nan")
    if value.is_finite():
        return str(value.normalize() + 0)
    return normalise(answer, options.ignore_case, options.ignore_punctuation)


def expected_answer(answer: str, options: Items) -> str | None:
    """Return the form to compare of an answer in a regex file; None if the pattern finds nothing."""
    pattern = options.regex if options.answer_regex is None else options.answer_regex
    extracted = extract(answer, pattern, options.take) if pattern else answer
    return None if extracted is None else canonical(extracted, options)


def judge(generated: str, answers: Sequence[str], options: Items) -> tuple[bool, str | None]:
    """Return whether a generated text is right, and the part of it that was compared."""
    if options.metric == "regex":
        extracted = extract(generated, options.regex, options.take)
        if extracted is None:
            return False, None
        compared = canonical(extracted, options)
        return compared in {expected_answer(answer, options) for answer in answers}, compared
    compared = normalise(generated, options.ignore_case, options.ignore_punctuation)
    return compared in {normalise(answer, options.ignore_case, options.ignore_punctuation) for answer in answers}, compared


def pick_choices(logprobs: Sequence[float], choices: Sequence[str], tokens: Sequence[int]) -> dict[str, int]:
    """Return the choice that each norm picks; the first wins a tie.

    The norms are the log-prob (lm-evaluation-harness's acc), that per character (its acc_norm), and that per token.
    """
    sizes = {"sum": [1] * len(choices), "characters": [len(choice) for choice in choices], "tokens": tokens}
    return {norm: max(range(len(choices)), key=lambda i: _comparable(logprobs[i] / sizes[norm][i])) for norm in NORMS}


def _comparable(value: float) -> float:
    """Return a log-prob, and -inf for NaN, so that NaN is never the likeliest."""
    return -math.inf if math.isnan(value) else value
