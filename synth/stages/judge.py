"""Stage `judge`: every judge scores every usable response, and may compare the two best of an item.

A score is the expected value of the digits 1 to 5 under their probabilities where the judge's answer would begin, or the number that the
judge writes on its last line after a justification. A score that cannot be read is NULL in the pool, with its reason.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from operator import attrgetter
from typing import NamedTuple

from synth.config import Model, name_of
from synth.engines import kind_of
from synth.engines.chat_format import ChatFormat
from synth.engines.interface import Choice, ChoiceRequest, Completion, CompletionRequest, Failure, Prompt, Sampling
from synth.judging.calibration import judges_by_author, rate_responses
from synth.judging.rubric import DIGITS, LETTERS, PAIRWISE_PROMPT, fill_placeholders, load_rubric, prompt_text
from synth.judging.score_parsing import (
    NO_PROBABILITY,
    NO_SCORE_LINE,
    expected_score,
    finite_or_none,
    most_likely_score,
    parse_score,
    preference_for_first,
)
from synth.pool import seeds
from synth.pool.store import ITEM_IS_CLEAN, Chat
from synth.pool.synthesis_run import SynthesisRun, model_identity, why_unusable

PAGE = 4000  # responses read from the pool at a time

# Usable responses to clean items by one of `authors` (its placeholders) that a judge (the last value) has not scored. Unary plus keeps
# SQLite from using an index for these columns, so that it walks the responses in the order of their keys and need not sort them.
UNSCORED = f"""
    FROM responses AS r
    WHERE r.reason IS NULL AND +r.item IN (SELECT id FROM items WHERE {ITEM_IS_CLEAN}) AND +r.model IN ({{authors}}) AND NOT EXISTS (
        SELECT 1 FROM scores AS s WHERE s.item = r.item AND s.model = r.model AND s.sample = r.sample AND s.judge = ?)"""
COUNT_UNSCORED = f"SELECT count(*) {UNSCORED}"
# The next page of them, after a key (item, model, sample); a row is an UnscoredResponse
PAGE_OF_UNSCORED = f"""
    SELECT r.item, r.model, r.sample, r.text {UNSCORED}
    AND (r.item, r.model, r.sample) > (?, ?, ?) ORDER BY r.item, r.model, r.sample LIMIT ?"""

# Every response with a rating; a row is a RatedResponse
RATED_RESPONSES = """
    SELECT q.item, q.model, q.sample, q.value, r.text
    FROM ratings AS q JOIN responses AS r ON r.item = q.item AND r.model = q.model AND r.sample = q.sample
    WHERE q.value IS NOT NULL ORDER BY q.item, q.model, q.sample"""
COUNT_SCORES = "SELECT count(*), count(score) FROM scores WHERE judge = ?"
COMPARISON_KEYS = "SELECT item, model, sample, other_model, other_sample FROM comparisons WHERE judge = ?"
RESPONSE_TEXTS = "SELECT item, model, sample, text FROM responses WHERE item BETWEEN ? AND ?"


def judge(run: SynthesisRun) -> None:
    """Run the stage: request the scores, and the comparisons, that the pool lacks."""
    run.require("respond")
    pin_judge_settings(run)
    self_judged = [author for author, judges in judges_by_author(run.config).items() if judges == (author,)]
    if self_judged and run.config.judge.exclude_self:
        run.say(f"judge: {', '.join(self_judged)} scores its own responses, because there is no other judge")
    for model in run.config.judges:
        task = ScoringTask(run, model)
        if missing := task.count_missing():
            with run.use_engine("judge", model) as writer:
                ask = writer.choose if task.options.scoring == "expected_score" else writer.complete
                ask(task.requests(), missing, task.write)
            task.warn_without_scores()
    if run.config.judge.pairwise:
        compare_best_pairs(run)
    run.finish("judge")


def pin_judge_settings(run: SynthesisRun) -> None:
    """Store the settings that scores depend on, with the text of the rubric.

    Raises UserError where a later call has other settings.
    """
    options, text = run.config.judge, load_rubric(run.config.judge)
    length = {"max_tokens": options.max_tokens} if options.scoring == "generated" else {}
    run.pin_settings("judge", {"judges": [model_identity(model) for model in run.config.judges], "scoring": options.scoring, **length,
                         "rubric": _short_hash(text)})
    if run.pool.get("rubric") is None:
        with run.pool.transaction():
            run.pool.set("rubric", text)


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class JudgeTask:
    """One judge's work: its prompts, in the form that its engine takes."""

    def __init__(self, run: SynthesisRun, model: Model):
        self.run, self.model, self.name, self.options = run, model, name_of(model), run.config.judge
        self.format: ChatFormat | None = None if kind_of(model) == "openai" else run.format(model)

    def choice(self, key: tuple, text: str, choices: tuple[str, ...]) -> ChoiceRequest:
        """Ask with which of `choices` the judge's answer to `text` begins."""
        messages = ({"role": "user", "content": text},)
        if self.format is None:
            return ChoiceRequest(key, Prompt(None, messages), choices)
        token_ids, rest = self.format.choice_prompt(messages, choices)
        return ChoiceRequest(key, Prompt(token_ids), tuple(rest + choice for choice in choices))

    def completion(self, key: tuple, text: str, seed: int) -> CompletionRequest:
        """Ask for the judge's whole answer to `text`, decoded greedily."""
        messages = ({"role": "user", "content": text},)
        prompt = Prompt(self.format.response_prompt(messages)) if self.format else Prompt(None, messages)
        stops = self.format.response_stops if self.format else ()
        return CompletionRequest(key, prompt, Sampling(0.0, 1.0, self.options.max_tokens, *stops), seed)


def chats_between(run: SynthesisRun, first: int, last: int) -> dict[int, Chat]:
    """Read the chats of the items `first` to `last`."""
    return {chat.item: chat for chat in run.pool.chats(f"id BETWEEN {first} AND {last}")}


# ---------------------------------------------------------------- scores


class UnscoredResponse(NamedTuple):
    """A usable response that a judge has not scored."""

    item: int
    model: str
    sample: int
    text: str

    @property
    def key(self) -> tuple[int, str, int]:
        return self.item, self.model, self.sample


class JudgeScore(NamedTuple):
    """The columns of `scores` that follow the key."""

    score: float | None
    mass: float | None  # probability of all digits together
    text: str | None
    seed: int
    reason: str | None  # why there is no score


class ScoringTask(JudgeTask):
    """Score the responses that one judge has not scored yet."""

    def __init__(self, run: SynthesisRun, model: Model):
        super().__init__(run, model)
        self.rubric = load_rubric(self.options)
        self.authors = [author for author, judges in judges_by_author(run.config).items() if self.name in judges]

    def _select(self, query: str, *values) -> list[tuple]:
        query = query.format(authors=", ".join("?" * len(self.authors)))
        return self.run.pool.select(query, *self.authors, self.name, *values)

    def count_missing(self) -> int:
        (count,), = self._select(COUNT_UNSCORED)
        return count

    def warn_without_scores(self) -> None:
        """Say so where none of the judge's answers could be read."""
        (answers, scores), = self.run.pool.select(COUNT_SCORES, self.name)
        if answers and not scores:
            remedy = ("use judge.scoring generated" if self.options.scoring == "expected_score"
                      else "look at the texts in the pool's table scores, and raise judge.max_tokens where they are cut off")
            self.run.say(f"judge: WARNING: none of the {answers:,} answers of {self.name} has a score; {remedy}, in another output")

    def requests(self) -> Iterator[ChoiceRequest | CompletionRequest]:
        last = (-1, "", 0)
        while page := [UnscoredResponse(*row) for row in self._select(PAGE_OF_UNSCORED, *last, PAGE)]:
            chats = chats_between(self.run, page[0].item, page[-1].item)
            prompts = {item: prompt_text(chat) for item, chat in chats.items()}
            for response in page:
                text = fill_placeholders(self.rubric, instruction=prompts[response.item], response=response.text)
                yield self._request(response.key, text)
            last = page[-1].key

    def _request(self, key: tuple, text: str) -> ChoiceRequest | CompletionRequest:
        if self.options.scoring == "expected_score":
            return self.choice(key, text, DIGITS)
        return self.completion(key, text, self._seed(key))

    def _seed(self, key: tuple) -> int:
        return seeds.seed(self.run.config.seed, "judge", self.name, *key)

    def write(self, results: list) -> None:
        self.run.pool.insert("scores", [(*result.key, self.name, *self._read(result)) for result in results])

    def _read(self, result: Choice | Completion | Failure) -> JudgeScore:
        seed = self._seed(result.key)
        if isinstance(result, Failure):
            return JudgeScore(None, None, None, seed, result.reason)
        if isinstance(result, Choice):
            score, digit = expected_score(result.probabilities), most_likely_score(result.probabilities)
            text = None if digit is None else str(digit)
            return JudgeScore(score, finite_or_none(result.mass), text, seed, NO_PROBABILITY if score is None else None)
        return self._read_completion(result, seed)

    def _read_completion(self, result: Completion, seed: int) -> JudgeScore:
        answer = self.format.final_answer(result.text) if self.format else result.text
        text = (result.text if answer is None else answer).strip()
        reason = why_unusable(result, None) or ("no answer in its final channel" if answer is None else None)
        if reason:
            return JudgeScore(None, None, text, seed, reason)
        score = parse_score(answer)
        return JudgeScore(score, None, text, seed, NO_SCORE_LINE if score is None else None)


# ---------------------------------------------------------------- pairs


class RatedResponse(NamedTuple):
    """A response with its rating."""

    item: int
    model: str
    sample: int
    value: float
    text: str

    @property
    def key(self) -> tuple[int, str, int]:
        return self.item, self.model, self.sample


class ComparisonKey(NamedTuple):
    """The key of a comparison; the response of `model` is shown first."""

    item: int
    model: str
    sample: int
    other_model: str
    other_sample: int

    @property
    def first(self) -> tuple[int, str, int]:
        return self.item, self.model, self.sample

    @property
    def second(self) -> tuple[int, str, int]:
        return self.item, self.other_model, self.other_sample


class ResponsePair(NamedTuple):
    """The two best responses to an instruction."""

    best: RatedResponse
    second: RatedResponse

    @property
    def orders(self) -> tuple[ComparisonKey, ComparisonKey]:
        """Return the keys of its two comparisons, one for each order."""
        best, second = self.best, self.second
        return (ComparisonKey(*best.key, second.model, second.sample), ComparisonKey(*second.key, best.model, best.sample))


def compare_best_pairs(run: SynthesisRun) -> None:
    """Have each item's two best responses compared in both orders.

    They are compared by every judge that wrote neither, or by all judges where there is none such.
    """
    run.pin_settings("pairwise", {"calibrate_judges": run.config.judge.calibrate_judges, "text": _short_hash(PAIRWISE_PROMPT)})
    with run.pool.transaction():
        rate_responses(run)
    pairs = list(best_pairs(run))
    for model in run.config.judges:
        task = ComparisonTask(run, model, pairs)
        if task.missing:
            with run.use_engine("judge", model) as writer:
                writer.choose(task.requests(), len(task.missing), task.write)


def best_pairs(run: SynthesisRun) -> Iterator[ResponsePair]:
    """Yield each item's best response and the best one with another text; the seed breaks ties."""

    def rank(response: RatedResponse) -> tuple:
        return -round(response.value, 9), seeds.seed(run.config.seed, "pairwise", *response.key)

    responses = map(RatedResponse._make, run.pool.connection.execute(RATED_RESPONSES))
    for _, of_item in itertools.groupby(responses, key=attrgetter("item")):
        best, *others = sorted(of_item, key=rank)
        second = next((response for response in others if response.text != best.text), None)
        if second:
            yield ResponsePair(best, second)


def judges_of_pair(run: SynthesisRun, pair: ResponsePair) -> list[str]:
    """Return which judges compare a pair."""
    judges, authors = sorted({name_of(model) for model in run.config.judges}), (pair.best.model, pair.second.model)
    others = [judge for judge in judges if judge not in authors]
    return others if others and run.config.judge.exclude_self else judges


class ComparisonTask(JudgeTask):
    """Make the comparisons that one judge has not made yet."""

    def __init__(self, run: SynthesisRun, model: Model, pairs: list[ResponsePair]):
        super().__init__(run, model)
        done = set(run.pool.select(COMPARISON_KEYS, self.name))
        self.missing = [key for pair in pairs if self.name in judges_of_pair(run, pair) for key in pair.orders if key not in done]

    def requests(self) -> Iterator[ChoiceRequest]:
        for start in range(0, len(self.missing), PAGE):
            page = self.missing[start:start + PAGE]
            chats = chats_between(self.run, page[0].item, page[-1].item)
            texts = self._texts(page)
            for key in page:
                text = fill_placeholders(PAIRWISE_PROMPT, instruction=prompt_text(chats[key.item]), first=texts[key.first],
                                         second=texts[key.second])
                yield self.choice(tuple(key), text, LETTERS)

    def _texts(self, page: list[ComparisonKey]) -> dict[tuple[int, str, int], str]:
        """Read the texts of the responses that a page of comparisons shows."""
        shown = {response for key in page for response in (key.first, key.second)}
        rows = self.run.pool.connection.execute(RESPONSE_TEXTS, (page[0].item, page[-1].item))
        return {response: text for *key, text in rows if (response := tuple(key)) in shown}

    def write(self, results: list) -> None:
        self.run.pool.insert("comparisons", [(*result.key, self.name, *self._read(result)) for result in results])

    def _read(self, result: Choice | Failure) -> tuple[float | None, float | None, str | None]:
        """Return preference, mass and reason."""
        if isinstance(result, Failure):
            return None, None, result.reason
        preference = preference_for_first(result.probabilities)
        return preference, finite_or_none(result.mass), NO_PROBABILITY if preference is None else None
