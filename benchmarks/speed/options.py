"""What each option of the trainer costs: a step with it over a plain LoRA step, in CPU time.

The setting is that of the suite `training`: a Llama of 7.15 M parameters with random weights, 500 chats, about a thousand tokens a step,
one thread. Every line is the trainer's own step, built as `python -m trainer.run` builds it with the line's options, and differs from the
plain line in these alone: same weights, same packs in the same order. So what an option leaves as it is must be equal, and is compared
before anything is timed: losses and gradient norms of several steps, or of the first one.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import record, timing
from benchmarks.harness.costs import step_costs
from benchmarks.harness.record import origin
from benchmarks.harness.timing import Line, Sample
from benchmarks.speed.training import AGREEMENT, RANK, TOKENS_PER_STEP, Setting, Steadfast, make_setting, quiet, run_options
from trainer.config import Config, validate
from trainer.errors import UserError
from trainer.model.forward import unwrap_peft
from trainer.model.fused_layers import layer_forward, row_selecting_layer
from trainer.runtime.device import fast_bf16
from trainer.training.loop import garbage_at_log_steps, train_step

COMPARED = 3  # steps of each line whose figures are compared before anything is timed
COUNTED = 4  # steps of each line whose memory is counted afterwards
FEWEST = 5  # steps' time before the first one that a table shows: building the same line twice differs by less


# ---------------------------------------------------------------- the lines

# What an option must leave as it is in the plain line's first steps.
STEPS, GRADIENT, LOSS, ROUNDED, NOTHING = (
    "losses and gradient norms", "first loss and gradient norm", "first loss", "first loss, but for rounding", "nothing")


@dataclass(frozen=True)
class Option:
    """A line: the options that it sets, as `python -m trainer.run` names them, and what they must not change."""

    values: dict[str, Any] = field(default_factory=dict)
    same: str = STEPS
    needs: str | None = None  # of NEEDS
    all_rows: bool = False  # the last layer computes every row, which no option asks for


KL = {"retention.kl_weight": 0.3, "retention.kl_sources": "all"}
PLAIN, LIVE, STORED, PROMPTS, ALL_ROWS = (
    f"LoRA of rank {RANK}", "KL, live base", "KL, stored base", "KL on prompts too, stored base", "last layer at all rows")
AGAIN = f"{PLAIN} (A/A)"  # a second run of the plain line
LINES = {
    PLAIN: Option(),
    "rank 64": Option({"lora.rank": 64}, LOSS),
    "LoRA dropout 0.1": Option({"lora.dropout": 0.1}, LOSS),
    "DoRA": Option({"lora.dora": True}, LOSS),
    "full fine-tuning": Option({"method": "full"}, LOSS),
    "QLoRA": Option({"method": "qlora"}, ROUNDED, "bitsandbytes"),
    "checkpointing, selective": Option({"activation_checkpointing": "selective"}),
    "checkpointing, full": Option({"activation_checkpointing": "full"}),
    "8-bit AdamW": Option({"optim.name": "adamw_8bit"}, GRADIENT, "bitsandbytes"),
    "bf16": Option({"precision": "bf16"}, ROUNDED, "bf16"),
    "torch.compile": Option({"compile": True}, needs="compiler"),
    "stock modules": Option({"model.fused_kernels": False}),
    ALL_ROWS: Option(all_rows=True),
    LIVE: Option(KL, GRADIENT),
    STORED: Option(KL | {"retention.kl_reference": "cached"}, GRADIENT),
    PROMPTS: Option(KL | {"retention.kl_reference": "cached", "retention.kl_positions": "all"}, GRADIENT),
    "DFT": Option({"retention.token_weighting": "dft"}, NOTHING),
    # Random weights find every token improbable: this perplexity masks a fifth of them, as the default does in text that a model knows.
    "STM": Option({"retention.token_weighting": "stm", "retention.stm_threshold": 11300.0}, NOTHING),
    "FLOW": Option({"retention.token_weighting": "flow"}, NOTHING),
    "L2 to the start": Option({"retention.l2_sp": 0.1}, GRADIENT),
}
ALIKE = ((STORED, LIVE),)  # lines that must give the same figures in all steps
FREE = {"rsLoRA": "it changes one factor, and no operation"}
NEEDS = {
    "bitsandbytes": lambda: None if find_spec("bitsandbytes") else "bitsandbytes is not installed",
    "bf16": lambda: None if fast_bf16() else "this CPU has no bf16 products",
    "compiler": lambda: None if shutil.which("g++") or shutil.which("clang++") else "there is no C++ compiler",
}


def changed(settings: Any, name: str, value: Any) -> Any:
    """A configuration with another value of the option of this dotted name."""
    section, dot, rest = name.partition(".")
    return replace(settings, **{section: changed(getattr(settings, section), rest, value) if dot else value})


def configuration(setting: Setting, option: Option, steps: int) -> Config:
    """The run of a line: a new adapter on the setting's model, whole passes over the data, and the line's options."""
    config = run_options(setting, "fp32", steps)
    for name, value in {"lora.path": None, "lora.rank": RANK, "max_steps": None, **option.values}.items():
        config = changed(config, name, value)
    validate(config)
    return config


class WithOptions(Steadfast):
    """The trainer's own step with the options of a line."""

    def __init__(self, setting: Setting, option: Option, steps: int):
        self.begin(setting, configuration(setting, option, steps))
        if option.all_rows:
            compute_all_rows(self.run.model)

    def first_steps(self) -> list[tuple[float, float]]:
        """Loss and gradient norm of each; what they take counts as building, since a compiled layer is compiled in them."""
        begun = time.process_time()
        steps = [train_step(self.run, next(self.works), self.phases) for _ in range(COMPARED)]
        self.seconds += time.process_time() - begun
        return [(step.loss.item(), float(step.grad_norm)) for step in steps]


def compute_all_rows(model: torch.nn.Module) -> None:
    """What follows the last layer's attention is computed for every token, also where nothing reads it."""
    last = row_selecting_layer(unwrap_peft(model))
    if last is None:
        raise ValueError("compute_all_rows: expected a model whose last layer computes some rows alone, got one that computes all")
    layer, stream_norm, _ = last.forward.args
    last.forward = partial(layer_forward, layer, stream_norm, False)


# ---------------------------------------------------------------- agreement


def difference(name: str, same: str, ours: Sequence[tuple[float, float]], theirs: Sequence[tuple[float, float]]) -> float | None:
    """Largest relative difference of what a line must leave as it is, of (loss, gradient norm) of each step; None where that is nothing."""
    if same == NOTHING:
        return None
    steps = len(ours) if same == STEPS else 1
    figures = 2 if same in (STEPS, GRADIENT) else 1
    pairs = [pair for a, b in zip(ours[:steps], theirs[:steps], strict=True) for pair in zip(a[:figures], b[:figures])]
    apart, allowed = [abs(a - b) / abs(b) for a, b in pairs], AGREEMENT["bf16" if same == ROUNDED else "fp32"]
    if not all(one <= allowed for one in apart):  # NaN too
        raise AssertionError(f"{name}: {same} differ by {max(apart):.1e}, more than {allowed:.0e}; pairs: {pairs}")
    return max(apart)


def agreement(found: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """The difference of each line from the plain one, and of lines that must be alike."""
    apart = {name: difference(name, LINES[name].same if name in LINES else STEPS, found[name], found[PLAIN])
             for name in found if name != PLAIN}
    apart |= {f"{a} / {b}": difference(a, STEPS, found[a], found[b]) for a, b in ALIKE if a in found and b in found}
    return {name: worst for name, worst in apart.items() if worst is not None}


# ---------------------------------------------------------------- figures


def cpu_a_step(sample: Sample) -> float:
    return sample.cpu / sample.steps


def rows_of(samples: dict[str, list[Sample]], seconds: dict[str, float], mib: dict[str, float]) -> list[dict]:
    """A row for each line: its cost over the plain line's, the memory of a step, and what comes before the first step, in plain steps.

    `seconds`: of CPU time, to build a line and run the steps that are compared. What the second plain line took is common to all.
    """
    step = {name: timing.spread(line, cpu_a_step) for name, line in samples.items()}
    once = {name: spent - COMPARED * step[name].value for name, spent in seconds.items()}
    return [{
        "line": name, "options": LINES[name].values if name in LINES else {}, "cpu_seconds": asdict(step[name]),
        "cost": asdict(timing.ratio(line, samples[PLAIN], cpu_a_step)), "mib": mib[name],
        "steps_before": max(0.0, (once[name] - once[AGAIN]) / step[PLAIN].value)} for name, line in samples.items()]


def table(record: dict) -> list[list[str]]:
    """Head and rows."""
    rows = [["option", "cost of a step, ×", "memory of a step, MiB", "before the first step, in steps"]]
    for row in record["summary"]:
        if row["line"] != AGAIN:
            before = f"{row['steps_before']:.0f}" if row["steps_before"] >= FEWEST else ""
            rows.append([row["line"], interval(row["cost"]), f"{row['mib']:.0f}", before])
    return rows


def interval(cost: dict) -> str:
    return f"{cost['value']:.2f} ({cost['low']:.2f}-{cost['high']:.2f})"


def conditions(record: dict) -> str:
    c, rows = record["conditions"], {row["line"]: row for row in record["summary"]}
    left_out = "".join(f" No line of {name}: {why}." for name, why in c["left_out"].items())
    return (
        f"CPU time of a training step over that of a plain step, {PLAIN} ({1e3 * rows[PLAIN]['cpu_seconds']['value']:.0f} ms): 1.00 is "
        f"free. {c['model']}; {c['chats']} chats, about {c['tokens_per_step']:,} tokens a step, fp32 where nothing else is said. Memory: "
        f"what a step adds at its height to weights and optimiser states. Before the first step: what a run does once, to read or quantise "
        f"its base or to compile, in CPU time of plain steps. {record['cpu']}, {record['threads']} thread; medians of {c['rounds']} "
        f"interleaved rounds of {c['steps_per_round']} steps, 95% intervals. The plain step timed against itself: "
        f"{interval(rows[AGAIN]['cost'])}.{agreed(record)}{left_out} {origin(record)}.")


def agreed(record: dict) -> str:
    """How well the figures agree that options must not change."""
    rounded = record["conditions"]["rounded"]
    exact = [worst for name, worst in record["agreement"].items() if name not in rounded]
    words = ([f"at worst to {max(exact):.0e}"] if exact else []) + [f"{name} to {record['agreement'][name]:.0e}" for name in rounded]
    return f" What an option must not change of losses and gradient norms is equal, {', '.join(words)}." if words else ""


def picture(record: dict, figure, axes) -> None:
    """Cost of every option with its interval, the dearest on top."""
    rows = sorted((row for row in record["summary"] if row["line"] != PLAIN), key=lambda row: row["cost"]["value"])
    costs = [row["cost"] for row in rows]
    whiskers = [[c["value"] - c["low"] for c in costs], [c["high"] - c["value"] for c in costs]]
    figure.set_size_inches(8, 0.9 + 0.3 * len(rows))
    axes.barh([row["line"] for row in rows], [c["value"] for c in costs], xerr=whiskers, ecolor="#555555",
              color=["#b8b8b8" if row["line"] == AGAIN else "#1f6f8b" for row in rows])
    for i, cost in enumerate(costs):
        axes.text(cost["high"], i, f" {cost['value']:.2f}", va="center", fontsize=9)
    axes.axvline(1, color="#555555", linewidth=0.8)
    axes.set_xlim(0, 1.12 * max(c["high"] for c in costs))
    axes.set_xlabel(f"CPU time of a step, × {PLAIN}")


# ---------------------------------------------------------------- the suite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lines", nargs="+", metavar="NAME", default=list(LINES), help="of: " + "; ".join(LINES))
    parser.add_argument("--rounds", type=int, default=16, help="rounds of all lines (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="steps of each line in a round (default: %(default)s)")


def run(arguments: argparse.Namespace) -> dict:
    """Check, time and summarise; returns the record."""
    if arguments.rounds < 2 or arguments.steps < 1:
        raise UserError(f"--rounds, --steps: expected at least 2 and 1, got {arguments.rounds} and {arguments.steps}")
    if unknown := [name for name in arguments.lines if name not in LINES]:
        raise UserError(f"--lines: expected names of {', '.join(LINES)}, got {', '.join(unknown)}")
    torch.set_num_threads(1)
    quiet()
    missing = {name: why for name in arguments.lines if (needed := LINES[name].needs) and (why := NEEDS[needed]())}
    names = [name for name in LINES if name == PLAIN or name in arguments.lines and name not in missing]
    with tempfile.TemporaryDirectory(prefix="steadfast-benchmark-") as folder:
        setting = make_setting(Path(folder), None)
        made = make_lines(setting, names, COMPARED + timing.WARMUP + arguments.rounds * arguments.steps + COUNTED)
        agreed = agreement({name: line.first_steps() for name, line in made.items()})
        with garbage_at_log_steps():  # as in a run; and there are many models to walk through
            samples = timing.interleave([Line(name, line.step) for name, line in made.items()], arguments.rounds, arguments.steps)
        mib = {name: step_costs(line.step, countable=False, steps=COUNTED).mib for name, line in made.items()}
    size = made[PLAIN].run.size
    facts = {
        "model": f"Llama, {size.parameters - size.trainable:,} parameters, random weights", "chats": len(setting.samples),
        "tokens_per_step": TOKENS_PER_STEP, "rounds": arguments.rounds, "steps_per_round": arguments.steps, "compared": COMPARED,
        "rounded": [name for name in names if LINES[name].same == ROUNDED], "left_out": missing | FREE}
    rows = rows_of(samples, {name: line.seconds for name, line in made.items()}, mib)
    return record.make("options-cpu", facts, agreed, rows, timing.raw(samples))


def make_lines(setting: Setting, names: Sequence[str], steps: int) -> dict[str, WithOptions]:
    """The lines' runs, ready for their first step; the plain one twice."""
    made = {}
    for name in [*names, AGAIN]:
        made[name] = WithOptions(setting, LINES[PLAIN if name == AGAIN else name], steps)
        print(f"built: {name}", file=sys.stderr, flush=True)
    return made
