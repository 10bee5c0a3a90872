"""Show records as the READMEs do."""

from pathlib import Path

from benchmarks.harness import show
from benchmarks.harness.suite import view_of
from benchmarks.suites import VIEWS


def shown(record: dict) -> str:
    """Return the Markdown of a record."""
    return show.markdown(record, view_of(record, VIEWS))


def drawn(record: dict, path: Path) -> Path:
    """Draw the picture of a record."""
    return show.draw(record, view_of(record, VIEWS), path)


def table_rows(record: dict) -> list[str]:
    """Return the lines of a record's table, head and rule included."""
    return [line for line in shown(record).splitlines() if line.startswith("|")]
