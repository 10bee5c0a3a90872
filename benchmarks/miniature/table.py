"""The table of arms: what each model scores in general and on the domain, what it forgot, and its accuracy by skill."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.miniature.evaluate import Scores, lost


def table(arms: dict[str, tuple[Scores, Scores]]) -> str:
    """One row per arm, from its (general, domain) scores. Forgotten: share of what the first arm has right that this one has wrong."""
    first = next(iter(arms.values()))[0]
    rows = []
    for arm, (general, domain) in arms.items():
        forgotten = len(lost(first, general)) / max(1, sum(first.right))
        summary = [f"{figure:.3f}" for figure in (general.accuracy, domain.accuracy, forgotten)]
        rows.append([arm, *summary, *(f"{figure:.2f}" for figure in (*general.by_skill.values(), *domain.by_skill.values()))])
    return align([["model", "general", "domain", "forgotten", *general.by_skill, *domain.by_skill], *rows])


def align(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width: names to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
