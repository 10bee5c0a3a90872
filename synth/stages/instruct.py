"""Stage `instruct`: sample the base's own instructions, with its responses between several turns.

Items are planned first: each one's temperature, top_p, system prompt and number of turns follow from the seed and the item's number. Then
turns are sampled position by position, all items at once. Reference samples are taken besides, at temperature 1 and top_p 1. They are not
part of the pool: the report compares the pool with them, because they are draws of the base's own distribution.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple

from synth.config import Config, name_of
from synth.engines.chat_format import ChatFormat, UserPrompt
from synth.engines.interface import Completion, CompletionRequest, Failure, Prompt, Sampling
from synth.pool import seeds
from synth.pool.synthesis_run import SynthesisRun, why_unusable
from synth.pool.writer import ResultWriter

CHUNK = 1000  # items whose earlier turns are read at a time


# Items that lack the turn at a position (the values: position, position, position, position - 1) but have all turns before it
MISSING_TURN = """
    SELECT id FROM items
    WHERE 2 * items.turns - 1 > ? AND id NOT IN (SELECT item FROM drops) AND id NOT IN (SELECT item FROM turns WHERE position = ?)
    AND (? = 0 OR id IN (SELECT item FROM turns WHERE position = ?)) ORDER BY id"""
ITEMS = "SELECT id, temperature, top_p, system, turns FROM items WHERE id IN ({ids}) ORDER BY id"
EARLIER_TURNS = "SELECT item, position, text FROM turns WHERE item IN ({ids}) ORDER BY item, position"


class PlannedItem(NamedTuple):
    """A row of the table `items`."""

    id: int
    temperature: float
    top_p: float
    system: str | None
    turns: int


class EarlierTurn(NamedTuple):
    """A row of the query EARLIER_TURNS."""

    item: int
    position: int
    text: str

    @property
    def message(self) -> dict[str, str]:
        return {"role": ("user", "assistant")[self.position % 2], "content": self.text}


def instruct(run: SynthesisRun) -> None:
    """Run the stage: sample the turns and reference samples that the pool lacks."""
    config = run.config
    # languages only change the weights that `clean` gives
    run.pin_settings("instruct", {key: value for key, value in dataclasses.asdict(config.instruct).items() if key != "languages"})
    if run.done("instruct"):
        return
    with run.use_engine("instruct", run.base) as writer:
        if not run.pool.select("SELECT 1 FROM items LIMIT 1"):
            run.say(f"instruct: planning {config.instruct.num_instructions:,} instructions")
            with run.pool.transaction():
                run.pool.insert("items", map(plan, itertools.repeat(config), range(config.instruct.num_instructions)))
        sample_reference(run, writer)
        for position in range(2 * len(config.instruct.turn_weights) - 1):
            sample_turns(run, writer, position)
    run.finish("instruct")


def plan(config: Config, item: int) -> PlannedItem:
    """Plan the sampling of an item.

    Strata of temperature and top_p rotate; system prompt and number of turns are drawn by weight.
    """
    options = config.instruct
    strata = list(itertools.product(options.temperature, options.top_p))
    system = seeds.choice([system.weight for system in options.system_prompts], config.seed, "system", item)
    turns = 1 + seeds.choice(options.turn_weights, config.seed, "turns", item)
    return PlannedItem(item, *strata[item % len(strata)], options.system_prompts[system].text, turns)


# ---------------------------------------------------------------- the pool's turns


def sample_turns(run: SynthesisRun, writer: ResultWriter, position: int) -> None:
    """Sample the turns that are missing at `position`, of items that have all turns before it."""
    missing = [item for item, in run.pool.select(MISSING_TURN, position, position, position, position - 1)]
    if missing:
        task = TurnTask(run, position)
        writer.complete(task.requests(missing), len(missing), task.write)


class TurnTask:
    """Sample the turns at one position of the pool's chats."""

    def __init__(self, run: SynthesisRun, position: int):
        self.run, self.position, self.format = run, position, run.format(run.base)
        self.prompts = UserPrompts(self.format)
        self.rest: dict[int, str] = {}  # by item: text of the template that its prompt leaves for the model to write first

    @property
    def is_user_turn(self) -> bool:
        return self.position % 2 == 0

    def requests(self, missing: Sequence[int]) -> Iterator[CompletionRequest]:
        for start in range(0, len(missing), CHUNK):
            chunk = missing[start : start + CHUNK]
            histories = self._histories(chunk)
            for item in map(PlannedItem._make, self.run.pool.select(ITEMS.format(ids=_id_list(chunk)))):
                yield self._request(item, histories.get(item.id, ()))

    def _histories(self, items: Sequence[int]) -> dict[int, tuple[dict, ...]]:
        """Return the messages so far of each item."""
        if not self.position:
            return {}
        turns = map(EarlierTurn._make, self.run.pool.select(EARLIER_TURNS.format(ids=_id_list(items))))
        return {item: tuple(turn.message for turn in of_item) for item, of_item in itertools.groupby(turns, key=attrgetter("item"))}

    def _request(self, item: PlannedItem, history: tuple[dict, ...]) -> CompletionRequest:
        config = self.run.config
        if self.is_user_turn:
            prompt = self.prompts.get(history, item.system)
            self.rest[item.id] = prompt.rest
            token_ids, stops, max_tokens = prompt.token_ids, self.format.user_stops, config.instruct.max_tokens
        else:
            token_ids, stops = self.format.response_prompt(history, item.system), self.format.response_stops
            max_tokens = config.respond.max_tokens
        sampling = Sampling(item.temperature, item.top_p, max_tokens, *stops)
        return CompletionRequest((item.id,), Prompt(token_ids), sampling, self._seed(item.id))

    def _seed(self, item: int) -> int:
        return seeds.seed(self.run.config.seed, "instruct", name_of(self.run.base), item, self.position)

    def write(self, results: list) -> None:
        turns, drops = [], []
        for result in results:
            (item,), text = result.key, None
            if not isinstance(result, Failure):
                text = result.text.removeprefix(self.rest.pop(item, "")).strip()
                text = text if self.is_user_turn else self.format.final_answer(text)
                turns.append((item, self.position, text, result.tokens, result.finish, result.logprob, self._seed(item)))
            reason = why_unusable(result, self.format.leaked_token(text or ""))
            if not reason and not text:
                reason = "no answer in its final channel" if text is None else "empty"
            if reason:
                drops.append((item, "instruct", reason, f"turn {self.position + 1}"))
        self.run.pool.insert("turns", turns)
        self.run.pool.insert("drops", drops)


def _id_list(items: Sequence[int]) -> str:
    return ",".join(map(str, items))


class UserPrompts:
    """Prompts after which the model writes a user turn.

    The prompt of a first turn depends only on the system prompt, and is cached.
    """

    def __init__(self, format: ChatFormat):
        self.format, self.first = format, {}

    def get(self, history: Sequence[dict], system: str | None) -> UserPrompt:
        """Return the prompt after the turns so far."""
        if history:
            return self.format.user_prompt(history, system)
        if system not in self.first:
            self.first[system] = self.format.user_prompt((), system)
        return self.first[system]


# ---------------------------------------------------------------- reference samples


def sample_reference(run: SynthesisRun, writer: ResultWriter) -> None:
    """Sample first turns at temperature 1 and top_p 1, under the pool's system prompts."""
    done = {item for item, in run.pool.select("SELECT id FROM fresh")}
    missing = [item for item in range(run.config.instruct.reference_samples) if item not in done]
    if not missing:
        return
    format, config = run.format(run.base), run.config
    prompts, sampling = UserPrompts(format), Sampling(1.0, 1.0, config.instruct.max_tokens, *format.user_stops)

    def seed(item: int) -> int:
        return seeds.seed(config.seed, "fresh", name_of(run.base), item)

    def prompt(item: int) -> UserPrompt:
        drawn = seeds.choice([system.weight for system in config.instruct.system_prompts], config.seed, "fresh system", item)
        return prompts.get((), config.instruct.system_prompts[drawn].text)

    def requests() -> Iterable[CompletionRequest]:
        return (CompletionRequest((item,), Prompt(prompt(item).token_ids), sampling, seed(item)) for item in missing)

    def row(result: Completion) -> tuple:
        (item,) = result.key
        text = result.text.removeprefix(prompt(item).rest).strip()
        return item, text, result.tokens, result.finish, result.logprob, seed(item)

    def write(results: list) -> None:
        run.pool.insert("fresh", [row(result) for result in results if not isinstance(result, Failure)])

    writer.complete(requests(), len(missing), write)
