"""Invented, pronounceable words: the arguments of skills and the names in facts."""

from __future__ import annotations

from random import Random

CONSONANTS = "bcdfghjklmnpqrstvwxyz"
VOWELS = "aeiou"


def word(rng: Random, shortest: int = 3, longest: int = 7) -> str:
    """Consonants and vowels in turn, e.g. `tamik` or `ovel`; every length equally likely."""
    length, odd = rng.randint(shortest, longest), rng.randrange(2)
    return "".join(rng.choice(VOWELS if (place + odd) % 2 else CONSONANTS) for place in range(length))


def names(count: int, rng: Random) -> list[str]:
    """`count` different capitalised names of 5 to 7 letters."""
    made: dict[str, None] = {}
    while len(made) < count:
        made[word(rng, 5, 7).capitalize()] = None
    return list(made)
