"""Cached records and tokens are whole, or made anew: damage never reaches training, and never stops it."""

import fcntl
import os
import tracemalloc

import pyarrow
import pytest

from tests.helpers import tiny
from tests.helpers.runs import write_chats
from trainer.checksums import verify_checksum, write_checksum
from trainer.config import Data
from trainer.data.chat_template import ChatTemplate
from trainer.data.sources import load_sources
from trainer.data.tokenize import tokenize
from trainer.errors import UserError
from trainer.files import temporary_folder


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit": flip,
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "overwritten": lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
    "removed": lambda path: path.unlink(),
    "never finished": lambda path: path.with_name(path.name + ".xxh3").unlink(),
}


@pytest.mark.parametrize("kind", ["records", "tokens"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_entries_are_made_anew(tmp_path, capsys, kind, damage):
    chats, cache = write_chats(tmp_path / "chats.jsonl"), tmp_path / "cache"

    def fingerprint() -> str:
        sources = load_sources(str(chats), "domain", str(cache))
        return tokenize(sources, ChatTemplate(tiny.tokenizer()), Data(cache_dir=str(cache), num_proc=1)).fingerprint

    whole = fingerprint()
    entry, = (cache / kind).iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in cache.rglob("*.arrow")}
    assert fingerprint() == whole and {path.name: path.stat().st_mtime_ns for path in cache.rglob("*.arrow")} == before
    assert capsys.readouterr().out == ""
    damage(next(entry.glob("*.arrow")))
    assert fingerprint() == whole
    assert capsys.readouterr().out.startswith(f"data: the cache {entry} is damaged and made anew: ")
    assert fingerprint() == whole and capsys.readouterr().out == ""
    assert [path.name for path in (cache / kind).iterdir()] == [entry.name]


def test_what_killed_writers_left_is_removed_and_what_others_write_is_not(tmp_path):
    left, used = (tmp_path / name for name in (".making.left", ".making.used"))
    for folder in (left, used):
        folder.mkdir()
        (folder / "tmp1.arrow").touch()
    handle = os.open(used, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with temporary_folder(tmp_path, "making") as made, temporary_folder(tmp_path, "making") as second:
        assert {path for path in tmp_path.iterdir()} == {used, made, second} and not list(made.iterdir())
    os.close(handle)
    assert list(tmp_path.iterdir()) == [used]
    with temporary_folder(tmp_path, "making"):
        assert not used.exists()


@pytest.mark.parametrize("kind", ["records", "tokens"])
def test_a_full_disk_is_told_by_the_cache(tmp_path, monkeypatch, kind):
    cache, opened = tmp_path / "cache", pyarrow.ipc.new_stream
    monkeypatch.setattr(pyarrow.ipc, "new_stream", lambda path, schema: opened("/dev/full" if f"/{kind}." in path else path, schema))
    with pytest.raises(UserError, match=f"^data.cache_dir: cannot write the cache {cache / kind}: No space left on device; free space, or"):
        tokenize(load_sources(str(write_chats(tmp_path / "chats.jsonl")), "domain", str(cache)), ChatTemplate(tiny.tokenizer()),
                 Data(cache_dir=str(cache), num_proc=1))
    assert not list((cache / kind).iterdir())


def test_a_small_file_costs_little_memory_to_verify(tmp_path):
    (tmp_path / "small").write_bytes(b"x" * 1000)
    tracemalloc.start()
    write_checksum(tmp_path / "small", durable=False)
    verify_checksum(tmp_path / "small")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**17  # 16 MiB of zeros for each of ten thousand files took minutes
