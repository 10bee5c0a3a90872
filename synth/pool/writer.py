"""Write an engine's results into the pool in batches, with what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from synth.engines.interface import Engine
from synth.pool.store import Pool

BATCH = 256  # results of one transaction
SECONDS = 2.0  # or as many as came in this time
TELL = 10.0  # seconds between two lines about how far a stage is


class Totals(NamedTuple):
    """What was done: `results` count failures too."""

    results: int = 0
    prompt_tokens: int = 0
    tokens: int = 0

    def plus(self, results: Iterable) -> Totals:
        results = list(results)
        return Totals(self.results + len(results), self.prompt_tokens + sum(getattr(r, "prompt_tokens", 0) for r in results),
                      self.tokens + sum(getattr(r, "tokens", 0) for r in results))


class Worker:
    """One model at work for one stage: it is asked, and what it says is written."""

    def __init__(self, pool: Pool, say: Callable[[str], None], stage: str, model: str, engine: Engine):
        self.pool, self.say, self.stage, self.model, self.engine = pool, say, stage, model, engine

    def complete(self, requests: Iterable, total: int, write: Callable[[list], None]) -> Totals:
        """`write` gets lists of Completion and Failure, inside an open transaction."""
        return self._pump(self.engine.complete(requests), total, write)

    def choose(self, requests: Iterable, total: int, write: Callable[[list], None]) -> Totals:
        """`write` gets lists of Choice and Failure, inside an open transaction."""
        return self._pump(self.engine.choose(requests), total, write)

    def likelihood(self, requests: Iterable, total: int, write: Callable[[list], None]) -> Totals:
        """`write` gets lists of Likelihood and Failure, inside an open transaction."""
        return self._pump(self.engine.likelihood(requests), total, write)

    def _pump(self, results: Iterator, total: int, write: Callable[[list], None]) -> Totals:
        """Results into the pool, a batch at a time; what had come before an interruption is kept."""
        ledger, batch = Ledger(self.say, self.stage, self.model, total, self.engine), []
        try:
            for result in results:
                batch.append(result)
                if len(batch) >= BATCH or time.monotonic() - ledger.saved >= SECONDS:
                    self._save(ledger, batch, write)
        finally:
            self._save(ledger, batch, write)
        ledger.end()
        return ledger.done

    def _save(self, ledger: Ledger, batch: list, write: Callable[[list], None]) -> None:
        if not batch:
            return
        taken, batch[:] = list(batch), []  # whatever goes wrong, no batch is tried twice
        with self.pool.transaction():
            write(taken)
            ledger.book(taken, self.pool)


class Ledger:
    """What one engine did for one stage: told now and then, and booked in the pool."""

    def __init__(self, say: Callable[[str], None], stage: str, model: str, total: int, engine: Engine):
        self.say, self.stage, self.model, self.total, self.engine = say, stage, model, total, engine
        self.began = self.saved = self.told = time.monotonic()
        self.done, self.busy, self.cost = Totals(), engine.busy(), engine.cost()

    def book(self, batch: list, pool: Pool) -> None:
        now, busy, cost, before = time.monotonic(), self.engine.busy(), self.engine.cost(), self.done
        self.done = before.plus(batch)
        pool.spend(self.stage, self.model, *(a - b for a, b in zip(self.done, before)), seconds=now - self.saved, busy=busy - self.busy,
                   cost=cost - self.cost)
        self.saved, self.busy, self.cost = now, busy, cost
        if now - self.told >= TELL:
            self.told = now
            left = (now - self.began) * (self.total / self.done.results - 1)
            self.say(f"{self.stage}: {self.model} {self.done.results:,} of {self.total:,}, {self.rate}, {left / 60:.0f} min left")

    @property
    def rate(self) -> str:
        seconds = max(time.monotonic() - self.began, 1e-9)
        if self.done.tokens > self.done.results:
            return f"{self.done.tokens / seconds:,.0f} tokens/s"
        return f"{self.done.results / seconds:,.0f} results/s"

    def end(self) -> None:
        self.say(f"{self.stage}: {self.model} {self.done.results:,} results in {time.monotonic() - self.began:.1f} s, {self.rate}")
