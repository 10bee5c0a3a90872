"""Draw invented, pronounceable words: the arguments of skills and the names in facts."""

from __future__ import annotations

from random import Random

CONSONANTS = "bcdfghjklmnpqrstvwxyz"
VOWELS = "aeiou"


def word(rng: Random, shortest: int = 3, longest: int = 7) -> str:
    """Draw a word of alternating consonants and vowels, e.g. `tamik`; all lengths are equally likely."""
    length, odd = rng.randint(shortest, longest), rng.randrange(2)
    return "".join(rng.choice(VOWELS if (place + odd) % 2 else CONSONANTS) for place in range(length))


def names(count: int, rng: Random) -> list[str]:
    """Draw `count` different capitalised names of 5 to 7 letters."""
    made: dict[str, None] = {}
    while len(made) < count:
        made[word(rng, 5, 7).capitalize()] = None
    return list(made)
