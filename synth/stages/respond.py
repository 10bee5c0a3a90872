"""Stage `respond`: every model answers every instruction that was kept, and the base says how likely each answer is under itself.

The base comes last, so that its one engine answers, and then reads what the others said. Its own answers need no reading: how likely they
are is known from when they were sampled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from synth.config import Model, name_of
from synth.engines import kind_of
from synth.engines.chat_format import ChatFormat
from synth.engines.interface import CompletionRequest, Failure, Likelihood, LikelihoodRequest, Prompt, Sampling
from synth.pool import seeds
from synth.pool.run import SynthesisRun, identity, usable
from synth.pool.store import CLEAN, Chat
from synth.pool.writer import Worker

GREEDY = -1  # the number of a greedy answer


def respond(run: SynthesisRun) -> None:
    config = run.config
    models = [*config.responders, run.base]
    run.settle("respond", {"models": [identity(model) for model in models], **dataclasses.asdict(config.respond)})
    run.require("clean")
    for model in models:
        answering = Answering(run, model)
        missing, unread = answering.missing(), len(_unread(run)) if model is run.base else 0
        if missing or unread:
            with run.at_work("respond", model) as worker:
                if missing:
                    worker.complete(answering.requests(), missing, answering.write)
                if model is run.base:
                    read(run, worker)
    run.finish("respond")


class Answering:
    """One model's answers: which are missing, their requests, and what becomes of the results."""

    def __init__(self, run: SynthesisRun, model: Model):
        self.run, self.model, self.name, self.options = run, model, name_of(model), run.config.respond
        self.format: ChatFormat | None = None if kind_of(model) == "openai" else run.format(model)
        self.is_base = model is run.base
        self.samples = [*range(self.options.num_samples), *([GREEDY] if self.is_base and self.options.include_greedy else [])]

    def _have(self) -> set[int]:
        """Answers that are in the pool, as numbers: millions of pairs would not fit."""
        rows = self.run.pool.select("SELECT item, sample FROM responses WHERE model = ?", self.name)
        return {self._number(item, sample) for item, sample in rows}

    def _number(self, item: int, sample: int) -> int:
        return item * (self.options.num_samples + 1) + sample + 1

    def missing(self) -> int:
        kept, = self.run.pool.select(f"SELECT count(*) FROM items WHERE {CLEAN}")[0]
        return kept * len(self.samples) - len(self._have())

    def requests(self) -> Iterator[CompletionRequest]:
        have = self._have()
        for chat in self.run.pool.chats():
            wanted = [sample for sample in self.samples if self._number(chat.item, sample) not in have]
            prompt = self._prompt(chat) if wanted else None
            for sample in wanted:
                yield CompletionRequest((chat.item, sample), prompt, self._sampling(sample), self._seed(chat.item, sample))

    def _prompt(self, chat: Chat) -> Prompt:
        if self.format:
            return Prompt(self.format.response(chat.messages, chat.system))
        system = () if chat.system is None else ({"role": "system", "content": chat.system},)
        return Prompt(None, (*system, *chat.messages))

    def _sampling(self, sample: int) -> Sampling:
        stops = self.format.response_stops if self.format else ()
        if sample == GREEDY:
            return Sampling(0.0, 1.0, self.options.max_tokens, *stops)
        return Sampling(self.options.temperature, self.options.top_p, self.options.max_tokens, *stops)

    def _seed(self, item: int, sample: int) -> int:
        return seeds.seed(self.run.config.seed, "respond", self.name, item, sample)

    def write(self, results: list) -> None:
        self.run.pool.insert("responses", [self._row(result) for result in results])

    def _row(self, result) -> tuple:
        item, sample = result.key
        seed = self._seed(item, sample)
        if isinstance(result, Failure):
            return (item, self.name, sample, None, None, None, None, None, None, seed, result.reason)
        said = self.format.answer(result.text) if self.format else result.text
        leaked = self.format.leaked(said or "") if self.format else None
        reason = usable(result, leaked) or ("no answer in its final channel" if said is None else None)
        own = (result.logprob, result.tokens) if self.is_base and not reason else (None, None)
        return (item, self.name, sample, (said or "").strip(), result.tokens, result.finish, result.logprob, *own, seed, reason)


# ---------------------------------------------------------------- how likely answers are under the base


def _unread(run: SynthesisRun) -> list[tuple[int, str, int]]:
    """Usable answers of other models that the base has not read yet."""
    if not run.config.respond.score_with_base:
        return []
    return run.pool.select("SELECT item, model, sample FROM responses WHERE base_tokens IS NULL AND reason IS NULL "
                           "ORDER BY item, model, sample")


def read(run: SynthesisRun, worker: Worker) -> None:
    """Log-probability under the base of every answer and of the end of the turn after it. What cannot be read has base_tokens 0."""
    unread = _unread(run)
    if not unread:
        return
    format = run.format(run.base)

    def requests() -> Iterator[LikelihoodRequest]:
        wanted = {item for item, *_ in unread}
        for chat in run.pool.chats():
            if chat.item not in wanted:
                continue
            prompt = Prompt(format.response(chat.messages, chat.system))
            answers = run.pool.select("SELECT model, sample, text FROM responses WHERE item = ? AND base_tokens IS NULL AND reason IS NULL "
                                      "ORDER BY model, sample", chat.item)
            for model, sample, text in answers:
                yield LikelihoodRequest((chat.item, model, sample), prompt, format.continuation(text))

    def write(results: list) -> None:
        run.pool.connection.executemany(
            "UPDATE responses SET base_logprob = ?, base_tokens = ? WHERE item = ? AND model = ? AND sample = ?",
            [((r.logprob, r.tokens) if isinstance(r, Likelihood) else (None, 0)) + tuple(r.key) for r in results])

    worker.likelihood(requests(), len(unread), write)
