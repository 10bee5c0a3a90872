"""Fine-tune the miniature base on the domain with and without replay, and show what it forgets.

Usage: `python -m benchmarks.forgetting.miniature.demo`. Replay is made by the whole method: `synth.run` samples instructions from the base,
three models respond and judge, and the best responses become the replay set; `trainer.run` trains on the domain and the replay set.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

import torch
from peft import PeftModel
from transformers.utils.logging import disable_progress_bar

from benchmarks.forgetting.miniature.domain import DOMAIN
from benchmarks.forgetting.miniature.evaluate import Scores, evaluate
from benchmarks.forgetting.miniature.family import FAMILY, load
from benchmarks.forgetting.miniature.judging import RUBRIC
from benchmarks.forgetting.miniature.skills import GENERAL
from benchmarks.forgetting.miniature.table import figures, table
from benchmarks.forgetting.miniature.world import heldout_items, training_records, write_jsonl
from benchmarks.harness import record, show
from benchmarks.harness.parallel import THREADS
from benchmarks.harness.record import origin
from benchmarks.harness.suite import Caption, Suite, View
from synth import config as synthesis
from synth.run import synthesise
from trainer.config import BatchSize, Config, Data, Logging, Lora, Model, Optim, Replay
from trainer.errors import UserError
from trainer.run import train

ROWS, EPOCHS = 600, 8
INSTRUCTIONS = 3000
RUN = Path("runs/demo")
ITEMS = heldout_items(GENERAL, 80), heldout_items(DOMAIN, 80)


def synthesis_config(output: Path, count: int) -> synthesis.Config:
    """Return the configuration of synthesis: three models respond to the base's instructions and judge.

    The judge prompt is the one that the models were trained to judge by.
    """
    base, *others = (synthesis.Model(path=str(member.folder)) for member in FAMILY.values())
    return synthesis.Config(
        output=str(output), base=base, responders=others, probe=synthesis.Probe(samples=200),
        instruct=synthesis.Instruct(num_instructions=count, max_tokens=64), respond=synthesis.Respond(max_tokens=32),
        judge=synthesis.Judge(rubric=str(RUBRIC)))


def recipe(base: Path, domain: Path, output: Path, replay: Path | None = None) -> Config:
    """Return the configuration of a run: LoRA on every linear layer, about eight chats a step.

    So small a model needs a learning rate 25 times that of a large one.
    """
    return Config(
        output=str(output), model=Model(path=str(base)), lora=Lora(rank=16, alpha=32.0), data=Data(train=str(domain), max_length=256),
        replay=Replay(data=str(replay)) if replay else Replay(),
        batch=BatchSize(tokens_per_pack=256, tokens_per_step=256), optim=Optim(lr=5e-3), epochs=EPOCHS, logging=Logging(every=100))


def measure() -> dict[str, tuple[Scores, Scores]]:
    """Train and return the general and domain scores of each arm.

    Raises UserError if a run cannot be made.
    """
    torch.set_num_threads(THREADS)
    disable_progress_bar()
    base = FAMILY["base"].folder
    arms = {"base": scores(base)}
    shutil.rmtree(RUN, ignore_errors=True)
    domain = write_jsonl(training_records(DOMAIN, ROWS, seed=0), RUN / "domain.jsonl")
    arms["domain only"] = scores(base, train(recipe(base, domain, RUN / "domain-only")).folder)
    synthesise(synthesis_config(RUN / "synth", INSTRUCTIONS))
    arms["with replay"] = scores(base, train(recipe(base, domain, RUN / "with-replay", RUN / "synth" / "replay.jsonl")).folder)
    return arms


def scores(base: Path, run: Path | None = None) -> tuple[Scores, Scores]:
    """Return the general and the domain scores of the base, or of the base with a run's adapter."""
    model, tokenizer = load(base)
    if run:
        model = PeftModel.from_pretrained(model, run / "adapter")
    return tuple(evaluate(model, tokenizer, items) for items in ITEMS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no options: the suite has none."""


def run(_: argparse.Namespace) -> dict:
    """Run the demo as a suite of `python -m benchmarks.run`, and return its record."""
    begun = time.perf_counter()
    arms = measure()
    conditions = {"items": {name: len(items) for name, items in zip(("general", "domain"), ITEMS)}, "domain_rows": ROWS, "epochs": EPOCHS,
                  "seconds": time.perf_counter() - begun}
    raw = {arm: [{"items": name, "right": "".join("01"[right] for right in scores.right)}
                 for name, scores in zip(("general", "domain"), both)] for arm, both in arms.items()}
    return record.make("demo-cpu", conditions, {}, figures(arms), raw)


# ---------------------------------------------------------------- how a record is shown


def table_of(record: dict) -> list[list[str]]:
    columns = ("general", "domain", "forgotten")
    return [["model", *columns]] + [[row["line"], *(f"{row[column]:.3f}" for column in columns)] for row in record["summary"]]


def caption(record: dict) -> Caption:
    c = record["conditions"]
    return Caption(
        f"Exact match of greedy answers to {c['items']['general']} general and {c['items']['domain']} held-out domain items. "
        "Forgotten: share of the base's right general answers that are wrong after training.",
        (f"{c['domain_rows']} domain chats, {c['epochs']} epochs, LoRA; {c['seconds']:.0f} s with both evaluations.",
         f"{show.machine(record)}; {origin(record)}."))


def draw(record: dict, figure) -> None:
    """Draw general against domain accuracy, one point for each arm."""
    axes = show.axes_of(figure)
    for row in record["summary"]:
        axes.plot(row["domain"], row["general"], "o", markersize=9, color=show.OURS, clip_on=False)
        axes.annotate(row["line"], (row["domain"], row["general"]), xytext=(8, 8), textcoords="offset points")
    axes.set(xlabel="domain accuracy", ylabel="general accuracy", xlim=(0, 1.15), ylim=(0, 1.1))


SUITE = Suite("demo", "The miniature demo: fine-tuning forgets, replay prevents it", add_arguments, run,
              {"demo": View(table_of, caption, draw, lambda record: "Replay keeps general accuracy while the domain is learnt")})


def main() -> int:
    try:
        arms = measure()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\nAccuracy on held-out items; forgotten: share of the base's right general answers that are wrong after training.\n\n"
          f"{table(arms)}\n")
    print(f"Synthesis (instructions, responses, agreement of judges): {RUN / 'synth' / 'report.html'}\n"
          f"Training: {RUN / 'domain-only' / 'report.html'}, {RUN / 'with-replay' / 'report.html'}\n\n"
          "A real model instead of this miniature, in some 50 CPU minutes: make real")
    return 0


if __name__ == "__main__":
    sys.exit(main())
