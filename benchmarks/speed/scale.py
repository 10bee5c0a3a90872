"""Measure time and memory where there is very much of something.

There are cases of many rows, sources, items, scores, logged steps and words (`benchmarks/speed/scale_worker.py`). Each runs in a process
of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import record, show
from benchmarks.harness.arguments import check_names
from benchmarks.harness.record import origin
from benchmarks.harness.suite import Caption, Suite, View
from trainer.errors import UserError, require


@dataclass(frozen=True)
class Case:
    """A case in full size: the function of the worker that does it, and what a table says."""

    function: str
    size: int
    text: str  # with its size
    again: bool = False  # once more, in another process: from caches
    fixed: bool = False  # of its full size at any share


CASES = {
    "rows": Case("rows", 1_000_000, "{:,} short chats: a run's start", again=True),
    "document": Case("document", 1_000_000, "one chat of {:,} words: a run's start", fixed=True),
    "sources-alike": Case("sources_alike", 10_000, "{:,} files of one name: a run's start"),
    "sources-apart": Case("sources_apart", 10_000, "{:,} files of different names: a run's start"),
    "items": Case("items", 100_000, "{:,} items beside their base"),
    "pool": Case("pool", 1_000_000, "a pool of {:,} scores"),
    "metrics": Case("metrics", 1_000_000, "metrics of {:,} steps"),
    "mcnemar": Case("mcnemar_tail", 80_000, "McNemar's p-value, {:,} items lost", fixed=True),
}
AGAIN = "the second start"


def measure(case: Case, size: int, folder: Path) -> dict:
    """Run a case in a process of its own. Raises UserError with its last line where that fails."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.speed.scale_worker", case.function, str(size), str(folder)],
                          capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"scale: the case {case.function} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---------------------------------------------------------------- the suite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--share", type=float, default=0.1, help="of the full sizes, such as a million rows (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", metavar="CASE", default=list(CASES), help="of: " + ", ".join(CASES))


def run(arguments: argparse.Namespace) -> dict:
    """Measure each case, and return the record."""
    require(0 < arguments.share <= 1, "--share", "more than 0 and at most 1", arguments.share)
    check_names("--cases", arguments.cases, CASES)
    summary = []
    for name in arguments.cases:
        case = CASES[name]
        size = case.size if case.fixed else max(20, round(arguments.share * case.size))
        with tempfile.TemporaryDirectory(prefix="steadfast-scale-") as folder:
            for text in (case.text.format(size), *([AGAIN] if case.again else [])):
                row = {"line": text, "case": name, "size": size, **measure(case, size, Path(folder))}
                print(f"{text}: {sum(row['seconds'].values()):.1f} CPU-s, {row['peak_mib']:,.0f} MiB", file=sys.stderr, flush=True)
                summary.append(row)
    return record.make("scale-cpu", {"share": arguments.share}, {}, summary, {})


def table(made: dict) -> list[list[str]]:
    rows = [["what there is much of", "CPU seconds", "by part", "µs each", "peak, MiB", "of it the work's, MiB"]]
    for row in made["summary"]:
        total = sum(row["seconds"].values())
        parts = ", ".join(f"{name} {seconds:,.1f}" for name, seconds in row["seconds"].items())
        rows.append([row["line"], f"{total:,.1f}", parts, f"{1e6 * total / row['size']:,.1f}", f"{row['peak_mib']:,.0f}",
                     f"{row['peak_mib'] - row['before_mib']:,.0f}"])
    return rows


def caption(made: dict) -> Caption:
    return Caption(
        f"Time and memory where there is very much of something, one process for each row of the table; {made['cpu']}.",
        ("A run's start: read, tokenize with one process and plan three epochs; the second start finds the caches of the first.",
         "Peak: of the whole process, of which the imported libraries are the larger part where there is little work.",
         f"{origin(made)}."))


def headline(made: dict) -> str:
    first = next((row for row in made["summary"] if row["case"] == "rows"), None)
    return f"{first['size']:,} chats are ready to train on after {sum(first['seconds'].values()):,.0f} CPU seconds" if first else ""


def draw(made: dict, figure) -> None:
    """Draw the time of each case and, beside it, its memory."""
    rows = made["summary"][::-1]
    figure.set_size_inches(10, 0.4 * len(rows) + 1.5)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, values, label in ((left, [sum(row["seconds"].values()) for row in rows], "CPU seconds"),
                                (right, [row["peak_mib"] for row in rows], "peak memory, MiB")):
        show.bars(axes, [row["line"] for row in rows], [{"value": v, "low": v, "high": v} for v in values], [show.OURS] * len(rows), ",.1f")
        axes.set_xlabel(label)


SUITE = Suite("scale", "Time and memory of a million rows, and of much of everything else", add_arguments, run,
              {"scale": View(table, caption, draw, headline)})
