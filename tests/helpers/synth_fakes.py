"""Replace engines by scripted ones, and fill pools by hand, for tests of the stages.

    engine = FakeEngine("judge", choose=lambda request: (0, 0, 0, 0, 1))
    install(monkeypatch, judge=engine)                # the engine of the model of that name
    run = make_run(tmp_path, ["base", "other"])
    fill(run, ["What is 2 + 2?"], {"base": [["4", "5"]]})
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from synth.config import Config, Model, name_of, resolve_presets
from synth.engines import open_engine
from synth.engines.interface import Choice, Completion, Embedding, Engine, EngineError, EngineInfo, Failure, Likelihood
from synth.pool.store import Pool
from synth.pool.synthesis_run import SynthesisRun

BASE = str(Path(__file__).parents[2] / "benchmarks/forgetting/miniature/models/base")  # a real tokenizer and chat template


class FakeEngine:
    """An engine that answers by functions of the request. Each returns a result, or the part of it that matters:

        complete    the text, which ended with a stop; it has as many tokens as characters
        choose      the choices' probabilities
        likelihood  the log-probability
        embed       the vector

    A returned Exception becomes a Failure with its text. Results come in a random order by `seed`, while at most `window` requests wait;
    after `results` of them the engine fails. `requests` are all requests so far, `started` and `closed` count how often it was, `dead`
    says that its processes have ended.
    """

    def __init__(self, name: str = "model", complete: Callable | None = None, choose: Callable | None = None,
                 likelihood: Callable | None = None, embed: Callable | None = None, deterministic: bool = True, seed: int = 0,
                 window: int = 8, results: int | None = None):
        self.info = EngineInfo("scripted 1.0", name, f"fingerprint of {name}", deterministic)
        self.scripts = {"complete": complete, "choose": choose, "likelihood": likelihood, "embed": embed}
        self.random, self.window, self.results = random.Random(seed), window, results
        self.requests, self.started, self.closed, self.dead = [], 0, 0, False

    def complete(self, requests: Iterable) -> Iterator[Completion | Failure]:
        return self._answer("complete", requests, lambda r, text: Completion(r.key, text, len(text), "stop", -1.0, size(r.prompt)))

    def choose(self, requests: Iterable) -> Iterator[Choice | Failure]:
        return self._answer("choose", requests, lambda r, p: Choice(r.key, tuple(p), size(r.prompt)))

    def likelihood(self, requests: Iterable) -> Iterator[Likelihood | Failure]:
        return self._answer("likelihood", requests, lambda r, logprob: Likelihood(r.key, logprob, len(r.continuation)))

    def embed(self, requests: Iterable) -> Iterator[Embedding | Failure]:
        return self._answer("embed", requests, lambda r, vector: Embedding(r.key, tuple(vector)))

    def busy(self) -> float:
        return 0.001 * len(self.requests)

    def cost(self) -> float:
        return 0.0

    def notes(self) -> list[str]:
        return []

    def alive(self) -> bool:
        return not self.dead

    def close(self) -> None:
        self.closed += 1

    def _answer(self, method: str, requests: Iterable, result: Callable) -> Iterator:
        script, waiting = self.scripts[method], []
        assert script, f"{self.info.model} was not expected to {method}"

        def pop():
            if self.results is not None and self.results <= 0:
                raise EngineError(f"{self.info.model}: died")
            self.results = None if self.results is None else self.results - 1
            request = waiting.pop(self.random.randrange(len(waiting)))
            returned = script(request)
            if isinstance(returned, Exception):
                return Failure(request.key, str(returned))
            finished = isinstance(returned, (Completion, Choice, Likelihood, Embedding, Failure))
            return returned if finished else result(request, returned)

        for request in requests:
            self.requests.append(request)
            waiting.append(request)
            if len(waiting) > self.window:
                yield pop()
        while waiting:
            yield pop()


def size(prompt) -> int:
    """Return the length of a prompt in tokens, or in characters where it is messages."""
    return sum(len(message["content"]) for message in prompt.messages) if prompt.token_ids is None else len(prompt.token_ids)


def install(monkeypatch, **engines: FakeEngine) -> None:
    """Replace the engines of local models by these, by name; of other models only servers may start."""

    def open_fake(model: Model, log: Path) -> Engine:
        if model.engine == "openai" and name_of(model) not in engines:
            return open_engine(model, log)
        assert name_of(model) in engines, f"{name_of(model)} was not expected to start"
        engines[name_of(model)].started += 1
        return engines[name_of(model)]

    monkeypatch.setattr("synth.pool.synthesis_run.open_engine", open_fake)


# ---------------------------------------------------------------- pools


def make_run(folder: Path, models: Sequence[str] = ("base",), say: Callable[[str], None] | None = None, **options) -> SynthesisRun:
    """Return a run on a new or existing pool in `folder`, with `options` of Config.

    The first of `models` is the base, the others are responders.

    All have the tokenizer and chat template of the miniature's base. Close its pool, or leave that to the end of the process.
    """
    base, *others = (Model(path=BASE, name=name) for name in models)
    config = resolve_presets(Config(**{"output": str(folder), "base": base, "responders": others} | options))
    return SynthesisRun(config, Pool(folder / "pool.sqlite"), say or (lambda line: None))


def fill(run: SynthesisRun, chats: Sequence[str | Sequence[str]], responses: Mapping[str, Sequence[Sequence]] | None = None,
         systems: Mapping[int, str] | None = None, weights: Mapping[int, float] | None = None,
         likelihoods: Mapping[tuple, float] | None = None, done: Iterable[str] = ("probe", "instruct", "clean", "respond")) -> None:
    """Insert items, their turns and their responses, as the stages before would.

    `chats[i]`: the instruction of item i, or all its turns. `responses[model][i]`: its responses to item i; an Exception stands for one
    that cannot be used, for that reason; sample numbers count from 0. `likelihoods[item, model, sample]`: log-probability per token under
    the base.
    """
    chats = [[chat] if isinstance(chat, str) else list(chat) for chat in chats]
    with run.pool.transaction():
        run.pool.insert("items", [(i, 1.0, 1.0, (systems or {}).get(i), len(turns) // 2 + 1) for i, turns in enumerate(chats)])
        run.pool.insert("turns", [(i, position, text, len(text), "stop", -1.0, 0)
                                  for i, turns in enumerate(chats) for position, text in enumerate(turns)])
        run.pool.insert("traits", [(i, "en", i, (weights or {}).get(i, 1.0)) for i in range(len(chats))])
        run.pool.insert("responses", [response_row(i, model, sample, answer, (likelihoods or {}).get((i, model, sample)))
                                      for model, answers in (responses or {}).items()
                                      for i, samples in enumerate(answers) for sample, answer in enumerate(samples)])
        for stage in done:
            run.pool.set(f"done.{stage}", True)


def response_row(item: int, model: str, sample: int, answer: str | Exception, likelihood: float | None) -> tuple:
    """Return a row of `responses`."""
    if isinstance(answer, Exception):
        return item, model, sample, "", 1, "length", None, None, None, 0, str(answer)
    tokens = len(answer) + 1
    return item, model, sample, answer, tokens, "stop", None, None if likelihood is None else likelihood * tokens, tokens, 0, None


def score(run: SynthesisRun, scores: Mapping[tuple, float | None]) -> None:
    """Insert scores by (item, model, sample, judge), None for unreadable ones, and mark stage `judge` as done."""
    from synth.stages.judge import pin_judge_settings

    pin_judge_settings(run)
    with run.pool.transaction():
        run.pool.insert("scores", [(*key, value, None, None, 0, "unread" if value is None else None) for key, value in scores.items()])
        run.pool.set("done.judge", True)
