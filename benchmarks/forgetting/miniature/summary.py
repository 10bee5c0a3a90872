"""Summarise the study's outcomes: means over seeds, standard errors, and gaps paired by seed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.forgetting.miniature.arms import Arm

BASE = "base"


def names(plan: Mapping[str, Sequence[Arm]]) -> list[str]:
    """Return the names of the table's rows, in their order."""
    found = [BASE]
    for arm in itertools.chain.from_iterable(plan.values()):
        found += [name for name in (arm.name, *map(arm.point, arm.points)) if name not in found]
    return found


def rows(outcomes: Iterable) -> list[dict]:
    """Return a row for each base and arm.

    `forgotten` is the share of the base's right items that are wrong after training, `gained` the share of its wrong ones that are right.
    """
    grouped: dict[tuple[str, str], dict[int, object]] = {}
    for found in outcomes:
        grouped.setdefault((found.base, found.arm), {})[found.seed] = found
    return [row(base, arm, by_seed, grouped[base, BASE]) for (base, arm), by_seed in grouped.items()]


def row(base: str, arm: str, by_seed: Mapping[int, object], before: Mapping[int, object]) -> dict:
    lost = [moved(before[seed].general, found.general, "10") / before[seed].general.count("1") for seed, found in by_seed.items()]
    gained = [moved(before[seed].general, found.general, "01") / max(1, before[seed].general.count("0")) for seed, found in by_seed.items()]
    return {
        "line": f"{base}: {arm}", "base": base, "arm": arm, "seeds": len(by_seed),
        **estimate("general", [share(found.general) for found in by_seed.values()]),
        **estimate("domain", [share(found.domain) for found in by_seed.values()]),
        **estimate("forgotten", lost), **estimate("gained", gained),
        "cpu_seconds": statistics.median(found.seconds for found in by_seed.values())}


def moved(before: str, after: str, change: str) -> int:
    """Return how many items changed their marks as `change` says, e.g. "10": from right to wrong."""
    return sum(was + now == change for was, now in zip(before, after, strict=True))


def share(marks: str) -> float:
    return marks.count("1") / len(marks)


def estimate(name: str, values: Sequence[float]) -> dict[str, float | None]:
    return {name: statistics.fmean(values), f"{name}_error": standard_error(values)}


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean, or None for one value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def gap(outcomes: Iterable, base: str, lower: str, upper: str) -> tuple[float, float | None]:
    """Return how much general accuracy `upper` has above `lower`, and the standard error.

    Both are arms; the mean is over the seeds that both have.
    """
    marks = {(found.arm, found.seed): share(found.general) for found in outcomes if found.base == base}
    seeds = sorted(seed for arm, seed in marks if arm == lower and (upper, seed) in marks)
    gaps = [marks[upper, seed] - marks[lower, seed] for seed in seeds]
    return statistics.fmean(gaps), standard_error(gaps)
