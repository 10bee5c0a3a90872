"""Test that near-duplicates are grouped by the true similarities of all pairs, whatever their order."""

import random

import numpy as np
import pytest

from synth.filters.duplicates import PERMUTATIONS, UnionFind, group_near_duplicates, jaccard, minhash_signatures, shingles
from synth.filters.ngrams import normalize, words
from tests.helpers import real_prompts

LONG = ("Please write a short story for children in which a fox and an owl meet on a rainy day in the old town, become friends in spite of "
        "everything, and learn together that patience is worth more than gold, with a happy end for both of them and a moral for us all.")


def grams(text):
    """What the module says its sets are, in plain Python."""
    found = words(text)
    if len(found) >= 20:
        return {tuple(found[i:i + 5]) for i in range(len(found) - 4)}
    padded = " " * 4 + normalize(text) + " " * 4
    numbers = "".join(c if c.isdecimal() else " " for c in text).split()
    return {(padded[i:i + 5], *numbers) for i in range(len(padded) - 4)}


def similarity(a, b):
    return len(grams(a) & grams(b)) / len(grams(a) | grams(b))


def changed(text, count, rng):
    """The text with some of its words replaced."""
    found = text.split()
    for i in rng.sample(range(len(found)), count):
        found[i] = rng.choice(["blue", "seven", "quietly", "Anna"])
    return " ".join(found)


def partition(texts, found):
    return {frozenset(texts[i] for i in range(len(texts)) if found[i] == first) for first in set(found)}


@pytest.fixture(scope="module")
def texts():
    """Prompts that people wrote, and some of them with a few words changed."""
    rng = random.Random(0)
    real = real_prompts.prompts("gsm8k_test", "self_instruct_seed_tasks")[:1400:4]
    return real + [changed(text, 1 + i % 3, rng) for i, text in enumerate(real)] + [text.upper() + " " for text in real[:20]]


def test_similarities_are_those_of_the_sets(texts):
    for a, b in zip(texts, texts[374:]):
        assert jaccard(shingles(a), shingles(b)) == pytest.approx(similarity(a, b), abs=1e-12)


def test_minhashes_estimate_similarities(texts):
    pairs = [(changed(LONG, n, random.Random(n)), LONG) for n in range(1, 8)]
    for a, b in pairs:
        one, other = minhash_signatures([a, b])
        assert abs(np.mean(one == other) - similarity(a, b)) < 4 * 0.5 / PERMUTATIONS ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("least", [0.5, 0.8, 0.97, 1.0])
def test_groups_are_those_of_all_pairs(texts, least):
    links, sets = UnionFind(len(texts)), [grams(text) for text in texts]
    pairs = [(i, j) for i in range(len(texts)) for j in range(i) if len(sets[i] & sets[j]) >= least * len(sets[i] | sets[j])]
    for i, j in pairs:
        links.join(i, j)
    found = group_near_duplicates(texts, least)
    together = sum(found[i] == found[j] for i, j in pairs)
    assert together >= 0.95 * len(pairs) and len(pairs) >= 20  # LSH misses a few pairs close to the threshold
    expected = [links.root(i) for i in range(len(texts))]
    assert all(expected[i] == expected[first] for i, first in enumerate(found))  # and makes up none


def test_the_order_of_texts_does_not_matter(texts):
    shuffled = texts[:]
    random.Random(1).shuffle(shuffled)
    assert partition(texts, group_near_duplicates(texts, 0.7)) == partition(shuffled, group_near_duplicates(shuffled, 0.7))


def test_a_group_is_named_by_its_first_text():
    found = group_near_duplicates(["hi", LONG, "Hi ", "Hello", LONG.replace("fox", "cat"), "HI"], 0.7)
    assert found == [0, 1, 0, 3, 1, 0]
    assert group_near_duplicates([], 0.8) == [] and group_near_duplicates(["", " ", "x"], 0.8) == [0, 0, 2]


@pytest.mark.parametrize("one, other", [
    ("Which number comes after 801?", "Which number comes after 804?"),
    ("What is the sum of the numbers 4521 and 3312 in base ten?", "What is the sum of the numbers 4521 and 3313 in base ten?"),
    ("What is the capital of Austria?", "What is the capital of Australia?"),
])
def test_short_texts_that_ask_something_else_are_apart(one, other):
    assert group_near_duplicates([one, other], 0.8) == [0, 1]


def test_thousands_alike_are_one_group():
    rng = random.Random(2)
    many = list({changed(LONG, 1, rng) for _ in range(2000)})
    assert len(many) > 100 and set(group_near_duplicates(many, 0.7)) == {0}


@pytest.mark.slow
def test_real_prompts_are_hardly_ever_near_duplicates():
    found = group_near_duplicates(real_prompts.prompts("gsm8k_train"), 0.8)
    assert len(found) == 7473 and len(set(found)) == 7472  # Josie's and Amanda's fifty dollars
