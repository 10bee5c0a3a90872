"""Identify the language of an instruction with py3langid, which works offline.

The language of a short text or of made-up words is unknown ('und', where its probability is below one half), and formulas have none
('zxx'): neither is a reason to drop an instruction. Wanted shares of languages are reached by weights, never by dropping.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

from trainer.errors import UserError

UNKNOWN = ("und", "zxx")  # ISO 639-2: undetermined, and no language at all (numbers, code)
MIN_PROBABILITY = 0.5  # from which a language counts as known


@lru_cache(1)
def _identifier():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=MIN_PROBABILITY)


def language_of(text: str) -> str:
    """Return the ISO code of a text's language, or one of UNKNOWN."""
    return _identifier().classify(text)[0]


def check_codes(option: str, codes: Iterable[str]) -> None:
    """Raise UserError for a code that py3langid does not know."""
    known = set(_identifier().labels)
    for code in codes:
        if code not in known:
            raise UserError(f"{option}: expected ISO 639-1 codes of languages, such as en, de or zh, got '{code}'")


def check_shares(option: str, wanted: Mapping[str, float]) -> None:
    """Raise UserError for shares that are not above 0 or sum to more than 1."""
    check_codes(option, wanted)
    if wanted and not (min(wanted.values()) > 0 and sum(wanted.values()) <= 1 + 1e-9):
        raise UserError(f"{option}: expected shares above 0 that sum to at most 1, got {dict(wanted)}")


def weight_factors(actual: Mapping[str, float], wanted: Mapping[str, float]) -> dict[str, float]:
    """Return the factor of each language's weights that gives the languages their wanted shares.

    `actual` is the weight of each language now, `wanted` the shares of the weight whose language is known. Languages that are not wanted
    keep their proportions in what the wanted ones leave; where that is nothing they keep their weights, and the shares are those among
    the wanted ones. The weights of 'und' and 'zxx' and the sum of all weights do not change. A wanted language that does not occur leaves
    its share to the other wanted ones.
    """
    known = {code: weight for code, weight in actual.items() if code not in UNKNOWN and weight > 0}
    wanted_known = {code: share for code, share in wanted.items() if code in known}
    others = sum(weight for code, weight in sorted(known.items()) if code not in wanted_known)
    left = max(0.0, 1.0 - sum(wanted.values())) if others else 0.0
    if not wanted_known:
        return dict.fromkeys(actual, 1.0)
    if left < 1e-9:
        left = others / sum(known.values())
    scale = sum(known.values()) * (1.0 - left) / sum(wanted_known.values())
    rest = left * sum(known.values()) / others if others else 1.0

    def factor(code: str) -> float:
        if code in wanted_known:
            return wanted_known[code] * scale / known[code]
        return rest if code in known else 1.0

    return {code: factor(code) for code in actual}
