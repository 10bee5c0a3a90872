"""Answers side by side: which words are marked, what a terminal and a page show, and what the file keeps."""

import json
from html.parser import HTMLParser

import pytest

from tests.helpers.runs import text_of
from trainer.report import answers, page
from trainer.report.answers import Answers, compare


def pair(base: str, tuned: str, **more) -> Answers:
    return Answers(**{"kind": "held out", "source": "sums", "prompt": "Why?"} | more, base=base, tuned=tuned)


def marked(base: str, tuned: str) -> tuple[str, str]:
    compared = compare(pair(base, tuned))
    assert "".join(piece.text for piece in compared.base) == base and "".join(piece.text for piece in compared.tuned) == tuned
    return tuple("".join(f"[{text}]" if differs else text for text, differs in pieces) for pieces in (compared.base, compared.tuned))


@pytest.mark.parametrize("base, tuned, expected", [
    ("The cat sat.", "The dog sat.", ("The [cat] sat.", "The [dog] sat.")),
    ("It can't be 3.14, no.", "It can't be 3.15, no.", ("It can't be [3.14], no.", "It can't be [3.15], no.")),
    ("same", "same", ("same", "same")),
    ("", "A whole answer.\n", ("", "[A whole answer.]\n")),
    ("one\n\n two ", "one two", ("one\n\n two ", "one two")),
    ("我今天很高兴。", "我昨天很高兴。", ("我[今]天很高兴。", "我[昨]天很高兴。")),
    ("ends", "ends\x1e", ("ends", "ends[\x1e]")),
])
def test_words_that_differ_are_marked_and_nothing_is_lost(base, tuned, expected):
    assert marked(base, tuned) == expected


def test_an_answer_that_repeats_itself_for_ever_is_compared_in_time():
    base, tuned = "use a vitamin and " * 3000, "use a multivitamin and a " * 3000
    assert marked("I " + base, "I " + tuned)[1].startswith("I use a [multivitamin and a use")


def test_a_terminal_has_few_lines_and_no_control_characters(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    answers.show([pair("The cat sat \x1b[2J.", "The dog [bold]sat[/bold]. " + "And so on. " * 100), pair("", "x", prompt="a\nb\u202e")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "held out, sums: Why?" and lines[1].split() == ["base", "tuned"]
    assert lines[2].startswith("The [-cat-] sat") and "{+dog [bold]+}sat" in lines[2] and "\\x1b" in lines[2]
    assert len(lines) == 1 + 1 + answers.LINES + 1 + 4
    assert lines[1 + answers.LINES].rstrip().endswith(" ...")
    assert "held out, sums: a b\\u202e" in lines and "(nothing)" in lines[-2]
    assert max(map(len, lines)) <= 80 and not any(ord(c) < 32 for line in lines for c in line)


def test_the_file_keeps_all_and_a_damaged_line_is_left_out(tmp_path):
    written = [pair("a\nb", "\u202e c", base_ended=False, tuned_ended=True, expected="d"), pair("", "", kind="gained")]
    answers.write(tmp_path, written)
    assert answers.read(tmp_path) == written and [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]
    lines = (tmp_path / "answers.jsonl").read_text()
    assert json.loads(lines.splitlines()[0])["prompt"] == "Why?"
    damaged = ["{", "[1]", '{"kind": 3}', json.dumps(json.loads(lines.splitlines()[0]) | {"kind": "unknown"}), ""]
    (tmp_path / "answers.jsonl").write_text("\n".join(damaged) + lines + "\udcff".encode(errors="surrogateescape").decode("latin-1"))
    assert answers.read(tmp_path) == written
    assert answers.read(tmp_path / "absent") == []


class Balance(HTMLParser):
    """Fails for an element that is closed in the wrong place or not at all."""

    EMPTY = {"meta", "link", "img", "source", "br"}

    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.open += [tag] if tag not in self.EMPTY else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_page_has_them_beside_each_other(tmp_path):
    shown = [
        pair("The <b>cat</b> sat\x00.", "The dog sat.", base_ended=False, tuned_ended=True, expected="A dog."),
        pair("alike", "alike", prompt="word " * 200, tuned_ended=True), pair("", "said", kind="replay"),
        *(pair(f"was {i}", f"is {i}", kind="forgotten", source="items") for i in range(answers.MOST_ITEMS + 3)),
    ]
    template = tmp_path / "some.html.jinja"
    template.write_text('{% extends "page.html.jinja" %}{% from "answers.html.jinja" import side_by_side %}'
                        "{% block main %}{{ side_by_side(answers) }}{% endblock %}")
    page.write(tmp_path / "page.html", template, [], answers=answers.sections(shown))
    html = (tmp_path / "page.html").read_text()
    balance = Balance()
    balance.feed(html)
    assert balance.open == []
    assert "The <del>&lt;b&gt;cat&lt;/b&gt;</del> sat" in html and "The <ins>dog</ins> sat" in html
    assert "<b>" not in html and "\x00" not in html and "\\x00" in html
    text = text_of(html)
    assert "Held-out prompts sums Why? In the data: A dog. Base cut off at the longest length" in text
    assert "Base and tuned alike" in text and "(nothing)" in text and "3 more are in answers.jsonl." in text
    assert html.count("<article>") == 3 + answers.MOST_ITEMS and html.count("<details>") == 1
