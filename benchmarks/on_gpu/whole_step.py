"""One whole training step of a patched Llama with LoRA: forward, fused loss, backward, update.

compile      the loss and its backward compile into one graph without a break, and agree with eager
capture      the step is captured as a CUDA graph; replayed on other packs it gives the losses of an eager run, and draws new masks
throughput   real tokens a second, beside a stock model with padded batches, PEFT and sdpa, from the same weights on the same samples
rivals       the same beside packs: a stock model's, told apart by position ids, and TRL's, without and with Liger's kernels

It needs torch, Triton, transformers, peft and numpy, and rivals trl: `python -m benchmarks.on_gpu.whole_step CHECK --out FILE`.
Larger models,
other adapters and longer contexts are `benchmarks.on_gpu.whole_step_sizes`'s, on the lines and the comparison made here.
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
from benchmarks.harness.timing import Line, Sample, Samples, StepResult, counted
from benchmarks.speed.kernel_predictions import MODELS, RANK, Model
from kernels import linear_cross_entropy
from trainer.data.batch import PackedBatch, collate
from trainer.data.samples import Piece
from trainer.metrics.throughput import model_size
from trainer.model.quantization import nf4_of, quantized_layers

SMALL = Model("small", 256, 704, 8, 4, 32, 2048, 2)  # for the checks
ROUNDS, STEPS, SAMPLES, MICRO_BATCH = 8, 2, 16, 8
COMPARED = 2  # steps whose losses have to agree; later ones drift apart in bf16
OURS, PLAIN = "Steadfast", "plain HF loop"
AGREEMENT = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # relative difference of losses, at most


# ---------------------------------------------------------------- a model and its data


def make_model(size: Model, device: torch.device, dtype: torch.dtype, dropout: float = 0.0, rank: int = RANK,
               attention: str = "sdpa") -> nn.Module:
    """A model of this size with random weights and a LoRA adapter, as transformers and PEFT make them."""
    return adapted(stock_model(size, device, dtype, attention), rank, dropout)


def stock_model(size: Model, device: torch.device, dtype: torch.dtype, attention: str = "sdpa") -> nn.Module:
    """A Llama, or a Qwen3 where queries and keys are normed, made on the device; equal weights each time."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    torch.manual_seed(0)
    config = (Qwen3Config if size.qk_norm else LlamaConfig)(
        vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=size.mlp, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, head_dim=size.head_dim, use_cache=False,
        max_position_embeddings=8192, tie_word_embeddings=False)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).train()


def adapted(base: nn.Module, rank: int = RANK, dropout: float = 0.0) -> nn.Module:
    """With a LoRA adapter in fp32 on every linear layer but the head."""
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules="all-linear")
    model = get_peft_model(base, adapter)
    for p in trained(model):
        p.data = p.data.float()
        nn.init.normal_(p, std=0.02)  # B is zero at first, which would hide an adapter's faults
    return model.train()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def optimizer_of(model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """AdamW; a whole model in bf16 would run away at an adapter's rate."""
    rate = 1e-3 if hasattr(model, "peft_config") else 1e-4
    return torch.optim.AdamW(trained(model), lr=rate, fused=True, capturable=device.type == "cuda")


def random_samples(lengths: list[int], vocabulary: int, seed: int) -> Samples:
    """Random tokens, the second half of each sample supervised."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(vocabulary, size=n), np.arange(n) >= n // 2) for n in lengths]


def long_tailed(count: int, mean: float, longest: int, seed: int) -> list[int]:
    """Log-normal lengths, as those of chats are."""
    spread = 0.8
    drawn = mean * np.exp(spread * np.random.default_rng(seed).standard_normal(count) - spread**2 / 2)
    return np.clip(drawn.round().astype(int), 16, longest).tolist()


def packed(samples: Samples, device: torch.device) -> PackedBatch:
    return collate([Piece(ids, supervised) for ids, supervised in samples]).to(device)


def patched(model: nn.Module) -> nn.Module:
    from trainer.model.forward import unwrap_peft
    from trainer.model.loading import use_packed_attention
    from trainer.model.patch import patch

    use_packed_attention(unwrap_peft(model))
    patch(model)
    return model


def packed_loss(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Mean over the supervised tokens, as the trainer has it (`trainer.training.loss.batch_loss`)."""
    from trainer.model.forward import lm_head, supervised_hidden

    return linear_cross_entropy(supervised_hidden(model, batch), lm_head(model).weight, batch.targets, token_weight=batch.weights,
                                ignore_index=None, reduction="sum") / batch.weight_sum


def relative(value: float, other: float) -> float:
    return abs(value - other) / abs(other)


# ---------------------------------------------------------------- torch.compile


def check_compile(device: torch.device, dtype: torch.dtype, size: Model = SMALL, backend: str = "inductor",
                  packs: tuple[list[int], ...] = ([70, 5, 130], [9, 200, 64, 31])) -> dict:
    """Packs of different shapes: values and gradients of the compiled loss beside the eager one's. A break in the graph is an error."""
    model = patched(make_model(size, device, dtype))
    compiled = torch.compile(lambda batch: packed_loss(model, batch), fullgraph=True, backend=backend)
    differences, begun = {"loss": 0.0, "gradients": 0.0}, time.perf_counter()
    for seed, lengths in enumerate(packs):
        batch = packed(random_samples(lengths, size.vocabulary, seed), device)
        outcomes = []
        for loss_of in (compiled, lambda batch: packed_loss(model, batch)):
            loss = loss_of(batch)
            outcomes.append((loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained(model))])))
        (loss, gradient), (true_loss, true_gradient) = outcomes
        differences["loss"] = max(differences["loss"], relative(loss, true_loss))
        differences["gradients"] = max(differences["gradients"], float((gradient - true_gradient).norm() / true_gradient.norm()))
    passed = differences["loss"] <= AGREEMENT[dtype] and differences["gradients"] <= 5 * AGREEMENT[dtype]
    return {"passed": passed, "differences": differences, "seconds": time.perf_counter() - begun}


# ---------------------------------------------------------------- CUDA graphs


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: PackedBatch) -> Tensor:
    loss = packed_loss(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def same_shapes(count: int, vocabulary: int, device: torch.device) -> list[PackedBatch]:
    """Packs of other documents but equal shapes, which is what a captured graph can be given. All say one longest document."""
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
    """A CUDA graph of `train_step` on `static`, after steps on `warm_up`; and the loss that each replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for batch in warm_up:
            fill(static, batch)
            train_step(model, optimizer, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = train_step(model, optimizer, static)
    return graph, loss


def check_capture(device: torch.device, dtype: torch.dtype, size: Model = SMALL, warm: int = 3, steps: int = 8) -> dict:
    """Losses of captured steps beside those of an eager run on the same packs; and, with dropout, of two replays of one step."""
    batches = same_shapes(warm + steps, size.vocabulary, device)
    model = patched(make_model(size, device, dtype))
    optimizer = optimizer_of(model, device)
    eager = [train_step(model, optimizer, batch).item() for batch in batches]
    model = patched(make_model(size, device, dtype))
    static = copy.deepcopy(batches[0])
    graph, loss = captured_step(model, optimizer_of(model, device), static, batches[:warm])
    replayed = []
    for batch in batches[warm:]:
        fill(static, batch)
        graph.replay()
        replayed.append(loss.item())
    worst = max(relative(a, b) for a, b in zip(replayed, eager[warm:], strict=True))
    redrawn = masks_are_redrawn(device, dtype, size, batches)
    return {"passed": worst <= AGREEMENT[dtype] and redrawn, "difference": worst, "masks_redrawn": redrawn, "eager": eager[warm:],
            "replayed": replayed}


def masks_are_redrawn(device: torch.device, dtype: torch.dtype, size: Model, batches: list[PackedBatch]) -> bool:
    """Whether replays of one step at learning rate 0 give different losses."""
    model = patched(make_model(size, device, dtype, dropout=0.3))
    optimizer = torch.optim.AdamW(trained(model), lr=0.0, weight_decay=0.0, fused=True, capturable=True)
    static = copy.deepcopy(batches[0])
    graph, loss = captured_step(model, optimizer, static, batches[:2])
    fill(static, batches[0])
    losses = []
    for _ in range(3):
        graph.replay()
        losses.append(loss.item())
    return len(set(losses)) == 3


# ---------------------------------------------------------------- two lines


class Packs:
    """Our step: all samples of a step in one pack."""

    def __init__(self, model: nn.Module, device: torch.device, stream: list[Samples], size):
        self.model, self.optimizer, self.device, self.size = patched(model), optimizer_of(model, device), device, size
        self.feed(stream)

    def feed(self, stream: list[Samples]) -> None:
        """Steps over these from now on, again and again."""
        self.works, self.at = [(samples, packed(samples, self.device)) for samples in stream], -1

    def step(self) -> StepResult:
        self.at = (self.at + 1) % len(self.works)
        samples, batch = self.works[self.at]
        loss = train_step(self.model, self.optimizer, batch)
        return counted(samples, loss.item(), batch.tokens, self.size)


class Padded:
    """The plain loop: micro-batches padded to their longest sample, the model's own loss, gradients accumulated over the step."""

    def __init__(self, model: nn.Module, device: torch.device, stream: list[Samples], size):
        self.model, self.optimizer, self.device, self.size = model, optimizer_of(model, device), device, size
        self.micro_batch = MICRO_BATCH
        self.feed(stream)

    def feed(self, stream: list[Samples]) -> None:
        self.works, self.at = stream, -1

    def lay(self, samples: Samples) -> dict[str, Tensor]:
        return padded(samples, self.device)

    def fit(self) -> None:
        """Halve the micro-batch, as anybody would, until the step with the longest sample fits into memory."""
        longest = max(self.works, key=lambda samples: max(len(ids) for ids, _ in samples))
        fits = False
        while not fits:
            try:
                self.gradients(longest)
                fits = True
            except torch.cuda.OutOfMemoryError:
                if self.micro_batch == 1:
                    raise
                self.micro_batch //= 2
            self.optimizer.zero_grad(set_to_none=True)
            free()

    def step(self) -> StepResult:
        self.at = (self.at + 1) % len(self.works)
        loss, computed = self.gradients(self.works[self.at])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return counted(self.works[self.at], float(loss), computed, self.size)

    def gradients(self, samples: Samples) -> tuple[Tensor | float, int]:
        """The loss of a step, and the positions that were computed for it."""
        supervised, loss, computed = sum(int(mask[1:].sum()) for _, mask in samples), 0.0, 0
        for start in range(0, len(samples), self.micro_batch):
            batch = self.lay(samples[start:start + self.micro_batch])
            part = self.model(**batch, use_cache=False, num_items_in_batch=supervised).loss
            part.backward()
            loss, computed = loss + part.detach(), computed + batch["input_ids"].numel()
        return loss, computed


class Flat(Padded):
    """The same with every micro-batch end to end in one row, told apart by position ids."""

    def lay(self, samples: Samples) -> dict[str, Tensor]:
        from benchmarks.speed.baselines import flattened

        return {name: t.to(self.device) for name, t in flattened(samples).items()}


def padded(samples: Samples, device: torch.device) -> dict[str, Tensor]:
    longest = max(len(ids) for ids, _ in samples)
    ids, mask, labels = (np.full((len(samples), longest), fill) for fill in (0, 0, -100))
    for i, (tokens, supervised) in enumerate(samples):
        ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
        labels[i, : len(tokens)] = np.where(supervised, tokens, -100)
    return {name: torch.from_numpy(a).to(device) for name, a in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}


# ---------------------------------------------------------------- side by side


def side_by_side(makers: dict[str, Callable], dtype: torch.dtype, rounds: int, steps: int) -> tuple[dict[str, list[Sample]], dict]:
    """Samples of the lines that run and agree, in interleaved rounds; and what each one's outcome, memory and launches are.

    All are made before the first one steps, so that each has the memory that is left beside the others.
    """
    lines, facts = {}, {}
    for name, make in makers.items():
        _, why = tried(lambda name=name, make=make: lines.update({name: make()}))
        facts[name] = {"outcome": why or "timed"}
    losses: dict[str, list[float]] = {}
    for name in list(lines):
        about, why = tried(lambda name=name: first_steps(lines[name]))
        if not why:
            facts[name] |= about
            losses[name] = about["losses"]
            why = disagreement(name, losses, facts[name], AGREEMENT[dtype])
        if why:
            facts[name]["outcome"] = why
            del lines[name]
            free()
    samples = timing.interleave([Line(name, line.step) for name, line in lines.items()], rounds, steps)
    for name, line in lines.items():
        facts[name]["launches"], _ = tried(lambda line=line: launches(line))
    return samples, facts


def first_steps(line) -> dict:
    """Losses of a line's first steps; then the memory of a pass over all."""
    if hasattr(line, "fit"):
        line.fit()
    losses = [line.step().loss for _ in range(COMPARED)]
    free()
    return {"losses": losses, "step_mib": peak_mib(lambda: [line.step() for _ in line.works]), "resident_mib": resident_mib(line),
            "micro_batch": getattr(line, "micro_batch", None)}


def disagreement(name: str, losses: dict[str, list[float]], facts: dict, most: float) -> str | None:
    """How far a line's losses are from those of the first line that ran, if it is too far; `facts` notes it either way."""
    first = next(iter(losses))
    if first == name:
        return None
    facts["difference"] = max(map(relative, losses[name], losses[first]))
    return None if facts["difference"] <= most else f"disagrees: {facts['difference']:.1e} from the {first}"


def resident_mib(line) -> float:
    """Of weights, in 4 bits or more, and the optimiser's states."""
    states = [t for state in line.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    scales = sum(nf4_of(layer).nbytes - layer.weight.nbytes for layer in quantized_layers(line.model))
    return (sum(t.nbytes for t in (*line.model.parameters(), *line.model.buffers(), *states)) + scales) / 2**20


def launches(line) -> int | None:
    """Kernels that a step starts on the device; on a CPU, operations that compute. None where the profiler sees nothing."""
    if line.device.type == "cpu":
        from benchmarks.harness.costs import counted_operations

        return counted_operations(line.step)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        line.step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return kernels_in(json.loads(path.read_text())) or None


def kernels_in(trace: dict) -> int:
    """Copies and fills aside."""
    return sum(event.get("cat") == "kernel" for event in trace["traceEvents"])


def rows_of(samples: dict[str, list[Sample]], facts: dict[str, dict], product_flops: float) -> list[dict]:
    """Every line's figures, those that could not be timed among them; MFU is the share of `product_flops`."""
    figures = {"tokens_per_second": lambda s: s.tokens / s.wall, "supervised_per_second": lambda s: s.supervised / s.wall,
               "steps_per_second": lambda s: s.steps / s.wall, "mfu": lambda s: s.flops / s.wall / product_flops}
    rows = []
    for name, about in facts.items():
        rows.append({"line": name, **about})
        if line := samples.get(name):
            rows[-1] |= {figure: asdict(timing.spread(line, of)) for figure, of in figures.items()}
            rows[-1]["padding"] = sum(s.padding for s in line) / sum(s.padding + s.tokens for s in line)
            if name != PLAIN and PLAIN in samples:
                rows[-1]["ratio"] = asdict(timing.ratio(line, samples[PLAIN], figures["tokens_per_second"]))
    return rows


def throughput(device: torch.device, dtype: torch.dtype, shape: Model = MODELS[-1], mean: int = 400, rounds: int = ROUNDS) -> dict:
    """Both lines with LoRA, over long-tailed lengths."""
    stream = [random_samples(long_tailed(SAMPLES, mean, 4 * mean, seed), shape.vocabulary, seed) for seed in range(8)]

    def line(kind):
        model = make_model(shape, device, dtype)
        return kind(model, device, stream, model_size(model))

    rates = measured_rates(device, Clock(device))
    samples, facts = side_by_side({PLAIN: lambda: line(Padded), OURS: lambda: line(Packs)}, dtype, rounds, STEPS)
    rows = [{"model": shape.name, "adapter": "lora", "lengths": "tailed"} | row for row in rows_of(samples, facts, rates["product_flops"])]
    outcome = {"passed": len(samples) == len(rows), "rows": rows, "rates": rates, "raw": timing.raw(samples)}
    return outcome if outcome["passed"] else outcome | {"error": "; ".join(f"{row['line']} {row['outcome']}" for row in rows)}


# ---------------------------------------------------------------- beside others' packs


def rivals(device: torch.device, dtype: torch.dtype, shape: Model = MODELS[-1], mean: int = 400, rounds: int = ROUNDS) -> dict:
    """Tokens a second of every line that runs here, in interleaved rounds; why others do not. First each one's loss beside ours, on its
    own first batch. Attention of the others is FlashAttention's where it is installed, else sdpa."""
    from benchmarks.speed.baselines import Trl, missing, packed_batches

    stream = [random_samples(long_tailed(SAMPLES, mean, 4 * mean, seed), shape.vocabulary, seed) for seed in range(8)]
    attention = "flash_attention_2" if device.type == "cuda" and importlib.util.find_spec("flash_attn") else "sdpa"
    reference = patched(make_model(shape, device, dtype))
    size, outcomes, differences, lines, memory = model_size(reference), {}, {}, {}, {}

    def trl(**settings) -> Trl:
        batches = packed_batches(SAMPLES * mean) | {"learning_rate": 1e-3} | settings
        return Trl(make_model(shape, device, dtype, attention=attention), sum(stream, []), bare_tokenizer(), batches, device=device)

    makers = {
        "Steadfast": lambda: Packs(make_model(shape, device, dtype), device, stream, size),
        "HF loop, packed": lambda: Flat(make_model(shape, device, dtype, attention=attention), device, stream, size),
        "TRL packed": trl, "TRL packed, Liger": lambda: trl(use_liger_kernel=True)}
    if why := missing("liger_kernel", device):
        outcomes["TRL packed, Liger"] = why
    for name, make in makers.items():
        if name in outcomes:
            continue
        _, why = tried(lambda name=name, make=make: first_step(name, make, reference, stream, device, lines, differences))
        if why or not differences[name] <= AGREEMENT[dtype]:
            outcomes[name] = why or f"disagrees: {differences[name]:.1e} from ours"
            lines.pop(name, None)
            free()
        else:
            memory[name] = peak_mib(lines[name].step)
            outcomes[name] = "timed"
    samples = timing.interleave([Line(name, line.step) for name, line in lines.items()], rounds, STEPS)
    rates = {name: asdict(timing.spread(line, lambda s: s.tokens / s.wall)) for name, line in samples.items()}
    ratios = {name: asdict(timing.ratio(samples["Steadfast"], line, lambda s: s.tokens / s.wall))
              for name, line in samples.items() if name != "Steadfast" and "Steadfast" in samples}
    return {"passed": "Steadfast" in samples and not any(o.startswith("disagrees") for o in outcomes.values()), "outcomes": outcomes,
            "differences": differences, "attention_of_others": attention, "model": shape.name, "tokens_per_second": rates,
            "ratio": ratios, "step_mib": memory, "raw": timing.raw(samples)}


def first_step(name: str, make: Callable, reference: nn.Module, stream: list[Samples], device: torch.device, lines: dict,
               differences: dict) -> None:
    """Makes a line and has it do a step; how far its loss is from that of the same weights, ours, on the same samples."""
    line = make()
    batch = line.next_batch() if hasattr(line, "next_batch") else None
    samples = stream[0] if batch is None else line.samples_of(batch)
    with torch.no_grad():
        expected = packed_loss(reference, packed(samples, device)).item()
    done = line.step() if batch is None else line.step_on(batch)
    lines[name], differences[name] = line, relative(done.loss, expected)


def bare_tokenizer():
    """What TRL asks for beside samples that are tokens already: ids to pad and to end with."""
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
        outcome = CHECKS[arguments.check](torch.device("cuda"), torch.bfloat16)
    except Exception as error:  # the outcome of a check, which the caller writes down
        outcome = {"passed": False, "error": reason(error)}
        print(f"benchmarks.on_gpu.whole_step: {arguments.check}: {error}", file=sys.stderr)
    arguments.out.write_text(json.dumps(outcome, indent=1) + "\n")
    return 0 if outcome["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
