"""Stage `respond`: every model responds to every clean item, and the base scores all likelihoods.

The base comes last, so that it is loaded once: it samples its own responses, then scores those of the other models. The likelihood of its
own responses is known from sampling them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from synth.config import Model, name_of
from synth.engines import kind_of
from synth.engines.chat_format import ChatFormat
from synth.engines.interface import Completion, CompletionRequest, Failure, Likelihood, LikelihoodRequest, Prompt, Sampling
from synth.pool import seeds
from synth.pool.store import ITEM_IS_CLEAN, Chat
from synth.pool.synthesis_run import SynthesisRun, model_identity, why_unusable
from synth.pool.writer import ResultWriter

GREEDY = -1  # sample number of a greedy response

COUNT_CLEAN = f"SELECT count(*) FROM items WHERE {ITEM_IS_CLEAN}"
SAMPLES_OF_MODEL = "SELECT item, sample FROM responses WHERE model = ?"
# Usable responses of other models that the base has not scored
UNSCORED = "FROM responses WHERE base_tokens IS NULL AND reason IS NULL"
UNSCORED_KEYS = f"SELECT item, model, sample {UNSCORED} ORDER BY item, model, sample"
UNSCORED_OF_ITEM = f"SELECT model, sample, text {UNSCORED} AND item = ? ORDER BY model, sample"
SET_LIKELIHOOD = "UPDATE responses SET base_logprob = ?, base_tokens = ? WHERE item = ? AND model = ? AND sample = ?"


def respond(run: SynthesisRun) -> None:
    """Run the stage: request the responses and likelihoods that the pool lacks."""
    config = run.config
    models = [*config.responders, run.base]
    run.pin_settings("respond", {"models": [model_identity(model) for model in models], **dataclasses.asdict(config.respond)})
    run.require("clean")
    for model in models:
        task = ResponseTask(run, model)
        missing, unscored = task.count_missing(), _unscored_keys(run) if model is run.base else []
        if missing or unscored:
            with run.use_engine("respond", model) as writer:
                if missing:
                    writer.complete(task.requests(), missing, task.write)
                if model is run.base:
                    score_likelihood(run, writer)
    run.finish("respond")


class ResponseRow(NamedTuple):
    """A row of the table `responses`."""

    item: int
    model: str
    sample: int
    text: str | None
    tokens: int | None
    finish: str | None
    logprob: float | None
    base_logprob: float | None
    base_tokens: int | None
    seed: int
    reason: str | None  # why it is not usable


class ResponseTask:
    """Sample the responses that one model has not given yet."""

    def __init__(self, run: SynthesisRun, model: Model):
        self.run, self.model, self.name, self.options = run, model, name_of(model), run.config.respond
        self.format: ChatFormat | None = None if kind_of(model) == "openai" else run.format(model)
        self.is_base = model is run.base
        self.samples = [*range(self.options.num_samples), *([GREEDY] if self.is_base and self.options.include_greedy else [])]

    def _done(self) -> set[int]:
        """Return the numbers of the responses in the pool: a set of millions of pairs would not fit in memory."""
        return {self._number(item, sample) for item, sample in self.run.pool.select(SAMPLES_OF_MODEL, self.name)}

    def _number(self, item: int, sample: int) -> int:
        return item * (self.options.num_samples + 1) + sample + 1

    def count_missing(self) -> int:
        (items,), = self.run.pool.select(COUNT_CLEAN)
        return items * len(self.samples) - len(self._done())

    def requests(self) -> Iterator[CompletionRequest]:
        done = self._done()
        for chat in self.run.pool.chats():
            missing = [sample for sample in self.samples if self._number(chat.item, sample) not in done]
            prompt = self._prompt(chat) if missing else None
            for sample in missing:
                yield CompletionRequest((chat.item, sample), prompt, self._sampling(sample), self._seed(chat.item, sample))

    def _prompt(self, chat: Chat) -> Prompt:
        if self.format:
            return Prompt(self.format.response_prompt(chat.messages, chat.system))
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

    def _row(self, result: Completion | Failure) -> ResponseRow:
        item, sample = result.key
        seed = self._seed(item, sample)
        if isinstance(result, Failure):
            return ResponseRow(item, self.name, sample, None, None, None, None, None, None, seed, result.reason)
        answer = self.format.final_answer(result.text) if self.format else result.text
        leaked = self.format.leaked_token(answer or "") if self.format else None
        reason = why_unusable(result, leaked) or ("no answer in its final channel" if answer is None else None)
        base_logprob, base_tokens = (result.logprob, result.tokens) if self.is_base and not reason else (None, None)
        return ResponseRow(item, self.name, sample, (answer or "").strip(), result.tokens, result.finish, result.logprob, base_logprob,
                           base_tokens, seed, reason)


# ---------------------------------------------------------------- likelihood under the base


def _unscored_keys(run: SynthesisRun) -> list[tuple[int, str, int]]:
    """Return (item, model, sample) of the responses whose likelihood the base still has to score."""
    return run.pool.select(UNSCORED_KEYS) if run.config.respond.score_with_base else []


def score_likelihood(run: SynthesisRun, writer: ResultWriter) -> None:
    """Write every response's log-probability under the base, its end of turn included.

    Where that fails, base_tokens is 0.
    """
    unscored = _unscored_keys(run)
    if not unscored:
        return
    format = run.format(run.base)

    def requests() -> Iterator[LikelihoodRequest]:
        items = {item for item, *_ in unscored}
        for chat in run.pool.chats():
            if chat.item not in items:
                continue
            prompt = Prompt(format.response_prompt(chat.messages, chat.system))
            for model, sample, text in run.pool.select(UNSCORED_OF_ITEM, chat.item):
                yield LikelihoodRequest((chat.item, model, sample), prompt, format.continuation_ids(text))

    def write(results: list) -> None:
        likelihoods = [(result.logprob, result.tokens) if isinstance(result, Likelihood) else (None, 0) for result in results]
        run.pool.connection.executemany(SET_LIKELIHOOD, [(*pair, *result.key) for pair, result in zip(likelihoods, results, strict=True)])

    writer.likelihood(requests(), len(unscored), write)
