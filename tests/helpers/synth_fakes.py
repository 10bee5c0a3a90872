"""A scripted engine in the place of a real one, and pools filled by hand, for tests of the stages.

    engine = FakeEngine("judge", choose=lambda request: (0, 0, 0, 0, 1))
    install(monkeypatch, judge=engine)                # what open_engine starts for the model of that name
    run = make_run(tmp_path, ["base", "other"])
    fill(run, ["What is 2 + 2?"], {"base": [["4", "5"]]})
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from synth.config import Config, Model, name_of, resolve_presets
from synth.engines.interface import Choice, Completion, Embedding, EngineError, EngineInfo, Failure, Likelihood
from synth.pool.run import SynthesisRun
from synth.pool.store import Pool

BASE = str(Path(__file__).parents[2] / "benchmarks/forgetting/miniature/models/base")  # a real tokenizer and chat template


class FakeEngine:
    """Answers by functions of the request. Each may return the finished result, or what is told in its place:

        complete    the text, which then stopped by itself; of as many tokens as characters
        choose      the choices' probabilities
        likelihood  the log-probability
        embed       the vector

    An Exception that is returned becomes a Failure with its text. Results come in a random order of `seed`, at most `window` ahead of what
    was asked; after `results` of them the engine dies. `asked` are all requests so far, `started` and `closed` count its lives.
    """

    def __init__(self, name: str = "model", complete: Callable | None = None, choose: Callable | None = None,
                 likelihood: Callable | None = None, embed: Callable | None = None, deterministic: bool = True, seed: int = 0,
                 window: int = 8, results: int | None = None):
        self.info = EngineInfo("scripted 1.0", name, f"fingerprint of {name}", deterministic)
        self.scripts = {"complete": complete, "choose": choose, "likelihood": likelihood, "embed": embed}
        self.random, self.window, self.results = random.Random(seed), window, results
        self.asked, self.started, self.closed = [], 0, 0

    def complete(self, requests: Iterable) -> Iterator[Completion | Failure]:
        return self._answer("complete", requests, lambda r, text: Completion(r.key, text, len(text), "stop", -1.0, size(r.prompt)))

    def choose(self, requests: Iterable) -> Iterator[Choice | Failure]:
        return self._answer("choose", requests, lambda r, p: Choice(r.key, tuple(p), size(r.prompt)))

    def likelihood(self, requests: Iterable) -> Iterator[Likelihood | Failure]:
        return self._answer("likelihood", requests, lambda r, logprob: Likelihood(r.key, logprob, len(r.continuation)))

    def embed(self, requests: Iterable) -> Iterator[Embedding | Failure]:
        return self._answer("embed", requests, lambda r, vector: Embedding(r.key, tuple(vector)))

    def busy(self) -> float:
        return 0.001 * len(self.asked)

    def cost(self) -> float:
        return 0.0

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
            told = script(request)
            if isinstance(told, Exception):
                return Failure(request.key, str(told))
            return told if isinstance(told, (Completion, Choice, Likelihood, Embedding, Failure)) else result(request, told)

        for request in requests:
            self.asked.append(request)
            waiting.append(request)
            if len(waiting) > self.window:
                yield pop()
        while waiting:
            yield pop()


def size(prompt) -> int:
    """Tokens of a prompt; characters where it is a chat."""
    return sum(len(message["content"]) for message in prompt.messages) if prompt.token_ids is None else len(prompt.token_ids)


def install(monkeypatch, **engines: FakeEngine) -> None:
    """Let the stages start these engines, by the names of their models; no other is expected to start."""

    def open_engine(model: Model, log: Path) -> FakeEngine:
        assert name_of(model) in engines, f"{name_of(model)} was not expected to start"
        engines[name_of(model)].started += 1
        return engines[name_of(model)]

    monkeypatch.setattr("synth.pool.run.open_engine", open_engine)


# ---------------------------------------------------------------- pools


def make_run(folder: Path, models: Sequence[str] = ("base",), say: Callable[[str], None] | None = None, **options) -> SynthesisRun:
    """A run on a new or existing pool in `folder`: the first of `models` is the base, the others answer too; `options` of Config.

    All have the tokenizer and chat template of the miniature's base. Close its pool, or leave that to the end of the process.
    """
    base, *others = (Model(path=BASE, name=name) for name in models)
    config = resolve_presets(Config(**{"output": str(folder), "base": base, "responders": others} | options))
    return SynthesisRun(config, Pool(folder / "pool.sqlite"), say or (lambda line: None))


def fill(run: SynthesisRun, chats: Sequence[str | Sequence[str]], responses: Mapping[str, Sequence[Sequence]] | None = None,
         systems: Mapping[int, str] | None = None, weights: Mapping[int, float] | None = None,
         likelihoods: Mapping[tuple, float] | None = None, done: Iterable[str] = ("probe", "instruct", "clean", "respond")) -> None:
    """Items, their turns and their answers, as the stages before would leave them.

    `chats[i]`: the instruction of item i, or all its turns. `responses[model][i]`: its answers to item i; an Exception is one that cannot
    be used, for that reason; sample numbers count from 0. `likelihoods[item, model, sample]`: log-probability per token under the base.
    """
    chats = [[chat] if isinstance(chat, str) else list(chat) for chat in chats]
    with run.pool.transaction():
        run.pool.insert("items", [(i, 1.0, 1.0, (systems or {}).get(i), len(turns) // 2 + 1) for i, turns in enumerate(chats)])
        run.pool.insert("turns", [(i, position, text, len(text), "stop", -1.0, 0)
                                  for i, turns in enumerate(chats) for position, text in enumerate(turns)])
        run.pool.insert("traits", [(i, "en", i, (weights or {}).get(i, 1.0)) for i in range(len(chats))])
        run.pool.insert("responses", [response_row(i, model, sample, answer, (likelihoods or {}).get((i, model, sample)))
                                      for model, answers in (responses or {}).items()
                                      for i, said in enumerate(answers) for sample, answer in enumerate(said)])
        for stage in done:
            run.pool.set(f"done.{stage}", True)


def response_row(item: int, model: str, sample: int, answer: str | Exception, likelihood: float | None) -> tuple:
    if isinstance(answer, Exception):
        return item, model, sample, "", 1, "length", None, None, None, 0, str(answer)
    tokens = len(answer) + 1
    return item, model, sample, answer, tokens, "stop", None, None if likelihood is None else likelihood * tokens, tokens, 0, None


def score(run: SynthesisRun, scores: Mapping[tuple, float | None]) -> None:
    """Scores by (item, model, sample, judge), as `judge` would leave them, and that stage ended; None: could not be read."""
    from synth.stages.judge import pin_judge_settings

    pin_judge_settings(run)
    with run.pool.transaction():
        run.pool.insert("scores", [(*key, value, None, None, 0, "unread" if value is None else None) for key, value in scores.items()])
        run.pool.set("done.judge", True)
