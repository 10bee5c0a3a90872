"""Time whole steps by model, method, lengths and context, beside the plain Hugging Face loop.

sizes     1B, 4B and 8B shapes; LoRA, QLoRA, all weights; log-normal lengths, which packing gains from, and equal ones, which it does not
context   one sample of 2k to 128k tokens a step on the 8B shape with LoRA, activations kept or computed again; the longest that fits

Weights are random and made on the device. A contender that runs out of memory, fails or disagrees keeps its row. The outcome is written
anew after each case; cases that it has already are not run again: `python -m benchmarks.on_gpu.whole_step_sizes sizes --out FILE`.

Without bitsandbytes, Steadfast's QLoRA has a base of random codes, as fast and as large as any, and the plain loop has none. All weights of
8B are left out: two such runs do not fit beside each other. With all weights trained, Steadfast keeps fp32 masters of bf16 weights, as the
trainer does, and the plain loop trains the bf16 weights themselves.
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
from benchmarks.harness.model_shapes import MODELS, ModelShape
from benchmarks.harness.synthetic_models import adapted, log_normal_lengths, random_samples, stock_model
from benchmarks.harness.timing import AGREEMENT, Measurement, TokenSamples, relative
from benchmarks.on_gpu.whole_step import CONTENDERS, DTYPES, OURS, PLAIN, PLANNED, SAMPLES, resident_mib, rows_of, side_by_side
from benchmarks.speed.contenders import Trained
from kernels.nf4 import GROUP, dequantize_nf4
from trainer.files import atomic_file
from trainer.model.quantization import BLOCK, nf4_of, prepare_quantized
from trainer.runtime.device import choose_device

TOKENS, ROUNDS = 8192, 6  # tokens of a step, rounds of one step each
B8, B4, B1 = MODELS
CONTEXTS = tuple(2**k for k in range(11, 18))
FEWEST_SECONDS = 3.0  # of timed steps at one context length, or three of them
RESERVE = 90.0  # seconds that a case may take which begins at the end of the budget


# ---------------------------------------------------------------- a base in NF4


class Linear4bit(nn.Linear):
    """A layer with the attributes of bitsandbytes' one of this name, doubly quantised, with random codes."""

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
    """Put every linear layer but the head into NF4, by bitsandbytes where it is installed."""
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
    """A comparison of both contenders."""

    model: ModelShape
    method: str  # lora, qlora, full
    lengths: str  # tailed, equal
    climb = None

    @property
    def name(self) -> str:
        return f"{self.model.name}, {self.method}, {self.lengths}"


@dataclass(frozen=True)
class Height:
    """One contender at one context length; a climb ends at the first that does not fit."""

    contender: str
    checkpointing: str  # none, full
    tokens: int

    @property
    def climb(self) -> str:
        return f"{self.contender}, checkpointing {self.checkpointing}"

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
    """Return cases without a row, in climbs that have not ended."""
    done = {row["case"] for row in rows}
    ended = {row["climb"] for row in rows if "climb" in row and row["outcome"] != "timed"}
    return [case for case in cases if case.name not in done and case.climb not in ended]


def work_off(cases: Sequence, measure: Callable, outcome: dict, keep: Callable[[dict], None], budget: float) -> dict:
    """Add the rows of every open case; none begins once the budget is over.

    `keep` is called with the outcome after each.
    """
    begun = time.monotonic()
    while (left := still_open(cases, outcome["rows"])) and time.monotonic() - begun <= budget:
        measured, why = tried(lambda case=left[0]: measure(case))
        rows, raw = measured or ([{"contender": getattr(left[0], "contender", OURS), "outcome": why}], {})
        about = {"case": left[0].name} | ({"climb": left[0].climb} if left[0].climb else {})
        outcome["rows"] += [about | row for row in rows]
        outcome["raw"] |= {f"{left[0].name}: {name}": own for name, own in raw.items()}
        keep(judged(outcome, cases))
        print("; ".join(f"{left[0].name}: {row['contender']} {row['outcome']}" for row in rows), file=sys.stderr, flush=True)
        free()
    return judged(outcome, cases)


def judged(outcome: dict, cases: Sequence) -> dict:
    """Return the outcome with the names of cases not reached, and with faults.

    Running out of memory is no fault, nor is a plain loop that is not installed.
    """
    faults = [f"{row['case']}: {row['contender']} {row['outcome']}" for row in outcome["rows"]
              if row["outcome"].startswith("disagrees") or (row["contender"] == OURS and row["outcome"].startswith("failed"))]
    outcome |= {"passed": not faults, "not_reached": [case.name for case in still_open(cases, outcome["rows"])]}
    outcome.pop("error", None)
    return outcome | ({"error": "; ".join(faults)} if faults else {})


def begun(earlier: dict | None) -> dict:
    """Return an empty outcome, or the one that an earlier run left."""
    earlier = earlier or {}
    return {"rows": [*earlier.get("rows", [])], "raw": dict(earlier.get("raw", {}))}


# ---------------------------------------------------------------- sizes


def lengths_of(kind: str, tokens: int, seed: int = 0) -> np.ndarray:
    """Return the lengths of the samples of PLANNED steps of `tokens` tokens."""
    count = SAMPLES * PLANNED
    if kind == "equal":
        return np.full(count, tokens // SAMPLES)
    return log_normal_lengths(count, tokens / SAMPLES, np.random.default_rng(seed), longest=tokens // 4)


def trainable(case: Case, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return the model of a case; equal weights each time."""
    base = stock_model(case.model, device, dtype)
    if case.method == "full":
        return base
    return adapted(quantized(base, dtype) if case.method == "qlora" else base)


def measure_case(case: Case, device: torch.device, dtype: torch.dtype, tokens: int = TOKENS, rounds: int = ROUNDS) -> tuple[list, dict]:
    """Return the rows of both contenders and their raw measurements.

    MFU is a share of a matmul's rate, measured just before.
    """
    samples = random_samples(lengths_of(case.lengths, tokens), case.model.vocabulary, seed=0)
    absent = {PLAIN: {"outcome": no_bitsandbytes()}} if case.method == "qlora" and no_bitsandbytes() else {}
    rates = measured_rates(device, Clock(device))
    makers = {name: lambda kind=kind: kind(trainable(case, device, dtype), samples, tokens, device)
              for name, kind in CONTENDERS.items() if name not in absent}
    measured, facts = side_by_side(makers, dtype, rounds, steps=1)
    about = {"model": case.model.name, "method": case.method, "lengths": case.lengths, "tokens": tokens} | rates
    return [about | row for row in rows_of(measured, absent | facts, rates["product_flops"])], timing.raw(measured)


def sizes(device: torch.device, dtype: torch.dtype, cases: Sequence[Case] = CASES, tokens: int = TOKENS, rounds: int = ROUNDS,
          budget: float = float("inf"), keep: Callable[[dict], None] = lambda outcome: None, earlier: dict | None = None) -> dict:
    return work_off(cases, lambda case: measure_case(case, device, dtype, tokens, rounds), begun(earlier), keep, budget)


# ---------------------------------------------------------------- context


class Climber:
    """Makes one contender at a time, and steps it at learning rate 0.

    So at each length all losses are those of equal weights.
    """

    def __init__(self, shape: ModelShape, device: torch.device, dtype: torch.dtype):
        self.shape, self.device, self.dtype = shape, device, dtype
        self.rates = measured_rates(device, Clock(device))
        self.name: str | None = None
        self.contender: Trained | None = None

    def take(self, height: Height) -> None:
        """Make the contender of this height, with activations kept or computed again."""
        from trainer.model.forward import apply_activation_checkpointing

        if self.name != height.contender:
            self.contender = None
            free()
            model = adapted(stock_model(self.shape, self.device, self.dtype))
            self.contender = CONTENDERS[height.contender](model, self.samples(height.tokens), height.tokens, self.device)
            self.name = height.contender
            self.contender.use_learning_rate(0.0)
        if height.contender == OURS:
            apply_activation_checkpointing(self.contender.model, height.checkpointing)
        elif height.checkpointing == "full":
            self.contender.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.contender.model.gradient_checkpointing_disable()

    def samples(self, tokens: int) -> TokenSamples:
        return random_samples([tokens], self.shape.vocabulary, seed=tokens)

    def measure(self, height: Height, rows: list[dict]) -> tuple[list[dict], dict]:
        """Return the row of one height, and its raw measurements; `rows` are those of the heights before."""
        row = {"contender": height.contender, "checkpointing": height.checkpointing, "tokens": height.tokens}
        losses, measured = [], []

        def climb() -> None:
            self.take(height)
            self.contender.use(self.samples(height.tokens), height.tokens)
            losses.append(float(self.contender.step().loss))  # also warms up
            row["step_mib"] = peak_mib(lambda: measured.extend(timed_steps(self.contender)))
            if not measured:  # on a CPU there is no such peak, and nothing was run for it
                measured.extend(timed_steps(self.contender))

        _, failure = tried(climb)
        if failure:
            if self.contender is not None:
                self.contender.drop_batches()
                free()
            return [row | {"outcome": failure}], {}
        row |= {"loss": losses[0], "resident_mib": resident_mib(self.contender)}
        others = [other["loss"] for other in rows if other["tokens"] == height.tokens and "loss" in other]
        if others and not relative(losses[0], others[0]) <= AGREEMENT[DTYPES[self.dtype]]:
            return [row | {"outcome": f"disagrees: {relative(losses[0], others[0]):.1e} from the contenders before"}], {}
        own = {height.contender: measured}
        return rows_of(own, {height.contender: row | {"outcome": "timed"}}, self.rates["product_flops"]), timing.raw(own)


def timed_steps(contender: Trained) -> list[Measurement]:
    """Return measurements of three steps, or of as many as take some seconds."""
    measured: list[Measurement] = []
    while len(measured) < 3 and sum(one.wall for one in measured) < FEWEST_SECONDS:
        synchronize()
        start, cpu = time.perf_counter(), time.process_time()
        done = contender.step()
        synchronize()
        wall = time.perf_counter() - start
        measured.append(Measurement(time.process_time() - cpu, wall, 1, done.tokens, done.supervised, done.padding, done.flops))
    return measured


def longest_that_fits(rows: list[dict]) -> dict[str, int | None]:
    """Return the longest context of every climb, None where not even the shortest fits."""
    longest: dict[str, int | None] = {}
    for row in rows:
        longest.setdefault(row["climb"], None)
        if row["outcome"] == "timed":
            longest[row["climb"]] = max(longest[row["climb"]] or 0, row["tokens"])
    return longest


def context(device: torch.device, dtype: torch.dtype, shape: ModelShape = B8, lengths: Sequence[int] = CONTEXTS,
            budget: float = float("inf"), keep: Callable[[dict], None] = lambda outcome: None, earlier: dict | None = None) -> dict:
    # Activations are kept first: computing them again leaves a gradient of the embedding's output behind in the plain loop.
    heights = [Height(name, mode, tokens) for name in (OURS, PLAIN) for mode in ("none", "full") for tokens in lengths]
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
        with atomic_file(arguments.out) as tmp:
            tmp.write_text(json.dumps(outcome, indent=1) + "\n")

    def kept() -> dict | None:
        return json.loads(arguments.out.read_text()) if arguments.out.exists() else None

    try:
        outcome = CHECKS[arguments.check](choose_device("cuda"), torch.bfloat16, budget=arguments.seconds - RESERVE, keep=keep,
                                          earlier=kept())
    except Exception as error:  # the outcome of a check, which the caller writes down
        outcome = (kept() or {}) | {"passed": False, "error": reason(error)}
        print(f"benchmarks.on_gpu.whole_step_sizes: {arguments.check}: {error}", file=sys.stderr)
    keep(outcome)
    return 0 if outcome["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
