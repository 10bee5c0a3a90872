"""Tabulate arms: general and domain accuracy, the share forgotten, and accuracy by skill."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.forgetting.miniature.evaluate import Scores, lost


def figures(arms: dict[str, tuple[Scores, Scores]]) -> list[dict]:
    """Return a row for each arm, from its general and domain scores.

    `forgotten` is the share of the first arm's right items that this arm has wrong.
    """
    first = next(iter(arms.values()))[0]
    return [{
        "line": arm, "general": general.accuracy, "domain": domain.accuracy,
        "forgotten": len(lost(first, general)) / max(1, sum(first.right)), "by_skill": general.by_skill | domain.by_skill,
    } for arm, (general, domain) in arms.items()]


def table(arms: dict[str, tuple[Scores, Scores]]) -> str:
    rows = figures(arms)
    columns = ("general", "domain", "forgotten")
    shown = [[row["line"], *(f"{row[c]:.3f}" for c in columns), *(f"{mark:.2f}" for mark in row["by_skill"].values())] for row in rows]
    return align([["model", *columns, *rows[0]["by_skill"]], *shown])


def align(rows: Sequence[Sequence[str]]) -> str:
    """Format rows with aligned columns, the first one to the left and all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
