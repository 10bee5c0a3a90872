"""Follow a pool's items through the stages: counts, reasons of drops, and samples after each rule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from synth.config import STAGES
from synth.filters.rules import RULES
from synth.pool.seeds import uniform
from synth.pool.store import ITEM_IS_CLEAN, Pool
from synth.pool.synthesis_run import SynthesisRun
from synth.reporting.distribution import InstructionSample

CHUNK = 500  # items of one query

SAMPLED = """
    SELECT count(*) FROM items WHERE id NOT IN (SELECT item FROM drops WHERE stage = 'instruct')
    AND EXISTS (SELECT 1 FROM turns WHERE item = id AND position = 2 * items.turns - 2)"""
DROPS_BY_REASON = "SELECT stage, reason, count(*) FROM drops GROUP BY stage, reason ORDER BY count(*) DESC, reason"
RESPONSES_BY_MODEL = "SELECT model, count(*), count(*) - count(reason) FROM responses GROUP BY model ORDER BY model"
UNUSABLE_RESPONSES = """
    SELECT model, reason, count(*) FROM responses WHERE reason IS NOT NULL
    GROUP BY model, reason ORDER BY model, count(*) DESC, reason"""
# Every item with a first turn; a row is a SampledItem
SAMPLED_ITEMS = """
    SELECT turns.item, stage, reason, coalesce(weight, 1.0)
    FROM turns LEFT JOIN drops USING (item) LEFT JOIN traits USING (item) WHERE position = 0 AND text IS NOT NULL"""
# Rows of these are InstructionRows
FIRST_TURNS = "SELECT item, text, logprob, tokens FROM turns WHERE position = 0 AND item IN ({ids})"
REFERENCE = "SELECT id, text, logprob, tokens FROM fresh WHERE text IS NOT NULL"


def pool_yield(pool: Pool) -> dict:
    """Count items left after each stage that has begun, drops by reason, and usable responses."""
    left = {"planned": _count(pool, "SELECT count(*) FROM items")}
    if _count(pool, "SELECT EXISTS (SELECT 1 FROM turns)"):
        left["sampled"] = _count(pool, SAMPLED)
    if pool.get("done.clean"):
        left["clean"] = _count(pool, f"SELECT count(*) FROM items WHERE {ITEM_IS_CLEAN}")
    for name, table, condition in (("answered", "responses", "reason IS NULL"), ("judged", "scores", "score IS NOT NULL")):
        if _count(pool, f"SELECT EXISTS (SELECT 1 FROM {table})"):
            left[name] = _count(pool, f"SELECT count(DISTINCT item) FROM {table} WHERE {condition}")
    if _count(pool, "SELECT EXISTS (SELECT 1 FROM selection)"):
        left["selected"] = _count(pool, "SELECT count(*) FROM selection")
    drops = [{"stage": stage, "reason": reason, "items": count} for stage, reason, count in pool.select(DROPS_BY_REASON)]
    drops.sort(key=lambda drop: _position(STAGES, drop["stage"]))
    return {"left": left, "drops": drops, "responses": _responses(pool)}


def _responses(pool: Pool) -> dict[str, dict]:
    by_model = {model: {"all": count, "usable": usable, "reasons": {}} for model, count, usable in pool.select(RESPONSES_BY_MODEL)}
    for model, reason, count in pool.select(UNUSABLE_RESPONSES):
        by_model[model]["reasons"][reason] = count
    return by_model


def _count(pool: Pool, query: str) -> int:
    (count,), = pool.select(query)
    return count


def _position(order: Sequence[str], name: str | None) -> int:
    """Return the index of a name, behind all others for one that is not in `order`."""
    return order.index(name) if name in order else len(order)


# ---------------------------------------------------------------- samples after each step


class FunnelStep(NamedTuple):
    """The instructions that are left after a step."""

    name: str
    items: int
    sample: InstructionSample


class SampledItem(NamedTuple):
    """A row of the query SAMPLED_ITEMS."""

    id: int
    dropped_by: str | None  # stage
    reason: str | None
    weight: float

    @property
    def rule(self) -> tuple[str | None, str | None]:
        """Return the stage and the rule that dropped it; all unusable turns count as one rule."""
        return ("instruct", None) if self.dropped_by == "instruct" else (self.dropped_by, self.reason)


class InstructionRow(NamedTuple):
    """A row of the queries FIRST_TURNS and REFERENCE."""

    item: int
    text: str
    logprob: float | None
    tokens: int


def reference_sample(run: SynthesisRun) -> InstructionSample:
    """Read the reference samples, in a random order."""
    rows = {row.item: row for row in map(InstructionRow._make, run.pool.select(REFERENCE))}
    return _instruction_sample([rows[item] for item in _shuffled(run, rows, "report fresh")[:run.config.report.sample]])


def funnel_steps(run: SynthesisRun) -> list[FunnelStep]:
    """Sample the pool's instructions after every step of the funnel.

    The steps are: as sampled, after every rule that dropped some, weighted, and selected. Of an item with several turns the first one is
    compared, because reference samples are first turns. Each step shows the same items as the one before, as far as they are left. Where
    items have weights, one is kept with a probability of its weight over the largest weight, so that the sample is distributed as the
    replay set is.
    """
    items = {item.id: item for item in map(SampledItem._make, run.pool.select(SAMPLED_ITEMS))}
    left = [items[item] for item in _shuffled(run, items, "report")]
    plan = [("sampled", left)]
    for rule in _rules_in_order(left):
        left = [item for item in left if item.rule != rule]
        _, reason = rule
        plan.append((f"without {reason or 'unusable'}", left))
    if len({item.weight for item in left}) > 1:
        plan.append(("weighted", _thin_by_weight(run, left)))
    if selected := {item for item, in run.pool.select("SELECT item FROM selection")}:
        plan.append(("selected", _thin_by_weight(run, [item for item in left if item.id in selected])))
    shown = {name: [item.id for item in items[:run.config.report.sample]] for name, items in plan}
    rows = _first_turns(run.pool, {item for ids in shown.values() for item in ids})
    return [FunnelStep(name, len(items), _instruction_sample([rows[item] for item in shown[name]])) for name, items in plan]


def _rules_in_order(items: Iterable[SampledItem]) -> list[tuple[str, str | None]]:
    """Return the rules of instruct and clean that dropped items, in the order of their application."""
    rules = {item.rule for item in items if item.dropped_by in ("instruct", "clean")}

    def order(rule: tuple[str, str | None]) -> tuple:
        stage, reason = rule
        return _position(STAGES, stage), _position(RULES, reason), reason or ""

    return sorted(rules, key=order)


def _shuffled(run: SynthesisRun, ids: Iterable[int], name: str) -> list[int]:
    return sorted(ids, key=lambda item: (uniform(run.config.seed, name, item), item))


def _thin_by_weight(run: SynthesisRun, items: list[SampledItem]) -> list[SampledItem]:
    largest = max((item.weight for item in items), default=0.0)
    return [item for item in items if uniform(run.config.seed, "report weight", item.id) < item.weight / (largest or 1.0)]


def _first_turns(pool: Pool, items: set[int]) -> dict[int, InstructionRow]:
    ids, rows = sorted(items), {}
    for start in range(0, len(ids), CHUNK):
        chunk = ",".join(map(str, ids[start:start + CHUNK]))
        rows |= {row.item: row for row in map(InstructionRow._make, pool.select(FIRST_TURNS.format(ids=chunk)))}
    return rows


def _instruction_sample(rows: Sequence[InstructionRow]) -> InstructionSample:
    logprobs = np.array([np.nan if row.logprob is None else row.logprob for row in rows], float)
    return InstructionSample([row.text for row in rows], logprobs, np.array([row.tokens for row in rows], float))
