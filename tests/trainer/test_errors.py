"""Text of users is no markup: nothing of it steers a terminal, forges a line, or is set as mathematics."""

import pytest

from trainer.cli import parse
from trainer.config import Config, Source
from trainer.data.sources import load_sources
from trainer.errors import UserError, one_line, printable
from trainer.report import page

HOSTILE = "a\x1b]0;x\x07b\x9b31mc\u202ed\u2066e\rf\x7f\ud800"


def test_what_steers_a_terminal_is_shown_as_escapes():
    assert printable(HOSTILE) == r"a\x1b]0;x\x07b\x9b31mc\u202ed\u2066e\rf\x7f\ud800"
    assert printable("é 七\u200d\n\tx \xa0") == "é 七\u200d\n\tx \xa0"
    assert one_line("a\nstep 9\x1b[2J") == r"a step 9\x1b[2J"


@pytest.mark.parametrize("option", ["--output", "--data.train"])
def test_names_forge_no_line(option):
    value = "x\nstep 9  loss 0.0000" if option == "--output" else '[{path: x, name: "x\\nstep 9"}]'
    with pytest.raises(UserError, match=r"expected one line of printable text") as raised:
        parse(Config, [option, value], "trainer.run")
    assert "\n" not in str(raised.value)


def test_names_of_files_are_printable(tmp_path):
    path = tmp_path / "x\nstep 9\x1bc.jsonl"
    path.write_text('{"text": "a"}\n')
    (source, _), = load_sources([Source(str(path))], "domain", str(tmp_path / "cache"))
    assert source.name == r"x step 9\x1bc"


@pytest.mark.parametrize("name", ["price_$5_and_$10", "$x$", r"$\frac{$"])
def test_plots_show_names_as_they_are(name):
    shown = []

    def draw(axes, theme):
        axes.set_yticks([0, 1], [name, "other"])
        axes.plot([0, 1], [0, 1], label=name)
        page.legend(axes)
        texts = [*axes.get_yticklabels(), *axes.get_legend().get_texts()]
        shown.extend(text.get_parse_math() for text in texts)

    page.plot("p", "P", "", draw)
    assert shown and not any(shown)
