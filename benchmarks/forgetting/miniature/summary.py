"""What the study's outcomes come to: each arm's mean over seeds and its standard error, and gaps between arms, paired by seed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.forgetting.miniature.arms import Arm

BASE = "base"


def names(plan: Mapping[str, Sequence[Arm]]) -> list[str]:
    """All lines of the table, in its order."""
    found = [BASE]
    for arm in itertools.chain.from_iterable(plan.values()):
        found += [name for name in (arm.name, *map(arm.point, arm.points)) if name not in found]
    return found


def rows(outcomes: Iterable) -> list[dict]:
    """A row for each base and arm. forgotten: share of the items that the base has right which are wrong now; gained: the reverse."""
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


def moved(before: str, after: str, how: str) -> int:
    """How many marks went from the one to the other."""
    return sum(was + now == how for was, now in zip(before, after, strict=True))


def share(marks: str) -> float:
    return marks.count("1") / len(marks)


def estimate(name: str, values: Sequence[float]) -> dict[str, float | None]:
    return {name: statistics.fmean(values), f"{name}_error": standard_error(values)}


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None of one value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def gap(outcomes: Iterable, base: str, lower: str, upper: str) -> tuple[float, float | None]:
    """Mean general accuracy of one arm less another's, both of the same seeds, and its standard error."""
    marks = {(found.arm, found.seed): share(found.general) for found in outcomes if found.base == base}
    seeds = sorted(seed for arm, seed in marks if arm == lower and (upper, seed) in marks)
    apart = [marks[upper, seed] - marks[lower, seed] for seed in seeds]
    return statistics.fmean(apart), standard_error(apart)
