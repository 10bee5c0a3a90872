"""Split texts into words and hash their n-grams to 64-bit numbers.

Words are compared without case and punctuation. Ideographs and kana, which are written without spaces, are words by themselves; one word
of other scripts is worth about two of them. Thai, Lao, Khmer and Burmese have no spaces between words either and stay whole phrases.

Hashes are fixed functions of the text (Python's `hash` differs between processes): word w has v(w) = BLAKE2b in 64 bits, and the n-gram
from word i has h(i, n) = Σ_k v(i+k) M^k mod 2^64 with an odd M, computed for every n from prefix sums times M^-i (Karp and Rabin 1987).
Two different n-grams share a hash with probability 2^-64.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

M = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
CACHED_WORDS = 1 << 18  # words whose hashes are cached
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA")  # how Unicode's names of their characters begin


class _CharacterMap(dict):
    """A map of characters that separates words by spaces.

    Letters, marks and digits stay, ideographs and kana get spaces around them, all else becomes a space.
    """

    def __missing__(self, code: int) -> str:
        char = chr(code)
        if unicodedata.category(char)[0] not in "LMN":
            self[code] = " "
        else:
            self[code] = f" {char} " if unicodedata.name(char, "").startswith(UNSPACED) else char
        return self[code]


_CHARACTER_MAP = _CharacterMap()


def words(text: str) -> list[str]:
    """Return the words of a text, without case and punctuation."""
    return unicodedata.normalize("NFKC", text).casefold().translate(_CHARACTER_MAP).split()


def is_unspaced(words: Sequence[str]) -> bool:
    """Return whether most of these words are ideographs or kana, of which two are worth a word."""
    unspaced = sum(len(word) == 1 and not word.isascii() and unicodedata.name(word, "").startswith(UNSPACED) for word in words)
    return 2 * unspaced > len(words)


def normalize(text: str) -> str:
    """Return the text in lower case, with single spaces."""
    return " ".join(text.casefold().split())


@lru_cache(CACHED_WORDS)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def word_hashes(words: Sequence[str]) -> np.ndarray:
    """Return the hash of each word: (words,) uint64."""
    return np.fromiter(map(_hash, words), np.uint64, len(words))


def character_hashes(text: str) -> np.ndarray:
    """Return the hash of each character: (characters,) uint64.

    Code points are mixed by the finalizer of SplitMix64 (Steele, Lea and Flood 2014).
    """
    mixed = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64) + np.uint64(M)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """Return the hashes of all n-grams in their order: (units,) -> (units - n + 1,).

    Empty where the text is shorter; n >= 1.
    """
    count = len(hashes) - n + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    powers, inverses = _powers(1 << (len(hashes) - 1).bit_length())
    sums = np.zeros(len(hashes) + 1, np.uint64)
    np.cumsum(hashes * powers[:len(hashes)], out=sums[1:])
    return (sums[n:] - sums[:count]) * inverses[:count]


@lru_cache(32)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return M^i and M^-i mod 2^64 for i below `count`."""
    def table(factor: int) -> np.ndarray:
        return np.cumprod(np.array([1, *[factor] * (count - 1)], np.uint64), dtype=np.uint64)

    return table(M), table(pow(M, -1, 1 << 64))
