"""Show answers while they are written: side by side on a terminal, one after the other elsewhere.

Text of a model is never read as markup, and control characters in it are shown as escapes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trainer.errors import printable
from trainer.report.answers import STYLES, Answers, compare


class StreamedAnswers:
    """Answers by the names of models: `with StreamedAnswers(names) as shown: shown.update(name, text)`."""

    def __init__(self, names: Sequence[str]):
        self.console = Console(file=sys.stdout, highlight=False)
        self.texts = dict.fromkeys(names, "")
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None

    def __enter__(self) -> StreamedAnswers:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error) -> None:
        """Leave the whole answers, with the words marked that differ."""
        if self.live:
            self.live.update(self._table(self._marked()), refresh=True)
            self.live.stop()
            return
        for name, text in self.texts.items():
            print(f"{name}: {printable(text)}", flush=True)

    def update(self, name: str, text: str) -> None:
        """Show an answer as far as it is written."""
        self.texts[name] = text
        if self.live:
            self.live.update(self._table({name: self._end(text) for name, text in self.texts.items()}), refresh=True)

    def _table(self, columns: dict[str, Text]) -> Table:
        table = Table(box=None, show_header=len(columns) > 1, expand=True, padding=(0, 2, 0, 0))
        for name in columns:
            table.add_column(name, ratio=1, header_style="dim")
        table.add_row(*columns.values())
        return table

    def _end(self, text: str) -> Text:
        """Return the last lines of a text, as many as the terminal has room for."""
        lines = Text(printable(text)).wrap(self.console, max(10, self.console.width // len(self.texts) - 2))
        return Text("\n").join(lines[-max(3, self.console.height - 4):])

    def _marked(self) -> dict[str, Text]:
        if set(self.texts) != set(STYLES):
            return {name: Text(printable(text)) for name, text in self.texts.items()}
        compared = compare(Answers("held out", "", "", self.texts["base"], self.texts["tuned"]))
        return {name: Text.assemble(*((printable(text), STYLES[name] if differs else "") for text, differs in pieces))
                for name, pieces in (("base", compared.base), ("tuned", compared.tuned))}
