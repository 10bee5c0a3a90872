"""Define a benchmark suite: its options, its measurement, and views of its records."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Caption:
    """The text below a table: a short paragraph, and details that a page folds away."""

    text: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class View:
    """How records of one kind are shown: table rows, the head first, a caption, a headline, and a picture."""

    table: Callable[[dict], list[list[str]]]
    caption: Callable[[dict], Caption]
    draw: Callable[[dict, Any], None]  # onto a matplotlib figure
    headline: Callable[[dict], str] = lambda record: ""  # title of the picture
    text_columns: int = 1  # columns that hold text, not numbers, on the left of the table


@dataclass(frozen=True)
class Suite:
    """A benchmark that `python -m benchmarks.run NAME` measures."""

    name: str
    summary: str  # one line
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], dict]  # returns the record
    views: dict[str, View] = field(default_factory=dict)  # by the record's suite, or the beginning of it
    status: Callable[[dict], int] = lambda record: 0  # exit status after a run


def view_of(record: dict, views: dict[str, View]) -> View:
    """Return the view with the longest name that begins the record's suite; KeyError without one."""
    suite = record["suite"]
    return views[max((name for name in views if suite == name or suite.startswith(f"{name}-")), key=len, default=suite)]
