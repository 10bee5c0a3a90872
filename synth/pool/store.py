"""Store instructions, responses and scores in one SQLite file, the pool.

It also holds who made each with which seed, and why items were dropped.

One process writes, one transaction per batch of results, so a kill loses the batch in flight and nothing else; the next call makes what is
missing. Rows are keyed by their content, never by time: two pools of equal settings are equal row for row. Only `usage`, which adds up what
was spent, differs between runs.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from trainer.errors import UserError, one_line

VERSION = 1
PAGE = 10_000  # rows that are inserted at a time
SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
-- The model behind each name: a name keeps its engine and weights for the life of the pool.
CREATE TABLE models (name TEXT PRIMARY KEY, engine TEXT, path TEXT, fingerprint TEXT, deterministic INTEGER) WITHOUT ROWID;
-- Instructions to sample, planned before anything is generated.
CREATE TABLE items (id INTEGER PRIMARY KEY, temperature REAL, top_p REAL, system TEXT, turns INTEGER);
-- Turns of an item in order: 0 the user's, 1 the assistant's, 2 the user's ... The last one is the user's and is the instruction.
CREATE TABLE turns (item INTEGER, position INTEGER, text TEXT, tokens INTEGER, finish TEXT, logprob REAL, seed INTEGER,
                    PRIMARY KEY (item, position)) WITHOUT ROWID;
-- Reference samples outside the pool, at temperature 1 and top_p 1: the report compares the pool with them.
CREATE TABLE fresh (id INTEGER PRIMARY KEY, text TEXT, tokens INTEGER, finish TEXT, logprob REAL, seed INTEGER);
-- Why an item was dropped, by the earliest stage that found a reason.
CREATE TABLE drops (item INTEGER PRIMARY KEY, stage TEXT, reason TEXT, detail TEXT);
-- Results of `clean` for an item: its language, its group of near-duplicates, and its weight.
CREATE TABLE traits (item INTEGER PRIMARY KEY, language TEXT, grp INTEGER, weight REAL);
-- sample -1 is the greedy response. A response that cannot be used has a reason. base_logprob: log-probability of the response and its end
-- under the base, which tokenizes it into base_tokens tokens.
CREATE TABLE responses (item INTEGER, model TEXT, sample INTEGER, text TEXT, tokens INTEGER, finish TEXT, logprob REAL,
                        base_logprob REAL, base_tokens INTEGER, seed INTEGER, reason TEXT, PRIMARY KEY (item, model, sample)) WITHOUT ROWID;
-- A score that could not be read is NULL, and has a reason. mass: probability of all digits together. text: what the judge wrote, or the
-- likeliest digit where score is the mean of the digits' distribution.
CREATE TABLE scores (item INTEGER, model TEXT, sample INTEGER, judge TEXT, score REAL, mass REAL, text TEXT, seed INTEGER, reason TEXT,
                     PRIMARY KEY (item, model, sample, judge)) WITHOUT ROWID;
-- Pairwise judgements: the judge's probability for the response shown first.
CREATE TABLE comparisons (item INTEGER, model TEXT, sample INTEGER, other_model TEXT, other_sample INTEGER, judge TEXT, preference REAL,
                          mass REAL, reason TEXT, PRIMARY KEY (item, model, sample, other_model, other_sample, judge)) WITHOUT ROWID;
-- All judges together: the mean of their scores, NULL where one of them is missing, and their standard deviation.
CREATE TABLE ratings (item INTEGER, model TEXT, sample INTEGER, value REAL, disagreement REAL, judges INTEGER,
                      PRIMARY KEY (item, model, sample)) WITHOUT ROWID;
CREATE TABLE selection (item INTEGER PRIMARY KEY, model TEXT, sample INTEGER, value REAL, rejected_model TEXT, rejected_sample INTEGER,
                        rejected_value REAL);
CREATE TABLE usage (stage TEXT, model TEXT, requests INTEGER, prompt_tokens INTEGER, tokens INTEGER, seconds REAL, busy REAL, cost REAL,
                    PRIMARY KEY (stage, model)) WITHOUT ROWID;
"""
TABLES = ("meta", "models", "items", "turns", "fresh", "drops", "traits", "responses", "scores", "comparisons", "ratings", "selection")
# SQL condition on `items`: kept by `instruct` and `clean`, and so answered and judged. `select` may drop more, anew at every call.
ITEM_IS_CLEAN = "id NOT IN (SELECT item FROM drops WHERE stage IN ('instruct', 'clean'))"


# One row for each turn, in the order of items and turns.
CHATS = "SELECT id, system, items.turns, text FROM items JOIN turns ON item = id WHERE {where} ORDER BY id, position"
ADD_USAGE = """
INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET requests = requests + excluded.requests,
    prompt_tokens = prompt_tokens + excluded.prompt_tokens, tokens = tokens + excluded.tokens, seconds = seconds + excluded.seconds,
    busy = busy + excluded.busy, cost = cost + excluded.cost"""


TYPES = {"TEXT": "'text', 'null'", "INTEGER": "'integer', 'null'", "REAL": "'real', 'null'"}  # of values, by that of the column
INCOMPLETE = """
SELECT 1 WHERE EXISTS (SELECT 1 FROM items WHERE turns IS NULL) OR EXISTS (SELECT 1 FROM turns WHERE text IS NULL)"""


class Chat(NamedTuple):
    """An item as messages, the last one the user's; system None: the chat template's own prompt."""

    item: int
    system: str | None
    messages: tuple[dict, ...]

    @property
    def instruction(self) -> str:
        """Return the last user turn."""
        return self.messages[-1]["content"]


def create_tables(connection: sqlite3.Connection) -> None:
    for statement in SCHEMA.split(";"):
        connection.execute(statement)


def check_tables(connection: sqlite3.Connection) -> None:
    """Check that a pool holds our tables alone, whole, with values of their types.

    Raises ValueError for the first that is not so: triggers and views run code of whoever made the file.
    """
    with closing(sqlite3.connect(":memory:")) as fresh:
        create_tables(fresh)
        expected, found = (dict(own.execute("SELECT name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_stat%'").fetchall())
                           for own in (fresh, connection))
    if changed := sorted(name for name in expected | found if expected.get(name) != found.get(name)):
        raise ValueError(f"{changed[0]} is no table as synth.run makes it")
    if (verdict := connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        raise ValueError(verdict)
    for table in expected:
        columns = [(name, kind) for _, name, kind, *_ in connection.execute(f"PRAGMA table_info({table})")]
        wrong = " OR ".join(f"typeof({name}) NOT IN ({TYPES[kind]})" for name, kind in columns)
        if connection.execute(f"SELECT 1 FROM {table} WHERE {wrong} LIMIT 1").fetchone():
            raise ValueError(f"the table {table} holds a value of another type than its column")
    if connection.execute(INCOMPLETE).fetchone():
        raise ValueError("an item lacks its number of turns, or a turn its text")
    for value, in connection.execute("SELECT value FROM meta"):
        json.loads(value)


class Pool:
    """An open pool file. Use as a context manager."""

    def __init__(self, path: Path | str):
        """Open the pool at `path`, or create it.

        Raises UserError for another file, another version, or a disk that cannot be written.
        """
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.connection = sqlite3.connect(self.path, isolation_level=None, timeout=30)
            self.connection.execute("PRAGMA journal_mode=WAL")
            self.connection.execute("PRAGMA synchronous=NORMAL")
            if not self.connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                with self.transaction():
                    create_tables(self.connection)
                    self.set("version", VERSION)
            self._check_version()
            check_tables(self.connection)
        except (ValueError, RecursionError) as error:
            raise self._damaged(error) from None
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"pool {self.path}: {error}; expected a pool of synth.run on a disk that can be written") from None

    def _damaged(self, reason: Exception) -> UserError:
        return UserError(f"pool {self.path}: it is damaged or no pool of synth.run: {one_line(str(reason))}; "
                         "restore it from a copy, or choose another output")

    def _check_version(self) -> None:
        if not self.connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
            raise UserError(f"pool {self.path}: expected a pool of synth.run, got another SQLite file; choose another output")
        found = self.get("version")
        if found != VERSION:
            remedy = "use the newer Steadfast that wrote it" if isinstance(found, int) and found > VERSION else "start a new one"
            raise UserError(f"pool {self.path}: expected version {VERSION}, got {found}; {remedy}")

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        """Close the pool. Raises UserError in the place of an error of SQLite: what it reads is damaged."""
        self.connection.close()
        if isinstance(error, sqlite3.Error):
            raise self._damaged(error) from error

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit all that is written inside, or nothing.

        Raises UserError where the disk refuses; the pool stays as it was.
        """
        try:
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self.connection.execute("ROLLBACK")
                raise
            self.connection.execute("COMMIT")
        except sqlite3.OperationalError as error:
            raise UserError(f"pool {self.path}: cannot be written ({error}); it is intact: free space or correct "
                            "its permissions, and run the same command again") from None

    def get(self, key: str) -> Any:
        """Return a value of the table `meta`, None where there is none."""
        found = self.connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if found is None else json.loads(found[0])

    def set(self, key: str, value: Any) -> None:
        """Store a JSON value in the table `meta`; the caller has opened a transaction."""
        self.connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value, sort_keys=True)))

    def pin_settings(self, key: str, settings: Any, remedy: str) -> None:
        """Store settings at the first call.

        Raises UserError that names the first difference where a later call has other settings.
        """
        settings, pinned = json.loads(json.dumps(settings)), self.get(f"settings.{key}")
        if pinned is None:
            with self.transaction():
                self.set(f"settings.{key}", settings)
        elif pinned != settings:
            changed = next(name for name in sorted(pinned.keys() | settings.keys()) if pinned.get(name) != settings.get(name))
            raise UserError(f"{key}.{changed}: this pool was made with {pinned.get(changed)!r}, found {settings.get(changed)!r}; {remedy}")

    def forget_settings(self, key: str) -> None:
        """Delete settings with which nothing was made; the caller has opened a transaction."""
        self.connection.execute("DELETE FROM meta WHERE key = ?", (f"settings.{key}",))

    def insert(self, table: str, rows: Iterable[Sequence]) -> None:
        """Insert rows, with values in the order of the table's columns; the caller has opened a transaction."""
        rows = iter(rows)
        while page := list(itertools.islice(rows, PAGE)):
            self.connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(page[0]))})", page)

    def select(self, query: str, *values) -> list[tuple]:
        """Return all rows of a query, with `values` for its question marks."""
        return self.connection.execute(query, values).fetchall()

    def add_usage(self, stage: str, model: str, requests: int, prompt_tokens: int, tokens: int, seconds: float, busy: float = 0.0,
              cost: float = 0.0) -> None:
        """Add to what a stage has spent on a model; `busy`: seconds in which the engine itself was computing."""
        self.connection.execute(ADD_USAGE, (stage, model, requests, prompt_tokens, tokens, seconds, busy, cost))

    def chats(self, where: str = ITEM_IS_CLEAN) -> Iterator[Chat]:
        """Yield complete items in the order of their numbers; `where` is an SQL condition on `items`."""
        rows = self.connection.execute(CHATS.format(where=where))
        for (item, system, turns), group in itertools.groupby(rows, key=lambda row: row[:3]):
            texts = [text for *_, text in group]
            if len(texts) == 2 * turns - 1:
                roles = itertools.cycle(("user", "assistant"))
                yield Chat(item, system, tuple({"role": role, "content": text} for role, text in zip(roles, texts)))

    def dump(self) -> dict[str, list[tuple]]:
        """Return the rows of every table but `usage`, in a fixed order: equal for equal settings."""
        rows = {table: self.select(f"SELECT * FROM {table}") for table in TABLES}
        return {table: sorted(found, key=repr) for table, found in rows.items()}
