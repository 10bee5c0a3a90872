"""Fine-tune a real instruct model with and without replay, and show what it says then: `make real`.

SmolLM2-135M-Instruct learns GSM8K. Its replay set is its own: `synth.run` samples instructions through its chat template, and it answers
them. The bundled mini suite measures what is kept, and three of its prompts are answered side by side. Some 50 CPU minutes; what
an earlier start has finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.forgetting.real_model import display, pools, study
from benchmarks.forgetting.real_model.arms import BASE, Arm, synthetic_sets
from benchmarks.forgetting.real_model.jobs import Job, Size, Study
from benchmarks.harness.parallel import begin
from benchmarks.harness.public_sets import add_data_argument
from benchmarks.harness.smollm2 import smollm2
from benchmarks.harness.synthetic_models import quiet
from trainer.errors import UserError, printable
from trainer.files import sole_owner
from trainer.report import page

RUN = Path("runs/real-demo")
SIZE = Size(domain_rows=500, instructions=300, answer_tokens=192, steps=24, tokens=2048, pack=1024, suites=(), words=0, rules=0, public=0,
            problems=40, problem_tokens=128)
ARMS = (Arm("domain only"), Arm("with replay", "self 1x1"))
SHOWN_FILE, SHOWN = "mini_instructions", 3  # the first prompts of this file are shown with their answers
TEMPLATE = Path(__file__).with_name("demo.html.jinja")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forgetting.real_model.demo", description=__doc__.partition("\n")[0])
    add_data_argument(parser, "folder with gsm8k_train.jsonl and gsm8k_test.jsonl")
    arguments = parser.parse_args(argv)
    begun = time.perf_counter()
    begin()
    quiet()
    try:
        with sole_owner(RUN, "demo"):
            summary, jobs = run(arguments.data)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows, answers = display.cells(summary), answers_of(jobs)
    write_page(RUN / "report.html", rows, answers)
    print_all(rows, answers)
    print(f"{(time.perf_counter() - begun) / 60:.0f} minutes. Page: {RUN / 'report.html'}; synthesis: {RUN / 'synth' / 'report.html'}")
    return 0


def run(data: Path | None) -> tuple[list[dict], list[Job]]:
    """Train both arms, and score them beside the base.

    Returns a row of figures for each, and the jobs, the base first, whose folders hold the answers.
    """
    work = RUN.absolute()
    shared = Study(str(smollm2()[0]), SIZE, work, "gsm8k")
    study.claim(work, shared, BASE, [])
    pool = pools.pool_config(work / "synth", shared.base, [], synthetic_sets(ARMS), SIZE)
    measured = study.measure(shared, ARMS, 1, data, pool, min(2, os.cpu_count() or 1))
    return display.summary(measured.base, measured.outcomes), [Job(shared, None), *(Job(shared, arm) for arm in ARMS)]


def answers_of(jobs: Sequence[Job]) -> list[tuple[str, dict[str, str]]]:
    """Return the prompts that are shown, each with the answers by model."""
    shown: dict[str, dict[str, str]] = {}
    for job in jobs:
        records = map(json.loads, (job.folder / "scores" / "results.jsonl").read_text(encoding="utf-8").splitlines())
        for record in [record for record in records if record["file"] == SHOWN_FILE][:SHOWN]:
            answer = record["model"]
            shown.setdefault(record["question"], {})[job.arm.name if job.arm else BASE] = \
                printable(answer["prediction"].strip() or "(nothing)") + ("" if answer["finished"] else " [cut off]")
    return list(shown.items())


def print_all(rows: list[list[str]], answers: list[tuple[str, dict[str, str]]]) -> None:
    """Print the table of figures, and the answers in columns."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
    console.print(display.EXPLAINED)
    for question, by_model in answers:
        beside = Table(*by_model, title=Text(printable(question)), title_justify="left", show_lines=True)
        beside.add_row(*map(Text, by_model.values()))
        console.print(beside)


def write_page(path: Path, rows: list[list[str]], answers: list[tuple[str, dict[str, str]]]) -> None:
    page.write(path, TEMPLATE, [], header=rows[0], rows=rows[1:], answers=answers, explained=display.EXPLAINED)


if __name__ == "__main__":
    sys.exit(main())
