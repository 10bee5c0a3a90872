"""Cached records and tokens are whole, or made anew: damage never reaches training, and never stops it."""

import pytest

from tests.helpers import tiny
from tests.helpers.runs import write_chats
from trainer.config import Data
from trainer.data.chat_template import ChatTemplate
from trainer.data.sources import load_sources
from trainer.data.tokenize import tokenize


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
