"""Summarise the study's outcomes: means over seeds, standard errors, and gaps paired by seed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.forgetting.miniature.arms import Arm

BASE = "base"


def row_names(plan: Mapping[str, Sequence[Arm]]) -> list[str]:
    """Return the names of the table's rows, in their order."""
    rows = [BASE]
    for arm in itertools.chain.from_iterable(plan.values()):
        rows += [name for name in (arm.name, *map(arm.alpha_name, arm.alphas)) if name not in rows]
    return rows


def rows(outcomes: Iterable) -> list[dict]:
    """Return a row for each base and arm.

    `forgotten` is the share of the base's right items that are wrong after training, `gained` the share of its wrong ones that are right.
    """
    grouped: dict[tuple[str, str], dict[int, object]] = {}
    for outcome in outcomes:
        grouped.setdefault((outcome.base, outcome.arm), {})[outcome.seed] = outcome
    return [row(base, arm, by_seed, grouped[base, BASE]) for (base, arm), by_seed in grouped.items()]


def row(base: str, arm: str, by_seed: Mapping[int, object], before: Mapping[int, object]) -> dict:
    """Return the row of an arm from its outcomes and the base's, both by seed."""
    pairs = [(before[seed].general, outcome.general) for seed, outcome in by_seed.items()]
    forgotten = [count_changes(old, new, "10") / old.count("1") for old, new in pairs]
    gained = [count_changes(old, new, "01") / max(1, old.count("0")) for old, new in pairs]
    return {
        "line": f"{base}: {arm}", "base": base, "arm": arm, "seeds": len(by_seed),
        **estimate("general", [share(outcome.general) for outcome in by_seed.values()]),
        **estimate("domain", [share(outcome.domain) for outcome in by_seed.values()]),
        **estimate("forgotten", forgotten), **estimate("gained", gained),
        "cpu_seconds": statistics.median(outcome.seconds for outcome in by_seed.values())}


def count_changes(before: str, after: str, change: str) -> int:
    """Return how many items changed their marks as `change` says, e.g. "10": from right to wrong."""
    return sum(was + now == change for was, now in zip(before, after, strict=True))


def share(marks: str) -> float:
    """Return the share of right answers."""
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
    accuracy = {(outcome.arm, outcome.seed): share(outcome.general) for outcome in outcomes if outcome.base == base}
    seeds = sorted(seed for arm, seed in accuracy if arm == lower and (upper, seed) in accuracy)
    gaps = [accuracy[upper, seed] - accuracy[lower, seed] for seed in seeds]
    return statistics.fmean(gaps), standard_error(gaps)
