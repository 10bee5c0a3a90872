"""Check and time whole training steps of a Llama with LoRA on a GPU.

compile      the loss and its backward compile into one graph without a break, and agree with eager
capture      the step is captured as a CUDA graph; replayed on other packs it gives the losses of an eager run, and draws new dropout masks
throughput   real tokens a second of the trainer's own step, beside a stock model with padded batches, PEFT and sdpa, from equal weights
rivals       Steadfast beside packs: a stock model's, told apart by position ids, and TRL's, without and with Liger's kernels

It needs torch, Triton, transformers, peft and numpy, and rivals trl: `python -m benchmarks.on_gpu.whole_step CHECK --out FILE`.
Larger models, other methods and longer contexts: `benchmarks.on_gpu.whole_step_sizes`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import timing
from benchmarks.harness.gpu_timing import Clock, free, measured_rates, peak_mib, reason, tried
from benchmarks.harness.model_shapes import LLAMA_1B, ModelShape
from benchmarks.harness.synthetic_models import adapted, log_normal_lengths, random_samples, stock_model, trained
from benchmarks.harness.timing import AGREEMENT, Contender, Measurement, TokenSamples, relative
from benchmarks.speed.baselines import Batching, PlainLoop, Trl, missing, packed_arguments, packed_loop, padded_loop
from benchmarks.speed.contenders import Steadfast, Trained, fused, in_memory
from trainer.data.batch import PackedBatch, collate
from trainer.data.samples import Piece
from trainer.model.quantization import nf4_of, quantized_layers
from trainer.runtime.device import choose_device
from trainer.training.loss import sft_loss

SMALL = ModelShape("small", 256, 704, 8, 4, 32, 2048, 2)  # for the checks
ROUNDS, STEPS, SAMPLES, MICRO_BATCH = 8, 2, 16, 8  # samples: of a step, on average
PLANNED = 16  # steps of different samples in memory
COMPARED = 2  # steps whose losses have to agree; later ones drift apart in bf16
PEAK_STEPS = 4  # whose highest memory counts
OURS, PLAIN = "Steadfast", "plain HF loop"
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def learning_rate(model: nn.Module) -> float:
    """Return a rate for AdamW: lower for all weights in bf16, which would diverge at an adapter's."""
    return 1e-3 if hasattr(model, "peft_config") else 1e-4


def packed(samples: TokenSamples, device: torch.device) -> PackedBatch:
    return collate([Piece(ids, supervised) for ids, supervised in samples]).to(device)


def mean_loss(model: nn.Module, batch: PackedBatch) -> Tensor:
    return sft_loss(model, batch) / batch.weight_sum


# ---------------------------------------------------------------- torch.compile


def check_compile(device: torch.device, dtype: torch.dtype, size: ModelShape = SMALL, backend: str = "inductor",
                  packs: tuple[list[int], ...] = ([70, 5, 130], [9, 200, 64, 31])) -> dict:
    """Compare values and gradients of the compiled loss with the eager one's, on packs of other shapes.

    A graph break is an error.
    """
    model = fused(adapted(stock_model(size, device, dtype)))
    compiled = torch.compile(lambda batch: mean_loss(model, batch), fullgraph=True, backend=backend)
    differences, begun = {"loss": 0.0, "gradients": 0.0}, time.perf_counter()
    for seed, lengths in enumerate(packs):
        batch = packed(random_samples(lengths, size.vocabulary, seed), device)
        outcomes = []
        for loss_of in (compiled, lambda batch: mean_loss(model, batch)):
            loss = loss_of(batch)
            outcomes.append((loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained(model))])))
        (loss, gradient), (true_loss, true_gradient) = outcomes
        differences["loss"] = max(differences["loss"], relative(loss, true_loss))
        differences["gradients"] = max(differences["gradients"], float((gradient - true_gradient).norm() / true_gradient.norm()))
    tolerance = AGREEMENT[DTYPES[dtype]]
    passed = differences["loss"] <= tolerance and differences["gradients"] <= 5 * tolerance
    return {"passed": passed, "differences": differences, "seconds": time.perf_counter() - begun}


# ---------------------------------------------------------------- CUDA graphs


def capturable_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: PackedBatch) -> Tensor:
    """Do a step that a CUDA graph can hold: no clipping, no loader, torch's AdamW.

    It is checked, and never reported as throughput.
    """
    loss = mean_loss(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def capturable_adamw(model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), lr=learning_rate(model), fused=True, capturable=device.type == "cuda")


def same_shapes(count: int, vocabulary: int, device: torch.device) -> list[PackedBatch]:
    """Return packs of different samples but equal shapes, as a captured graph needs.

    All name one longest sample.
    """
    lengths = ([200, 56, 128], [100, 156, 128], [60, 130, 194], [128, 128, 128])
    batches = [packed(random_samples(lengths[i % len(lengths)], vocabulary, i), device) for i in range(count)]
    rows = min(len(batch.targets) for batch in batches)
    return [dataclasses.replace(
        batch, max_seqlen=256, weight_sum=float(rows),
        **{name: getattr(batch, name)[:rows] for name in ("supervised_rows", "targets", "weights")}) for batch in batches]


def fill(static: PackedBatch, batch: PackedBatch) -> None:
    for name in ("input_ids", "position_ids", "cu_seqlens", "supervised_rows", "targets", "weights"):
        getattr(static, name).copy_(getattr(batch, name))


def captured_step(model: nn.Module, optimizer: torch.optim.Optimizer, static: PackedBatch, warm_up: list[PackedBatch]):
    """Return a CUDA graph of `capturable_step` on `static`, and the loss that each replay writes.

    It is captured after steps on `warm_up`.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for batch in warm_up:
            fill(static, batch)
            capturable_step(model, optimizer, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = capturable_step(model, optimizer, static)
    return graph, loss


def check_capture(device: torch.device, dtype: torch.dtype, size: ModelShape = SMALL, warm: int = 3, steps: int = 8) -> dict:
    """Compare losses of captured steps with an eager run's on equal packs.

    With dropout, losses of replays of one step must differ.
    """
    batches = same_shapes(warm + steps, size.vocabulary, device)
    model = fused(adapted(stock_model(size, device, dtype)))
    optimizer = capturable_adamw(model, device)
    eager = [capturable_step(model, optimizer, batch).item() for batch in batches]
    model = fused(adapted(stock_model(size, device, dtype)))
    static = copy.deepcopy(batches[0])
    graph, loss = captured_step(model, capturable_adamw(model, device), static, batches[:warm])
    replayed = []
    for batch in batches[warm:]:
        fill(static, batch)
        graph.replay()
        replayed.append(loss.item())
    worst = max(relative(a, b) for a, b in zip(replayed, eager[warm:], strict=True))
    redrawn = masks_are_redrawn(device, dtype, size, batches)
    return {"passed": worst <= AGREEMENT[DTYPES[dtype]] and redrawn, "difference": worst, "masks_redrawn": redrawn, "eager": eager[warm:],
            "replayed": replayed}


def masks_are_redrawn(device: torch.device, dtype: torch.dtype, size: ModelShape, batches: list[PackedBatch]) -> bool:
    """Return whether replays of one step at learning rate 0 give different losses."""
    model = fused(adapted(stock_model(size, device, dtype), dropout=0.3))
    optimizer = torch.optim.AdamW(trained(model), lr=0.0, weight_decay=0.0, fused=True, capturable=True)
    static = copy.deepcopy(batches[0])
    graph, loss = captured_step(model, optimizer, static, batches[:2])
    fill(static, batches[0])
    losses = []
    for _ in range(3):
        graph.replay()
        losses.append(loss.item())
    return len(set(losses)) == 3


# ---------------------------------------------------------------- side by side


def steadfast(model: nn.Module, samples: TokenSamples, tokens: int, device: torch.device) -> Steadfast:
    """Return the trainer's own step on packs of `tokens`."""
    return in_memory(model, samples, tokens, learning_rate(model), device)


def plain_loop(model: nn.Module, samples: TokenSamples, tokens: int, device: torch.device) -> PlainLoop:
    """Return the plain loop over batches of SAMPLES, in padded micro-batches."""
    return padded_loop(model, samples, Batching(samples=SAMPLES), learning_rate(model), device=device, micro_batch=MICRO_BATCH)


CONTENDERS: dict[str, Callable[..., Trained]] = {PLAIN: plain_loop, OURS: steadfast}


def side_by_side(makers: dict[str, Callable[[], Trained]], dtype: torch.dtype, rounds: int,
                 steps: int) -> tuple[dict[str, list[Measurement]], dict]:
    """Return measurements of the contenders that run and agree, and facts about all.

    Facts are outcome, memory and launches. All are made before the first one steps, so that each has the memory left beside the others.
    """
    made, facts = {}, {}
    for name, make in makers.items():
        _, failure = tried(lambda name=name, make=make: made.update({name: make()}))
        facts[name] = {"outcome": failure or "timed"}
    batches = first_batches(made)
    losses: dict[str, list[float]] = {}
    for name in list(made):
        about, failure = tried(lambda name=name: first_steps(made[name], batches))
        if not failure:
            facts[name] |= about
            losses[name] = about["losses"]
            failure = disagreement(name, losses, facts[name], AGREEMENT[DTYPES[dtype]])
        if failure:
            facts[name]["outcome"] = failure
            del made[name]
            free()
    measured = timing.interleave([Contender(name, one.step) for name, one in made.items()], rounds, steps)
    for name, one in made.items():
        facts[name]["launches"], _ = tried(lambda one=one: launches(one))
    return measured, facts


def first_batches(made: dict[str, Trained]) -> list[TokenSamples]:
    """Return the batches that all contenders are compared on: the plain loop's, or any of our own samples."""
    if PLAIN in made:
        return [made[PLAIN].next_batch() for _ in range(COMPARED)]
    samples = [made[OURS].samples[i] for i in range(min(COMPARED, len(made[OURS].samples)))] if OURS in made else []
    return [samples] * COMPARED if samples else []


def first_steps(one: Trained, batches: list[TokenSamples]) -> dict:
    """Return the losses of a contender's first steps, and the memory of some of its own."""
    if hasattr(one, "halve_until_it_fits"):
        one.halve_until_it_fits()
    losses = [float(one.step_on(batch).loss) for batch in batches]
    free()
    return {"losses": losses, "step_mib": peak_mib(lambda: [one.step() for _ in range(PEAK_STEPS)]), "resident_mib": resident_mib(one),
            "micro_batch": getattr(one, "micro_batch", None)}


def disagreement(name: str, losses: dict[str, list[float]], facts: dict, most: float) -> str | None:
    """Return how far a contender's losses are from the first one's, where that is too far.

    `facts` notes the difference either way.
    """
    first = next(iter(losses))
    if first == name:
        return None
    facts["difference"] = max(map(relative, losses[name], losses[first]))
    return None if facts["difference"] <= most else f"disagrees: {facts['difference']:.1e} from the {first}"


def resident_mib(one: Trained) -> float:
    """Return the memory held between steps: weights, gradients and the optimizer's states."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in one.state_tensors()}
    scales = sum(nf4_of(layer).nbytes - layer.weight.nbytes for layer in quantized_layers(one.model))
    return (sum(storages.values()) + scales) / 2**20


def launches(one) -> int | None:
    """Return the kernels that a step starts on the device; on a CPU, operations that compute.

    None where the profiler sees nothing.
    """
    if one.device.type == "cpu":
        from benchmarks.harness.costs import counted_operations

        return counted_operations(one.step)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        one.step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return kernels_in(json.loads(path.read_text())) or None


def kernels_in(trace: dict) -> int:
    """Return the number of kernels in a trace, without copies and fills."""
    return sum(event.get("cat") == "kernel" for event in trace["traceEvents"])


def rows_of(measured: dict[str, list[Measurement]], facts: dict[str, dict], matmul_flops: float) -> list[dict]:
    """Return every contender's row, also of those that could not be timed.

    MFU is the share of `matmul_flops`.
    """
    figures = {"tokens_per_second": lambda m: m.tokens / m.wall, "supervised_per_second": lambda m: m.supervised / m.wall,
               "steps_per_second": lambda m: m.steps / m.wall, "mfu": lambda m: m.flops / m.wall / matmul_flops}
    rows = []
    for name, about in facts.items():
        rows.append({"contender": name, **about})
        if own := measured.get(name):
            rows[-1] |= {figure: asdict(timing.spread(own, of)) for figure, of in figures.items()}
            rows[-1]["padding"] = sum(m.padding for m in own) / sum(m.padding + m.tokens for m in own)
            if name != PLAIN and PLAIN in measured:
                rows[-1]["ratio"] = asdict(timing.ratio(own, measured[PLAIN], figures["tokens_per_second"]))
    return rows


def tailed_samples(shape: ModelShape, mean: int) -> TokenSamples:
    """Return the samples of PLANNED steps, of log-normal lengths."""
    lengths = log_normal_lengths(SAMPLES * PLANNED, mean, np.random.default_rng(0), longest=4 * mean)
    return random_samples(lengths, shape.vocabulary, seed=0)


def throughput(device: torch.device, dtype: torch.dtype, shape: ModelShape = LLAMA_1B, mean: int = 400, rounds: int = ROUNDS) -> dict:
    """Time both contenders with LoRA, over log-normal lengths."""
    samples = tailed_samples(shape, mean)

    def make(kind: Callable[..., Trained]) -> Trained:
        return kind(adapted(stock_model(shape, device, dtype)), samples, SAMPLES * mean, device)

    rates = measured_rates(device, Clock(device))
    makers = {name: lambda kind=kind: make(kind) for name, kind in CONTENDERS.items()}
    measured, facts = side_by_side(makers, dtype, rounds, STEPS)
    rows = [{"model": shape.name, "method": "lora", "lengths": "tailed"} | row for row in rows_of(measured, facts, rates["product_flops"])]
    outcome = {"passed": len(measured) == len(rows), "rows": rows, "rates": rates, "raw": timing.raw(measured)}
    return outcome if outcome["passed"] else outcome | {"error": "; ".join(f"{row['contender']} {row['outcome']}" for row in rows)}


# ---------------------------------------------------------------- beside others' packs


def rivals(device: torch.device, dtype: torch.dtype, shape: ModelShape = LLAMA_1B, mean: int = 400, rounds: int = ROUNDS) -> dict:
    """Time every contender that runs here in interleaved rounds, and note why others do not.

    First each one's loss on its own first batch is compared with ours. Attention of the others is FlashAttention's where it is installed,
    else sdpa.
    """
    samples, tokens = tailed_samples(shape, mean), SAMPLES * mean
    attention = "flash_attention_2" if device.type == "cuda" and importlib.util.find_spec("flash_attn") else "sdpa"

    def model(attention: str = "sdpa") -> nn.Module:
        return adapted(stock_model(shape, device, dtype, attention))

    def trl(**arguments) -> Trl:
        batches = packed_arguments(tokens) | {"learning_rate": 1e-3} | arguments
        return Trl(model(attention), samples, bare_tokenizer(), batches, device=device)

    makers = {
        "HF loop, packed": lambda: packed_loop(model(attention), samples, Batching(tokens=tokens), 1e-3, device=device),
        "TRL packed": trl, "TRL packed, Liger": lambda: trl(use_liger_kernel=True)}
    made: dict[str, Trained] = {OURS: steadfast(model(), samples, tokens, device)}
    outcomes, differences, memory = {OURS: "timed"}, {}, {}
    if failure := missing("liger_kernel", device):
        outcomes["TRL packed, Liger"] = failure
    for name, make in makers.items():
        if name in outcomes:
            continue
        _, failure = tried(lambda name=name, make=make: differences.update({name: first_difference(make, made, name)}))
        outcomes[name] = failure or "timed"
        if not failure and not differences[name] <= AGREEMENT[DTYPES[dtype]]:
            outcomes[name] = f"disagrees: {differences[name]:.1e} from ours"
        if outcomes[name] != "timed":
            made.pop(name, None)
            free()
    memory = {name: peak_mib(one.step) for name, one in made.items()}
    measured = timing.interleave([Contender(name, one.step) for name, one in made.items()], rounds, STEPS)
    rates = {name: asdict(timing.spread(own, lambda m: m.tokens / m.wall)) for name, own in measured.items()}
    ratios = {name: asdict(timing.ratio(measured[OURS], own, lambda m: m.tokens / m.wall))
              for name, own in measured.items() if name != OURS}
    return {"passed": not any(outcome.startswith("disagrees") for outcome in outcomes.values()), "outcomes": outcomes,
            "differences": differences, "attention_of_others": attention, "model": shape.name, "tokens_per_second": rates,
            "ratio": ratios, "step_mib": memory, "raw": timing.raw(measured)}


def first_difference(make: Callable[[], Trained], made: dict[str, Trained], name: str) -> float:
    """Make a contender, have it do a step, and return how far its loss is from ours.

    Ours has made no step yet, and is evaluated on the contender's samples.
    """
    one = made[name] = make()
    batch = one.next_batch()
    expected = float(made[OURS].loss_on(one.samples_of(batch)))
    return relative(float(one.step_on(batch).loss), expected)


def bare_tokenizer():
    """Return the tokenizer that TRL requires even for tokens: ids to pad and to end with."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<s>": 0, "<pad>": 1, "</s>": 2}, unk_token="<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", pad_token="<pad>", eos_token="</s>")


# ---------------------------------------------------------------- the command

CHECKS = {"compile": check_compile, "capture": check_capture, "throughput": throughput, "rivals": rivals}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu.whole_step", description=__doc__.splitlines()[0])
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--out", type=Path, required=True, help="file for the outcome, as JSON")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.on_gpu.whole_step: expected a GPU, found none", file=sys.stderr)
        return 2
    try:
        outcome = CHECKS[arguments.check](choose_device("cuda"), torch.bfloat16)
    except Exception as error:  # the outcome of a check, which the caller writes down
        outcome = {"passed": False, "error": reason(error)}
        print(f"benchmarks.on_gpu.whole_step: {arguments.check}: {error}", file=sys.stderr)
    arguments.out.write_text(json.dumps(outcome, indent=1) + "\n")
    return 0 if outcome["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
