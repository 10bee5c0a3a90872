"""The pool: one SQLite file with every instruction, answer and score, who made it with which seed, and why it was dropped.

One process writes, one transaction per batch of results, so a kill loses the batch in flight and nothing else; what is missing is what a
later call does. Rows are keyed by what they are, never by when they came: two pools of the same settings are equal row for row. `usage`
alone counts what was spent, and differs between runs.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from trainer.errors import UserError

VERSION = 1
SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
-- Who answers under a name: a name keeps its engine and weights for the life of the pool.
CREATE TABLE models (name TEXT PRIMARY KEY, engine TEXT, path TEXT, fingerprint TEXT, deterministic INTEGER) WITHOUT ROWID;
-- What is sampled: planned before anything is generated.
CREATE TABLE items (id INTEGER PRIMARY KEY, temperature REAL, top_p REAL, system TEXT, turns INTEGER);
-- Turns of an item in order: 0 the user's, 1 the assistant's, 2 the user's ... The last one is the user's and is the instruction.
CREATE TABLE turns (item INTEGER, position INTEGER, text TEXT, tokens INTEGER, finish TEXT, logprob REAL, seed INTEGER,
                    PRIMARY KEY (item, position)) WITHOUT ROWID;
-- Samples apart: what the base asks with nothing in its way (temperature 1, top_p 1), which the report compares the pool with.
CREATE TABLE fresh (id INTEGER PRIMARY KEY, text TEXT, tokens INTEGER, finish TEXT, logprob REAL, seed INTEGER);
-- Why an item is out, by the earliest stage that found it.
CREATE TABLE drops (item INTEGER PRIMARY KEY, stage TEXT, reason TEXT, detail TEXT);
-- What `clean` found out about an item: its language, its group of near-duplicates, and the weight it has after that.
CREATE TABLE traits (item INTEGER PRIMARY KEY, language TEXT, grp INTEGER, weight REAL);
CREATE TABLE responses (item INTEGER, model TEXT, sample INTEGER, text TEXT, tokens INTEGER, finish TEXT, logprob REAL,
                        base_logprob REAL, base_tokens INTEGER, seed INTEGER, reason TEXT, PRIMARY KEY (item, model, sample)) WITHOUT ROWID;
-- sample -1 is a greedy answer. An answer that cannot be used has its reason. base_logprob: of the answer and its end, under the base,
-- which reads it as base_tokens tokens. A score that could not be read is NULL, with its reason. text: what the judge wrote, or the
-- likeliest digit where score is the mean of their distribution.
CREATE TABLE scores (item INTEGER, model TEXT, sample INTEGER, judge TEXT, score REAL, mass REAL, text TEXT, seed INTEGER, reason TEXT,
                     PRIMARY KEY (item, model, sample, judge)) WITHOUT ROWID;
-- Pairwise judgements: the share of the judge's choice that the first-shown answer has.
CREATE TABLE comparisons (item INTEGER, model TEXT, sample INTEGER, other_model TEXT, other_sample INTEGER, judge TEXT, preference REAL,
                          mass REAL, reason TEXT, PRIMARY KEY (item, model, sample, other_model, other_sample, judge)) WITHOUT ROWID;
-- What the judges say together: the mean of their scores, NULL where one of them is missing, and how far they are apart.
CREATE TABLE ratings (item INTEGER, model TEXT, sample INTEGER, value REAL, disagreement REAL, judges INTEGER,
                      PRIMARY KEY (item, model, sample)) WITHOUT ROWID;
CREATE TABLE selection (item INTEGER PRIMARY KEY, model TEXT, sample INTEGER, value REAL, rejected_model TEXT, rejected_sample INTEGER,
                        rejected_value REAL);
CREATE TABLE usage (stage TEXT, model TEXT, requests INTEGER, prompt_tokens INTEGER, tokens INTEGER, seconds REAL, busy REAL, cost REAL,
                    PRIMARY KEY (stage, model)) WITHOUT ROWID;
"""
TABLES = ("meta", "models", "items", "turns", "fresh", "drops", "traits", "responses", "scores", "comparisons", "ratings", "selection")
# Which items are answered and judged. `select` drops some of them later, and may change its mind.
CLEAN = "id NOT IN (SELECT item FROM drops WHERE stage IN ('instruct', 'clean'))"


class Chat(NamedTuple):
    """An item as it is asked: the system prompt it was sampled under (None: the template's own), and turns that end with the user's."""

    item: int
    system: str | None
    messages: tuple[dict, ...]

    @property
    def instruction(self) -> str:
        return self.messages[-1]["content"]


class Pool:
    """An open pool file. Use as a context manager."""

    def __init__(self, path: Path | str):
        """Open the pool at `path`, or make it. UserError for a file that is not a pool, is from a newer version, or cannot be written."""
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.connection = sqlite3.connect(self.path, isolation_level=None, timeout=30)
            self.connection.execute("PRAGMA journal_mode=WAL")
            self.connection.execute("PRAGMA synchronous=NORMAL")
            if not self.connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                with self.transaction():
                    for statement in SCHEMA.split(";"):
                        self.connection.execute(statement)
                    self.set("version", VERSION)
            self._check_version()
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"pool {self.path}: {error}; expected a pool of synth.run on a disk that can be written") from None

    def _check_version(self) -> None:
        if not self.connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
            raise UserError(f"pool {self.path}: expected a pool of synth.run, found another SQLite file; choose another output")
        found = self.get("version")
        if found != VERSION:
            remedy = "use the newer Steadfast that wrote it" if isinstance(found, int) and found > VERSION else "start a new one"
            raise UserError(f"pool {self.path}: expected version {VERSION}, found {found}; {remedy}")

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_) -> None:
        self.connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of what is written inside, or nothing. UserError where the disk refuses; the pool stays as it was."""
        try:
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self.connection.execute("ROLLBACK")
                raise
            self.connection.execute("COMMIT")
        except sqlite3.OperationalError as error:
            raise UserError(f"pool {self.path}: cannot be written ({error}); what was saved before is whole: "
                            "free space or rights, and run again") from None

    def get(self, key: str) -> Any:
        """A value of `meta`, None where there is none."""
        found = self.connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if found is None else json.loads(found[0])

    def set(self, key: str, value: Any) -> None:
        self.connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value, sort_keys=True)))

    def settle(self, key: str, settings: Any, remedy: str) -> None:
        """Keep a stage's settings at its first call; UserError, naming what differs, where a later call has other ones."""
        settings, kept = json.loads(json.dumps(settings)), self.get(f"settings.{key}")
        if kept is None:
            with self.transaction():
                self.set(f"settings.{key}", settings)
        elif kept != settings:
            changed = next(name for name in sorted(kept.keys() | settings.keys()) if kept.get(name) != settings.get(name))
            raise UserError(f"{key}.{changed}: this pool was made with {kept.get(changed)!r}, found {settings.get(changed)!r}; {remedy}")

    def forget(self, key: str) -> None:
        """Drop a stage's settings: nothing was made with them."""
        self.connection.execute("DELETE FROM meta WHERE key = ?", (f"settings.{key}",))

    def insert(self, table: str, rows: Iterable[Sequence]) -> None:
        """Rows of a table, in the order of its columns; the caller has opened a transaction."""
        rows = list(rows)
        if rows:
            self.connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)

    def select(self, query: str, *values) -> list[tuple]:
        return self.connection.execute(query, values).fetchall()

    def spend(self, stage: str, model: str, requests: int, prompt_tokens: int, tokens: int, seconds: float, busy: float = 0.0,
              cost: float = 0.0) -> None:
        """Adds to what a stage has spent on a model; `busy` are the seconds in which the engine itself was at work."""
        self.connection.execute(
            "INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET requests = requests + excluded.requests, "
            "prompt_tokens = prompt_tokens + excluded.prompt_tokens, tokens = tokens + excluded.tokens, "
            "seconds = seconds + excluded.seconds, busy = busy + excluded.busy, cost = cost + excluded.cost",
            (stage, model, requests, prompt_tokens, tokens, seconds, busy, cost))

    def chats(self, where: str = CLEAN) -> Iterator[Chat]:
        """Items whose instruction is there, in the order of their numbers, with all their turns; `where` is a condition on `items`."""
        rows = self.connection.execute(
            f"SELECT id, system, items.turns, text FROM items JOIN turns ON item = id WHERE {where} ORDER BY id, position")
        for (item, system, turns), found in itertools.groupby(rows, key=lambda row: row[:3]):
            texts = [text for *_, text in found]
            if len(texts) == 2 * turns - 1:
                roles = itertools.cycle(("user", "assistant"))
                yield Chat(item, system, tuple({"role": role, "content": text} for role, text in zip(roles, texts)))

    def dump(self) -> dict[str, list[tuple]]:
        """Every row of every table but `usage`, in a fixed order: equal for equal settings."""
        rows = {table: self.select(f"SELECT * FROM {table}") for table in TABLES}
        return {table: sorted(found, key=repr) for table, found in rows.items()}
