"""Write the replay set, preference pairs in TRL's format, and the manifest of both.

Every file is written atomically. Equal pools give equal bytes: no file contains a time or a path.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from synth.judging.calibration import JudgeScale
from synth.pool.synthesis_run import SynthesisRun
from synth.reporting.manifest import manifest
from trainer.errors import UserError
from trainer.files import atomic_file

ROW_GROUP = 10_000  # rows of a Parquet row group
MESSAGE = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
RECORD = pyarrow.schema([("messages", pyarrow.list_(MESSAGE)), ("id", pyarrow.string()), ("source", pyarrow.string()),
                         ("weight", pyarrow.float64())])

DROPS_BY_REASON = "SELECT stage, reason, count(*) FROM drops GROUP BY stage, reason ORDER BY count(*) DESC, stage, reason"
# Every selected item with the texts of its chosen and rejected responses, in the order of items; a row is a SelectedRow
SELECTED = """
    SELECT s.item, t.weight, s.model, c.text, s.value, r.text, s.rejected_value
    FROM selection AS s JOIN responses AS c ON c.item = s.item AND c.model = s.model AND c.sample = s.sample
    LEFT JOIN responses AS r ON r.item = s.item AND r.model = s.rejected_model AND r.sample = s.rejected_sample
    LEFT JOIN traits AS t ON t.item = s.item ORDER BY s.item"""
IS_SELECTED = "id IN (SELECT item FROM selection)"


def export(run: SynthesisRun, scales: Mapping[str, JudgeScale]) -> None:
    """Write replay.jsonl or replay.parquet, pairs.jsonl and manifest.json.

    Raises UserError where nothing was selected, or the files cannot be written.
    """
    if not run.pool.select("SELECT 1 FROM selection LIMIT 1"):
        raise nothing_selected(run)
    writers = {"jsonl": write_json_lines, "parquet": write_parquet}
    replay = run.folder / f"replay.{run.config.format}"
    try:
        writers[run.config.format](replay, replay_records(run))
        for other in writers.keys() - {run.config.format}:
            (run.folder / f"replay.{other}").unlink(missing_ok=True)
        write_json_lines(run.folder / "pairs.jsonl", preference_pairs(run))
        with atomic_file(run.folder / "manifest.json") as tmp:
            tmp.write_text(json.dumps(manifest(run, scales, replay.name), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the replay set in {run.folder}: {error.strerror or error}; the pool is complete: free disk space or "
                        "change permissions, and run again: --stages '[select]'") from None
    run.say(f"select: wrote {replay}, pairs.jsonl and manifest.json")


def nothing_selected(run: SynthesisRun) -> UserError:
    """Return an error that says which rules dropped all items."""
    (planned,), = run.pool.select("SELECT count(*) FROM items")
    drops = "; ".join(f"{stage} dropped {count:,}: {reason}" for stage, reason, count in run.pool.select(DROPS_BY_REASON))
    return UserError(f"pool {run.pool.path}: expected items for a replay set, got none: of {planned:,} planned items none is left "
                     f"({drops or 'none was sampled'}); loosen the rule that dropped the most")


# ---------------------------------------------------------------- records


class SelectedRow(NamedTuple):
    """A row of the query SELECTED."""

    item: int
    weight: float | None
    model: str
    chosen: str
    value: float | None
    rejected: str | None
    rejected_value: float | None


def replay_records(run: SynthesisRun) -> Iterator[dict]:
    """Yield the selected chats with their chosen response, in the order of items."""
    for prompt, row in _selected_chats(run):
        weight = 1.0 if row.weight is None else row.weight
        yield {"messages": [*prompt, _response(row.chosen)], "id": f"synth-{row.item}", "source": row.model, "weight": weight}


def preference_pairs(run: SynthesisRun) -> Iterator[dict]:
    """Yield chosen and rejected responses with their ratings, for the items that have both."""
    for prompt, row in _selected_chats(run):
        if row.rejected is not None:
            yield {"prompt": prompt, "chosen": [_response(row.chosen)], "rejected": [_response(row.rejected)],
                   "score_chosen": row.value, "score_rejected": row.rejected_value}


def _response(text: str) -> dict:
    return {"role": "assistant", "content": text}


def _selected_chats(run: SynthesisRun) -> Iterator[tuple[list[dict], SelectedRow]]:
    """Yield the prompt's messages with each selected row."""
    rows = map(SelectedRow._make, run.pool.connection.execute(SELECTED))
    for chat, row in itertools.zip_longest(run.pool.chats(IS_SELECTED), rows):
        if chat is None or row is None or chat.item != row.item:
            raise UserError(f"pool {run.pool.path}: it is damaged: a selected item lacks its turns or its response; "
                            "restore it from a copy, or choose another output")
        # the trainer ignores a blank system prompt
        system = [{"role": "system", "content": chat.system}] if chat.system and chat.system.strip() else []
        yield [*system, *chat.messages], row


# ---------------------------------------------------------------- files


def write_json_lines(path: Path, rows: Iterable[dict]) -> None:
    """Write one JSON object a line."""
    with atomic_file(path) as tmp, tmp.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_parquet(path: Path, rows: Iterable[dict]) -> None:
    """Write records in the schema RECORD."""
    rows = iter(rows)
    with atomic_file(path) as tmp, pyarrow.parquet.ParquetWriter(tmp, RECORD) as file:
        while batch := list(itertools.islice(rows, ROW_GROUP)):
            file.write_table(pyarrow.Table.from_pylist(batch, schema=RECORD))
