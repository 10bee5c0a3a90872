"""Groups of near-duplicates: MinHash and locality-sensitive hashing find candidates, true Jaccard similarity decides, links make groups.

J(a, b) = |A ∩ B| / |A ∪ B| over the sets of 5-grams: of words, or of characters where a text has fewer than 20 words. A short text with
another number asks something else ("What is 801 plus 5?"): its numbers are part of each of its 5-grams. A MinHash is the
minimum of each of 128 random permutations of the set; two texts agree in one with probability J (Broder 1997), so texts that agree in
all rows of one of several bands are candidates (datasketch chooses the bands, for few misses: candidates are checked anyway). At J = 0.8
a pair is found with probability 0.95, at 0.9 always.

Texts that are equal but for case and spaces are one before any of this, so a thousand times "hi" costs nothing. What is computed depends
on the set of texts alone, never on their order.

The bands are sorted with numpy here, rather than kept in datasketch's own index: that takes 530 MB and 8 s for 100,000 texts, this takes
20 MB and 1 s.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from synth.filters.ngrams import character_hashes, plain, runs, word_hashes, words

GRAM = 5
SHORT = 20  # words from which a text has enough 5-grams of words
PERMUTATIONS = 128
STRICTEST = 0.95  # similarity from which 128 permutations make too few bands
SEED = 1  # of the permutations
WEIGHTS = (0.05, 0.95)  # of false and missed candidates, in datasketch's choice of bands
WINDOW = 50  # texts that follow in a band's bucket and that each is compared with: keeps the work linear where thousands are alike
BLOCK = 10_000  # pairs that are looked at together
MARGIN = 0.15  # what the estimate of J may be wrong by: four standard deviations, sqrt(J (1 - J) / 128)


def group(texts: Sequence[str], similarity: float) -> list[int]:
    """For each text the index of the first text of its group of near-duplicates."""
    plains = [plain(text) for text in texts]
    distinct = sorted(set(plains))
    links = Links(len(distinct))
    if len(distinct) > 1:
        _link(distinct, similarity, links)
    place = {text: i for i, text in enumerate(distinct)}
    first: dict[int, int] = {}
    return [first.setdefault(links.root(place[text]), i) for i, text in enumerate(plains)]


class Links:
    """Sets that grow together (union-find): each has its smallest member for a root."""

    def __init__(self, count: int):
        self.parent = list(range(count))

    def root(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = i = self.parent[self.parent[i]]
        return i

    def join(self, i: int, j: int) -> None:
        i, j = sorted((self.root(i), self.root(j)))
        self.parent[j] = i


def shingles(text: str) -> np.ndarray:
    """The set of a text's 5-grams, as sorted numbers. Blanks around a short text put each of its characters into five of them."""
    found = words(text)
    if len(found) >= SHORT:
        return np.unique(runs(word_hashes(found), GRAM))
    margin = " " * (GRAM - 1)
    numbers = word_hashes([" ".join(re.findall(r"\d+", text))])
    return np.unique(runs(character_hashes(margin + plain(text) + margin), GRAM) ^ numbers)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|A ∩ B| / |A ∪ B| of two sets, as sorted arrays."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def signatures(texts: Sequence[str]) -> np.ndarray:
    """(texts, PERMUTATIONS) uint32: their MinHashes."""
    from datasketch import MinHash  # imports scipy
    empty = MinHash(PERMUTATIONS, seed=SEED, hashfunc=int)
    found = np.empty((len(texts), PERMUTATIONS), np.uint32)
    for i, text in enumerate(texts):
        minhash = empty.copy()
        minhash.update_batch((shingles(text) >> np.uint64(32)).tolist())
        found[i] = minhash.hashvalues
    return found


def _link(distinct: Sequence[str], similarity: float, links: Links) -> None:
    """Join all pairs that LSH finds and whose Jaccard similarity is high enough."""
    remembered = lru_cache(4 * WINDOW)(lambda i: shingles(distinct[i]))
    found = signatures(distinct)
    for pairs in _candidates(found, similarity):
        for i, j in itertools.chain.from_iterable(pairs[start:start + BLOCK].tolist() for start in range(0, len(pairs), BLOCK)):
            if links.root(i) != links.root(j) and jaccard(remembered(i), remembered(j)) >= similarity:
                links.join(i, j)


def _candidates(found: np.ndarray, similarity: float) -> Iterator[np.ndarray]:
    """(pairs, 2) for each band: texts that agree in all its rows, and in about enough of all permutations."""
    from datasketch import MinHashLSH
    index = MinHashLSH(min(similarity, STRICTEST), PERMUTATIONS, weights=WEIGHTS)
    for band in range(index.b):
        rows = np.ascontiguousarray(found[:, band * index.r:(band + 1) * index.r])
        buckets = np.unique(rows.view(np.dtype((np.void, rows.itemsize * index.r))).ravel(), return_inverse=True)[1]
        order = np.argsort(buckets, kind="stable").astype(np.int32)
        near = [_alike(found, order[:-k], order[k:], buckets, similarity - MARGIN) for k in range(1, min(WINDOW, len(order)))]
        pairs = np.concatenate(near)
        yield pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _alike(found: np.ndarray, i: np.ndarray, j: np.ndarray, buckets: np.ndarray, least: float) -> np.ndarray:
    """(pairs, 2) of i and j in one bucket whose estimated similarity is `least` or more."""
    same = np.flatnonzero(buckets[i] == buckets[j])
    i, j = i[same], j[same]
    agree = [np.mean(found[i[start:start + BLOCK]] == found[j[start:start + BLOCK]], 1) for start in range(0, max(1, len(i)), BLOCK)]
    return np.stack((i, j), 1)[np.concatenate(agree) >= least]
