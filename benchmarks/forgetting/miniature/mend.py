"""Bring back with `trainer.recover` what the miniature forgot, beside training anew with replay.

The adapter is the demo's, trained on the domain alone. Prompts and replay set are the base's own: its instructions and its greedy answers.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.forgetting.miniature.demo import ITEMS, ROWS, recipe, scores
from benchmarks.forgetting.miniature.domain import DOMAIN
from benchmarks.forgetting.miniature.family import FAMILY
from benchmarks.forgetting.miniature.table import figures
from benchmarks.forgetting.miniature.world import training_records, write_jsonl
from benchmarks.harness import record, show
from benchmarks.harness.parallel import THREADS
from benchmarks.harness.record import origin
from benchmarks.harness.suite import Caption, Suite, View
from synth import config as synthesis
from synth.run import synthesise
from trainer.config import BatchSize
from trainer.recover import recover
from trainer.recovery.config import Recover
from trainer.run import train

INSTRUCTIONS = 1500
RUN = Path("runs/mend")


def run(_: argparse.Namespace) -> dict:
    """Run the arms as a suite of `python -m benchmarks.run`, and return their record."""
    torch.set_num_threads(THREADS)
    disable_progress_bar()
    shutil.rmtree(RUN, ignore_errors=True)
    base, seconds, arms = FAMILY["base"].folder, {}, {"base": scores(FAMILY["base"].folder)}
    domain = write_jsonl(training_records(DOMAIN, ROWS, seed=0), RUN / "domain.jsonl")
    items = [str(write_jsonl([{"prompt": item.instruction, "answer": item.answer} for item in of_role], RUN / f"{name}.jsonl"))
             for name, of_role in zip(("general", "domain-items"), ITEMS)]
    replay = RUN / "synth" / "replay.jsonl"
    recovery = Recover(
        adapter=str(RUN / "domain-only" / "adapter"), prompts=str(replay), domain=str(domain), general=items[0], domain_items=items[1],
        output=str(RUN / "recovered"), scale=0.4, share=0.6, lr=1e-3, rounds=8, steps=100, answers=600, max_tokens=32,
        batch=BatchSize(512, 512))
    work = {
        "domain only": lambda: train(recipe(base, domain, RUN / "domain-only")),
        "the base's replay set": lambda: synthesise(own_answers(base)),
        "trained anew with replay": lambda: train(recipe(base, domain, RUN / "with-replay", replay)),
        "recovered": lambda: recover(recovery)}
    for name, do in work.items():
        begun = time.perf_counter()
        result = do()
        seconds[name] = time.perf_counter() - begun
        if result:
            arms[name] = scores(base, result.folder)
    rows = [row | {"seconds": seconds.get(row["line"])} for row in figures(arms)]
    conditions = {"items": dict(zip(("general", "domain"), map(len, ITEMS))), "domain_rows": ROWS, "prompts": INSTRUCTIONS,
                  "seconds": seconds, "floor": recovery.floor}
    raw = {arm: [{"items": name, "right": "".join("01"[right] for right in scores.right)}
                 for name, scores in zip(("general", "domain"), both)] for arm, both in arms.items()}
    return record.make("mend-cpu", conditions, {}, rows, raw)


def own_answers(base: Path) -> synthesis.Config:
    """Return the configuration of a replay set of the base's own instructions and greedy answers."""
    return synthesis.Config(
        output=str(RUN / "synth"), base=synthesis.Model(path=str(base), engine="transformers"),
        stages=["instruct", "clean", "respond", "select"], select=synthesis.Select(rule="first"),
        instruct=synthesis.Instruct(num_instructions=INSTRUCTIONS, max_tokens=64, reference_samples=0),
        respond=synthesis.Respond(num_samples=0, max_tokens=32))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no options: the suite has none."""


def table_of(record: dict) -> list[list[str]]:
    def shown(row: dict) -> list[str]:
        seconds = row["seconds"]
        return [*(f"{row[column]:.3f}" for column in ("general", "domain", "forgotten")), "" if seconds is None else f"{seconds:.0f}"]

    return [["model", "general", "domain", "forgotten", "seconds"]] + [[row["line"], *shown(row)] for row in record["summary"]]


def caption(record: dict) -> Caption:
    c = record["conditions"]
    shared = c["seconds"]["the base's replay set"]
    return Caption(
        f"Exact match of greedy answers to {c['items']['general']} general and {c['items']['domain']} held-out domain items. Seconds of "
        f"training, for the recovery with its measurements; both need the base's instructions, which took {shared:.0f} s more.",
        (f"{c['domain_rows']} domain chats, {c['prompts']:,} prompts of the base's own; floor {c['floor']:.0%}.",
         f"{show.machine(record)}; {origin(record)}."))


def draw(record: dict, figure) -> None:
    """Draw general against domain accuracy, one point for each arm."""
    axes = show.axes_of(figure)
    for row in record["summary"]:
        axes.plot(row["domain"], row["general"], "o", markersize=9, color=show.OURS, clip_on=False)
        left = row["line"] == "recovered"  # its neighbour's name stands on the right
        axes.annotate(row["line"], (row["domain"], row["general"]), xytext=(-8 if left else 8, 8), textcoords="offset points",
                      ha="right" if left else "left")
    axes.set(xlabel="domain accuracy", ylabel="general accuracy", xlim=(0, 1.15), ylim=(0, 1.1))


SUITE = Suite("mend", "What the miniature forgot, brought back by trainer.recover, beside training anew with replay", add_arguments, run,
              {"mend": View(table_of, caption, draw, lambda record: "An adapter that forgot, and what brings it back")})
