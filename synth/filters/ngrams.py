"""Words of a text, and every run of n of them as one 64-bit number: what texts are compared by.

Words are compared without case and punctuation. Ideographs and kana, which no spaces part, are words by themselves; a word is worth about
two of them. Thai, Lao, Khmer and Burmese have no spaces between words either and stay whole phrases.

Hashes are fixed functions of the text (Python's own `hash` differs between processes): word w is v(w) = BLAKE2b in 64 bits, and the run
from word i is h(i, n) = Σ_k v(i+k) M^k mod 2^64 with an odd M: a difference of prefix sums times M^-i (Karp and Rabin 1987), the same
cost for every n. Two different runs share a number with probability 2^-64.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

M = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
VOCABULARY = 1 << 18  # words whose hashes are remembered
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA")  # how Unicode's names of their characters begin


class _Plain(dict):
    """What a character becomes: letters, marks and digits stay, ideographs and kana stand alone, all else parts words."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        if unicodedata.category(char)[0] not in "LMN":
            self[code] = " "
        else:
            self[code] = f" {char} " if unicodedata.name(char, "").startswith(UNSPACED) else char
        return self[code]


_PLAIN = _Plain()


def words(text: str) -> list[str]:
    """The words of a text, without case and punctuation."""
    return unicodedata.normalize("NFKC", text).casefold().translate(_PLAIN).split()


def is_unspaced(found: Sequence[str]) -> bool:
    """Whether most of these words are ideographs or kana, of which two are worth a word."""
    return 2 * sum(len(word) == 1 and not word.isascii() and unicodedata.name(word, "").startswith(UNSPACED) for word in found) > len(found)


def plain(text: str) -> str:
    """The text without what two spellings of the same may differ in: case and spaces."""
    return " ".join(text.casefold().split())


@lru_cache(VOCABULARY)
def _hashed(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def word_hashes(found: Sequence[str]) -> np.ndarray:
    """(words,) uint64"""
    return np.fromiter(map(_hashed, found), np.uint64, len(found))


def character_hashes(text: str) -> np.ndarray:
    """(characters,) uint64: code points, mixed by the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    mixed = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64) + np.uint64(M)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def runs(hashes: np.ndarray, n: int) -> np.ndarray:
    """(units,) hashes -> (units - n + 1,) numbers of all runs of n units in their order; none where the text is shorter. n >= 1."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    powers, inverses = _powers(1 << (len(hashes) - 1).bit_length())
    sums = np.zeros(len(hashes) + 1, np.uint64)
    np.cumsum(hashes * powers[:len(hashes)], out=sums[1:])
    return (sums[n:] - sums[:count]) * inverses[:count]


@lru_cache(32)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """M^i and M^-i mod 2^64 for i below `count`."""
    def table(factor: int) -> np.ndarray:
        return np.cumprod(np.array([1, *[factor] * (count - 1)], np.uint64), dtype=np.uint64)

    return table(M), table(pow(M, -1, 1 << 64))
