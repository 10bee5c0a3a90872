"""Training throughput on a CPU beside a plain Hugging Face loop in its usual forms, and TRL.

Each contender is compared with those of its own dtype. Before anything is timed, its losses are compared with Steadfast's, step by step.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.harness import record, show, timing
from benchmarks.harness.arguments import add_timing_arguments, check_names, check_timing
from benchmarks.harness.costs import Costs, step_costs
from benchmarks.harness.model_shapes import CPU_MODELS, REAL
from benchmarks.harness.public_sets import add_data_argument
from benchmarks.harness.record import origin
from benchmarks.harness.suite import Caption, Suite, View
from benchmarks.harness.synthetic_models import RANK, quiet
from benchmarks.harness.timing import Contender
from benchmarks.speed.baselines import (
    Trl,
    checkpointed,
    compiled,
    grouped_loop,
    load_stock,
    missing,
    packed_arguments,
    packed_loop,
    padded_arguments,
    padded_loop,
)
from benchmarks.speed.chat_task import BATCHING, CHATS, DATA, LEARNING_RATE, TOKENS_PER_STEP, ChatTask, check_tokens, make_task, steadfast
from benchmarks.speed.contenders import Trained, agreement
from trainer.errors import UserError, require
from trainer.metrics.throughput import model_size
from trainer.runtime.device import fast_bf16

METHODS = {"lora": f"LoRA, rank {RANK}, all linear layers", "qlora": f"LoRA, rank {RANK}, on a base in NF4", "full": "all weights trained"}
COMPARED, COUNTED = 5, 4  # steps whose losses are compared first, and steps whose memory and operations are counted last
OURS, COMPILED = "Steadfast", "torch.compile"


# ---------------------------------------------------------------- contenders


@dataclass(frozen=True)
class Kind:
    """A contender of this benchmark: how it is made, the dtype it computes in, and its form."""

    make: Callable[[ChatTask], Trained]
    dtype: str
    form: str  # plain, grouped and packed are what others are compared with


def stock(task: ChatTask, dtype: torch.dtype = torch.float32) -> nn.Module:
    adapter = None if task.method == "full" else task.folder / "adapter"
    return load_stock(task.folder / "model", adapter, in_4bit=task.method == "qlora", dtype=dtype)


def hf_loop(form: Callable, dtype: torch.dtype, autocast: bool, task: ChatTask) -> Trained:
    return form(stock(task, dtype), task.samples, BATCHING, LEARNING_RATE, autocast=autocast)


def trl(task: ChatTask, batches: dict) -> Trl:
    return Trl(stock(task), task.samples, task.tokenizer, batches | {"learning_rate": LEARNING_RATE, "max_grad_norm": 1.0})


FORMS = {"plain": padded_loop, "grouped": grouped_loop, "packed": packed_loop}
FORM_NAMES = {"plain": "plain HF loop", "grouped": "HF loop, grouped", "packed": "HF loop, packed"}
WEIGHTS = {"fp32": (torch.float32, False, "fp32"), "bf16": (torch.bfloat16, False, "bf16"), "autocast": (torch.float32, True, "bf16")}
LOOPS = {f"{FORM_NAMES[form]}, {weights}": Kind(partial(hf_loop, make, dtype, autocast), group, form)
         for weights, (dtype, autocast, group) in WEIGHTS.items() for form, make in FORMS.items()}
PLAIN = "plain HF loop, fp32"
OTHERS: dict[str, Kind] = LOOPS | {
    f"HF loop, {COMPILED}, fp32": Kind(lambda task: compiled(LOOPS[PLAIN].make(task)), "fp32", COMPILED),
    "HF loop, checkpointing, fp32": Kind(lambda task: checkpointed(LOOPS[PLAIN].make(task)), "fp32", "checkpointing"),
    "TRL padded, fp32": Kind(lambda task: trl(task, padded_arguments(BATCHING.samples)), "fp32", "TRL padded"),
    "TRL packed, fp32": Kind(lambda task: trl(task, packed_arguments(TOKENS_PER_STEP)), "fp32", "TRL packed"),
}
FOR_GPUS = {"TRL packed, Liger": "liger_kernel", "Unsloth": "unsloth"}  # and the package that each needs


def ours(dtype: str) -> str:
    return f"{OURS}, {dtype}"


def kind_of(name: str, attribute: str) -> str:
    """Return the dtype or form of a contender by its name."""
    return getattr(OTHERS[name], attribute) if name in OTHERS else {"dtype": name.rpartition(", ")[2], "form": OURS}[attribute]


# ---------------------------------------------------------------- the suite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chats", choices=DATA, default="tailed", help="random words of log-normal or equal lengths, or GSM8K "
                        "(default: %(default)s)")
    add_data_argument(parser, "GSM8K's train split, JSON lines with question and answer")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", default=list(OTHERS),
                        help="those to measure beside ours, of: " + "; ".join(OTHERS))
    parser.add_argument("--model", choices=(*CPU_MODELS, REAL), default="7m", help="default: %(default)s; 100m and smollm2, "
                        "a real model, take far longer a step")
    parser.add_argument("--method", choices=tuple(METHODS), default="lora", help="default: %(default)s")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(timing.AGREEMENT), default=["fp32"] + ["bf16"] * fast_bf16(),
                        help="default: fp32, and bf16 where this CPU multiplies in it")
    parser.add_argument("--compared", type=int, default=COMPARED, metavar="STEPS",
                        help="steps whose losses are compared first (default: %(default)s)")
    add_timing_arguments(parser, rounds=8, steps=3, threads=1)
    parser.add_argument("--quick", action="store_true", help="24 chats, two rounds of one step: tests the code, gives no figures")


def check(arguments: argparse.Namespace) -> None:
    """Raise UserError for options that no run can use."""
    check_timing(arguments)
    check_names("--contenders", arguments.contenders, OTHERS)
    require(arguments.compared >= 1, "--compared", "at least 1 step", arguments.compared)
    require(not arguments.data or arguments.chats == "gsm8k", "--data", "--chats gsm8k beside it", f"--chats {arguments.chats}")
    if arguments.method == "qlora" and find_spec("bitsandbytes") is None:
        raise UserError("--method qlora: expected bitsandbytes, which is not installed; pip install 'bitsandbytes>=0.50'")


def run(arguments: argparse.Namespace) -> dict:
    """Compare losses, time, count, and return the record."""
    check(arguments)
    count, rounds, steps = (24, 2, 1) if arguments.quick else (CHATS, arguments.rounds, arguments.steps)
    torch.set_num_threads(arguments.threads)
    quiet()
    with tempfile.TemporaryDirectory(prefix="steadfast-benchmark-") as folder:
        task = make_task(Path(folder), arguments.chats, CPU_MODELS.get(arguments.model), arguments.method, arguments.data, count)
        check_tokens(task)
        dtypes = [dtype for dtype in timing.AGREEMENT if dtype in arguments.dtypes]
        names = [name for name in arguments.contenders if OTHERS[name].dtype in dtypes]
        agreed, left_out = agreements(task, names, arguments.compared)
        made = {name: OTHERS[name].make(task) for name in names if name not in left_out}
        planned = 2 * (timing.WARMUP + rounds * steps) + COUNTED
        made |= {ours(dtype): steadfast(task, dtype, planned) for dtype in dtypes}
        contenders = [Contender(name, one.step) for name, one in made.items()]
        again = timing.again(next(one for one in contenders if one.name == ours(dtypes[0])))
        matmuls = [timing.matmul(timing.dtype_of(dtype)) for dtype in dtypes]
        progress("timing")
        measured = timing.interleave([*contenders, again, *matmuls], rounds, steps)
        phases = {name: shares(one.phases.read()) for name, one in made.items() if kind_of(name, "form") in ("plain", OURS)}
        progress("counting memory and operations")
        counted = min(COUNTED, rounds * steps)
        costs = {name: step_costs(one.step, COMPILED not in name, counted) for name, one in made.items()}
        size = model_size(stock(task))
    lengths = [len(ids) for ids, _ in task.samples]
    rates = {name: timing.spread(measured[name]).value for name in made}
    conditions = {
        "model": f"{task.model}, {size.parameters - size.trainable * (arguments.method != 'full'):,} parameters",
        "method": METHODS[arguments.method], "data": task.description, "chats": count,
        "mean_tokens": float(np.mean(lengths)), "longest": max(lengths),
        "supervised": sum(int(mask.sum()) for _, mask in task.samples) / sum(lengths), "tokens_per_step": TOKENS_PER_STEP,
        "rounds": rounds, "steps_per_round": steps, "compared": arguments.compared, "phases": phases, "bases": bases_of(rates),
        "left_out": left_out | absent(dtypes)}
    return record.make(suite_name(arguments), conditions, agreed, summary(measured, costs, conditions["bases"]), timing.raw(measured))


def absent(dtypes: list[str]) -> dict[str, str]:
    """Return what this machine cannot measure, and why."""
    found = {name: missing(package, torch.device("cpu")) for name, package in FOR_GPUS.items()}
    return found if "bf16" in dtypes or fast_bf16() else found | {"bf16": "this CPU has no bf16 matmul"}


def progress(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def suite_name(arguments: argparse.Namespace) -> str:
    """Return the name of the record: each setting that is not the default adds a word."""
    parts = ("training", "cpu", "" if arguments.model == "7m" else arguments.model, "" if arguments.method == "lora" else arguments.method,
             "" if arguments.chats == "tailed" else arguments.chats)
    return "-".join(filter(None, parts))


def agreements(task: ChatTask, names: list[str], steps: int) -> tuple[dict[str, float], dict[str, str]]:
    """Compare each contender's losses with Steadfast's in its dtype.

    Returns the differences, and why some cannot be timed. A loop that trains bf16 weights without fp32 masters may drift from Steadfast; it
    is left out by name. Any other difference is an error.
    """
    agreed, left_out = {}, {}
    for name in names:
        kind = OTHERS[name]
        progress(f"comparing losses: {name}")
        try:
            agreed[name] = agreement(steadfast(task, kind.dtype, 1), kind.make(task), steps, kind.dtype, name)
        except AssertionError as error:
            if not (task.method == "full" and name.endswith(", bf16")):
                raise
            left_out[name] = str(error).partition(",")[0]
    return agreed, left_out


def bases_of(rates: dict[str, float]) -> dict[str, dict[str, str]]:
    """Return the contender of each dtype and form that others are compared with.

    In bf16 that is the faster one of bf16 weights and autocast.
    """
    bases: dict[str, dict[str, str]] = {}
    for name in sorted(rates, key=rates.get):  # the fastest comes last and stays
        if kind_of(name, "form") in FORMS:
            bases.setdefault(kind_of(name, "dtype"), {})[kind_of(name, "form")] = name
    return bases


def shares(seconds: dict[str, float]) -> dict[str, float]:
    whole = sum(seconds.values())
    return {name: spent / whole for name, spent in seconds.items()}


def summary(measured: dict[str, list[timing.Measurement]], costs: dict[str, Costs], bases: dict[str, dict[str, str]]) -> list[dict]:
    """Return a row for each contender: rates, memory, operations, and ratios to the loops of its dtype.

    MFU is the share of the machine's matmul rate in that dtype.
    """
    rows = []
    for name, rounds in measured.items():
        own = name.removesuffix(timing.AGAIN)
        if own not in costs:  # a matmul
            continue
        dtype = kind_of(own, "dtype")
        against = {OURS: own} if name != own else {form: base for form, base in bases.get(dtype, {}).items() if base != name}
        cross = PLAIN if dtype != "fp32" and PLAIN in measured else None
        tokens, computed = sum(m.tokens for m in rounds), sum(m.tokens + m.padding for m in rounds)
        rows.append({
            "contender": name, "dtype": dtype, "tokens_per_cpu_second": asdict(timing.spread(rounds)),
            "supervised_per_cpu_second": asdict(timing.spread(rounds, lambda m: m.supervised / m.cpu)),
            "steps_per_cpu_second": asdict(timing.spread(rounds, lambda m: m.steps / m.cpu)),
            "useful_flops": asdict(timing.spread(rounds, flop_rate)), "padding": 1 - tokens / computed,
            "mfu": asdict(timing.ratio(rounds, measured[timing.matmul(timing.dtype_of(dtype)).name], flop_rate)), **asdict(costs[own]),
            "ratio": {form: asdict(timing.ratio(rounds, measured[base])) for form, base in against.items()},
            "ratio_fp32": asdict(timing.ratio(rounds, measured[cross])) if cross else None})
    return rows


def flop_rate(measurement: timing.Measurement) -> float:
    return measurement.flops / measurement.cpu


# ---------------------------------------------------------------- how a record is shown


def shown(record: dict) -> list[dict]:
    return [row for row in record["summary"] if not row["contender"].endswith(timing.AGAIN)]


def table(record: dict) -> list[list[str]]:
    rows = shown(record)
    forms = [form for form in FORMS if any(form in row["ratio"] for row in rows)]
    crossed = any(row["ratio_fp32"] for row in rows)
    head = ["contender", "real tokens per CPU-second", "padding", "MFU", "memory a step adds, MiB", "operations a step",
            *(f"× {form}" for form in forms), *["× plain, fp32"] * crossed]
    return [head] + [[
        row["contender"], show.interval(row["tokens_per_cpu_second"], ",.0f"), f"{row['padding']:.0%}", f"{row['mfu']['value']:.0%}",
        f"{row['mib']:,.0f}", f"{row['operations']:,.0f}" if row["operations"] else "",
        *(show.interval(row["ratio"].get(form)) for form in forms),
        *[f"{row['ratio_fp32']['value']:.2f}" if row["ratio_fp32"] else ""] * crossed] for row in rows]


def caption(record: dict) -> Caption:
    c = record["conditions"]
    noise = next((ratio for row in record["summary"] if row["contender"].endswith(timing.AGAIN) for ratio in row["ratio"].values()), None)
    worst = max(record["agreement"].items(), key=lambda item: item[1], default=None)
    return Caption(
        f"{c['model']}; {c['method']}; {c['chats']} chats ({c['data']}), about {c['tokens_per_step']:,} tokens a step; "
        f"{show.machine(record)}. Columns × compare with the plain HF loop of the row's own dtype: padded, grouped by length, packed.",
        (f"Chats: {c['mean_tokens']:.0f} tokens on average, {c['supervised']:.0%} supervised.",
         f"Medians of {c['rounds']} interleaved rounds of {c['steps_per_round']} steps; rates with their 20th and 80th percentiles, ratios "
         "with 95% intervals.",
         *bf16_detail(record),
         "MFU: the share of this machine's matmul rate in that dtype that useful FLOPs reach. Memory: the most that a step holds beside "
         "weights and optimizer states. Operations: ATen operations, without views.",
         *([f"Noise: Steadfast timed against itself: {show.interval(noise)}."] if noise else []),
         *([f"Losses over {c['compared']} steps agree with Steadfast's, at worst to {worst[1]:.0e} ({worst[0]})."] if worst else []),
         *(f"Wall time by phase, {name}: {', '.join(f'{phase} {share:.0%}' for phase, share in spent.items())}."
           for name, spent in c["phases"].items() if OURS in name),
         *show.left_out(c["left_out"]), f"{origin(record)}."))


def bf16_detail(record: dict) -> tuple[str, ...]:
    """Return what bf16 and autocast mean, and which of them others are compared with."""
    bases = record["conditions"]["bases"].get("bf16", {})
    if not bases:
        return ()
    return ("bf16: base weights in bf16, PEFT's adapters in fp32 (its default). autocast: fp32 weights under torch.autocast. In bf16, "
            f"× compares with the faster of the two: {'; '.join(bases.values())}.",)


def headline(record: dict) -> str:
    """Return Steadfast's ratios to the plain loop of each dtype."""
    rows = [row for row in shown(record) if row["contender"].startswith(OURS) and "plain" in row["ratio"]]
    ratios = ", ".join(f"{row['ratio']['plain']['value']:.1f}× in {row['dtype']}" for row in rows)
    return f"Training on a CPU, × the plain HF loop of the same dtype: {ratios}" if ratios else "Training on a CPU"


def draw(record: dict, figure) -> None:
    """Draw bars of tokens per CPU-second, by dtype, and of the memory that a step adds."""
    rows = sorted(shown(record), key=lambda row: (row["dtype"] == "fp32", -row["tokens_per_cpu_second"]["value"]))
    names = [row["contender"] for row in rows]
    colours = [show.OURS if name.startswith(OURS) else show.OTHERS for name in names]
    figure.set_size_inches(11, 1.2 + 0.34 * len(rows))
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    show.bars(left, names, [row["tokens_per_cpu_second"] for row in rows], colours)
    memory = [{"value": row["mib"], "low": row["mib"], "high": row["mib"]} for row in rows]
    show.bars(right, names, memory, colours)
    left.set_xlabel("real tokens per CPU-second (more is better)")
    right.set(xlabel="memory a step adds, MiB (less is better)", yticks=[])


SUITE = Suite("training", "Training throughput on a CPU beside a plain Hugging Face loop and TRL, dtype by dtype", add_arguments, run,
              {"training": View(table, caption, draw, headline)})
