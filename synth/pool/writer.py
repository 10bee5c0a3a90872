"""Send requests to an engine, and write its results into the pool in batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from synth.engines.interface import Engine
from synth.pool.store import Pool

BATCH = 256  # results of one transaction,
BATCH_SECONDS = 2.0  # or as many as came in this time
PROGRESS_SECONDS = 10.0  # between two progress lines


class Totals(NamedTuple):
    """Sums over results."""

    results: int = 0  # failures included
    prompt_tokens: int = 0
    tokens: int = 0

    def plus(self, results: Iterable) -> Totals:
        """Return the totals with these results added."""
        results = list(results)
        return Totals(self.results + len(results), self.prompt_tokens + sum(getattr(r, "prompt_tokens", 0) for r in results),
                      self.tokens + sum(getattr(r, "tokens", 0) for r in results))


class ResultWriter:
    """Requests of one stage to the engine of one model, whose results go into the pool."""

    def __init__(self, pool: Pool, say: Callable[[str], None], stage: str, model: str, engine: Engine):
        self.pool, self.say, self.stage, self.model, self.engine = pool, say, stage, model, engine
        self.told: list[str] = []  # of the engine's notes

    def complete(self, requests: Iterable, total: int, write: Callable[[list], None]) -> Totals:
        """Run completion requests; `write` gets lists of Completion and Failure, in an open transaction."""
        return self._drain(self.engine.complete(requests), total, write)

    def choose(self, requests: Iterable, total: int, write: Callable[[list], None]) -> Totals:
        """Run choice requests; `write` gets lists of Choice and Failure, in an open transaction."""
        return self._drain(self.engine.choose(requests), total, write)

    def likelihood(self, requests: Iterable, total: int, write: Callable[[list], None]) -> Totals:
        """Run likelihood requests; `write` gets lists of Likelihood and Failure, in an open transaction."""
        return self._drain(self.engine.likelihood(requests), total, write)

    def _drain(self, results: Iterator, total: int, write: Callable[[list], None]) -> Totals:
        """Write all results, a batch at a time; an interruption keeps those that had arrived."""
        meter, batch = UsageMeter(self.say, self.stage, self.model, total, self.engine), []
        try:
            for result in results:
                batch.append(result)
                if len(batch) >= BATCH or time.monotonic() - meter.saved >= BATCH_SECONDS:
                    self._save(meter, batch, write)
        finally:
            self._save(meter, batch, write)
            self._tell_notes()
        meter.end()
        return meter.done

    def _save(self, meter: UsageMeter, batch: list, write: Callable[[list], None]) -> None:
        if not batch:
            return
        results, batch[:] = list(batch), []  # emptied first: a batch that fails is not written again by `finally`
        with self.pool.transaction():
            write(results)
            meter.record(results, self.pool)
        self._tell_notes()

    def _tell_notes(self) -> None:
        """Print the engine's notes, once each, and keep them in the pool for the manifest."""
        if new := [note for note in self.engine.notes() if note not in self.told]:
            self.told += new
            key = f"notes.{self.model}"
            with self.pool.transaction():
                self.pool.set(key, sorted({*(self.pool.get(key) or ()), *new}))
            for note in new:
                self.say(f"{self.stage}: {self.model}: {note}")


class UsageMeter:
    """Work of one engine for one stage: added up in the pool, and printed as progress."""

    def __init__(self, say: Callable[[str], None], stage: str, model: str, total: int, engine: Engine):
        self.say, self.stage, self.model, self.total, self.engine = say, stage, model, total, engine
        self.began = self.saved = self.printed = time.monotonic()
        self.done, self.busy, self.cost = Totals(), engine.busy(), engine.cost()

    def record(self, batch: list, pool: Pool) -> None:
        """Add a batch to the pool's usage, and print a progress line when one is due."""
        now, busy, cost, before = time.monotonic(), self.engine.busy(), self.engine.cost(), self.done
        self.done = before.plus(batch)
        pool.add_usage(self.stage, self.model, *(a - b for a, b in zip(self.done, before, strict=True)), seconds=now - self.saved,
                       busy=busy - self.busy, cost=cost - self.cost)
        self.saved, self.busy, self.cost = now, busy, cost
        if now - self.printed >= PROGRESS_SECONDS:
            self.printed = now
            left = (now - self.began) * (self.total / self.done.results - 1)
            self.say(f"{self.stage}: {self.model}: {self.done.results:,} of {self.total:,}, {self.rate}, {left / 60:.0f} min left")

    @property
    def rate(self) -> str:
        """Return tokens per second, or results per second where results hold no more than a token each."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        if self.done.tokens > self.done.results:
            return f"{self.done.tokens / seconds:,.0f} tokens/s"
        return f"{self.done.results / seconds:,.0f} results/s"

    def end(self) -> None:
        """Print a last line."""
        self.say(f"{self.stage}: {self.model}: {self.done.results:,} results in {time.monotonic() - self.began:.1f} s, {self.rate}")
