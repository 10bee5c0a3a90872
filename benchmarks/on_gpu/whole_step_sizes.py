"""How a whole step's speed and memory depend on the model, the adapter, the lengths and the context, beside the plain Hugging Face loop.

sizes     1B, 4B and 8B shapes; LoRA, QLoRA, all weights; long-tailed lengths, which packing gains from, and equal ones, which it does not
context   one sample of 2k to 128k tokens a step on the 8B shape with LoRA, activations kept or computed again; the longest that fits

Weights are random and made on the device. A line that runs out of memory, fails or disagrees keeps its row. The outcome is written anew
after each case; cases that it has already are not run again: `python -m benchmarks.on_gpu.whole_step_sizes sizes --out FILE`.

Without bitsandbytes our line of QLoRA has a base of random codes, as fast and as large as any, and the plain loop none. A whole model of
8B is left out: two of them do not fit beside each other.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import timing
from benchmarks.harness.gpu_timing import Clock, free, measured_rates, peak_mib, reason, synchronize, tried
from benchmarks.harness.timing import Sample
from benchmarks.on_gpu.whole_step import (
    AGREEMENT,
    OURS,
    PLAIN,
    SAMPLES,
    Packs,
    Padded,
    adapted,
    long_tailed,
    make_model,
    random_samples,
    relative,
    resident_mib,
    rows_of,
    side_by_side,
    stock_model,
)
from benchmarks.speed.kernel_predictions import MODELS, Model
from kernels.nf4 import GROUP, dequantize_nf4
from trainer.metrics.throughput import model_size
from trainer.model.quantization import BLOCK, nf4_of, prepare_quantized

LINES = {PLAIN: Padded, OURS: Packs}
TOKENS, STREAM, ROUNDS = 8192, 4, 6  # real tokens of a step, different steps, rounds of one step each
B8, B4, B1 = MODELS
CONTEXTS = tuple(2**k for k in range(11, 18))
FEWEST_SECONDS = 3.0  # of timed steps at one context length, or three of them
RESERVE = 90.0  # seconds that a case may take which begins at the end of the budget


# ---------------------------------------------------------------- a base in NF4


class Linear4bit(nn.Linear):
    """A layer as bitsandbytes' one of this name lays it out, doubly quantised, with random codes."""

    def __init__(self, dense: nn.Linear, dtype: torch.dtype):
        super().__init__(dense.in_features, dense.out_features, bias=False, device="meta")
        count, device = dense.weight.numel(), dense.weight.device
        blocks = -(-count // BLOCK)
        self.weight = nn.Parameter(torch.randint(256, (-(-count // 2), 1), dtype=torch.uint8, device=device), requires_grad=False)
        self.weight.quant_state = SimpleNamespace(
            shape=dense.weight.shape, dtype=dtype, quant_type="nf4", blocksize=BLOCK, nested=True,
            absmax=torch.randint(256, (blocks,), dtype=torch.uint8, device=device), offset=torch.tensor(0.04, device=device),
            state2=SimpleNamespace(code=torch.linspace(-1, 1, 256, device=device), blocksize=GROUP,
                                   absmax=torch.full((-(-blocks // GROUP),), 0.01, device=device)))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, dequantize_nf4(nf4_of(self), x.dtype))


def quantized(base: nn.Module, dtype: torch.dtype) -> nn.Module:
    """With every linear layer but the head in NF4: by bitsandbytes, where it is installed."""
    head, theirs = base.get_output_embeddings(), no_bitsandbytes() is None
    for module in list(base.modules()):
        for name, layer in module.named_children():
            if type(layer) is nn.Linear and layer is not head:
                setattr(module, name, by_bitsandbytes(layer, dtype) if theirs else Linear4bit(layer, dtype))
    base.requires_grad_(False)
    base.is_loaded_in_4bit = theirs  # what PEFT asks before it adapts their layers
    prepare_quantized(base, dtype)
    return base


def by_bitsandbytes(dense: nn.Linear, dtype: torch.dtype) -> nn.Module:
    from bitsandbytes import nn as theirs

    layer = theirs.Linear4bit(dense.in_features, dense.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    layer.weight = theirs.Params4bit(dense.weight.data, requires_grad=False, quant_type="nf4", module=layer).to(dense.weight.device)
    return layer


def no_bitsandbytes() -> str | None:
    return None if importlib.util.find_spec("bitsandbytes") else "bitsandbytes is not installed"


# ---------------------------------------------------------------- cases, and how they are worked off


@dataclass(frozen=True)
class Case:
    """A comparison of both lines."""

    model: Model
    adapter: str  # lora, qlora, full
    lengths: str  # tailed, equal
    climb = None

    @property
    def name(self) -> str:
        return f"{self.model.name}, {self.adapter}, {self.lengths}"


@dataclass(frozen=True)
class Height:
    """One line at one context length; a climb ends at the first that does not fit."""

    line: str
    checkpointing: str  # none, full
    tokens: int

    @property
    def climb(self) -> str:
        return f"{self.line}, checkpointing {self.checkpointing}"

    @property
    def name(self) -> str:
        return f"{self.climb}, {self.tokens} tokens"


# The most interesting first.
CASES = tuple(Case(model, adapter, lengths) for lengths, model, adapter in (
    ("tailed", B8, "lora"), ("equal", B8, "lora"), ("tailed", B4, "lora"), ("tailed", B1, "lora"), ("tailed", B8, "qlora"),
    ("tailed", B1, "full"), ("equal", B4, "lora"), ("equal", B1, "lora"), ("equal", B8, "qlora"), ("equal", B1, "full"),
    ("tailed", B4, "qlora"), ("tailed", B1, "qlora"), ("tailed", B4, "full"), ("equal", B4, "qlora"), ("equal", B1, "qlora"),
    ("equal", B4, "full")))


def still_open(cases: Sequence, rows: list[dict]) -> list:
    """Cases without a row, in climbs that go on."""
    done = {row["case"] for row in rows}
    ended = {row["climb"] for row in rows if "climb" in row and row["outcome"] != "timed"}
    return [case for case in cases if case.name not in done and case.climb not in ended]


def work_off(cases: Sequence, measure: Callable, outcome: dict, keep: Callable[[dict], None], budget: float) -> dict:
    """Add the rows of every case that is open; none begins once the budget is over. `keep` is given the outcome after each."""
    begun = time.monotonic()
    while (left := still_open(cases, outcome["rows"])) and time.monotonic() - begun <= budget:
        measured, why = tried(lambda case=left[0]: measure(case))
        rows, raw = measured or ([{"line": getattr(left[0], "line", OURS), "outcome": why}], {})
        about = {"case": left[0].name} | ({"climb": left[0].climb} if left[0].climb else {})
        outcome["rows"] += [about | row for row in rows]
        outcome["raw"] |= {f"{left[0].name}: {name}": line for name, line in raw.items()}
        keep(judged(outcome, cases))
        print("; ".join(f"{left[0].name}: {row['line']} {row['outcome']}" for row in rows), file=sys.stderr, flush=True)
        free()
    return judged(outcome, cases)


def judged(outcome: dict, cases: Sequence) -> dict:
    """`outcome` with the names of what was not reached, and with what went wrong; running out of memory is no fault, nor is a plain loop
    that cannot be had."""
    faults = [f"{row['case']}: {row['line']} {row['outcome']}" for row in outcome["rows"]
              if row["outcome"].startswith("disagrees") or (row["line"] == OURS and row["outcome"].startswith("failed"))]
    outcome |= {"passed": not faults, "not_reached": [case.name for case in still_open(cases, outcome["rows"])]}
    outcome.pop("error", None)
    return outcome | ({"error": "; ".join(faults)} if faults else {})


def begun(earlier: dict | None) -> dict:
    """Nothing yet, or what an earlier run left."""
    earlier = earlier or {}
    return {"rows": [*earlier.get("rows", [])], "raw": dict(earlier.get("raw", {}))}


# ---------------------------------------------------------------- sizes


def lengths_of(kind: str, count: int, tokens: int, seed: int) -> list[int]:
    """Of `count` samples that have `tokens` tokens together, or a few more."""
    if kind == "equal":
        return [-(-tokens // count)] * count
    drawn = np.array(long_tailed(count, tokens / count, tokens // 4, seed))
    return np.ceil(drawn * tokens / drawn.sum()).astype(int).tolist()


def trainable(case: Case, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model of a case; equal weights each time. All weights are trained in `dtype` themselves, in both lines."""
    base = stock_model(case.model, device, dtype)
    if case.adapter == "full":
        return base
    return adapted(quantized(base, dtype) if case.adapter == "qlora" else base)


def measure_case(case: Case, device: torch.device, dtype: torch.dtype, tokens: int = TOKENS, rounds: int = ROUNDS) -> tuple[list, dict]:
    """Rows of both lines, the plain one first; raw samples. MFU is a share of a product's rate measured just before."""
    stream = [random_samples(lengths_of(case.lengths, SAMPLES, tokens, seed), case.model.vocabulary, seed) for seed in range(STREAM)]

    def line(kind):
        model = trainable(case, device, dtype)
        return kind(model, device, stream, model_size(model))

    absent = {PLAIN: {"outcome": no_bitsandbytes()}} if case.adapter == "qlora" and no_bitsandbytes() else {}
    rates = measured_rates(device, Clock(device))
    makers = {name: lambda kind=kind: line(kind) for name, kind in LINES.items() if name not in absent}
    samples, facts = side_by_side(makers, dtype, rounds, steps=1)
    about = {"model": case.model.name, "adapter": case.adapter, "lengths": case.lengths, "tokens": tokens} | rates
    return [about | row for row in rows_of(samples, absent | facts, rates["product_flops"])], timing.raw(samples)


def sizes(device: torch.device, dtype: torch.dtype, cases: Sequence[Case] = CASES, tokens: int = TOKENS, rounds: int = ROUNDS,
          budget: float = float("inf"), keep: Callable[[dict], None] = lambda outcome: None, earlier: dict | None = None) -> dict:
    return work_off(cases, lambda case: measure_case(case, device, dtype, tokens, rounds), begun(earlier), keep, budget)


# ---------------------------------------------------------------- context


class Climber:
    """Makes one line at a time, and steps it at learning rate 0: at each length every line's loss is that of the same weights."""

    def __init__(self, shape: Model, device: torch.device, dtype: torch.dtype):
        self.shape, self.device, self.dtype = shape, device, dtype
        self.rates = measured_rates(device, Clock(device))
        self.name, self.line = None, None

    def take(self, height: Height) -> None:
        """Have the line of this height, with its activations kept or computed again."""
        from trainer.model.forward import apply_activation_checkpointing

        if self.name != height.line:
            self.line = None
            free()
            model = make_model(self.shape, self.device, self.dtype)
            self.line, self.name = LINES[height.line](model, self.device, [], model_size(model)), height.line
            for group in self.line.optimizer.param_groups:
                group["lr"] = 0.0
        if height.line == OURS:
            apply_activation_checkpointing(self.line.model, height.checkpointing)
        elif height.checkpointing == "full":
            self.line.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.line.model.gradient_checkpointing_disable()

    def measure(self, height: Height, rows: list[dict]) -> tuple[list[dict], dict]:
        """The row of one height, and its raw samples; `rows` are those of the heights before."""
        row = {"line": height.line, "checkpointing": height.checkpointing, "tokens": height.tokens}
        losses, samples = [], []

        def climb() -> None:
            self.take(height)
            self.line.feed([random_samples([height.tokens], self.shape.vocabulary, height.tokens)])
            losses.append(self.line.step().loss)  # also warms up
            row["step_mib"] = peak_mib(lambda: samples.extend(timed_steps(self.line)))
            if not samples:  # on a CPU there is no such peak, and nothing was run for it
                samples.extend(timed_steps(self.line))

        _, why = tried(climb)
        if why:
            if self.line is not None:
                self.line.optimizer.zero_grad(set_to_none=True)
                self.line.feed([])
                free()
            return [row | {"outcome": why}], {}
        row |= {"loss": losses[0], "resident_mib": resident_mib(self.line)}
        others = [other["loss"] for other in rows if other["tokens"] == height.tokens and "loss" in other]
        if others and not relative(losses[0], others[0]) <= AGREEMENT[self.dtype]:
            return [row | {"outcome": f"disagrees: {relative(losses[0], others[0]):.1e} from the lines before"}], {}
        return rows_of({height.line: samples}, {height.line: row | {"outcome": "timed"}}, self.rates["product_flops"]), timing.raw(
            {height.line: samples})


def timed_steps(line) -> list[Sample]:
    """Three steps of a line, or as many as take some seconds."""
    samples: list[Sample] = []
    while len(samples) < 3 and sum(sample.wall for sample in samples) < FEWEST_SECONDS:
        synchronize()
        start, cpu = time.perf_counter(), time.process_time()
        done = line.step()
        wall = time.perf_counter() - start
        samples.append(Sample(time.process_time() - cpu, wall, 1, done.tokens, done.supervised, done.padding, done.flops))
    return samples


def longest_that_fits(rows: list[dict]) -> dict[str, int | None]:
    """Of every climb; None where not even the shortest fits."""
    longest: dict[str, int | None] = {}
    for row in rows:
        longest.setdefault(row["climb"], None)
        if row["outcome"] == "timed":
            longest[row["climb"]] = max(longest[row["climb"]] or 0, row["tokens"])
    return longest


def context(device: torch.device, dtype: torch.dtype, shape: Model = B8, lengths: Sequence[int] = CONTEXTS,
            budget: float = float("inf"), keep: Callable[[dict], None] = lambda outcome: None, earlier: dict | None = None) -> dict:
    # Activations are kept first: computing them again leaves a gradient of the embedding's output behind in the plain loop.
    heights = [Height(line, mode, tokens) for line in (OURS, PLAIN) for mode in ("none", "full") for tokens in lengths]
    climber, outcome = Climber(shape, device, dtype), begun(earlier) | {"model": shape.name}

    def kept(outcome: dict) -> None:
        keep(outcome | {"longest": longest_that_fits(outcome["rows"])})

    outcome = work_off(heights, lambda height: climber.measure(height, outcome["rows"]), outcome, kept, budget)
    return outcome | {"longest": longest_that_fits(outcome["rows"]), "rates": climber.rates}


# ---------------------------------------------------------------- the command

CHECKS = {"sizes": sizes, "context": context}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu.whole_step_sizes", description=__doc__.splitlines()[0])
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--out", type=Path, required=True, help="file for the outcome, as JSON; of what it has, nothing is run again")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="when to be done; no case begins shortly before")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.on_gpu.whole_step_sizes: expected a GPU, found none", file=sys.stderr)
        return 2

    def keep(outcome: dict) -> None:
        aside = arguments.out.with_suffix(".part")
        aside.write_text(json.dumps(outcome, indent=1) + "\n")
        aside.replace(arguments.out)

    def kept() -> dict | None:
        return json.loads(arguments.out.read_text()) if arguments.out.exists() else None

    try:
        outcome = CHECKS[arguments.check](torch.device("cuda"), torch.bfloat16, budget=arguments.seconds - RESERVE, keep=keep,
                                          earlier=kept())
    except Exception as error:  # the outcome of a check, which the caller writes down
        outcome = (kept() or {}) | {"passed": False, "error": reason(error)}
        print(f"benchmarks.on_gpu.whole_step_sizes: {arguments.check}: {error}", file=sys.stderr)
    keep(outcome)
    return 0 if outcome["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
