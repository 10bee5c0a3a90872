"""Measure how a step's cost grows with tokens a step, context, vocabulary and rank.

One setting is varied at a time, from a common middle. All samples of a step have one length, so that packing gains nothing; half of the
tokens are supervised. Weights are random and made on the device. At every point Steadfast and the plain Hugging Face loop start from equal
weights, and their losses are compared over two steps before they are timed in interleaved rounds. Cost is CPU-seconds on a CPU, seconds on
a GPU. A contender that runs out of memory, or fails, keeps its row without a time.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from benchmarks.harness import record, show, timing
from benchmarks.harness.arguments import add_timing_arguments, check_names, check_timing
from benchmarks.harness.gpu_timing import free, peak_mib, tried
from benchmarks.harness.model_shapes import LLAMA_1B, SMALL, ModelShape
from benchmarks.harness.record import origin
from benchmarks.harness.suite import Caption, Suite, View
from benchmarks.harness.synthetic_models import adapted, random_samples, stock_model
from benchmarks.harness.timing import Contender, Measurement, TokenSamples
from benchmarks.speed.baselines import Batching, padded_loop
from benchmarks.speed.contenders import Trained, in_memory, require_agreement
from trainer.errors import UserError
from trainer.runtime.device import choose_device

OURS, PLAIN = "Steadfast", "plain HF loop"
LEARNING_RATE = 1e-3
COMPARED = 2  # steps
MICRO_BATCH = 8  # samples that the plain loop runs at once


def steadfast(model: nn.Module, samples: TokenSamples, point: Point, device: torch.device) -> Trained:
    return in_memory(model, samples, point.count * point.length, LEARNING_RATE, device)


def plain_loop(model: nn.Module, samples: TokenSamples, point: Point, device: torch.device) -> Trained:
    return padded_loop(model, samples, Batching(samples=point.count), LEARNING_RATE, device=device, micro_batch=MICRO_BATCH)


CONTENDERS = {PLAIN: plain_loop, OURS: steadfast}


@dataclass(frozen=True)
class Point:
    """One step: `count` samples of `length` tokens through a model."""

    model: ModelShape
    count: int
    length: int
    rank: int = 16


@dataclass(frozen=True)
class Grid:
    """The middle, and the values that each setting takes around it."""

    middle: Point
    values: dict[str, tuple[int, ...]]

    def point(self, axis: str, value: int) -> Point:
        if axis == "tokens a step":
            return replace(self.middle, count=value // self.middle.length)
        if axis == "context":
            return replace(self.middle, count=1, length=value)
        if axis == "vocabulary":
            return replace(self.middle, model=replace(self.middle.model, vocabulary=value))
        return replace(self.middle, rank=value)


AXES = ("tokens a step", "context", "vocabulary", "rank")
ON_CPU = Grid(Point(SMALL, 8, 128), dict(zip(AXES, (
    (256, 512, 1024, 2048, 4096), (256, 512, 1024, 2048, 4096), (2048, 8192, 32768, 131072), (4, 16, 64, 256)))))
ON_GPU = Grid(Point(LLAMA_1B, 16, 512), dict(zip(AXES, (
    (2048, 4096, 8192, 16384, 32768), (2048, 8192, 32768, 65536, 131072), (32768, 65536, 128256, 262144), (8, 16, 64, 256)))))


# ---------------------------------------------------------------- one point


def measure(point: Point, device: torch.device, dtype: str, rounds: int) -> tuple[dict[str, list[Measurement]], dict, float]:
    """Return measurements of a point, each contender's outcome, and the difference of losses."""
    samples = random_samples([point.length] * (COMPARED * point.count), point.model.vocabulary, seed=0)
    batches = [samples[i * point.count : (i + 1) * point.count] for i in range(COMPARED)]
    made: dict[str, Trained] = {}
    losses: dict[str, list[float]] = {}
    facts: dict[str, dict] = {}
    for name, make in CONTENDERS.items():
        def first_steps(name=name, make=make) -> None:
            model = adapted(stock_model(point.model, device, timing.dtype_of(dtype)), point.rank)
            one = make(model, samples, point, device)
            losses[name] = [float(one.step_on(batch).loss) for batch in batches]
            facts[name] = {"outcome": "timed", "step_mib": peak_mib(one.step)}
            made[name] = one

        _, failure = tried(first_steps)
        if failure:
            facts[name] = {"outcome": failure}
    difference = require_agreement(losses[OURS], losses[PLAIN], dtype, f"the {PLAIN}") if len(made) == 2 else 0.0
    timed = [Contender(name, one.step) for name, one in made.items()]
    timed += [timing.again(one) for one in timed if one.name == OURS]
    return timing.interleave(timed, rounds, 1), facts, difference


def rows_of(axis: str, value: int, measured: dict[str, list[Measurement]], facts: dict, device: torch.device) -> list[dict]:
    """Return both contenders' rows of one point."""
    clock = "wall" if device.type == "cuda" else "cpu"

    def microseconds(measurement: Measurement) -> float:
        return 1e6 * getattr(measurement, clock) / measurement.tokens

    rows = []
    for name, about in facts.items():
        own = measured.get(name)
        ratio = timing.ratio(measured[PLAIN], own, microseconds) if own and PLAIN in measured and name != PLAIN else None
        noise = timing.ratio(own, measured[f"{OURS}{timing.AGAIN}"], microseconds) if own and name == OURS else None
        rows.append({"axis": axis, "value": value, "contender": name, **about,
                     "us_per_token": asdict(timing.spread(own, microseconds)) if own else None,
                     "ratio": {PLAIN: asdict(ratio)} if ratio else {}, "same": asdict(noise) if noise else None})
    return rows


def growth(rows: list[dict], axis: str, contender: str) -> float | None:
    """Return the power of the setting that a step's cost grows with, over all values measured."""
    costs = [(row["value"], row["us_per_token"]["value"] * (row["value"] if axis in ("tokens a step", "context") else 1))
             for row in rows if row["axis"] == axis and row["contender"] == contender and row["us_per_token"]]
    if len(costs) < 2:
        return None
    (first, least), (last, most) = costs[0], costs[-1]
    return math.log(most / least) / math.log(last / first)


# ---------------------------------------------------------------- the suite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU where there is one")
    parser.add_argument("--axes", nargs="+", metavar="NAME", default=list(AXES), help="of: " + "; ".join(AXES))
    add_timing_arguments(parser, rounds=5, threads=1)
    parser.add_argument("--quick", action="store_true", help="two rounds at the two smallest values: tests the code, gives no figures")


def run(arguments: argparse.Namespace) -> dict:
    """Measure every point, and return the record."""
    check_timing(arguments)
    check_names("--axes", arguments.axes, AXES)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: expected a GPU, found none; use --device cpu")
    device = choose_device(arguments.device)
    dtype, grid = ("bf16", ON_GPU) if device.type == "cuda" else ("fp32", ON_CPU)
    rounds, points = (2, 2) if arguments.quick else (arguments.rounds, None)
    torch.set_num_threads(arguments.threads)
    summary, agreed, raw = [], {}, {}
    for axis in arguments.axes:
        for value in grid.values[axis][:points]:
            measured, facts, difference = measure(grid.point(axis, value), device, dtype, rounds)
            rows = rows_of(axis, value, measured, facts, device)
            print(f"{axis} {value:,}: " + "; ".join(f"{row['contender']} {cost_cell(row)}" for row in rows), file=sys.stderr, flush=True)
            summary += rows
            agreed[f"{axis} {value}"] = difference
            raw |= {f"{axis} {value}: {name}": one for name, one in timing.raw(measured).items()}
            free()
    conditions = {"middle": asdict(grid.middle), "dtype": dtype, "rounds": rounds,
                  "growth": {f"{axis}: {name}": growth(summary, axis, name) for axis in arguments.axes for name in CONTENDERS}}
    return record.make(f"scaling-{device.type}", conditions, agreed, summary, raw)


# ---------------------------------------------------------------- how a record is shown


def table(record: dict) -> list[list[str]]:
    """Return the cost of a token at every point, and the ratio of both."""
    points: dict[tuple, dict[str, dict]] = {}
    for row in record["summary"]:
        points.setdefault((row["axis"], row["value"]), {})[row["contender"]] = row
    rows = [["setting", "value", *(f"{name}, µs a token" for name in CONTENDERS), f"speed, × {PLAIN}"]]
    for (axis, value), by_name in points.items():
        rows.append([axis, f"{value:,}", *map(cost_cell, by_name.values()), show.interval(by_name[OURS]["ratio"].get(PLAIN))])
    return rows


def cost_cell(row: dict) -> str:
    """Return the microseconds a token of a row, or why it was not timed."""
    return f"{row['us_per_token']['value']:,.0f}" if row["us_per_token"] else row["outcome"]


def caption(record: dict) -> Caption:
    c = record["conditions"]
    middle, model = c["middle"], c["middle"]["model"]
    noise = [row["same"]["value"] for row in record["summary"] if row["same"]]
    where = f"CPU time, {show.machine(record)}" if record["device"] == "cpu" else f"time on {record['device']}"
    powers = "; ".join(f"{name} {power:.2f}" for name, power in c["growth"].items() if power is not None)
    return Caption(
        f"Cost of a training step in {c['dtype']} as one setting varies from a common middle: {middle['count']} samples of "
        f"{middle['length']} tokens, vocabulary {model['vocabulary']:,}, LoRA of rank {middle['rank']}. Both sides train equal tokens, "
        f"without padding; {where}.",
        (f"A Llama of width {model['width']} with {model['layers']} layers and random weights; LoRA on all linear layers; half of the "
         "tokens supervised. Context: one sample.",
         "Steadfast: the trainer's own step, its loader and optimizer included. The plain loop: micro-batches of "
         f"{MICRO_BATCH} samples.",
         f"Medians of {c['rounds']} interleaved rounds, ratios with 95% intervals."
         + (f" Noise: Steadfast timed against itself: {min(noise):.2f}-{max(noise):.2f} over all points." if noise else ""),
         f"Power that a step's cost grows with, from the smallest to the largest value: {powers}.",
         f"Losses agree, at worst to {max(record['agreement'].values(), default=0.0):.0e}.", f"{origin(record)}."))


def headline(record: dict) -> str:
    ratios = [row["ratio"][PLAIN]["value"] for row in record["summary"] if row["ratio"]]
    return f"Steadfast is {min(ratios):.1f} to {max(ratios):.1f} times as fast as the plain HF loop, without padding" if ratios else ""


def draw(record: dict, figure) -> None:
    """Draw the cost of a token over each setting, both axes logarithmic."""
    from matplotlib import ticker

    settings = list(dict.fromkeys(row["axis"] for row in record["summary"]))
    costs = [row["us_per_token"]["value"] for row in record["summary"] if row["us_per_token"]]
    figure.set_size_inches(3 * len(settings), 3.3)
    for i, axis in enumerate(settings):
        panel = show.bare(figure.add_subplot(1, len(settings), i + 1))
        for name, colour in ((PLAIN, show.OTHERS), (OURS, show.OURS)):
            rows = [row for row in record["summary"] if (row["axis"], row["contender"]) == (axis, name) and row["us_per_token"]]
            panel.plot([row["value"] for row in rows], [row["us_per_token"]["value"] for row in rows], marker="o", color=colour, label=name)
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="µs a token" if i == 0 else "")
        values = sorted({row["value"] for row in record["summary"] if row["axis"] == axis})
        panel.set_xticks(values, [f"{value // 1024}k" if value >= 1024 else str(value) for value in values])
        panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
        panel.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
        panel.minorticks_off()
        panel.set_ylim(0.9 * min(costs), 1.1 * max(costs))
    panel.legend(frameon=False)


SUITE = Suite("scaling", "How a step's cost grows with tokens, context, vocabulary and rank, beside the plain loop", add_arguments, run,
              {"scaling": View(table, caption, draw, headline, text_columns=1)})
