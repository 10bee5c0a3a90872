"""What became of a pool's items: how many each stage left, why the others went, and samples of what was there after each rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from synth.config import STAGES
from synth.filters.rules import RULES
from synth.pool.run import SynthesisRun
from synth.pool.seeds import uniform
from synth.pool.store import CLEAN, Pool
from synth.reporting.distribution import Sample

CHUNK = 500  # items of one query


def yields(pool: Pool) -> dict:
    """Items left after each stage that has begun, drops by stage and reason, and what was unusable of answers and scores."""
    left = {"planned": _count(pool, "SELECT count(*) FROM items")}
    if _count(pool, "SELECT EXISTS (SELECT 1 FROM turns)"):
        left["sampled"] = _count(pool, "SELECT count(*) FROM items WHERE id NOT IN (SELECT item FROM drops WHERE stage = 'instruct') AND "
                                       "EXISTS (SELECT 1 FROM turns WHERE item = id AND position = 2 * items.turns - 2)")
    if pool.get("done.clean"):
        left["clean"] = _count(pool, f"SELECT count(*) FROM items WHERE {CLEAN}")
    for name, table, condition in (("answered", "responses", "reason IS NULL"), ("judged", "scores", "score IS NOT NULL")):
        if _count(pool, f"SELECT EXISTS (SELECT 1 FROM {table})"):
            left[name] = _count(pool, f"SELECT count(DISTINCT item) FROM {table} WHERE {condition}")
    if _count(pool, "SELECT EXISTS (SELECT 1 FROM selection)"):
        left["selected"] = _count(pool, "SELECT count(*) FROM selection")
    drops = [{"stage": stage, "reason": reason, "items": count} for stage, reason, count in pool.select(
        "SELECT stage, reason, count(*) FROM drops GROUP BY stage, reason ORDER BY count(*) DESC, reason")]
    return {"left": left, "drops": sorted(drops, key=lambda drop: _place(STAGES, drop["stage"])), "responses": _responses(pool)}


def _responses(pool: Pool) -> dict[str, dict]:
    found = {model: {"all": count, "usable": usable, "reasons": {}} for model, count, usable in pool.select(
        "SELECT model, count(*), count(*) - count(reason) FROM responses GROUP BY model ORDER BY model")}
    for model, reason, count in pool.select("SELECT model, reason, count(*) FROM responses WHERE reason IS NOT NULL GROUP BY model, reason "
                                            "ORDER BY model, count(*) DESC, reason"):
        found[model]["reasons"][reason] = count
    return found


def _count(pool: Pool, query: str) -> int:
    return pool.select(query)[0][0]


def _place(order, name: str) -> int:
    return order.index(name) if name in order else len(order)


# ---------------------------------------------------------------- samples at each step


class Step(NamedTuple):
    name: str
    items: int  # that are left
    sample: Sample


class Item(NamedTuple):
    id: int
    stage: str | None  # that dropped it
    reason: str | None
    weight: float


def fresh(run: SynthesisRun) -> Sample:
    """Samples apart, in a random order."""
    ids = [item for item, in run.pool.select("SELECT id FROM fresh WHERE text IS NOT NULL")]
    rows = {row[0]: row[1:] for row in run.pool.select("SELECT id, text, logprob, tokens FROM fresh")}
    return _sample(rows, _shuffled(run, ids, "report fresh")[:run.config.report.sample])


def steps(run: SynthesisRun) -> list[Step]:
    """The pool's instructions as sampled, after every rule that dropped some in the order of the rules, weighted, and selected.

    Of an item with several turns the first one counts: fresh samples are first turns. Each step shows the same items as the one before, as
    far as they are left. Where items have weights, one stays with a probability of its weight over the largest one: what is shown is
    distributed as the replay set is.
    """
    most = run.config.report.sample
    found = {row[0]: Item(*row) for row in run.pool.select(
        "SELECT turns.item, stage, reason, coalesce(weight, 1.0) FROM turns LEFT JOIN drops USING (item) LEFT JOIN traits USING (item) "
        "WHERE position = 0 AND text IS NOT NULL")}
    left = [found[item] for item in _shuffled(run, found, "report")]
    plan = [("sampled", left)]
    for stage, reason in _rules(left):
        left = [item for item in left if (item.stage, item.reason if reason else None) != (stage, reason)]
        plan.append((f"without {reason or 'unusable'}", left))
    if len({item.weight for item in left}) > 1:
        plan.append(("weights", _thinned(run, left)))
    if chosen := {item for item, in run.pool.select("SELECT item FROM selection")}:
        plan.append(("selected", _thinned(run, [item for item in left if item.id in chosen])))
    shown = {name: [item.id for item in items[:most]] for name, items in plan}
    rows = _first_turns(run.pool, {item for ids in shown.values() for item in ids})
    return [Step(name, len(items), _sample(rows, shown[name])) for name, items in plan]


def _rules(items: Iterable[Item]) -> list[tuple[str, str | None]]:
    """Stage and reason of the drops before any answer was sampled, in the order in which they are applied; turns that are unusable for
    whatever reason go together."""
    found = {("instruct", None) if item.stage == "instruct" else (item.stage, item.reason) for item in items}
    order = [rule for rule in found if rule[0] in ("instruct", "clean")]
    return sorted(order, key=lambda rule: (_place(STAGES, rule[0]), _place(RULES, rule[1]), rule[1] or ""))


def _shuffled(run: SynthesisRun, ids: Iterable[int], name: str) -> list[int]:
    return sorted(ids, key=lambda item: (uniform(run.config.seed, name, item), item))


def _thinned(run: SynthesisRun, items: list[Item]) -> list[Item]:
    largest = max((item.weight for item in items), default=0.0)
    return [item for item in items if uniform(run.config.seed, "report weight", item.id) < item.weight / (largest or 1.0)]


def _first_turns(pool: Pool, ids: set[int]) -> dict[int, tuple]:
    wanted, rows = sorted(ids), {}
    for start in range(0, len(wanted), CHUNK):
        chunk = ",".join(map(str, wanted[start:start + CHUNK]))
        rows |= {row[0]: row[1:] for row in pool.select(
            f"SELECT item, text, logprob, tokens FROM turns WHERE position = 0 AND item IN ({chunk})")}
    return rows


def _sample(rows: Mapping[int, tuple], ids: list[int]) -> Sample:
    texts, logprobs, tokens = ([rows[item][i] for item in ids] for i in range(3))
    return Sample(texts, np.array([np.nan if x is None else x for x in logprobs], float), np.array(tokens, float))
