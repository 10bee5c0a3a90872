"""The pool: what is written is there after a kill, what is not whole is not, and other files are refused in one line."""

import multiprocessing
import os
import signal
import sqlite3

import pytest

from synth.pool.store import SCHEMA, TABLES, VERSION, Pool
from trainer.errors import UserError

ITEM = (0, 1.0, 0.98, None, 1)


def test_rows_come_back_and_a_second_opening_sees_them(tmp_path):
    with Pool(tmp_path / "deep" / "pool.sqlite") as pool, pool.transaction():
        pool.insert("items", [ITEM, (1, 0.5, 1.0, "Be brief.", 3)])
        pool.insert("items", [])
        pool.set("x", {"b": [1, None]})
    with Pool(tmp_path / "deep" / "pool.sqlite") as pool:
        assert pool.select("SELECT * FROM items") == [ITEM, (1, 0.5, 1.0, "Be brief.", 3)]
        assert pool.get("x") == {"b": [1, None]} and pool.get("y") is None


def test_every_table_is_dumped_but_what_was_spent(tmp_path):
    with Pool(tmp_path / "a.sqlite") as pool:
        tables = {name for name, in pool.select("SELECT name FROM sqlite_master WHERE type = 'table'")}
        assert tables == set(TABLES) | {"usage"} and SCHEMA.count("CREATE TABLE") == len(tables)
        assert pool.dump().keys() == set(TABLES)


def test_dumps_do_not_depend_on_the_order_of_writing(tmp_path):
    answers = [(i, "base", s, "text", 3, "stop", -1.5, None, None, 7, None) for i in range(3) for s in range(2)]
    dumps = []
    for name, rows in (("a", answers), ("b", answers[::-1])):
        with Pool(tmp_path / name) as pool:
            with pool.transaction():
                pool.insert("responses", rows)
            with pool.transaction():
                pool.add_usage("respond", "base", 6, 60, 18, seconds=len(name))
            dumps.append(pool.dump())
    assert dumps[0] == dumps[1]


def test_a_transaction_is_all_or_nothing(tmp_path):
    with Pool(tmp_path / "pool") as pool:
        with pytest.raises(sqlite3.IntegrityError), pool.transaction():
            pool.insert("items", [ITEM])
            pool.insert("items", [ITEM])
        assert pool.select("SELECT * FROM items") == []


def _write_until_killed(path, written):
    with Pool(path) as pool:
        for i in range(1_000_000):
            with pool.transaction():
                pool.insert("items", [(2 * i, *ITEM[1:]), (2 * i + 1, *ITEM[1:])])
            written.value = i + 1


def test_a_kill_loses_the_batch_in_flight_only(tmp_path):
    context = multiprocessing.get_context("spawn")
    written = context.Value("q", 0)
    writer = context.Process(target=_write_until_killed, args=(tmp_path / "pool", written))
    writer.start()
    while written.value < 20:
        assert writer.is_alive()
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    with Pool(tmp_path / "pool") as pool:
        ids = [i for i, in pool.select("SELECT id FROM items ORDER BY id")]
    assert ids == list(range(len(ids))) and len(ids) % 2 == 0 and len(ids) >= 2 * written.value


def test_what_was_spent_adds_up(tmp_path):
    with Pool(tmp_path / "pool") as pool:
        for _ in range(2):
            with pool.transaction():
                pool.add_usage("judge", "m", 1, 10, 5, 0.5, 0.25, 0.125)
        assert pool.select("SELECT * FROM usage") == [("judge", "m", 2, 20, 10, 1.0, 0.5, 0.25)]


def test_changed_settings_are_named(tmp_path):
    with Pool(tmp_path / "pool") as pool:
        pool.pin_settings("respond", {"samples": 3, "top_p": 0.98}, "choose another output")
        pool.pin_settings("respond", {"samples": 3, "top_p": 0.98}, "choose another output")
        with pytest.raises(UserError, match=r"respond\.top_p: this pool was made with 0\.98, found 1\.0; choose another output"):
            pool.pin_settings("respond", {"samples": 3, "top_p": 1.0}, "choose another output")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text").write_text("not a database, not by far: " * 10)
    with pytest.raises(UserError, match="expected a pool of synth.run"):
        Pool(tmp_path / "text")
    with sqlite3.connect(tmp_path / "other") as other:
        other.execute("CREATE TABLE t (x)")
    with pytest.raises(UserError, match="got another SQLite file"):
        Pool(tmp_path / "other")
    with Pool(tmp_path / "newer") as pool, pool.transaction():
        pool.set("version", VERSION + 1)
    with pytest.raises(UserError, match=rf"expected version {VERSION}, got {VERSION + 1}; use the newer Steadfast"):
        Pool(tmp_path / "newer")


def test_a_full_disk_is_one_line_and_the_pool_stays(tmp_path):
    with Pool(tmp_path / "pool") as pool:
        with pool.transaction():
            pool.insert("items", [ITEM])
        pool.connection.execute("PRAGMA max_page_count = 60")
        with pytest.raises(UserError, match="cannot be written .*it is intact: free space"), pool.transaction():
            pool.insert("turns", [(i, 0, "x" * 500, 1, "stop", -1.0, 1) for i in range(2000)])
        assert pool.select("SELECT count(*) FROM turns") == [(0,)] and pool.select("SELECT * FROM items") == [ITEM]


DAMAGE = {
    "a trigger": "CREATE TRIGGER t AFTER INSERT ON items BEGIN DELETE FROM items; END",
    "a view": "CREATE VIEW v AS SELECT * FROM items",
    "a view in the place of a table": "DROP TABLE fresh; CREATE VIEW fresh AS SELECT * FROM items",
    "a missing table": "DROP TABLE scores",
    "another column": "ALTER TABLE turns ADD COLUMN x TEXT",
    "text for a number": "UPDATE items SET turns = 'two'",
    "bytes for a text": "UPDATE turns SET text = x'ff00'",
    "no number of turns": "UPDATE items SET turns = NULL",
    "a turn without a text": "UPDATE turns SET text = NULL",
    "settings that are no JSON": "INSERT INTO meta VALUES ('settings.judge', '{')",
    "deep JSON": f"INSERT INTO meta VALUES ('settings.judge', '{'[' * 100_000}')",
    "a version that is no JSON": "UPDATE meta SET value = 'x' WHERE key = 'version'",
}


def made(path):
    with Pool(path) as pool, pool.transaction():
        pool.insert("items", [(i, *ITEM[1:]) for i in range(300)])
        pool.insert("turns", [(i, 0, "words " * 20, 1, "stop", -1.0, 1) for i in range(300)])
    return path


@pytest.mark.parametrize("script", DAMAGE.values(), ids=DAMAGE.keys())
def test_what_is_no_pool_below_its_header_is_one_line(tmp_path, script):
    with sqlite3.connect(made(tmp_path / "pool")) as other:
        other.executescript(script)
    other.close()
    with pytest.raises(UserError, match=r"^pool .*pool: it is damaged or no pool of synth.run: .*; restore it from a copy") as raised:
        Pool(tmp_path / "pool")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("part", [0.15, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("data", [bytes(4096), b"\xff" * 4096], ids=["zeros", "ones"])
def test_damaged_pages_are_one_line(tmp_path, part, data):
    content = bytearray(made(tmp_path / "pool").read_bytes())
    start = int(part * len(content)) // 4096 * 4096
    content[start : start + 4096] = data
    (tmp_path / "pool").write_bytes(content)
    with pytest.raises(UserError, match="^pool "):
        Pool(tmp_path / "pool")


def test_damage_that_is_met_later_is_one_line(tmp_path):
    with pytest.raises(UserError, match="it is damaged"), Pool(made(tmp_path / "pool")) as pool:
        pool.select("SELECT CAST(x'ff' AS TEXT)")
