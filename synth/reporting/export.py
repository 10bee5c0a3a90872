"""What a pool becomes: the replay set that `trainer.run` reads, preference pairs in TRL's format, and the manifest of both.

Every file is written beside its place and renamed into it. Equal pools give equal bytes: nothing says when or where it was written.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pyarrow
import pyarrow.parquet

from synth.judging.calibration import JudgeScale
from synth.pool.run import SynthesisRun
from synth.reporting.manifest import manifest
from trainer.errors import UserError
from trainer.files import atomic_file

ROWS = 10_000  # of one group of a Parquet file
MESSAGE = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
RECORD = pyarrow.schema([("messages", pyarrow.list_(MESSAGE)), ("id", pyarrow.string()), ("source", pyarrow.string()),
                         ("weight", pyarrow.float64())])


def export(run: SynthesisRun, scales: Mapping[str, JudgeScale]) -> None:
    """Write replay.jsonl or .parquet, pairs.jsonl and manifest.json. UserError where nothing was chosen, or the disk does not take it."""
    if not run.pool.select("SELECT 1 FROM selection LIMIT 1"):
        raise nothing_left(run)
    write = {"jsonl": write_lines, "parquet": write_parquet}
    replay = run.folder / f"replay.{run.config.format}"
    try:
        write[run.config.format](replay, records(run))
        for other in write.keys() - {run.config.format}:
            (run.folder / f"replay.{other}").unlink(missing_ok=True)
        write_lines(run.folder / "pairs.jsonl", pairs(run))
        with atomic_file(run.folder / "manifest.json") as aside:
            aside.write_text(json.dumps(manifest(run, scales, replay.name), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the replay set in {run.folder}: {error.strerror or error}; the pool is whole: free space or rights, "
                        "and run again: --stages '[select]'") from None
    run.say(f"select: wrote {replay}, pairs.jsonl and manifest.json")


def nothing_left(run: SynthesisRun) -> UserError:
    planned = run.pool.select("SELECT count(*) FROM items")[0][0]
    dropped = run.pool.select("SELECT stage, reason, count(*) FROM drops GROUP BY stage, reason ORDER BY count(*) DESC, stage, reason")
    said = "; ".join(f"{stage} dropped {count:,}: {reason}" for stage, reason, count in dropped)
    return UserError(f"pool {run.pool.path}: expected items for a replay set, found none of {planned:,} left "
                     f"({said or 'none was sampled'}); loosen what dropped the most")


# ---------------------------------------------------------------- records


def records(run: SynthesisRun) -> Iterator[dict]:
    """Chats with the chosen answer, in the order of their items."""
    for item, prompt, weight, author, text, *_ in _chosen(run):
        yield {"messages": [*prompt, _answer(text)], "id": f"synth-{item}", "source": author, "weight": weight}


def pairs(run: SynthesisRun) -> Iterator[dict]:
    """Chosen and rejected answers of the items that have both, with their ratings."""
    for _, prompt, _, _, text, value, rejected, rejected_value in _chosen(run):
        if rejected is not None:
            yield {"prompt": prompt, "chosen": [_answer(text)], "rejected": [_answer(rejected)], "score_chosen": value,
                   "score_rejected": rejected_value}


def _answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


def _chosen(run: SynthesisRun) -> Iterator[tuple]:
    """Item, prompt messages, weight, author, chosen text, its rating, rejected text and its rating, for each row of `selection`."""
    rows = run.pool.connection.execute(
        "SELECT s.item, t.weight, s.model, c.text, s.value, r.text, s.rejected_value FROM selection AS s "
        "JOIN responses AS c ON c.item = s.item AND c.model = s.model AND c.sample = s.sample "
        "LEFT JOIN responses AS r ON r.item = s.item AND r.model = s.rejected_model AND r.sample = s.rejected_sample "
        "LEFT JOIN traits AS t ON t.item = s.item ORDER BY s.item")
    chats = run.pool.chats("id IN (SELECT item FROM selection)")
    for chat, (item, weight, *rest) in zip(chats, rows, strict=True):
        assert chat.item == item
        # a blank system prompt is none to the trainer
        system = [{"role": "system", "content": chat.system}] if chat.system and chat.system.strip() else []
        yield item, [*system, *chat.messages], 1.0 if weight is None else weight, *rest


# ---------------------------------------------------------------- files


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    with atomic_file(path) as aside, aside.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_parquet(path: Path, rows: Iterable[dict]) -> None:
    rows = iter(rows)
    with atomic_file(path) as aside, pyarrow.parquet.ParquetWriter(aside, RECORD) as file:
        while batch := list(itertools.islice(rows, ROWS)):
            file.write_table(pyarrow.Table.from_pylist(batch, schema=RECORD))
