"""Time kernels on a GPU beside plain torch, torch.compile and libraries; or predict their times.

On a CPU, `benchmarks.speed.kernels_cpu` times their CPU forms instead.

Each case of `benchmarks.speed.kernel_cases` is one operation at one model's shapes, forward and backward. Before anything is timed, every
contender's results and gradients are compared with plain torch's. A round runs every contender once, in shuffled order. A contender's time
is the device's (`benchmarks.harness.gpu_timing`); the host's is noted beside it. One that runs out of memory, fails or disagrees keeps its
row, without a time.

Speeds are also given as shares of what this card was measured to reach just before: a large bf16 matmul, and a copy.
It needs torch, Triton and numpy only, and also runs by itself: `python -m benchmarks.speed.kernels --out FILE`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import record, show, timing
from benchmarks.harness.arguments import check_names
from benchmarks.harness.gpu_timing import FEWEST, Clock, distance, free, measured_rates, peak_mib, reason, rounds_of, tried
from benchmarks.harness.model_shapes import MODELS, ModelShape
from benchmarks.harness.record import origin
from benchmarks.harness.suite import Caption, Suite, View
from benchmarks.speed import kernel_predictions, kernels_cpu
from benchmarks.speed.kernel_cases import BARE, CASES, COMPILED, EAGER, OURS, RANDOM, Setup, Source, results_and_gradients
from benchmarks.speed.kernel_predictions import OPERATIONS, TOKENS
from trainer.errors import UserError
from trainer.files import atomic_file
from trainer.runtime.device import choose_device

TINY = ModelShape("tiny", 64, 128, 4, 2, 16, 257, 2, qk_norm=True)  # for --smoke, which tests this file on a CPU
TINY_TOKENS = 96
ROUNDS, CASE_SECONDS = 30, 1.5  # rounds of a case: at most, and how long once the fewest are done
TOLERANCE = {torch.bfloat16: 5e-2, torch.float32: 1e-3}  # of results and gradients, relative to plain torch's
AGAIN = f"{OURS} (A/A)"


# ---------------------------------------------------------------- running a contender


def contenders_of(setup: Setup, compiled: bool, again: bool) -> dict[str, Callable[[], list[Tensor] | None]]:
    upstream: list[Tensor] = []
    forwards = {OURS: setup.forwards[OURS], COMPILED: torch.compile(setup.forwards[EAGER])} if compiled else setup.forwards
    contenders = {name: partial(results_and_gradients, forward, setup.inputs, upstream, setup.calls) for name, forward in forwards.items()}
    if compiled:
        return contenders
    if again:
        contenders[AGAIN] = contenders[OURS]
    return contenders | ({BARE: setup.bare} if setup.bare else {})


def compare(contenders: dict[str, Callable], tolerance: float) -> tuple[dict[str, float], dict[str, str]]:
    """Return how far each contender is from plain torch, and the outcomes of those that cannot be timed.

    Where plain torch fails, ours takes its place. A difference is the largest of all results and gradients.
    """
    differences, outcomes, truth = {}, {}, None
    for name in sorted(contenders, key=lambda name: (name != EAGER, name != OURS)):
        results, why = tried(contenders[name])
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


def measure(operation: str, model: ModelShape, tokens: int, device: torch.device, dtype: torch.dtype, clock: Clock, compiled: bool,
            rates: dict[str, float], seconds: float = CASE_SECONDS, most: int = ROUNDS) -> tuple[list[dict], dict[str, float], dict]:
    """Return rows, agreement and raw measurements of one case.

    `compiled`: of torch.compile beside ours only.
    """
    def contenders(**options):
        return contenders_of(CASES[operation](Source(device, dtype), model, tokens, **options), compiled, again=operation == "RMSNorm")

    fixed = {"dropout": 0.0} if operation in RANDOM else {}
    checked = {name: run for name, run in contenders(**fixed).items() if name not in (AGAIN, BARE)}
    differences, outcomes = compare(checked, TOLERANCE[dtype])
    checked.clear()
    free()
    timed = {name: run for name, run in contenders().items() if name not in outcomes}
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
        f"{label}: {name}": [{"ms": ms, "host_ms": host} for ms, host in own] for name, own in samples.items()}


def row(operation: str, model: ModelShape, tokens: int, name: str, samples: dict, outcomes: dict[str, str], peaks: dict,
        rates: dict[str, float]) -> dict:
    """Return a contender's row: medians with their spread, ratios, and shares of the card's rates."""
    if name not in samples:
        return missing(operation, model, name, outcomes[name])
    own = samples[name]
    work = OPERATIONS[operation](model, tokens)
    kernels = work.base or work.forward + work.backward  # with an adapter: what the layer does without
    ms = timing.spread(own, lambda s: s[0])
    flops, moved = sum(k.flops for k in kernels), sum(k.bytes for k in kernels)
    return {
        "operation": operation, "model": model.name, "contender": name, "outcome": "timed",
        "ms": asdict(ms), "host_ms": asdict(timing.spread(own, lambda s: s[1])), "peak_mib": peaks[name],
        "share_of_product": 1e3 * flops / ms.value / rates["product_flops"], "share_of_copy": 1e3 * moved / ms.value / rates["copy_bytes"],
        "ratio": {other: asdict(timing.ratio(own, samples[other], lambda s: s[0])) for other in samples if other != name}}


def missing(operation: str, model: ModelShape, name: str, why: str) -> dict:
    """Return the row of a contender that could not be timed."""
    return {"operation": operation, "model": model.name, "contender": name, "outcome": why, "ms": None}


def cases(models: tuple[ModelShape, ...], operations: list[str], compiled: bool) -> Iterator[tuple[str, ModelShape, bool]]:
    """Yield every case of every model.

    torch.compile, which takes seconds for each, is tried for the first model, after its other cases.
    """
    for model in models:
        for with_compile in (False, True) if compiled and model is models[0] else (False,):
            for operation in operations:
                if kernel_predictions.applies(operation, model):
                    yield operation, model, with_compile


# ---------------------------------------------------------------- the suite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--predict", action="store_true", help="measure nothing: predict from bytes, FLOPs and launches")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto",
                        help="cpu: CPU forms beside stock torch, transformers and PEFT (default: a GPU where there is one)")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: tests the GPU benchmark on any device, gives no figures")
    parser.add_argument("--quick", action="store_true", help="on a CPU, two rounds of one call: tests the code, gives no figures")
    parser.add_argument("--operations", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--models", nargs="+", metavar="NAME", default=[m.name for m in MODELS], help="default: %(default)s")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds after which no case begins (default: %(default)s)")


def run(arguments: argparse.Namespace, keep: Callable[[dict], None] = lambda record: None) -> dict:
    """Measure or predict, and return the record; `keep` is called with it after every case."""
    if arguments.predict:
        return kernel_predictions.record_of()
    device = device_of(arguments)
    if device.type == "cpu" and not arguments.smoke:
        return kernels_cpu.run(chosen_operations(arguments.operations, kernels_cpu.OPERATIONS), arguments.quick)
    models, tokens = ((TINY,), TINY_TOKENS) if arguments.smoke else (chosen_models(arguments.models), TOKENS)
    operations = chosen_operations(arguments.operations, CASES)
    dtype, begun = torch.bfloat16 if device.type == "cuda" else torch.float32, time.monotonic()
    clock = Clock(device)
    rates = measured_rates(device, clock)
    conditions = {"tokens": tokens, "dtype": str(dtype).removeprefix("torch."), "models": [asdict(m) for m in models], "rates": rates,
                  "rounds": [FEWEST, ROUNDS], "memory_gib": memory_gib(device), "skipped": []}
    agreement, summary, raw = {}, [], {}
    made = record.make("kernels-smoke" if arguments.smoke else "kernels-cuda", conditions, agreement, summary, raw)
    effort = {"seconds": 0.0, "most": 2} if arguments.smoke else {}
    for operation, model, compiled in cases(models, operations, not arguments.no_compile):
        label = f"{operation}, {model.name}" + ", torch.compile" * compiled
        if time.monotonic() - begun > arguments.budget:
            conditions["skipped"].append(label)
            continue
        try:
            rows, agreed, samples = measure(operation, model, tokens, device, dtype, clock, compiled, rates, **effort)
        except torch.cuda.OutOfMemoryError as error:  # for its inputs alone
            rows, agreed, samples = [missing(operation, model, OURS, reason(error))], {}, {}
        summary += [r for r in rows if not (compiled and r["contender"] == OURS)]
        agreement |= agreed
        raw |= {(f"{name} beside torch.compile" if compiled and name.endswith(OURS) else name): own for name, own in samples.items()}
        outcomes = (f"{r['contender']} {r['ms']['value']:.3f} ms" if r["ms"] else f"{r['contender']} {r['outcome']}" for r in rows)
        print(f"{label}: {'; '.join(outcomes)}", file=sys.stderr, flush=True)
        keep(made)
        torch._dynamo.reset()
        free()
    return made


def device_of(arguments: argparse.Namespace) -> torch.device:
    """Return the device to measure on: a GPU where there is one, unless told otherwise."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("kernels: expected a GPU, found none; --predict says what to expect of one")
    return choose_device(arguments.device)


def chosen_operations(names: list[str] | None, known: Iterable[str]) -> list[str]:
    """Return the operations to measure: all, or those of these names."""
    check_names("--operations", names or (), known)
    return list(names or known)


def chosen_models(names: list[str]) -> tuple[ModelShape, ...]:
    known = {model.name: model for model in MODELS}
    check_names("--models", names, known)
    return tuple(known[name] for name in names)


def memory_gib(device: torch.device) -> float | None:
    return torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else None


# ---------------------------------------------------------------- how records are shown


def table(record: dict) -> list[list[str]]:
    """Return every contender of every case: ms, its ratio to ours, memory, and shares of the card's rates."""
    rows = [["operation", "model", "contender", "ms", f"× {OURS}", "host ms", "peak MiB", "of matmul rate", "of copy bandwidth"]]
    for r in record["summary"]:
        cells = [r["operation"], r["model"], r["contender"]]
        if r["ms"] is None:
            rows.append([*cells, r["outcome"], *[""] * 5])
            continue
        rows.append([*cells, show.interval(r["ms"], ".3g"), show.interval(r["ratio"].get(OURS)), f"{r['host_ms']['value']:.2f}",
                     "" if r["peak_mib"] is None else f"{r['peak_mib']:,.0f}", f"{r['share_of_product']:.0%}", f"{r['share_of_copy']:.0%}"])
    return rows


def caption(record: dict) -> Caption:
    c = record["conditions"]
    return Caption(
        f"Time of each operation on {record['device']}, forward and backward, {c['tokens']:,} tokens, {c['dtype']}; an operation's share "
        "is that of its useful work (of a LoRA layer: the base matmuls).",
        (f"torch {record['versions']['torch']}, Triton {record['versions'].get('triton', 'none')}.",
         "Medians of interleaved rounds with their 20th and 80th percentiles, ratios with 95% intervals.",
         f"A matmul runs at {c['rates']['product_flops'] / 1e12:.0f} TFLOP/s here, and a copy moves "
         f"{c['rates']['copy_bytes'] / 1e12:.2f} TB/s.",
         *([f"Not reached in the time given: {'; '.join(c['skipped'])}."] if c["skipped"] else []), f"{origin(record)}."))


def draw(record: dict, figure) -> None:
    """Draw how many times as long as ours every other contender of the first model's operations takes."""
    model = record["conditions"]["models"][0]["name"]
    rows = [row for row in record["summary"] if row["model"] == model and row["ms"] and OURS in row["ratio"]][::-1]
    axes = show.axes_of(figure, 8, 1.3 + 0.25 * len(rows))
    axes.barh([f"{row['operation']}: {row['contender']}" for row in rows], [row["ratio"][OURS]["value"] for row in rows],
              color=show.OTHERS)
    axes.axvline(1, color=show.OURS)
    axes.set_xlabel(f"time over Steadfast's, {model}, {record['device']}")


def gpu_table(record: dict) -> list[list[str]]:
    """Return the outcome of each check of `make gpu`."""
    outcomes = [[name, f"{part['outcome']} ({part.get('seconds', 0):.0f} s)"] for name, part in record["parts"].items()]
    return [["check", "outcome"], *outcomes]


def gpu_caption(record: dict) -> Caption:
    return Caption(f"`make gpu` on {record['device']}; its page has every table.", (f"{origin(record)}.",))


def gpu_draw(record: dict, figure) -> None:
    if inside := record["parts"].get("kernels", {}).get("record"):
        draw(inside, figure)


VIEW = View(table, caption, draw, lambda record: f"Operations on {record['device']}", text_columns=3)
SUITE = Suite("kernels", "Every operation beside stock code, on a CPU, or beside its peers on a GPU", add_arguments, run, {
    "kernels-cuda": VIEW, "kernels-smoke": VIEW, "kernels-cpu": kernels_cpu.VIEW, "kernels-predicted": kernel_predictions.VIEW,
    "gpu": View(gpu_table, gpu_caption, gpu_draw, text_columns=2)})


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
    """Write a record atomically: whoever started this may end it at any moment."""
    with atomic_file(path) as tmp:
        tmp.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
