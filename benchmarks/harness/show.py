"""Render records as Markdown and as pictures, with the parts that several suites share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.suite import Caption, View

OURS, OTHERS, SECOND, GREY = "#1f6f8b", "#b8b8b8", "#c8803c", "#555555"  # colours


# ---------------------------------------------------------------- Markdown


def markdown(record: dict, view: View) -> str:
    """Return the table of a record and its caption, details folded."""
    return f"{markdown_table(view.table(record), view.text_columns)}\n\n{markdown_caption(view.caption(record))}"


def markdown_table(rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """Return a Markdown table whose first row is its head.

    All columns but the first `text_columns` are numbers.
    """
    rule = ["---"] * text_columns + ["---:"] * (len(rows[0]) - text_columns)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], rule, *rows[1:]))


def markdown_caption(caption: Caption) -> str:
    if not caption.details:
        return f"{caption.text}\n"
    bullets = "\n".join(f"- {detail}" for detail in caption.details)
    return f"{caption.text}\n\n<details><summary>Details</summary>\n\n{bullets}\n\n</details>\n"


def interval(value: dict | None, form: str = ".2f") -> str:
    """Format a value with its interval, as in 1.05 (1.01-1.09); an empty string for None."""
    return f"{value['value']:{form}} ({value['low']:{form}}-{value['high']:{form}})" if value else ""


def machine(record: dict) -> str:
    """Return the processor and the number of threads."""
    return f"{record['cpu']}, {record['threads']} thread{'s' * (record['threads'] > 1)}"


def left_out(reasons: dict[str, str]) -> tuple[str, ...]:
    """Return a detail that names contenders that could not be measured, or none."""
    return ("Not measured: " + "; ".join(f"{name} ({why})" for name, why in reasons.items()) + ".",) if reasons else ()


# ---------------------------------------------------------------- pictures


def draw(record: dict, view: View, path: Path) -> Path:
    """Write the picture of a record, PNG or SVG by the path's suffix; equal records give equal bytes."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = record["suite"]  # names inside an SVG are random otherwise
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(8, 4), layout="constrained")
    view.draw(record, figure)
    if headline := view.headline(record):
        figure.suptitle(headline, fontsize=11, fontweight="bold")
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
    pyplot.close(figure)
    return path


def axes_of(figure: Any, width: float = 8, height: float = 4) -> Any:
    """Return the only axes of a figure of this size in inches, without the upper and right lines."""
    figure.set_size_inches(width, height)
    return bare(figure.subplots())


def bare(axes: Any) -> Any:
    """Remove the upper and right lines of axes, and return them."""
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def whiskers(intervals: Sequence[dict]) -> list[list[float]]:
    """Return matplotlib's error bars of intervals."""
    return [[one["value"] - one["low"] for one in intervals], [one["high"] - one["value"] for one in intervals]]


def bars(axes: Any, names: Sequence[str], intervals: Sequence[dict], colours: Sequence[str], form: str = ",.0f") -> None:
    """Draw horizontal bars with error bars and their values, the first at the bottom."""
    axes.barh(names, [one["value"] for one in intervals], xerr=whiskers(intervals), ecolor=GREY, color=colours)
    for i, one in enumerate(intervals):
        axes.text(one["high"], i, f" {one['value']:{form}}", va="center", fontsize=9)
    axes.set_xlim(0, 1.15 * max((one["high"] for one in intervals), default=1.0))
    bare(axes)
