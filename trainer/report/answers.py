"""Lay out the answers of base and tuned model side by side, with the words that differ marked.

Answers are kept in answers.jsonl, a prompt on each line. Words are those of Unicode (UAX 29), so texts without spaces have some too; which
of them differ is difflib's finding.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Literal, NamedTuple

import regex
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.errors import one_line, printable
from trainer.files import atomic_file

FILE_NAME = "answers.jsonl"
TITLES = {  # of the kinds of prompts, in the order of a page
    "held out": "Held-out prompts", "training": "Prompts of the training data", "general": "General prompts",
    "replay": "Prompts of the replay data", "forgotten": "Forgotten items", "gained": "Gained items",
}
MOST_ITEMS = 20  # of the forgotten and of the gained items on a page; all of them are in the file
LINES = 4  # of an answer in a terminal
SPACE = " \t\r\n"  # other characters that Python calls space are control characters, which are shown
STYLES = {"base": "red", "tuned": "green"}
BRACKETS = {"base": ("[-", "-]"), "tuned": ("{+", "+}")}  # as git marks words that differ


@dataclass(frozen=True)
class Answers:
    """A prompt, and what base and tuned model answer to it."""

    kind: Literal["held out", "training", "general", "replay", "forgotten", "gained"]
    source: str  # name of the file that the prompt is from
    prompt: str
    base: str
    tuned: str
    base_ended: bool | None = None  # the model ended its answer before the limit; None: its answer is one of several choices
    tuned_ended: bool | None = None
    expected: str | None = None  # the answer that the data has


class Piece(NamedTuple):
    """Some words of an answer."""

    text: str
    differs: bool  # the other answer does not have them there


class Compared(NamedTuple):
    """Answers with the words marked that differ."""

    answers: Answers
    base: list[Piece]
    tuned: list[Piece]


class Section(NamedTuple):
    """The answers of one kind on a page."""

    title: str
    shown: list[Compared]
    more: int  # that are in the file alone


# ---------------------------------------------------------------- the file


def write(folder: Path, answers: Sequence[Answers]) -> None:
    """Write answers.jsonl, atomically. Lets an OSError through."""
    with atomic_file(folder / FILE_NAME) as tmp:
        tmp.write_text("".join(json.dumps(asdict(one)) + "\n" for one in answers), encoding="utf-8")


def read(folder: Path) -> list[Answers]:
    """Read answers.jsonl; without the file there are none, and lines that hold no answers are left out."""
    path, found = folder / FILE_NAME, []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            one = Answers(**json.loads(line))
        except (ValueError, TypeError, RecursionError):
            continue
        texts = (one.kind, one.source, one.prompt, one.base, one.tuned, one.expected or "")
        if one.kind in TITLES and all(isinstance(text, str) for text in texts):
            found.append(one)
    return found


# ---------------------------------------------------------------- words that differ


def compare(answers: Answers) -> Compared:
    """Return the two answers in pieces, of which those that differ are marked."""
    base, tuned = _words(answers.base), _words(answers.tuned)
    matcher = SequenceMatcher(None, [word.strip(SPACE) for word in base], [word.strip(SPACE) for word in tuned])
    pieces: tuple[list[Piece], list[Piece]] = ([], [])
    for tag, base_start, base_end, tuned_start, tuned_end in matcher.get_opcodes():
        for found, words in ((pieces[0], base[base_start:base_end]), (pieces[1], tuned[tuned_start:tuned_end])):
            found += _pieces("".join(words), tag != "equal")
    return Compared(answers, *pieces)


def _words(text: str) -> list[str]:
    """Return the words of a text, each with the space that follows it."""
    words: list[str] = []
    for part in filter(None, regex.split(r"(?wV1)\b", text)):
        if words and not part.strip(SPACE):
            words[-1] += part
        else:
            words.append(part)
    return words


def _pieces(text: str, differs: bool) -> list[Piece]:
    """Return a text as pieces; space around words that differ is not marked."""
    if not differs:
        return [Piece(text, False)] if text else []
    start, end = len(text) - len(text.lstrip(SPACE)), len(text.rstrip(SPACE))
    parts = [Piece(text[:start], False), Piece(text[start:end], True), Piece(text[max(start, end):], False)]
    return [piece for piece in parts if piece.text]


# ---------------------------------------------------------------- a page


def sections(answers: Sequence[Answers]) -> list[Section]:
    """Return the answers as a page shows them, by kind.

    Of many items that were forgotten or gained, they are the first.
    """
    found = []
    for kind, title in TITLES.items():
        of_kind = [one for one in answers if one.kind == kind]
        shown = of_kind[:MOST_ITEMS] if kind in ("forgotten", "gained") else of_kind
        if of_kind:
            found.append(Section(title, [_visible(compare(one)) for one in shown], len(of_kind) - len(shown)))
    return found


def _visible(compared: Compared) -> Compared:
    """Return the same with escapes for control characters."""
    return Compared(compared.answers, *([Piece(printable(text), differs) for text, differs in pieces]
                                        for pieces in (compared.base, compared.tuned)))


# ---------------------------------------------------------------- a terminal


def show(answers: Sequence[Answers]) -> None:
    """Print the answers side by side, a few lines each, with colours on a terminal and brackets elsewhere."""
    console = Console(file=sys.stdout, highlight=False)
    for one in answers:
        compared = compare(one)
        console.print(Text(one_line(f"{one.kind}, {one.source}: {one.prompt}"), style="bold"))
        table = Table(box=None, show_header=True, expand=True, padding=(0, 2, 0, 0))
        for name in STYLES:
            table.add_column(name, ratio=1, header_style="dim")
        table.add_row(*(_few_lines(pieces, name, console) for name, pieces in (("base", compared.base), ("tuned", compared.tuned))))
        console.print(table)
        console.print()


def _few_lines(pieces: Sequence[Piece], name: str, console: Console) -> Text:
    """Return the beginning of an answer, wrapped to half the console."""
    opening, closing = ("", "") if console.is_terminal else BRACKETS[name]
    whole = Text(end="")
    for text, differs in pieces:
        words = regex.sub(f"[{SPACE}]+", " ", printable(text))
        whole.append(f"{opening}{words}{closing}" if differs else words, style=STYLES[name] if differs else None)
    lines = whole.wrap(console, max(20, console.width // 2 - 6))  # which leaves room for the dots
    few = Text("\n").join(lines[:LINES])
    return few.append(" ...") if len(lines) > LINES else few if few.plain.strip() else Text("(nothing)", style="dim")
