"""Stage `instruct`: the base writes users' turns, and answers of its own between them where an item has several.

What is to be sampled is planned first: each item's temperature, top_p, system prompt and number of turns follow from the seed and the
item's number. Then turns are sampled position by position, all items at once. Beside them, some instructions are sampled with nothing in
the model's way; they are not part of the pool, and show in the report how near to the base's own distribution the pool is.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from synth.config import Config, name_of
from synth.engines.chat_format import ChatFormat, UserPrompt
from synth.engines.interface import CompletionRequest, Failure, Prompt, Sampling
from synth.pool import seeds
from synth.pool.run import SynthesisRun, usable
from synth.pool.writer import Worker

CHUNK = 1000  # items whose earlier turns are read at a time


class Item(NamedTuple):
    id: int
    temperature: float
    top_p: float
    system: str | None
    turns: int


def instruct(run: SynthesisRun) -> None:
    config = run.config
    # the wanted languages are reached by weights, which `clean` gives
    run.settle("instruct", {key: value for key, value in dataclasses.asdict(config.instruct).items() if key != "languages"})
    if run.done("instruct"):
        return
    with run.at_work("instruct", run.base) as worker:
        if not run.pool.select("SELECT 1 FROM items LIMIT 1"):
            with run.pool.transaction():
                run.pool.insert("items", map(plan, itertools.repeat(config), range(config.instruct.num_instructions)))
        sample_fresh(run, worker)
        for position in range(2 * len(config.instruct.turn_weights) - 1):
            sample_turns(run, worker, position)
    run.finish("instruct")


def plan(config: Config, item: int) -> Item:
    """What item number `item` is sampled under: strata of temperature and top_p in turn, system prompt and turns by weight."""
    options = config.instruct
    strata = list(itertools.product(options.temperature, options.top_p))
    system = seeds.choice([system.weight for system in options.system_prompts], config.seed, "system", item)
    turns = 1 + seeds.choice(options.turn_weights, config.seed, "turns", item)
    return Item(item, *strata[item % len(strata)], options.system_prompts[system].text, turns)


# ---------------------------------------------------------------- the pool's turns


def sample_turns(run: SynthesisRun, worker: Worker, position: int) -> None:
    """The turns at `position` that are missing: of items that are not out, and have all turns before it."""
    missing = [item for item, in run.pool.select(
        "SELECT id FROM items WHERE 2 * items.turns - 1 > ? AND id NOT IN (SELECT item FROM drops) "
        "AND id NOT IN (SELECT item FROM turns WHERE position = ?) "
        "AND (? = 0 OR id IN (SELECT item FROM turns WHERE position = ?)) ORDER BY id",
        position, position, position, position - 1)]
    if missing:
        asking = Asking(run, position)
        worker.complete(asking.requests(missing), len(missing), asking.write)


class Asking:
    """One position of the pool's chats: its requests, and what becomes of their results."""

    def __init__(self, run: SynthesisRun, position: int):
        self.run, self.position, self.format = run, position, run.format(run.base)
        self.prefixes = Prefixes(self.format)
        self.openings: dict[int, str] = {}  # by item: text that its prompt left for the model to write first

    @property
    def by_user(self) -> bool:
        return self.position % 2 == 0

    def requests(self, missing: Sequence[int]) -> Iterator[CompletionRequest]:
        for start in range(0, len(missing), CHUNK):
            chunk = missing[start : start + CHUNK]
            histories = self._histories(chunk)
            for row in self.run.pool.select(f"SELECT * FROM items WHERE id IN ({_list(chunk)}) ORDER BY id"):
                yield self._request(Item(*row), histories.get(row[0], ()))

    def _histories(self, items: Sequence[int]) -> dict[int, tuple[dict, ...]]:
        if not self.position:
            return {}
        rows = self.run.pool.select(f"SELECT item, position, text FROM turns WHERE item IN ({_list(items)}) ORDER BY item, position")
        return {item: tuple({"role": ("user", "assistant")[position % 2], "content": text} for _, position, text in found)
                for item, found in itertools.groupby(rows, key=lambda row: row[0])}

    def _request(self, item: Item, history: tuple[dict, ...]) -> CompletionRequest:
        options = self.run.config
        if self.by_user:
            prefix, stops, longest = self.prefixes(history, item.system), self.format.user_stops, options.instruct.max_tokens
            self.openings[item.id] = prefix.rest
            prompt = prefix.token_ids
        else:
            prompt, stops, longest = self.format.response(history, item.system), self.format.response_stops, options.respond.max_tokens
        return CompletionRequest((item.id,), Prompt(prompt), Sampling(item.temperature, item.top_p, longest, *stops), self._seed(item.id))

    def _seed(self, item: int) -> int:
        return seeds.seed(self.run.config.seed, "instruct", name_of(self.run.base), item, self.position)

    def write(self, results: list) -> None:
        turns, drops = [], []
        for result in results:
            item, text = result.key[0], None
            if not isinstance(result, Failure):
                text = result.text.removeprefix(self.openings.pop(item, "")).strip()
                text = text if self.by_user else self.format.answer(text)
                turns.append((item, self.position, text, result.tokens, result.finish, result.logprob, self._seed(item)))
            leaked = self.format.leaked(text or "")
            if reason := usable(result, leaked) or ("no answer in its final channel" if text is None else None) or (not text and "empty"):
                drops.append((item, "instruct", reason, f"turn {self.position + 1}"))
        self.run.pool.insert("turns", turns)
        self.run.pool.insert("drops", drops)


def _list(items: Sequence[int]) -> str:
    return ",".join(map(str, items))


class Prefixes:
    """Pre-query prompts; that of a first turn depends on the system prompt alone, and is made once."""

    def __init__(self, format: ChatFormat):
        self.format, self.first = format, {}

    def __call__(self, history: Sequence[dict], system: str | None) -> UserPrompt:
        if history:
            return self.format.pre_query(history, system)
        if system not in self.first:
            self.first[system] = self.format.pre_query((), system)
        return self.first[system]


# ---------------------------------------------------------------- samples apart


def sample_fresh(run: SynthesisRun, worker: Worker) -> None:
    """First turns at temperature 1 and top_p 1, under the pool's system prompts, for comparison only."""
    have = {item for item, in run.pool.select("SELECT id FROM fresh")}
    missing = [item for item in range(run.config.instruct.reference_samples) if item not in have]
    if not missing:
        return
    format, config = run.format(run.base), run.config
    prefixes, sampling = Prefixes(format), Sampling(1.0, 1.0, config.instruct.max_tokens, *format.user_stops)

    def seed(item: int) -> int:
        return seeds.seed(config.seed, "fresh", name_of(run.base), item)

    def prefix(item: int) -> UserPrompt:
        chosen = seeds.choice([system.weight for system in config.instruct.system_prompts], config.seed, "fresh system", item)
        return prefixes((), config.instruct.system_prompts[chosen].text)

    def requests() -> Iterable[CompletionRequest]:
        return (CompletionRequest((item,), Prompt(prefix(item).token_ids), sampling, seed(item)) for item in missing)

    def write(results: list) -> None:
        run.pool.insert("fresh", [
            (r.key[0], r.text.removeprefix(prefix(r.key[0]).rest).strip(), r.tokens, r.finish, r.logprob, seed(r.key[0]))
            for r in results if not isinstance(r, Failure)])

    worker.complete(requests(), len(missing), write)
