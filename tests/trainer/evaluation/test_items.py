"""Item files of every kind and format, mistakes in them, and when an answer is right."""

import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.helpers import tiny
from trainer.data.chat_template import ChatTemplate
from trainer.errors import UserError
from trainer.evaluation.config import Data, Items
from trainer.evaluation.items import read_files
from trainer.evaluation.scoring import canonical, extract, judge, normalise, pick_choices
from trainer.evaluation.tokens import prompt_text

GSM8K = r"#### (-?[\d,.]+)"


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path, **options):
    file, = read_files(Data(general=[Items(str(path), **options)]))
    return file


def refused(path: Path, **options) -> str:
    with pytest.raises(UserError) as raised:
        read(path, **options)
    message = str(raised.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- reading


def test_the_metric_is_inferred_from_the_columns(tmp_path):
    chat = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    exact = read(write(tmp_path / "a.jsonl", {"question": "2 + 2?", "answer": 4, "id": "sum"}))
    assert exact.metric == "exact" and exact.items[0].answers == ("4",) and exact.items[0].id == "sum"
    assert exact.items[0].prompt == ({"role": "user", "content": "2 + 2?"},)
    choice = read(write(tmp_path / "b.jsonl", {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}))
    assert choice.metric == "choice" and choice.items[0].right_choice == 1
    regex = read(write(tmp_path / "c.jsonl", {"question": "2 + 2?", "answer": "It is\n#### 4"}), regex=GSM8K)
    assert regex.metric == "regex"
    text = read(write(tmp_path / "d.jsonl", {"text": "A text."}))
    assert text.metric == "logprob" and text.items[0].text == "A text."
    heldout = read(write(tmp_path / "e.jsonl", {"messages": chat}))
    assert heldout.metric == "logprob" and heldout.items[0].chat == tuple(chat)
    answered = read(write(tmp_path / "e.jsonl", {"messages": chat}), metric="exact")
    assert answered.items[0].prompt == tuple(chat[:1]) and answered.items[0].answers == ("4",)


def test_columns_map_and_several_answers_are_right(tmp_path):
    row = {"stem": {"text": "Capital?"}, "keys": ["Paris", "paris"], "context": "France", "system": "Be short."}
    item, = read(write(tmp_path / "a.jsonl", row), columns={"prompt": "stem.text", "answer": "keys", "input": "context"}).items
    assert item.answers == ("Paris", "paris")
    assert item.prompt == ({"role": "system", "content": "Be short."}, {"role": "user", "content": "Capital?\n\nFrance"})


@pytest.mark.parametrize("given, text", [(0, "0"), (False, "false"), ("0", "0"), ("", None), (None, None)])
def test_an_input_of_0_is_text(given, text, tmp_path):
    item, = read(write(tmp_path / "a.jsonl", {"prompt": "Square of", "input": given, "answer": "0"})).items
    assert item.prompt[0]["content"] == ("Square of" if text is None else f"Square of\n\n{text}")


def test_csv_parquet_and_json_hold_the_same_items(tmp_path):
    rows = [{"question": f"{n} + 1?", "choices": [str(n), str(n + 10)], "answer": "B"} for n in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    lines = ["question,choices,answer", *(f'{r["question"]},"{json.dumps(r["choices"]).replace(chr(34), chr(34) * 2)}",B' for r in rows)]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    kinds = ("json", "parquet", "csv")
    found = [[(item.prompt, item.choices, item.right_choice) for item in read(tmp_path / f"a.{kind}").items] for kind in kinds]
    assert found[0] == found[1] == found[2] and len(found[0]) == 3


@pytest.mark.parametrize("answer, choices, right", [
    (1, ["x", "y"], 1), ("y", ["x", "y"], 1), ("B", ["x", "y"], 1), ("b", ["x", "y"], 1), ("1", ["x", "y"], 1),
    ("1", ["0", "1", "2"], 1), ("2", ["1", "2"], 1), (1, ["1", "2"], 1),
    ("C", {"text": ["x", "y"], "label": ["C", "D"]}, 0), ("2", {"text": ["x", "y"], "label": ["1", "2"]}, 1),
])
def test_an_answer_is_an_index_a_text_a_label_or_a_letter(tmp_path, answer, choices, right):
    item, = read(write(tmp_path / "a.jsonl", {"question": "?", "choices": choices, "answer": answer})).items
    assert item.right_choice == right


def test_roles_limits_and_names(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"question": f"{n}?", "answer": "x"} for n in range(5)))
    general, again, domain = read_files(Data(general=[str(path), Items(str(path), max_records=2)], domain=str(path)))
    assert [(f.name, f.role, len(f.items)) for f in (general, again, domain)] == [
        ("a", "general", 5), ("a (2)", "general", 2), ("a (3)", "domain", 5)]
    assert domain.items[4].place == f"{path}, line 5"


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("row, options, expected", [
    ({"question": "?"}, {"metric": "exact"}, "metric exact expects answers, found the columns question; map them, as in columns: {answer"),
    ({"question": "?", "choices": ["a", "b"]}, {}, "metric choice expects answers"),
    ({"question": "?", "answer": "a"}, {"metric": "choice"}, "metric choice expects choices, found the columns question, answer"),
    ({"text": "words"}, {"metric": "exact"}, "metric exact expects a prompt or messages, .*; or use metric logprob"),
    ({"question": "?"}, {"metric": "logprob"}, "metric logprob expects messages, text, or prompt and answer"),
    ({"question": "?", "answer": "a"}, {"metric": "regex"}, "metric regex expects a pattern with a group, found none; set data.regex"),
    ({"question": "?", "answer": "a"}, {"regex": "####"}, "regex: expected a group in '####'.*put the answer's part in parentheses"),
    ({"question": "?", "answer": "a"}, {"regex": "(#"}, r"regex: '\(#' is not a regular expression: missing \)"),
    ({"question": "?", "answer": "a #1"}, {"regex": "#(.)", "answer_regex": "#."}, "answer_regex: expected a group"),
    ({"question": "?", "answer": "none"}, {"regex": GSM8K},
     "line 1: expected a match of the pattern .* in the answer 'none', found none; correct the pattern"),
    ({"question": "?", "choices": ["a"], "answer": 0}, {}, "line 1: expected two choices or more, found 1"),
    ({"question": "?", "choices": [], "answer": 0}, {}, "line 1: expected two choices or more, found 0"),
    ({"question": "?", "choices": ["a", "a"], "answer": 0}, {}, "line 1: expected two different choices"),
    ({"prompt": "?", "rules": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}]}, {}, "line 1: expected one or more rules"),
    ({"prompt": "?", "rules": ["no_comma"]}, {}, "line 1: expected the name of a rule, such as keywords:existence, found 'no_comma'"),
    ({"prompt": "?"}, {"metric": "rules"}, "metric rules expects rules, found the columns prompt"),
    ({"question": "?", "choices": "a or b", "answer": 0}, {}, "line 1: expected choices as a list"),
    ({"question": "?", "choices": ["a", "b"], "answer": "c d"}, {}, r"expected the answer among the choices \['a', 'b'\], found 'c d'"),
    ({"question": "?", "choices": ["a", "b"], "answer": 2}, {}, "expected the answer among the choices"),
    ({"question": "?", "choices": ["a", "b"], "answer": -1}, {}, "expected the answer among the choices"),
    ({"question": "?", "choices": ["a", "b"], "answer": None}, {}, "line 1: expected an answer: an index from 0"),
    ({"question": "?", "answer": None}, {}, "line 1: expected an answer in column answer, found none"),
    ({"question": "?", "answer": ""}, {}, "line 1: expected an answer in column answer"),
    ({"question": "?", "answers": []}, {}, "line 1: expected an answer in column answers"),
    ({"question": "", "answer": "a"}, {}, "line 1: turn 1: expected text"),
    ({"messages": [{"role": "user", "content": "?"}]}, {"metric": "exact"}, "line 1: expected an answer: an assistant's turn at the end"),
    ({"messages": [{"role": "assistant", "content": "!"}]}, {"metric": "exact"}, "line 1: expected a question before the assistant's turn"),
    ({"messages": [{"role": "user", "content": "?"}]}, {}, "line 1: expected an assistant's turn, whose log-prob is measured"),
    ({"question": "?", "answer": "a"}, {"columns": {"reply": "answer"}}, "columns: expected some of prompt, answer, .*, found reply"),
    ({"question": "?", "answer": "a"}, {"columns": {"answer": "key"}}, "columns: expected key in the file, found the columns question"),
])
def test_a_file_that_does_not_fit_is_one_line_with_its_place(tmp_path, row, options, expected):
    path = write(tmp_path / "items.jsonl", row)
    message = refused(path, **options)
    assert message.startswith(str(path)) and re.search(expected, message), message


def test_a_number_in_csv_that_may_be_index_or_text(tmp_path):
    (tmp_path / "a.csv").write_text('question,choices,answer\n2 - 1?,"[1, 2, 3]",1\n')
    expected = "line 2: expected one meaning, but the answer 1 is the text of one choice and the index of another"
    assert expected in refused(tmp_path / "a.csv")


def test_empty_and_absent_files(tmp_path):
    for name, contents in (("a.jsonl", ""), ("b.json", "[]"), ("c.csv", "question,answer\n")):
        (tmp_path / name).write_text(contents)
        assert refused(tmp_path / name).endswith("expected items, found an empty file")
    assert "found no such file" in refused(tmp_path / "d.jsonl")


def test_a_bad_row_late_in_a_file_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "?", "answer": "a"}, {"question": "?", "answer": "a"}, {"question": "?"})
    assert refused(path).startswith(f"{path}, line 3: expected an answer")


# ---------------------------------------------------------------- right answers


def test_normalising_keeps_what_tells_answers_apart():
    assert normalise("  a\n b\t") == "a b" and normalise("e\u0301") == "\u00e9"
    assert normalise("-3.5") != normalise("35") and normalise("A") != normalise("a")
    assert normalise("A, b.", ignore_case=True, ignore_punctuation=True) == "a b"


def test_patterns_take_the_first_or_the_last_match_and_its_first_group():
    assert extract("#### 1\n#### 2", GSM8K) == "1" and extract("#### 1\n#### 2", GSM8K, "last") == "2"
    assert extract("no", GSM8K) is None and extract("b", "(a)|(b)") == "b"


@pytest.mark.parametrize("one, other, same", [
    ("1,000", "1000", True), ("18", "18.0", True), ("18.", "18", True), ("$5", "5", True), ("-0", "0", True), ("1.5", "15", False),
    ("1e3", "1000", True), ("yes", " yes ", True), ("yes", "no", False), ("nan", "nan", True), ("1" * 40, "1" * 39 + "2", False)])
def test_numbers_are_compared_by_value(one, other, same):
    assert (canonical(one, Items("")) == canonical(other, Items(""))) == same


def test_judging_by_pattern_and_by_equality():
    gsm8k = Items("", metric="regex", regex=GSM8K)
    assert judge("so it is\n#### 1,234.0", ["<<2*617=1234>>\n#### 1234"], gsm8k) == (True, "1234")
    assert judge("no mark 1234", ["#### 1234"], gsm8k) == (False, None)
    bare = Items("", metric="regex", regex=GSM8K, answer_regex="")
    assert judge("#### 7", ["7.0"], bare) == (True, "7")
    assert judge(" Paris\n", ["Lyon", "Paris"], Items("", metric="exact")) == (True, "Paris")
    assert judge("paris", ["Paris"], Items("", metric="exact"))[0] is False


def test_choices_by_sum_by_character_and_by_token():
    """Pick the short one by log-prob, the long one per character, the middle one per token."""
    found = pick_choices([-2.0, -3.0, -4.0], ["a", "bb", "c" * 10], [1, 3, 2])
    assert found == {"sum": 0, "characters": 2, "tokens": 1}
    assert pick_choices([float("nan"), -5.0], ["a", "b"], [1, 1])["sum"] == 1


def test_tools_and_keywords_of_a_row_reach_the_template(tmp_path):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    item, = read(write(tmp_path / "a.jsonl", {"prompt": "Q", "answer": "A", "tools": json.dumps(tools),
                                              "chat_template_kwargs": {"x": 1}})).items
    assert item.inputs == {"x": 1, "tools": tools}
    template = ChatTemplate(tiny.tokenizer(), "{{ tools }}{{ x }}" + tiny.CHATML)
    assert prompt_text(item, template, True).startswith(str(tools) + "1")
