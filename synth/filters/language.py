"""The language of an instruction, by py3langid: 139 languages, offline, one model in its wheel.

A short text or made-up words have no language that can be told ('und' where its probability is below one half), formulas have none
('zxx'): no reason against them. Wanted shares of languages are reached by weights, never by dropping.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

from trainer.errors import UserError

UNTOLD = ("und", "zxx")  # ISO 639-2: undetermined, and no language at all (numbers, code)
SURE = 0.5  # probability from which a language counts as told


@lru_cache(1)
def _identifier():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=SURE)


def language_of(text: str) -> str:
    """The ISO code of a text's language, or one of UNTOLD."""
    return _identifier().classify(text)[0]


def check_codes(option: str, codes: Iterable[str]) -> None:
    """UserError for a code that no text is ever given."""
    known = set(_identifier().labels)
    for code in codes:
        if code not in known:
            raise UserError(f"{option}: expected ISO 639-1 codes of languages, such as en, de or zh, found '{code}'")


def check_shares(option: str, wanted: Mapping[str, float]) -> None:
    """UserError for shares that are none."""
    check_codes(option, wanted)
    if wanted and not (min(wanted.values()) > 0 and sum(wanted.values()) <= 1 + 1e-9):
        raise UserError(f"{option}: expected shares above 0 that sum to at most 1, found {dict(wanted)}")


def factors(actual: Mapping[str, float], wanted: Mapping[str, float]) -> dict[str, float]:
    """What the weights of each language are multiplied by, so that the wanted shares are those of the weight whose language is known.

    `actual`: the weight of each language now. Languages that are not listed have what the listed ones leave, in the proportions they come
    in; where nothing is left they stay as they are, and the shares are those among the listed. 'und' and 'zxx' stay as they are, and so
    does the sum.
    A wanted language that does not occur leaves its share to the others that are listed.
    """
    known = {code: weight for code, weight in actual.items() if code not in UNTOLD and weight > 0}
    listed = {code: share for code, share in wanted.items() if code in known}
    others = sum(weight for code, weight in sorted(known.items()) if code not in listed)
    left = max(0.0, 1.0 - sum(wanted.values())) if others else 0.0
    if not listed:
        return dict.fromkeys(actual, 1.0)
    if left < 1e-9:
        left = others / sum(known.values())
    scale = sum(known.values()) * (1.0 - left) / sum(listed.values())
    rest = left * sum(known.values()) / others if others else 1.0
    return {code: listed[code] * scale / known[code] if code in listed else 1.0 if code not in known else rest for code in actual}
