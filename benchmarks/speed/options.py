"""Measure what each option of the trainer costs, over a plain LoRA step.

The task is that of the suite `training`: a Llama of 7.15 M parameters with random weights, 500 chats, about a thousand tokens a step, one
thread. Each contender is the trainer's own step, built as `python -m trainer.run` builds it, and differs from the plain one in its options
only: equal weights, and equal packs in equal order. Figures that an option must not change are compared before anything is timed: losses
and gradient norms of several steps, or of the first one.
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

from benchmarks.harness import record, show, timing
from benchmarks.harness.arguments import add_timing_arguments, check_names, check_timing
from benchmarks.harness.costs import step_costs
from benchmarks.harness.record import origin
from benchmarks.harness.suite import Caption, Suite, View
from benchmarks.harness.synthetic_models import RANK, quiet
from benchmarks.harness.timing import AGREEMENT, Contender, Measurement
from benchmarks.speed.chat_task import CHATS, TOKENS_PER_STEP, ChatTask, check_tokens, make_task, run_options
from benchmarks.speed.contenders import Steadfast, from_config
from trainer.config import Config
from trainer.config_rules import validate
from trainer.model.forward import unwrap_peft
from trainer.model.fused_layers import layer_forward, row_selecting_layer
from trainer.runtime.device import fast_bf16
from trainer.training.loop import garbage_at_log_steps

COMPARED = 3  # steps of each contender whose losses and gradient norms are compared before anything is timed
COUNTED = 2  # steps of each contender whose memory is counted afterwards
FEWEST = 5  # steps' time before the first one that a table shows: two builds of one contender differ by less


# ---------------------------------------------------------------- contenders

# What an option must not change of the plain contender's first steps.
STEPS, GRADIENT, LOSS, ROUNDED, NOTHING = (
    "losses and gradient norms", "first loss and gradient norm", "first loss", "first loss, but for rounding", "nothing")


@dataclass(frozen=True)
class Option:
    """A contender: the options that it sets, in the trainer's names, and what they must not change."""

    values: dict[str, Any] = field(default_factory=dict)
    same: str = STEPS
    needs: str | None = None  # of NEEDS
    all_rows: bool = False  # the last layer computes every row, which no option asks for


KL = {"retention.kl_weight": 0.3, "retention.kl_sources": "all"}
PLAIN, LIVE, CACHED, PROMPTS, ALL_ROWS = (
    f"LoRA of rank {RANK}", "KL, live base", "KL, cached base", "KL on prompts too, cached base", "last layer at all rows")
AGAIN = f"{PLAIN} (A/A)"  # a second run of the plain contender
OPTIONS = {
    PLAIN: Option(),
    "rank 64": Option({"lora.rank": 64}, LOSS),
    "LoRA dropout 0.1": Option({"lora.dropout": 0.1}, LOSS),
    "DoRA": Option({"lora.dora": True}, LOSS),
    "MLPs alone": Option({"lora.target_modules": "mlp-linear"}, LOSS),
    "PiSSA": Option({"lora.init": "pissa_niter_4"}, ROUNDED),
    "EVA": Option({"lora.init": "eva"}, LOSS),
    "LoRA+": Option({"optim.loraplus_lr_ratio": 16.0}, GRADIENT),
    "NEFTune": Option({"optim.neftune_noise_alpha": 5.0}, NOTHING),
    "weight averaging": Option({"optim.ema_decay": 0.99}),
    "Adafactor": Option({"optim.name": "adafactor"}, GRADIENT),
    "full fine-tuning": Option({"method": "full"}, LOSS),
    "full fine-tuning, Muon": Option({"method": "full", "optim.name": "muon"}, LOSS),
    "QLoRA": Option({"method": "qlora"}, ROUNDED, "bitsandbytes"),
    "QLoRA, LoftQ": Option({"method": "qlora", "lora.init": "loftq"}, ROUNDED, "bitsandbytes"),
    "checkpointing, selective": Option({"activation_checkpointing": "selective"}),
    "checkpointing, full": Option({"activation_checkpointing": "full"}),
    "8-bit AdamW": Option({"optim.name": "adamw_8bit"}, GRADIENT, "bitsandbytes"),
    "bf16": Option({"precision": "bf16"}, ROUNDED, "bf16"),
    "torch.compile": Option({"compile": True}, needs="compiler"),
    "stock modules": Option({"model.fused_kernels": False}),
    ALL_ROWS: Option(all_rows=True),
    LIVE: Option(KL, GRADIENT),
    CACHED: Option(KL | {"retention.kl_reference": "cached"}, GRADIENT),
    PROMPTS: Option(KL | {"retention.kl_reference": "cached", "retention.kl_positions": "all"}, GRADIENT),
    "KL, live base, targets masked": Option(KL | {"retention.kl_mask_target": True}, GRADIENT),
    "DFT": Option({"retention.token_weighting": "dft"}, NOTHING),
    "EAFT": Option({"retention.token_weighting": "eaft"}, NOTHING),
    "ASFT, live base": Option(KL | {"retention.kl_weight": 0.05, "retention.token_weighting": "dft"}, NOTHING),
    # Under random weights every token is improbable: this perplexity masks a fifth of them, as the default does in text that a model knows.
    "STM": Option({"retention.token_weighting": "stm", "retention.stm_threshold": 11300.0}, NOTHING),
    "FLOW": Option({"retention.token_weighting": "flow"}, NOTHING),
    "L2 to the start": Option({"retention.l2_sp": 0.1}, GRADIENT),
}
ALIKE = ((CACHED, LIVE),)  # contenders whose figures must be equal in all steps
FREE = {"rsLoRA": "it changes one factor, and no operation", "OLoRA": "its step is PiSSA's",
        "cosine with restarts": "it changes the rate alone", "a curriculum": "it changes the order of samples alone"}
NEEDS = {
    "bitsandbytes": lambda: None if find_spec("bitsandbytes") else "bitsandbytes is not installed",
    "bf16": lambda: None if fast_bf16() else "this CPU has no bf16 matmul",
    "compiler": lambda: None if shutil.which("g++") or shutil.which("clang++") else "there is no C++ compiler",
}


def changed(section: Any, name: str, value: Any) -> Any:
    """Return a configuration with another value of the option of this dotted name."""
    first, dot, rest = name.partition(".")
    return replace(section, **{first: changed(getattr(section, first), rest, value) if dot else value})


def configuration(task: ChatTask, option: Option, steps: int) -> Config:
    """Return a contender's run: a new adapter on the task's model, whole epochs, and its options."""
    config = run_options(task, "fp32", steps)
    for name, value in {"lora.path": None, "lora.rank": RANK, "max_steps": None, **option.values}.items():
        config = changed(config, name, value)
    validate(config)
    return config


@dataclass
class Built:
    """A contender that is ready for its first step."""

    steadfast: Steadfast
    seconds: float  # of CPU time to build it, and then to run the steps that are compared

    def first_steps(self) -> list[tuple[float, float]]:
        """Return loss and gradient norm of each compared step.

        They count as building, since a compiled layer is compiled in them.
        """
        begun = time.process_time()
        done = [self.steadfast.train(next(self.steadfast.works)) for _ in range(COMPARED)]
        self.seconds += time.process_time() - begun
        return [(float(step.loss), float(step.grad_norm)) for step in done]


def build(task: ChatTask, option: Option, steps: int) -> Built:
    begun = time.process_time()
    made = from_config(configuration(task, option, steps), task.tokenizer)
    if option.all_rows:
        compute_all_rows(made.model)
    return Built(made, time.process_time() - begun)


def compute_all_rows(model: torch.nn.Module) -> None:
    """Make the last layer compute what follows its attention for every token, also where nothing reads it."""
    last = row_selecting_layer(unwrap_peft(model))
    if last is None:
        raise ValueError("compute_all_rows: expected a model whose last layer computes some rows alone, got one that computes all")
    layer, stream_norm, _ = last.forward.args
    last.forward = partial(layer_forward, layer, stream_norm, False)


# ---------------------------------------------------------------- agreement


def difference(name: str, same: str, ours: Sequence[tuple[float, float]], theirs: Sequence[tuple[float, float]]) -> float | None:
    """Return the largest relative difference of figures that an option must not change; None for nothing.

    `ours`, `theirs`: (loss, gradient norm) of each step. Raises AssertionError where it is too large.
    """
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
    """Return the difference of each contender from the plain one, and of those that must be alike."""
    apart = {name: difference(name, OPTIONS[name].same if name in OPTIONS else STEPS, found[name], found[PLAIN])
             for name in found if name != PLAIN}
    apart |= {f"{a} / {b}": difference(a, STEPS, found[a], found[b]) for a, b in ALIKE if a in found and b in found}
    return {name: worst for name, worst in apart.items() if worst is not None}


# ---------------------------------------------------------------- figures


def cpu_a_step(measurement: Measurement) -> float:
    return measurement.cpu / measurement.steps


def rows_of(measured: dict[str, list[Measurement]], seconds: dict[str, float], mib: dict[str, float]) -> list[dict]:
    """Return a row for each contender: cost, memory of a step, and time before the first step.

    `seconds`: CPU time to build a contender and run the compared steps; the second plain contender's is common to all, and is subtracted.
    """
    step = {name: timing.spread(rounds, cpu_a_step) for name, rounds in measured.items()}
    once = {name: spent - COMPARED * step[name].value for name, spent in seconds.items()}
    return [{
        "contender": name, "options": OPTIONS[name].values if name in OPTIONS else {}, "cpu_seconds": asdict(step[name]),
        "cost": asdict(timing.ratio(rounds, measured[PLAIN], cpu_a_step)), "mib": mib[name],
        "steps_before": max(0.0, (once[name] - once[AGAIN]) / step[PLAIN].value)} for name, rounds in measured.items()]


# ---------------------------------------------------------------- the suite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--contenders", nargs="+", metavar="NAME", default=list(OPTIONS), help="of: " + "; ".join(OPTIONS))
    add_timing_arguments(parser, rounds=12, steps=2)
    parser.add_argument("--quick", action="store_true", help="24 chats, two rounds of one step: tests the code, gives no figures")


def run(arguments: argparse.Namespace) -> dict:
    """Compare, time, count, and return the record."""
    check_timing(arguments)
    check_names("--contenders", arguments.contenders, OPTIONS)
    count, rounds, steps = (24, 2, 1) if arguments.quick else (CHATS, arguments.rounds, arguments.steps)
    torch.set_num_threads(1)
    quiet()
    missing = {name: why for name in arguments.contenders if (needed := OPTIONS[name].needs) and (why := NEEDS[needed]())}
    names = [name for name in OPTIONS if name == PLAIN or name in arguments.contenders and name not in missing]
    with tempfile.TemporaryDirectory(prefix="steadfast-benchmark-") as folder:
        task = make_task(Path(folder), count=count)
        check_tokens(task)  # and the tokens are in the cache, so that building the first contender takes no longer
        made = build_all(task, names, COMPARED + timing.WARMUP + rounds * steps + COUNTED)
        agreed = agreement({name: one.first_steps() for name, one in made.items()})
        with garbage_at_log_steps():  # as in a run: the garbage collector would walk through all these models
            measured = timing.interleave([Contender(name, one.steadfast.step) for name, one in made.items()], rounds, steps)
        mib = {name: step_costs(one.steadfast.step, countable=False, steps=COUNTED).mib for name, one in made.items()}
    size = made[PLAIN].steadfast.run.size
    conditions = {
        "model": f"Llama, {size.parameters - size.trainable:,} parameters, random weights", "chats": count,
        "tokens_per_step": TOKENS_PER_STEP, "rounds": rounds, "steps_per_round": steps, "compared": COMPARED,
        "rounded": [name for name in names if OPTIONS[name].same == ROUNDED], "left_out": missing | FREE}
    rows = rows_of(measured, {name: one.seconds for name, one in made.items()}, mib)
    return record.make("options-cpu", conditions, agreed, rows, timing.raw(measured))


def build_all(task: ChatTask, names: Sequence[str], steps: int) -> dict[str, Built]:
    """Build every contender, the plain one twice."""
    made = {}
    for name in [*names, AGAIN]:
        made[name] = build(task, OPTIONS[PLAIN if name == AGAIN else name], steps)
        print(f"built: {name}", file=sys.stderr, flush=True)
    return made


# ---------------------------------------------------------------- how a record is shown


def table(record: dict) -> list[list[str]]:
    rows = [["option", "cost of a step, ×", "memory of a step, MiB", "before the first step, in steps"]]
    for row in record["summary"]:
        if row["contender"] != AGAIN:
            before = f"{row['steps_before']:.0f}" if row["steps_before"] >= FEWEST else ""
            rows.append([row["contender"], show.interval(row["cost"]), f"{row['mib']:.0f}", before])
    return rows


def caption(record: dict) -> Caption:
    c, rows = record["conditions"], {row["contender"]: row for row in record["summary"]}
    return Caption(
        f"CPU time of a training step over that of {PLAIN} alone ({1e3 * rows[PLAIN]['cpu_seconds']['value']:.0f} ms): 1.00 is free. "
        f"{c['model']}; {c['chats']} chats, about {c['tokens_per_step']:,} tokens a step, fp32 unless the row says bf16; "
        f"{show.machine(record)}.",
        ("Memory: the most that a step holds beside weights and optimizer states.",
         "Before the first step: CPU time, in plain steps, that a run takes once to run or quantise its base, or to compile.",
         f"Medians of {c['rounds']} interleaved rounds of {c['steps_per_round']} steps, 95% intervals. Noise: the plain step timed "
         f"against a second one: {show.interval(rows[AGAIN]['cost'])}.",
         *agreed_details(record), *show.left_out(c["left_out"]), f"{origin(record)}."))


def agreed_details(record: dict) -> tuple[str, ...]:
    """Return how well the figures agree that options must not change."""
    rounded = record["conditions"]["rounded"]
    exact = [worst for name, worst in record["agreement"].items() if name not in rounded]
    parts = ([f"at worst to {max(exact):.0e}"] if exact else []) + [f"{name} to {record['agreement'][name]:.0e}" for name in rounded]
    return (f"Losses and gradient norms that an option must not change are equal, {', '.join(parts)}.",) if parts else ()


def headline(record: dict) -> str:
    return "What each option of the trainer costs, in CPU time of a step"


def draw(record: dict, figure) -> None:
    """Draw the cost of every option with its interval, the dearest on top."""
    rows = sorted((row for row in record["summary"] if row["contender"] != PLAIN), key=lambda row: row["cost"]["value"])
    axes = show.axes_of(figure, 8, 1.2 + 0.3 * len(rows))
    colours = [show.OTHERS if row["contender"] == AGAIN else show.OURS for row in rows]
    show.bars(axes, [row["contender"] for row in rows], [row["cost"] for row in rows], colours, ".2f")
    axes.axvline(1, color=show.GREY, linewidth=0.8)
    axes.set_xlabel(f"CPU time of a step, × {PLAIN}")


SUITE = Suite("options", "What each option of the trainer costs, in time and memory of a step", add_arguments, run,
              {"options": View(table, caption, draw, headline)})
