"""Kernel timings on a GPU, beside plain torch, torch.compile and the libraries that are installed; or, with --predict, predicted ones.

Each case of `benchmarks.speed.kernel_cases` is one operation at one model's shapes, forward and backward. Before anything is timed, every
line's results and gradients are compared with plain torch's. Then rounds: each runs every line once, in a shuffled order. A line's time
is the device's (`benchmarks.harness.gpu_timing`); the host's is noted beside it. A line that runs out of memory, fails or disagrees
keeps its
row, without a time.

Speeds are also given as shares of what this very card was measured to do just before: a large bf16 product, and a copy.
It needs torch, Triton and numpy alone, and also runs by itself: `python -m benchmarks.speed.kernels --out FILE`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import record, timing
from benchmarks.harness.gpu_timing import FEWEST, Clock, distance, free, measured_rates, peak_mib, reason, rounds_of, tried
from benchmarks.harness.record import origin
from benchmarks.speed import kernel_predictions
from benchmarks.speed.kernel_cases import BARE, CASES, COMPILED, EAGER, OURS, RANDOM, Setup, Source
from benchmarks.speed.kernel_predictions import MODELS, OPERATIONS, TOKENS, Model
from trainer.errors import UserError

TINY = Model("tiny", 64, 128, 4, 2, 16, 257, 2, qk_norm=True)  # for --smoke, which tests this file on a CPU
TINY_TOKENS = 96
ROUNDS, CASE_SECONDS = 30, 1.5  # rounds of a case: at most, and how long once the fewest are done
TOLERANCE = {torch.bfloat16: 5e-2, torch.float32: 1e-3}  # of results and gradients, relative to plain torch's
AGAIN = f"{OURS} (A/A)"


# ---------------------------------------------------------------- running a line


def step(forward: Callable, inputs: tuple, calls: int, upstream: list[Tensor]) -> list[Tensor]:
    """Results and gradients of those inputs that require one. `upstream` is filled at the first call and used by every line."""
    for _ in range(calls):
        results = forward(*inputs)
    results = list(results) if isinstance(results, (tuple, list)) else [results]
    wanted = [t for t in inputs if t.requires_grad]
    if not wanted:
        return results
    if not upstream:
        upstream += [torch.randn_like(y) if y.dim() else torch.ones_like(y) for y in results]
    gradients = torch.autograd.grad(results, wanted, [u.to(y.dtype) for u, y in zip(upstream, results, strict=True)])
    return [y.detach() for y in results] + list(gradients)


def lines_of(setup: Setup, compiled: bool, again: bool) -> dict[str, Callable[[], list[Tensor] | None]]:
    upstream: list[Tensor] = []
    forwards = {OURS: setup.forwards[OURS], COMPILED: torch.compile(setup.forwards[EAGER])} if compiled else setup.forwards
    lines = {name: partial(step, forward, setup.inputs, setup.calls, upstream) for name, forward in forwards.items()}
    if compiled:
        return lines
    if again:
        lines[AGAIN] = lines[OURS]
    return lines | ({BARE: setup.bare} if setup.bare else {})


def compare(lines: dict[str, Callable], tolerance: float) -> tuple[dict[str, float], dict[str, str]]:
    """How far each line is from plain torch (or, where that gives nothing, from ours): the largest of its results and gradients. And the
    outcomes of lines that cannot be timed."""
    differences, outcomes, truth = {}, {}, None
    for name in sorted(lines, key=lambda name: (name != EAGER, name != OURS)):
        results, why = tried(lines[name])
        if why:
            outcomes[name] = why
        elif results is not None and truth is None:
            truth = results
        elif results is not None:
            worst = max(distance(a, b) for a, b in zip(results, truth, strict=True))
            differences[name] = worst
            if not worst <= tolerance:
                outcomes[name] = f"disagrees: {worst:.1e} from the others"
    return differences, outcomes


# ---------------------------------------------------------------- a case


def measure(operation: str, model: Model, tokens: int, device: torch.device, dtype: torch.dtype, clock: Clock, compiled: bool,
            rates: dict[str, float], seconds: float = CASE_SECONDS, most: int = ROUNDS) -> tuple[list[dict], dict[str, float], dict]:
    """Rows, agreement and raw samples of one case; `compiled`: of torch.compile beside ours alone."""
    def lines(**options):
        return lines_of(CASES[operation](Source(device, dtype), model, tokens, **options), compiled, again=operation == "RMSNorm")

    fixed = {"dropout": 0.0} if operation in RANDOM else {}
    checked = {name: run for name, run in lines(**fixed).items() if name not in (AGAIN, BARE)}
    differences, outcomes = compare(checked, TOLERANCE[dtype])
    checked.clear()
    free()
    timed = {name: run for name, run in lines().items() if name not in outcomes}
    peaks = {}
    for name in list(timed):  # also warms up
        _, why = tried(timed[name])
        if why:
            outcomes[name] = why
            del timed[name]
        else:
            peaks[name] = peak_mib(timed[name])
    samples = rounds_of(timed, clock, seconds, most) if timed else {}
    label = f"{operation}, {model.name}"
    rows = [row(operation, model, tokens, name, samples, outcomes, peaks, rates) for name in (*timed, *outcomes)]
    return rows, {f"{label}: {name}": value for name, value in differences.items() if np.isfinite(value)}, {
        f"{label}: {name}": [{"ms": ms, "host_ms": host} for ms, host in line] for name, line in samples.items()}


def row(operation: str, model: Model, tokens: int, name: str, samples: dict, outcomes: dict[str, str], peaks: dict,
        rates: dict[str, float]) -> dict:
    """A line's summary: medians with their 20th and 80th percentiles, ratios with 95% intervals, shares of the card's measured rates."""
    if name not in samples:
        return missing(operation, model, name, outcomes[name])
    line = samples[name]
    work = OPERATIONS[operation](model, tokens)
    kernels = work.base or work.forward + work.backward  # with an adapter: what the layer does without
    ms = timing.spread(line, lambda s: s[0])
    flops, moved = sum(k.flops for k in kernels), sum(k.bytes for k in kernels)
    return {
        "operation": operation, "model": model.name, "line": name, "outcome": "timed",
        "ms": asdict(ms), "host_ms": asdict(timing.spread(line, lambda s: s[1])), "peak_mib": peaks[name],
        "share_of_product": 1e3 * flops / ms.value / rates["product_flops"], "share_of_copy": 1e3 * moved / ms.value / rates["copy_bytes"],
        "ratio": {other: asdict(timing.ratio(line, samples[other], lambda s: s[0])) for other in samples if other != name}}


def missing(operation: str, model: Model, name: str, why: str) -> dict:
    """The row of a line that could not be timed."""
    return {"operation": operation, "model": model.name, "line": name, "outcome": why, "ms": None}


def cases(models: tuple[Model, ...], operations: list[str], compiled: bool) -> Iterator[tuple[str, Model, bool]]:
    """Every case of every model. torch.compile, which takes seconds for each, is tried for the first model, right after its cases."""
    for model in models:
        for with_compile in (False, True) if compiled and model is models[0] else (False,):
            for operation in operations:
                if kernel_predictions.applies(operation, model):
                    yield operation, model, with_compile


# ---------------------------------------------------------------- the suite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--predict", action="store_true", help="measure nothing: predict from bytes, FLOPs and launches")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: a test of this code, not a benchmark")
    parser.add_argument("--operations", nargs="+", metavar="NAME", default=list(CASES), help="of: " + "; ".join(CASES))
    parser.add_argument("--models", nargs="+", metavar="NAME", default=[m.name for m in MODELS], help="default: %(default)s")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds after which no case begins (default: %(default)s)")


def run(arguments: argparse.Namespace, keep: Callable[[dict], None] = lambda record: None) -> dict:
    """Measure (or predict) and return the record; `keep` is given it after every case."""
    if arguments.predict:
        return kernel_predictions.record_of()
    device = device_of(arguments)
    models, tokens = ((TINY,), TINY_TOKENS) if arguments.smoke else (chosen_models(arguments.models), TOKENS)
    unknown = [name for name in arguments.operations if name not in CASES]
    if unknown:
        raise UserError(f"--operations: expected names of {', '.join(CASES)}, got {', '.join(unknown)}")
    dtype, begun = torch.bfloat16 if device.type == "cuda" else torch.float32, time.monotonic()
    clock = Clock(device)
    rates = measured_rates(device, clock)
    conditions = {"tokens": tokens, "dtype": str(dtype).removeprefix("torch."), "models": [asdict(m) for m in models], "rates": rates,
                  "rounds": [FEWEST, ROUNDS], "memory_gib": memory_gib(device), "skipped": []}
    agreement, summary, raw = {}, [], {}
    made = record.make(f"kernels-{device.type}", conditions, agreement, summary, raw)
    effort = {"seconds": 0.0, "most": 2} if arguments.smoke else {}
    for operation, model, compiled in cases(models, arguments.operations, not arguments.no_compile):
        label = f"{operation}, {model.name}" + ", torch.compile" * compiled
        if time.monotonic() - begun > arguments.budget:
            conditions["skipped"].append(label)
            continue
        try:
            rows, agreed, samples = measure(operation, model, tokens, device, dtype, clock, compiled, rates, **effort)
        except torch.cuda.OutOfMemoryError as error:  # for its inputs alone
            rows, agreed, samples = [missing(operation, model, OURS, reason(error))], {}, {}
        summary += [r for r in rows if not (compiled and r["line"] == OURS)]
        agreement |= agreed
        raw |= {(f"{name} beside torch.compile" if compiled and name.endswith(OURS) else name): line for name, line in samples.items()}
        outcomes = (f"{r['line']} {r['ms']['value']:.3f} ms" if r["ms"] else f"{r['line']} {r['outcome']}" for r in rows)
        print(f"{label}: {'; '.join(outcomes)}", file=sys.stderr, flush=True)
        keep(made)
        torch._dynamo.reset()
        free()
    return made


def device_of(arguments: argparse.Namespace) -> torch.device:
    if arguments.device == "cpu" and not arguments.smoke:
        raise UserError("kernels: a CPU's times say nothing of a GPU's; expected a GPU, or --predict, or --smoke, which tests the code")
    if arguments.device != "cpu" and not torch.cuda.is_available():
        raise UserError("kernels: expected a GPU, found none; --predict says what to expect of one")
    return torch.device(arguments.device)


def chosen_models(names: list[str]) -> tuple[Model, ...]:
    known = {model.name: model for model in MODELS}
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--models: expected names of {', '.join(known)}, got {', '.join(unknown)}")
    return tuple(known[name] for name in names)


def memory_gib(device: torch.device) -> float | None:
    return torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else None


# ---------------------------------------------------------------- the table


def report(record: dict) -> str:
    """What a run prints: everything. (The README has a prediction's first model alone.)"""
    predicted = record["suite"] == "kernels-predicted"
    return kernel_predictions.markdown(record, kernel_predictions.newest_measured()) if predicted else markdown(record)


def markdown(record: dict) -> str:
    """Every line of every case: ms, ours over it, peak memory, shares of the card's own product rate and copy bandwidth."""
    head = ["operation", "model", "line", "ms", f"× {OURS}", "host ms", "peak MiB", "of product rate", "of copy bandwidth"]
    lines = [head, ["---"] * 3 + ["---:"] * 6]
    for r in record["summary"]:
        cells = [r["operation"], r["model"], r["line"]]
        if r["ms"] is None:
            lines.append([*cells, r["outcome"], *[""] * 5])
            continue
        ms, ratio = r["ms"], r["ratio"].get(OURS)
        lines.append([*cells, f"{ms['value']:.3g} ({ms['low']:.3g}-{ms['high']:.3g})",
                      f"{ratio['value']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else "", f"{r['host_ms']['value']:.2f}",
                      "" if r["peak_mib"] is None else f"{r['peak_mib']:,.0f}",
                      f"{r['share_of_product']:.0%}", f"{r['share_of_copy']:.0%}"])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    c = record["conditions"]
    skipped = f" Not reached in the time given: {'; '.join(c['skipped'])}." if c["skipped"] else ""
    return (
        f"{table}\n\n{record['device']}, torch {record['versions']['torch']}, Triton {record['versions'].get('triton', 'none')}; "
        f"{c['tokens']} tokens, {c['dtype']}, forward and backward. Medians of interleaved rounds with their 20th and 80th percentiles, "
        f"ratios with 95% intervals. A product runs at {c['rates']['product_flops'] / 1e12:.0f} TFLOP/s here and a copy moves "
        f"{c['rates']['copy_bytes'] / 1e12:.2f} TB/s; an operation's share is that of its useful work (of a LoRA layer: the bare base "
        f"products).{skipped} {origin(record)}.\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.kernels", description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="file for the record, written anew after every case")
    arguments = parser.parse_args(argv)
    try:
        measured = run(arguments, keep=lambda record: write(arguments.out, record))
    except UserError as error:
        print(f"benchmarks.speed.kernels: {error}", file=sys.stderr)
        return 2
    write(arguments.out, measured)
    return 0


def write(path: Path, record: dict) -> None:
    """Whole or not at all: whoever started this may end it at any moment."""
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(record, indent=1) + "\n")
    aside.replace(path)


if __name__ == "__main__":
    sys.exit(main())
