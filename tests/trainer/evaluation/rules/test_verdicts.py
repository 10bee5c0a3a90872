"""Verdicts on answers: equal to those of IFEval's own checkers, on answers written to mislead them.

`ifeval_verdicts.json` has rule, arguments, answer, and the strict and loose verdict of lm-evaluation-harness 0.4.13's copy of the
checkers, with nltk 3.9.1 and langdetect 1.0.9 (seed 0).
"""

import importlib.util
import json
from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.evaluation.rules import text_units, verdicts
from trainer.evaluation.rules.checks import CHECKS
from trainer.evaluation.rules.verdicts import judge_rules, make_rule

RECORDED = json.loads(Path(__file__).with_name("ifeval_verdicts.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", sorted({case[0] for case in RECORDED}))
def test_verdicts_are_those_of_the_reference(name):
    if name in verdicts.NEED_LANGUAGE:
        pytest.importorskip("py3langid")
    for _, arguments, answer, strict, loose in (case for case in RECORDED if case[0] == name):
        judged = judge_rules([make_rule(name, arguments)], answer)
        assert (judged.strict, judged.loose) == ((strict,), (loose,)), (arguments, answer)


def test_every_rule_of_ifeval_is_compared_on_kept_and_broken_answers():
    verdicts_by_rule = {name: {case[3] for case in RECORDED if case[0] == name} for name in CHECKS if name != "json:equals"}
    assert len(verdicts_by_rule) == 25 and all(found == {True, False} for found in verdicts_by_rule.values())


@pytest.mark.parametrize("text, count", [
    ("", 0), ("No mark", 1), ("One. Two! Three?", 3), ("He saw Dr. Brown in the U.S. with Mrs. Ames.", 1),
    ("At 5 p.m. she left. It rained.", 2), ("In the U.S. The end.", 2), ("It costs 3.50 dollars, v. 4.2 or so.", 1),
    ("1. Bread\n2. Milk", 3), ("Wait... what", 1), ("Wait... The end", 2), ('"Stop!" she said. (He did.) It was late.', 4),
    ("See e.g. this", 2), ("What?! No!!", 3), ("Hi.\n\n", 1), ("J. Bach wrote it.", 1), ("**Bold.**", 2), ("世界。你好。", 1),
])
def test_sentences_end_where_punkt_ends_them(text, count):
    assert text_units.count_sentences(text) == count


@pytest.mark.parametrize("text, count", [
    ("I AM here", 2), ("DON'T", 2), ("CANNOT", 2), ("NASA's U.S. CO-OP", 3), ("(OK) \"YES\", 'NO'", 3), ("A1 B2: c3", 2), ("no", 0),
    ("WELL-known", 0),
])
def test_capital_words_are_tokens_without_small_letters(text, count):
    assert text_units.count_capital_words(text) == count


def test_repetition_is_the_share_of_runs_that_occurred_before():
    assert text_units.repetition("") == text_units.repetition("one two three") == text_units.repetition("a b c d e f") == 0
    assert text_units.repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert text_units.repetition("use it, " * 200) > 0.99


def test_loose_forgives_an_opening_line_and_asterisks():
    rule = make_rule("startend:quotation", {})
    assert judge_rules([rule], 'Sure, here it is:\n"A **poem**."') == verdicts.Verdicts((False,), (True,))
    assert judge_rules([rule], '**"A poem."**') == verdicts.Verdicts((False,), (True,))
    assert judge_rules([make_rule("punctuation:no_comma", {})], " \n ") == verdicts.Verdicts((False,), (False,)), "nothing is no answer"


def test_json_of_a_value():
    rule = make_rule("json:equals", {"value": {"a": [1, "b"]}})
    assert judge_rules([rule], '```json\n{"a": [1, "b"]}\n```').strict == (True,)
    assert judge_rules([rule], '{"a": [1, "c"]}').strict == judge_rules([rule], "{'a': [1, 'b']}").strict == (False,)


@pytest.mark.parametrize("name, arguments, expected", [
    ("length_constraints:words", {}, "expected the name of a rule, such as keywords:existence, found 'length_constraints:words'"),
    ("length_constraints:number_words", {"num_words": 3, "relation": None}, "arguments num_words, relation .* found num_words"),
    ("punctuation:no_comma", {"letter": "a"}, "expected the arguments none .* found letter"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at most"}, "to be less than or at least, found 'at most'"),
])
def test_rules_that_cannot_be(name, arguments, expected):
    with pytest.raises(ValueError, match=expected):
        make_rule(name, arguments)


def test_a_rule_of_language_without_its_package_names_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    rules = [make_rule("punctuation:no_comma", {}), make_rule("language:response_language", {"language": "de"})]
    verdicts.require_language(rules[:1], "a.jsonl, line 1")
    with pytest.raises(UserError, match=r"a.jsonl, line 1: the rule language:response_language needs the package py3langid"):
        verdicts.require_language(rules, "a.jsonl, line 1")
