"""Group near-duplicates by Jaccard similarity, with candidate pairs from locality-sensitive hashing.

J(a, b) = |A ∩ B| / |A ∪ B| over the sets of 5-grams: of words, or of characters where a text has fewer than 20 words. Short texts with
different numbers are different questions ("What is 801 plus 5?"), so the numbers of a short text are part of each of its 5-grams. A
MinHash is the minimum of each of 128 random permutations of the set; two texts agree in one of them with probability J (Broder 1997), so
texts that agree in all rows of one of several bands are candidates. datasketch chooses the bands for few misses, as false candidates are
removed anyway: a pair with J = 0.8 is found with probability 0.95, one with J = 0.9 practically always.

Texts that differ only in case and spaces count as one text, so that frequent ones cost nothing. The result depends on the set of texts,
never on their order. The bands are sorted with numpy here because that needs far less memory and time than datasketch's own index.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from synth.filters.ngrams import character_hashes, ngram_hashes, normalize, word_hashes, words

GRAM = 5
MIN_WORDS = 20  # from which 5-grams of words are enough
PERMUTATIONS = 128
MAX_BAND_SIMILARITY = 0.95  # above it 128 permutations make too few bands
SEED = 1  # of the permutations
ERROR_WEIGHTS = (0.05, 0.95)  # of false and missed candidates, in datasketch's choice of bands
WINDOW = 50  # following texts of its bucket with which each text is compared: keeps the work linear where thousands are alike
BLOCK = 10_000  # pairs that are compared at once
MARGIN = 0.15  # error of the estimate of J: four standard deviations, sqrt(J (1 - J) / 128)


def group_near_duplicates(texts: Sequence[str], similarity: float) -> list[int]:
    """Return for each text the index of the first text in its group of near-duplicates."""
    normalized = [normalize(text) for text in texts]
    distinct = sorted(set(normalized))
    groups = UnionFind(len(distinct))
    if len(distinct) > 1:
        _join_similar(distinct, similarity, groups)
    index = {text: i for i, text in enumerate(distinct)}
    first: dict[int, int] = {}
    return [first.setdefault(groups.root(index[text]), i) for i, text in enumerate(normalized)]


class UnionFind:
    """Disjoint sets that can be joined; the root of a set is its smallest member."""

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
    """Return the set of a text's 5-grams as sorted hashes.

    Spaces around a short text put each of its characters into five of them.
    """
    text_words = words(text)
    if len(text_words) >= MIN_WORDS:
        return np.unique(ngram_hashes(word_hashes(text_words), GRAM))
    margin = " " * (GRAM - 1)
    numbers = word_hashes([" ".join(re.findall(r"\d+", text))])
    return np.unique(ngram_hashes(character_hashes(margin + normalize(text) + margin), GRAM) ^ numbers)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Return |A ∩ B| / |A ∪ B| of two sets, given as sorted arrays."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def minhash_signatures(texts: Sequence[str]) -> np.ndarray:
    """Return the MinHashes of texts: (texts, PERMUTATIONS) uint32."""
    from datasketch import MinHash  # imports scipy
    empty = MinHash(PERMUTATIONS, seed=SEED, hashfunc=int)
    signatures = np.empty((len(texts), PERMUTATIONS), np.uint32)
    for i, text in enumerate(texts):
        minhash = empty.copy()
        minhash.update_batch((shingles(text) >> np.uint64(32)).tolist())
        signatures[i] = minhash.hashvalues
    return signatures


def _join_similar(distinct: Sequence[str], similarity: float, groups: UnionFind) -> None:
    """Join all pairs that LSH finds and whose Jaccard similarity is high enough."""
    cached_shingles = lru_cache(4 * WINDOW)(lambda i: shingles(distinct[i]))
    for pairs in _candidate_pairs(minhash_signatures(distinct), similarity):
        for i, j in itertools.chain.from_iterable(pairs[start:start + BLOCK].tolist() for start in range(0, len(pairs), BLOCK)):
            if groups.root(i) != groups.root(j) and jaccard(cached_shingles(i), cached_shingles(j)) >= similarity:
                groups.join(i, j)


def _candidate_pairs(signatures: np.ndarray, similarity: float) -> Iterator[np.ndarray]:
    """Yield (pairs, 2) for each band: texts that agree in all its rows and are similar by estimate."""
    from datasketch import MinHashLSH
    index = MinHashLSH(min(similarity, MAX_BAND_SIMILARITY), PERMUTATIONS, weights=ERROR_WEIGHTS)
    for band in range(index.b):
        rows = np.ascontiguousarray(signatures[:, band * index.r:(band + 1) * index.r])
        buckets = np.unique(rows.view(np.dtype((np.void, rows.itemsize * index.r))).ravel(), return_inverse=True)[1]
        order = np.argsort(buckets, kind="stable").astype(np.int32)
        near = [_similar_pairs(signatures, order[:-k], order[k:], buckets, similarity - MARGIN) for k in range(1, min(WINDOW, len(order)))]
        pairs = np.concatenate(near)
        yield pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _similar_pairs(signatures: np.ndarray, i: np.ndarray, j: np.ndarray, buckets: np.ndarray, min_similarity: float) -> np.ndarray:
    """Return (pairs, 2) of those i and j that share a bucket and are similar by estimate."""
    same = np.flatnonzero(buckets[i] == buckets[j])
    i, j = i[same], j[same]
    estimates = [np.mean(signatures[i[start:start + BLOCK]] == signatures[j[start:start + BLOCK]], 1)
                 for start in range(0, max(1, len(i)), BLOCK)]
    return np.stack((i, j), 1)[np.concatenate(estimates) >= min_similarity]
