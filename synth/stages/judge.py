"""Stage `judge`: every judge scores every usable answer, and, as an option, compares the two best in both orders.

A score is the mean of the distribution over the digits 1 to 5 where an answer of the judge would begin, or, as in the paper, what it writes
on the last line after a justification. What a judge does not say in that form is no score: NULL, and the reason.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from synth.config import Model, name_of
from synth.engines import kind_of
from synth.engines.chat_format import ChatFormat
from synth.engines.interface import Choice, ChoiceRequest, Completion, CompletionRequest, Failure, Prompt, Sampling
from synth.judging.calibration import panel, rate
from synth.judging.rubric import DIGITS, LETTERS, PAIRWISE, asked, fill, rubric
from synth.judging.score_parsing import NO_MASS, NO_SCORE, expected_score, likeliest_score, parsed_score, preference
from synth.pool import seeds
from synth.pool.run import SynthesisRun, identity, usable
from synth.pool.store import CLEAN, Chat

PAGE = 4000  # answers read from the pool at a time


def judge(run: SynthesisRun) -> None:
    run.require("respond")
    settle(run)
    alone = [author for author, judges in panel(run.config).items() if judges == (author,)]
    if alone and run.config.judge.exclude_self:
        run.say(f"judge: {', '.join(alone)} judges its own answers: there is no other judge")
    for model in run.config.judges:
        scoring = Scoring(run, model)
        if missing := scoring.missing():
            with run.at_work("judge", model) as worker:
                ask = worker.choose if scoring.options.scoring == "expected_score" else worker.complete
                ask(scoring.requests(), missing, scoring.write)
    if run.config.judge.pairwise:
        compare(run)
    run.finish("judge")


def settle(run: SynthesisRun) -> None:
    """Keep what scores depend on, the rubric's own words too; UserError where a later call has other ones."""
    options, text = run.config.judge, rubric(run.config.judge)
    length = {"max_tokens": options.max_tokens} if options.scoring == "generated" else {}
    run.settle("judge", {"judges": [identity(model) for model in run.config.judges], "scoring": options.scoring, **length,
                         "rubric": hashlib.sha256(text.encode()).hexdigest()[:16]})
    if run.pool.get("rubric") is None:
        with run.pool.transaction():
            run.pool.set("rubric", text)


class Judging:
    """How one model is asked for a verdict."""

    def __init__(self, run: SynthesisRun, model: Model):
        self.run, self.model, self.name, self.options = run, model, name_of(model), run.config.judge
        self.format: ChatFormat | None = None if kind_of(model) == "openai" else run.format(model)

    def choice(self, key: tuple, text: str, choices: tuple[str, ...]) -> ChoiceRequest:
        """Which of `choices` the judge's answer to `text` begins with."""
        messages = ({"role": "user", "content": text},)
        if self.format is None:
            return ChoiceRequest(key, Prompt(None, messages), choices)
        token_ids, rest = self.format.answering(messages, choices)
        return ChoiceRequest(key, Prompt(token_ids), tuple(rest + choice for choice in choices))

    def completion(self, key: tuple, text: str, seed: int) -> CompletionRequest:
        messages = ({"role": "user", "content": text},)
        prompt = Prompt(self.format.response(messages)) if self.format else Prompt(None, messages)
        stops = self.format.response_stops if self.format else ()
        return CompletionRequest(key, prompt, Sampling(0.0, 1.0, self.options.max_tokens, *stops), seed)


# ---------------------------------------------------------------- scores


class Scoring(Judging):
    """One judge's scores: which are missing, their requests, and what becomes of the results."""

    def __init__(self, run: SynthesisRun, model: Model):
        super().__init__(run, model)
        self.rubric = rubric(self.options)
        authors = [author for author, judges in panel(run.config).items() if self.name in judges]
        # the pluses make SQLite walk the answers in the order of their keys
        self.unscored = (
            f"FROM responses AS r WHERE r.reason IS NULL AND +r.item IN (SELECT id FROM items WHERE {CLEAN}) "
            f"AND +r.model IN ({', '.join('?' * len(authors))}) AND NOT EXISTS (SELECT 1 FROM scores AS s "
            "WHERE s.item = r.item AND s.model = r.model AND s.sample = r.sample AND s.judge = ?)")
        self.values = (*authors, self.name)

    def missing(self) -> int:
        return self.run.pool.select(f"SELECT count(*) {self.unscored}", *self.values)[0][0]

    def requests(self) -> Iterator[ChoiceRequest | CompletionRequest]:
        last = (-1, "", 0)
        while page := self.run.pool.select(
                f"SELECT r.item, r.model, r.sample, r.text {self.unscored} AND (r.item, r.model, r.sample) > (?, ?, ?) "
                "ORDER BY r.item, r.model, r.sample LIMIT ?", *self.values, *last, PAGE):
            questions = {item: asked(chat) for item, chat in chats_between(self.run, page[0][0], page[-1][0]).items()}
            for *key, response in page:
                yield self._request(tuple(key), fill(self.rubric, instruction=questions[key[0]], response=response))
            last = page[-1][:3]

    def _request(self, key: tuple, text: str) -> ChoiceRequest | CompletionRequest:
        if self.options.scoring == "expected_score":
            return self.choice(key, text, DIGITS)
        return self.completion(key, text, self._seed(key))

    def _seed(self, key: tuple) -> int:
        return seeds.seed(self.run.config.seed, "judge", self.name, *key)

    def write(self, results: list) -> None:
        self.run.pool.insert("scores", [(*result.key, self.name, *self._verdict(result)) for result in results])

    def _verdict(self, result: Choice | Completion | Failure) -> tuple:
        """Score, mass, text, seed and reason."""
        seed = self._seed(result.key)
        if isinstance(result, Failure):
            return None, None, None, seed, result.reason
        if isinstance(result, Choice):
            score, digit = expected_score(result.probabilities), likeliest_score(result.probabilities)
            return score, finite(result.mass), digit and str(digit), seed, NO_MASS if score is None else None
        said = self.format.answer(result.text) if self.format else result.text
        reason = usable(result, None) or (None if said is not None else "no answer in its final channel")
        score = None if reason else parsed_score(said)
        return score, None, (result.text if said is None else said).strip(), seed, reason or (NO_SCORE if score is None else None)


def chats_between(run: SynthesisRun, first: int, last: int) -> dict[int, Chat]:
    return {chat.item: chat for chat in run.pool.chats(f"id BETWEEN {first} AND {last}")}


def finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


# ---------------------------------------------------------------- pairs


class Pair(NamedTuple):
    """The two best answers to an instruction, each by its model and sample."""

    item: int
    best: tuple[str, int]
    second: tuple[str, int]

    @property
    def orders(self) -> tuple[tuple, tuple]:
        """The keys of its two comparisons."""
        return (self.item, *self.best, *self.second), (self.item, *self.second, *self.best)


def compare(run: SynthesisRun) -> None:
    """Every judge that wrote neither of an item's two best answers (every judge, where there is no such) compares them in both orders."""
    run.settle("pairwise", {"calibrate_judges": run.config.judge.calibrate_judges,
                            "text": hashlib.sha256(PAIRWISE.encode()).hexdigest()[:16]})
    with run.pool.transaction():
        rate(run)
    pairs = list(best_pairs(run))
    for model in run.config.judges:
        comparing = Comparing(run, model, pairs)
        if comparing.missing:
            with run.at_work("judge", model) as worker:
                worker.choose(comparing.requests(), len(comparing.missing), comparing.write)


def best_pairs(run: SynthesisRun) -> Iterator[Pair]:
    """The best answer to each item, and the best one that reads otherwise; ties by the seed."""
    found = run.pool.connection.execute(
        "SELECT q.item, q.model, q.sample, q.value, r.text FROM ratings AS q JOIN responses AS r "
        "ON r.item = q.item AND r.model = q.model AND r.sample = q.sample WHERE q.value IS NOT NULL ORDER BY q.item, q.model, q.sample")
    for item, rows in itertools.groupby(found, key=lambda row: row[0]):
        ranked = sorted(rows, key=lambda row: (-round(row[3], 9), seeds.seed(run.config.seed, "pairwise", *row[:3])))
        other = next((row for row in ranked if row[4] != ranked[0][4]), None)
        if other:
            yield Pair(item, ranked[0][1:3], other[1:3])


def judges_of_pair(run: SynthesisRun, pair: Pair) -> list[str]:
    judges, authors = sorted({name_of(model) for model in run.config.judges}), (pair.best[0], pair.second[0])
    others = [judge for judge in judges if judge not in authors]
    return others if others and run.config.judge.exclude_self else judges


class Comparing(Judging):
    """One judge's comparisons: which are missing, their requests, and what becomes of the results."""

    def __init__(self, run: SynthesisRun, model: Model, pairs: list[Pair]):
        super().__init__(run, model)
        have = set(run.pool.select("SELECT item, model, sample, other_model, other_sample FROM comparisons WHERE judge = ?", self.name))
        self.missing = [key for pair in pairs if self.name in judges_of_pair(run, pair) for key in pair.orders if key not in have]

    def requests(self) -> Iterator[ChoiceRequest]:
        for start in range(0, len(self.missing), PAGE):
            page = self.missing[start:start + PAGE]
            between = (page[0][0], page[-1][0])
            chats = chats_between(self.run, *between)
            shown = {answer for item, *rest in page for answer in ((item, *rest[:2]), (item, *rest[2:]))}
            texts = {tuple(key): text for *key, text in self.run.pool.connection.execute(
                "SELECT item, model, sample, text FROM responses WHERE item BETWEEN ? AND ?", between) if tuple(key) in shown}
            for key in page:
                item, model, sample, other_model, other_sample = key
                text = fill(PAIRWISE, instruction=asked(chats[item]), first=texts[item, model, sample],
                            second=texts[item, other_model, other_sample])
                yield self.choice(key, text, LETTERS)

    def write(self, results: list) -> None:
        self.run.pool.insert("comparisons", [(*result.key, self.name, *self._verdict(result)) for result in results])

    def _verdict(self, result: Choice | Failure) -> tuple:
        """Preference, mass and reason."""
        if isinstance(result, Failure):
            return None, None, result.reason
        preferred = preference(result.probabilities)
        return preferred, finite(result.mass), NO_MASS if preferred is None else None
