"""Attack the rows of data files: every layout that is read, mutated."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from random import Random

import pyarrow
import pyarrow.parquet

from tests.campaign.forked import Ended, complete
from tests.campaign.material import Material
from tests.campaign.odd_values import damaged, json_text, mutated, odd_value
from tests.campaign.oracle import Verdict, judge

CALL = {"id": "c1", "type": "function", "function": {"name": "warm", "arguments": {"room": "attic", "n": 3}}}
TOOL = {"type": "function", "function": {"name": "warm", "description": "How warm?", "parameters": {
    "type": "object", "properties": {"room": {"type": "string"}}, "required": ["room"]}}}
LAYOUTS = (
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 + 4?"},
                  {"role": "assistant", "content": "It is 7.", "weight": 1}], "id": "a", "source": "s", "weight": 1.0},
    {"messages": [{"role": "user", "content": "How warm is it?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                  {"role": "tool", "tool_call_id": "c1", "content": "31"}, {"role": "assistant", "content": "31 degrees."}],
     "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Name a colour."}]},
                  {"role": "assistant", "reasoning_content": "Hm.", "content": "Blue.", "train": True}], "documents": []},
    {"conversations": [{"from": "human", "value": "What is 1 + 1?"}, {"from": "gpt", "value": "2"}], "system": "Count."},
    {"instruction": "Add", "input": "1 and 2", "output": "3", "weight": 2},
    {"prompt": "What is 5 + 5?", "completion": "10"},
    {"prompt": [{"role": "user", "content": "x?"}], "completion": [{"role": "assistant", "content": "y."}]},
    {"text": "The quick brown fox jumps over the lazy dog."},
)
ITEM_LAYOUTS = (
    {"prompt": "What is 1 + 1?", "answer": "2", "id": "q"},
    {"question": "Which?", "choices": ["one", "two"], "answer": 1},
    {"question": "Which?", "choices": {"text": ["one", "two"], "label": ["A", "B"]}, "answer": "B"},
    {"prompt": "Write.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    {"text": "The quick brown fox."},
)
WAYS = (*["chats"] * 6, *["items"] * 2, "synthesis")
SUFFIXES = (".jsonl",) * 6 + (".json", ".csv", ".parquet")


def attack(dice: Random, folder: Path, material: Material) -> Verdict:
    """Write a file of good rows with a mutated one among them, and let a command read it."""
    way = dice.choice(WAYS)
    good = dice.choice(ITEM_LAYOUTS if way == "items" else LAYOUTS)
    bad = mutated(dice, good, dice.choice((1, 1, 1, 2, 4)))
    bad = odd_value(dice, 3) if dice.random() < 0.08 else bad
    rows = [good] * dice.choice((0, 1, 3))
    rows.insert(dice.randrange(len(rows) + 1), bad)
    suffix = dice.choice(SUFFIXES)
    path = folder / f"rows{suffix}"
    path.write_bytes(file_of(dice, rows, suffix))
    if way == "items":
        metric = dice.choice(("auto", "auto", "exact", "regex", "choice", "rules", "continuation", "logprob"))
        ended = complete("trainer.evaluate",
                         ["--model.path", material.model, "--data.general", path, "--output", "out", "--data.metric", metric,
                                              "--generation.max_tokens", "2", "--statistics.bootstrap", "100"], folder)
        return judge(ended, quotes_python=True)
    if way == "synthesis":
        ended = complete("synth.run",
                         ["--base.path", material.model, "--output", "out", "--base.engine", "transformers", "--stages", "[clean]",
                                       "--clean.contamination", json.dumps([str(path)])], folder)
        return judge(ended, quotes_python=True)
    more = dice.choice(((), (), (), ("--data.on_bad_row", "skip"), ("--data.on_overlong", "truncate"), ("--data.same_role", "join"),
                        ("--data.train_on", "last"), ("--data.on_overlong", "drop")))
    ended = material.dry_run(folder, "--data.train", path, *more)
    lines = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))
    return judge(ended, uncounted(ended, lines) if suffix == ".jsonl" else None, quotes_python=True)


def file_of(dice: Random, rows: list, suffix: str) -> bytes:
    """Return a file of the rows in one of the formats; some files are damaged.

    Rows that a format cannot hold go in as JSON.
    """
    if suffix == ".parquet":
        try:
            content = parquet(rows)
        except (pyarrow.ArrowException, TypeError, ValueError, OverflowError, AttributeError):  # rows of which Arrow makes no table
            content = parquet([{"messages": json.dumps(row)} for row in rows])
    elif suffix == ".csv":
        text = io.StringIO()
        table = csv.writer(text)
        rows = [row if isinstance(row, dict) else {"x": row} for row in rows]
        table.writerow(dict.fromkeys(key for row in rows for key in row))
        for row in rows:
            table.writerow([value if isinstance(value, str) else json.dumps(value) for value in row.values()])
        content = text.getvalue().encode("utf-8", "surrogatepass")
    elif suffix == ".json":
        content = json_text(dice.choice((rows, {"data": rows}, rows[0], dict(enumerate(rows)))), dice.random() < 0.7)
    else:
        content = b"\n".join(json_text(row, dice.random() < 0.7) for row in rows) + b"\n"
    return damaged(dice, content) if dice.random() < 0.12 else content


def parquet(rows: list) -> bytes:
    out = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue().to_pybytes()


def uncounted(ended: Ended, rows: int) -> str | None:
    """Return what a dry run does not account for: each row is a sample, or counted as none."""
    table = re.search(r"domain\s+([\d,]+)\s+[\d,]+\s+\d+%\s+[\d.]+%\s+[\d.]+%\s+([\d,]+)\s+[\d,]+\s+[\d,]+\s+([\d,]+)\s+([\d,]+)\s",
                      ended.output)
    if ended.status:
        return None
    found = sum(int(number.replace(",", "")) for number in table.groups()) if table else None
    return None if found == rows else f"{rows} rows, of which the dry run accounts for {found}"
