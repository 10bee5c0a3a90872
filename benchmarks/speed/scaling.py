"""How the cost of a training step grows with tokens a step, context, vocabulary and rank: Steadfast beside the plain Hugging Face loop.

One setting is varied at a time, from a common middle. All samples of a step have one length, so that nothing here is gained by packing;
half of the tokens are supervised. Weights are random and made on the device. At every point both lines start from the same weights, and
their losses are compared over two steps before they are timed in interleaved rounds. Cost is CPU-seconds on a CPU, seconds on a GPU.
A line that runs out of memory, or fails, keeps its row without a time.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict, dataclass, replace

import torch

from benchmarks.harness import record, timing
from benchmarks.harness.gpu_timing import free, peak_mib, tried
from benchmarks.harness.timing import Line, Sample
from benchmarks.on_gpu.whole_step import AGREEMENT, Packs, Padded, make_model, random_samples, relative
from benchmarks.speed.kernel_predictions import MODELS, Model
from trainer.errors import UserError
from trainer.metrics.throughput import model_size

OURS, PLAIN = "Steadfast", "plain HF loop"
LINES = {PLAIN: Padded, OURS: Packs}


@dataclass(frozen=True)
class Point:
    """One step: `count` samples of `length` tokens through a model."""

    model: Model
    count: int
    length: int
    rank: int = 16


@dataclass(frozen=True)
class Plan:
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
SMALL = Model("7 M", 256, 704, 4, 2, 64, 8192, 4)
ON_CPU = Plan(Point(SMALL, 8, 128), dict(zip(AXES, (
    (256, 512, 1024, 2048, 4096), (256, 512, 1024, 2048, 4096), (2048, 8192, 32768, 131072), (4, 16, 64, 256)))))
ON_GPU = Plan(Point(MODELS[-1], 16, 512), dict(zip(AXES, (
    (2048, 4096, 8192, 16384, 32768), (2048, 8192, 32768, 65536, 131072), (32768, 65536, 128256, 262144), (8, 16, 64, 256)))))


# ---------------------------------------------------------------- one point


def measure(point: Point, device: torch.device, dtype: torch.dtype, rounds: int) -> tuple[dict[str, list[Sample]], dict, float]:
    """Samples of the lines that ran; what each one's step adds to a GPU's memory, or why it did not run; the difference of losses."""
    steps = [random_samples([point.length] * point.count, point.model.vocabulary, seed) for seed in range(2)]
    lines, losses, facts = {}, {}, {}
    for name, kind in LINES.items():
        made = []

        def check(kind=kind, made=made) -> None:
            model = make_model(point.model, device, dtype, rank=point.rank)
            made.append(kind(model, device, steps, model_size(model)))
            made.append([made[0].step().loss for _ in steps])

        _, why = tried(check)
        if why:
            facts[name] = {"outcome": why}
            made.clear()
            free()
            continue
        lines[name], losses[name] = made
        facts[name] = {"outcome": "timed", "step_mib": peak_mib(made[0].step)}
    difference = max(map(relative, *losses.values())) if len(losses) == 2 else 0.0
    if not difference <= AGREEMENT[dtype]:
        raise AssertionError(f"{point}: losses of {OURS} and the {PLAIN} differ by {difference:.1e}, more than {AGREEMENT[dtype]:.0e}")
    timed = [Line(name, line.step) for name, line in lines.items()]
    timed += [timing.again(line) for line in timed if line.name == OURS]
    return timing.interleave(timed, rounds, 1), facts, difference


def rows_of(axis: str, value: int, samples: dict[str, list[Sample]], facts: dict, device: torch.device) -> list[dict]:
    """Both lines' rows of one point."""
    clock = "wall" if device.type == "cuda" else "cpu"

    def microseconds(sample: Sample) -> float:
        return 1e6 * getattr(sample, clock) / sample.tokens

    rows = []
    for name, about in facts.items():
        line = samples.get(name)
        ratio = timing.ratio(samples[PLAIN], line, microseconds) if line and PLAIN in samples and name != PLAIN else None
        same = timing.ratio(line, samples[f"{OURS} (A/A)"], microseconds) if line and name == OURS else None
        rows.append({"axis": axis, "value": value, "line": name, **about, "us_per_token": asdict(timing.spread(line, microseconds)) if line
                     else None, "ratio": {PLAIN: asdict(ratio)} if ratio else {}, "same": asdict(same) if same else None})
    return rows


def growth(rows: list[dict], axis: str, line: str) -> float | None:
    """The power of the setting that a step's cost grows with, from the smallest to the largest value measured."""
    costs = [(row["value"], row["us_per_token"]["value"] * (row["value"] if axis in ("tokens a step", "context") else 1))
             for row in rows if row["axis"] == axis and row["line"] == line and row["us_per_token"]]
    if len(costs) < 2:
        return None
    (first, least), (last, most) = costs[0], costs[-1]
    return math.log(most / least) / math.log(last / first)


# ---------------------------------------------------------------- the suite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU where there is one")
    parser.add_argument("--axes", nargs="+", metavar="NAME", default=list(AXES), help="of: " + "; ".join(AXES))
    parser.add_argument("--rounds", type=int, default=7, help="rounds at every point (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")


def run(arguments: argparse.Namespace) -> dict:
    """Measure every point; returns the record."""
    if unknown := [name for name in arguments.axes if name not in AXES]:
        raise UserError(f"--axes: expected names of {', '.join(AXES)}, got {', '.join(unknown)}")
    if arguments.rounds < 2 or arguments.threads < 1:
        raise UserError(f"--rounds, --threads: expected at least 2 and 1, got {arguments.rounds} and {arguments.threads}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: expected a GPU, found none; use --device cpu")
    device = torch.device("cpu" if arguments.device == "cpu" or not torch.cuda.is_available() else "cuda")
    dtype, plan = (torch.bfloat16, ON_GPU) if device.type == "cuda" else (torch.float32, ON_CPU)
    torch.set_num_threads(arguments.threads)
    summary, agreement, raw = [], {}, {}
    for axis in arguments.axes:
        for value in plan.values[axis]:
            samples, facts, difference = measure(plan.point(axis, value), device, dtype, arguments.rounds)
            rows = rows_of(axis, value, samples, facts, device)
            print(f"{axis} {value:,}: " + "; ".join(
                f"{r['line']} {r['us_per_token']['value']:,.0f} µs a token" if r["us_per_token"] else f"{r['line']} {r['outcome']}"
                for r in rows), file=sys.stderr, flush=True)
            summary += rows
            agreement[f"{axis} {value}"] = difference
            raw |= {f"{axis} {value}: {name}": line for name, line in timing.raw(samples).items()}
            free()
    conditions = {"middle": asdict(plan.middle), "dtype": str(dtype).removeprefix("torch."), "rounds": arguments.rounds,
                  "growth": {f"{axis}: {line}": growth(summary, axis, line) for axis in arguments.axes for line in LINES}}
    return record.make(f"scaling-{device.type}", conditions, agreement, summary, raw)
