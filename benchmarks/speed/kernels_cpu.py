"""Time every operation's CPU form beside stock torch, transformers and PEFT, in fp32 and bf16.

Forward and backward. Shapes are those of the 7 M model of the training benchmarks, 1,024 tokens. Both sides get equal inputs in one dtype;
results and gradients are compared before anything is timed, in interleaved rounds of CPU time.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import record, show, timing
from benchmarks.harness.gpu_timing import distance
from benchmarks.harness.model_shapes import SMALL, ModelShape
from benchmarks.harness.record import origin
from benchmarks.harness.suite import Caption, View
from benchmarks.harness.timing import Measurement
from benchmarks.speed.kernel_cases import EPS, IGNORED, Source, angles, heads, hidden_states, results_and_gradients
from benchmarks.speed.kernel_predictions import RANK
from kernels.attention import packed_attention
from kernels.glu import glu
from kernels.grouped_lora import grouped_lora_linear
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_kl import linear_kl
from kernels.lora import Lora, lora_linear, lora_qkv
from kernels.lora_mlp import lora_mlp
from kernels.nf4 import Nf4, dequantize_nf4
from kernels.qk_norm_rope import qk_norm_rope
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import apply_rope
from trainer.runtime.device import fast_bf16

OURS, TORCH, TRANSFORMERS, PEFT, BITSANDBYTES = "Steadfast", "torch", "transformers", "PEFT", "bitsandbytes"
TOKENS, DOCUMENT = 1024, 128  # of a step, and of each document in the pack that attention sees
EXPERTS = 8  # that share the tokens
ROUNDS, SAMPLE_SECONDS = 15, 0.02  # rounds of a case, and CPU time of one contender's share of a round
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}  # of results and gradients, relative to stock's


@dataclass
class Case:
    """Inputs, and functions of them by contender; gradients are taken of the inputs that require one."""

    inputs: tuple[Tensor, ...]
    forwards: dict[str, Callable]


# ---------------------------------------------------------------- operations


def cross_entropy(source: Source, shape: ModelShape, trained: bool = False, ignored: float = 0.0) -> Case:
    from transformers.loss.loss_utils import ForCausalLMLoss

    weight = source(shape.vocabulary, shape.width, scale=shape.width**-0.5, grad=trained)
    target = source.integers(shape.vocabulary, TOKENS)
    x = hidden_states(source, weight.detach(), target).requires_grad_()
    if ignored:
        target[torch.rand(TOKENS, generator=source.generator) < ignored] = IGNORED

    def stock(x: Tensor, weight: Tensor) -> Tensor:
        return ForCausalLMLoss(F.linear(x, weight)[None], None, shape.vocabulary, num_items_in_batch=1, shift_labels=target[None])

    return Case((x, weight), {
        OURS: lambda x, weight: linear_cross_entropy(x, weight, target, ignore_index=IGNORED if ignored else None), TRANSFORMERS: stock})


def kl(source: Source, shape: ModelShape) -> Case:
    weight = source(shape.vocabulary, shape.width, scale=shape.width**-0.5)
    reference = hidden_states(source, weight, source.integers(shape.vocabulary, TOKENS))
    x = (reference + source(TOKENS, shape.width)).requires_grad_()

    def stock(x: Tensor) -> Tensor:
        ours, theirs = (F.linear(t, weight).float().log_softmax(-1) for t in (x, reference))
        return F.kl_div(ours, theirs, reduction="sum", log_target=True)

    return Case((x,), {OURS: lambda x: linear_kl(x, weight, reference), TORCH: stock})


class Projections(nn.Module):
    """Linear layers that share their input."""

    def __init__(self, width: int, outputs: tuple[int, ...]):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, n, bias=False) for n in outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def adapt(module: nn.Module, dtype: torch.dtype) -> list[nn.Module]:
    """Put PEFT's LoRA on every linear layer, with a random B, all in one dtype; return these layers."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    names = [name for name, layer in module.named_modules() if type(layer) is nn.Linear]
    module.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names), module)
    layers = [layer for layer in module.to(dtype).modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    return layers


def matrices(layers: list[nn.Module]) -> tuple[Tensor, ...]:
    return tuple(matrix["default"].weight for layer in layers for matrix in (layer.lora_A, layer.lora_B))


def loras(tensors: tuple[Tensor, ...]) -> list[Lora]:
    return [Lora(A, B, 2.0, 0.0) for A, B in zip(tensors[::2], tensors[1::2])]


def projections(source: Source, shape: ModelShape, outputs: tuple[int, ...]) -> Case:
    torch.manual_seed(0)
    stock = Projections(shape.width, outputs)
    layers = adapt(stock, source.dtype)
    weights = [layer.base_layer.weight for layer in layers]

    def ours(x: Tensor, *tensors: Tensor):
        return lora_linear(x, weights[0], *loras(tensors)) if len(weights) == 1 else lora_qkv(x, weights, loras(tensors))

    return Case((source(TOKENS, shape.width, grad=True), *matrices(layers)), {OURS: ours, PEFT: lambda x, *_: stock(x)})


def mlp(source: Source, shape: ModelShape) -> Case:
    from transformers.models.llama.modeling_llama import LlamaMLP

    from benchmarks.harness.synthetic_models import model_config

    torch.manual_seed(0)
    stock = LlamaMLP(model_config(shape))
    adapt(stock, source.dtype)
    layers = [stock.gate_proj, stock.up_proj, stock.down_proj]
    weights = [layer.base_layer.weight for layer in layers]
    return Case((source(TOKENS, shape.width, grad=True), *matrices(layers)), {
        OURS: lambda x, *tensors: lora_mlp(x, weights, loras(tensors)), PEFT: lambda x, *_: stock(x)})


def experts(source: Source, shape: ModelShape) -> Case:
    """Compute one matrix of experts, as many rows each, with an adapter that PEFT adds to all weights."""
    weight = source(EXPERTS, shape.mlp, shape.width, scale=shape.width**-0.5)
    A, B = source(EXPERTS, RANK, shape.width, scale=0.1, grad=True), source(EXPERTS, shape.mlp, RANK, scale=0.1, grad=True)
    ends = torch.arange(1, EXPERTS + 1, dtype=torch.int32) * (TOKENS // EXPERTS)

    def stock(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.grouped_mm(x, torch.baddbmm(weight, B, A, alpha=2.0).transpose(1, 2), offs=ends)

    return Case((source(TOKENS, shape.width, grad=True), A, B), {
        OURS: lambda x, A, B: grouped_lora_linear(x, weight, A, B, 2.0, ends), f"{PEFT}, torch's grouped product": stock})


def stock_norm(weight: Tensor) -> nn.Module:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(len(weight), EPS)
    norm.weight = nn.Parameter(weight, requires_grad=False)
    return norm


def norm(source: Source, shape: ModelShape) -> Case:
    weight = source(shape.width)
    return Case((source(TOKENS, shape.width, grad=True),), {OURS: lambda x: rms_norm(x, weight, EPS), TRANSFORMERS: stock_norm(weight)})


def add_norm(source: Source, shape: ModelShape) -> Case:
    weight = source(shape.width)
    stock = stock_norm(weight)

    def plain(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        h = x + z
        return stock(h), h

    return Case((source(TOKENS, shape.width, grad=True), source(TOKENS, shape.width, grad=True)),
                {OURS: lambda x, z: add_rms_norm(x, z, weight, EPS), TRANSFORMERS: plain})


def stock_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Rotate q and k [T,H,C] by transformers' function, in the layout that its models have."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    rotated = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    return tuple(t[0].transpose(0, 1) for t in rotated)


def rope(source: Source, shape: ModelShape) -> Case:
    cos, sin = angles(source, TOKENS, shape.head_dim)
    return Case(heads(source, shape, TOKENS), {OURS: lambda q, k: apply_rope(q, k, cos, sin),
                                               TRANSFORMERS: lambda q, k: stock_rope(q, k, cos, sin)})


def norm_rope(source: Source, shape: ModelShape) -> Case:
    cos, sin = angles(source, TOKENS, shape.head_dim)
    weights = source(shape.head_dim), source(shape.head_dim)
    q_norm, k_norm = (stock_norm(weight) for weight in weights)
    return Case(heads(source, shape, TOKENS), {OURS: lambda q, k: qk_norm_rope(q, k, *weights, cos, sin, EPS),
                                               TRANSFORMERS: lambda q, k: stock_rope(q_norm(q), k_norm(k), cos, sin)})


def gated(source: Source, shape: ModelShape) -> Case:
    return Case((source(TOKENS, shape.mlp, grad=True), source(TOKENS, shape.mlp, grad=True)),
                {OURS: glu, TRANSFORMERS: lambda gate, up: F.silu(gate) * up})


def dequantisation(source: Source, shape: ModelShape) -> Case:
    """Dequantise the gate matrix, as bitsandbytes quantised it."""
    from bitsandbytes import functional

    dense = source(shape.mlp, shape.width)
    codes, state = functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
    nf4 = Nf4(codes, state.absmax, state.state2.code, state.state2.absmax, state.offset, tuple(dense.shape), source.dtype, state.blocksize)
    return Case((), {OURS: lambda: dequantize_nf4(nf4), BITSANDBYTES: lambda: functional.dequantize_4bit(codes, state)})


def attention(source: Source, shape: ModelShape) -> Case:
    """Attend within documents of equal length.

    transformers' sdpa runs batched without padding, its best case, and packed under a mask.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    bounds = torch.arange(0, TOKENS + 1, DOCUMENT, dtype=torch.int32)
    document = torch.arange(TOKENS) // DOCUMENT
    mask = ((document[:, None] == document) & torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril())[None, None]
    layer = SimpleNamespace(num_key_value_groups=shape.heads // shape.kv_heads, is_causal=True, training=True)
    q, k = heads(source, shape, TOKENS)
    v = source(TOKENS, shape.kv_heads, shape.head_dim, grad=True)

    def batched(*qkv: Tensor) -> Tensor:
        return sdpa_attention_forward(layer, *(t.unflatten(0, (-1, DOCUMENT)).transpose(1, 2) for t in qkv), None)[0].flatten(0, 1)

    def packed(*qkv: Tensor) -> Tensor:
        return sdpa_attention_forward(layer, *(t.transpose(0, 1)[None] for t in qkv), mask)[0][0]

    return Case((q, k, v), {OURS: lambda q, k, v: packed_attention(q, k, v, bounds, DOCUMENT),
                            f"{TRANSFORMERS} sdpa, batched": batched, f"{TRANSFORMERS} sdpa, packed": packed})


def qkv_outputs(shape: ModelShape) -> tuple[int, ...]:
    return shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.kv_heads * shape.head_dim


OPERATIONS: dict[str, Callable[[Source, ModelShape], Case]] = {
    "linear CE, frozen head": cross_entropy,
    "linear CE, half ignored": partial(cross_entropy, ignored=0.5),
    "linear CE, trained head": partial(cross_entropy, trained=True),
    "linear KL, frozen head": kl,
    "LoRA linear": lambda source, shape: projections(source, shape, (shape.mlp,)),
    "LoRA QKV": lambda source, shape: projections(source, shape, qkv_outputs(shape)),
    "LoRA MLP": mlp,
    "LoRA of experts": experts,
    "RMSNorm": norm,
    "add + RMSNorm": add_norm,
    "RoPE": rope,
    "QK-norm + RoPE": norm_rope,
    "GLU": gated,
    "NF4, one matrix": dequantisation,
    "packed attention": attention,
}
NEEDS = {"NF4, one matrix": "bitsandbytes"}


# ---------------------------------------------------------------- timing a case


def measure(operation: str, dtype: str, rounds: int, sample_seconds: float = SAMPLE_SECONDS) -> tuple[list[dict], dict[str, float], dict]:
    """Return rows, differences from stock code, and measurements of one operation.

    Raises AssertionError where results differ.
    """
    case = OPERATIONS[operation](Source(torch.device("cpu"), timing.dtype_of(dtype)), SMALL)
    upstream: list[Tensor] = []
    runs = {name: partial(results_and_gradients, forward, case.inputs, upstream) for name, forward in case.forwards.items()}
    results = {name: run() for name, run in runs.items()}
    differences = {name: max(distance(a, b) for a, b in zip(results[OURS], theirs, strict=True))
                   for name, theirs in results.items() if name != OURS}
    if worst := {name: value for name, value in differences.items() if not value <= TOLERANCE[dtype]}:
        raise AssertionError(f"{operation}, {dtype}: results differ from stock's, more than {TOLERANCE[dtype]:.0e}: {worst}")
    results.clear()
    runs[OURS + timing.AGAIN] = runs[OURS]
    measured = interleave(runs, rounds, sample_seconds)
    rows = [{
        "operation": operation, "dtype": dtype, "contender": name, "ms": asdict(timing.spread(own, milliseconds)),
        "ratio": asdict(timing.ratio(own, measured[OURS], milliseconds))} for name, own in measured.items()]
    return rows, {f"{operation}, {dtype}: {name}": value for name, value in differences.items()}, {
        f"{operation}, {dtype}: {name}": own for name, own in timing.raw(measured).items()}


def interleave(runs: dict[str, Callable], rounds: int, sample_seconds: float) -> dict[str, list[Measurement]]:
    """Time every contender once a round, in shuffled order, as many calls at a time as fill a sample."""
    calls = {name: max(1, round(sample_seconds / max(timed(run, 1).cpu, 1e-6))) for name, run in runs.items()}
    order, names = np.random.default_rng(0), list(runs)
    measured: dict[str, list[Measurement]] = {name: [] for name in names}
    gc.collect()
    for _ in range(rounds):
        for i in order.permutation(len(names)):
            measured[names[i]].append(timed(runs[names[i]], calls[names[i]]))
    return measured


def timed(run: Callable, calls: int) -> Measurement:
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        run()
    return Measurement(time.process_time() - cpu, time.perf_counter() - wall, calls, TOKENS * calls, 0, 0, 0.0)


def milliseconds(measurement: Measurement) -> float:
    return 1e3 * measurement.cpu / measurement.steps


def run(operations: list[str], quick: bool = False, threads: int = 1) -> dict:
    """Measure the operations in fp32, and in bf16 where this CPU multiplies in it; return the record."""
    torch.set_num_threads(threads)
    dtypes = ["fp32"] + ["bf16"] * fast_bf16()
    left_out = {operation: f"{package} is not installed" for operation, package in NEEDS.items() if find_spec(package) is None}
    rounds, sample_seconds = (2, 0.0) if quick else (ROUNDS, SAMPLE_SECONDS)
    conditions = {"tokens": TOKENS, "model": asdict(SMALL), "rank": RANK, "document": DOCUMENT, "rounds": rounds, "dtypes": dtypes,
                  "left_out": left_out | ({} if "bf16" in dtypes else {"bf16": "this CPU has no bf16 matmul"})}
    summary, agreed, raw = [], {}, {}
    for operation in operations:
        for dtype in dtypes if operation not in left_out else ():
            rows, differences, measurements = measure(operation, dtype, rounds, sample_seconds)
            summary, agreed, raw = summary + rows, agreed | differences, raw | measurements
            print(f"{operation}, {dtype}: " + "; ".join(f"{r['contender']} {r['ms']['value']:.3g} ms" for r in rows), file=sys.stderr)
    return record.make("kernels-cpu", conditions, agreed, summary, raw)


# ---------------------------------------------------------------- how a record is shown


def by_case(record: dict) -> dict[tuple[str, str], dict[str, dict]]:
    """Return the stock contenders' rows by operation and contender, and then by dtype."""
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for row in record["summary"]:
        if not row["contender"].startswith(OURS):
            found.setdefault((row["operation"], row["contender"]), {})[row["dtype"]] = row
    return found


def ours_of(record: dict, operation: str, dtype: str) -> dict | None:
    return next((row for row in record["summary"] if (row["operation"], row["dtype"], row["contender"]) == (operation, dtype, OURS)), None)


def table(record: dict) -> list[list[str]]:
    dtypes = record["conditions"]["dtypes"]
    rows = [["operation", "beside", *(cell for dtype in dtypes for cell in (f"ours in {dtype}, ms", f"× faster in {dtype}"))]]
    for (operation, stock), by_dtype in by_case(record).items():
        cells = []
        for dtype in dtypes:
            own, theirs = ours_of(record, operation, dtype), by_dtype.get(dtype)
            cells += [f"{own['ms']['value']:.3g}", show.interval(theirs["ratio"])] if own and theirs else ["", ""]
        rows.append([operation, stock, *cells])
    noise = [[row["ratio"]["value"] for row in record["summary"] if row["contender"].endswith(timing.AGAIN) and row["dtype"] == dtype]
             for dtype in dtypes]
    rows.append(["all (A/A)", "Steadfast again", *(cell for values in noise for cell in (
        "", f"{min(values):.2f}-{max(values):.2f}" if values else ""))])
    return rows


def caption(record: dict) -> Caption:
    c = record["conditions"]
    return Caption(
        f"CPU time of each operation's CPU form, forward and backward, and how many times as long stock code of equal dtype takes: torch, "
        f"transformers, PEFT or bitsandbytes. Shapes of the {c['model']['name']} model, {c['tokens']:,} tokens; {show.machine(record)}.",
        (f"LoRA of rank {c['rank']} without dropout, adapters in the dtype of the weights; attention over documents of {c['document']} "
         "tokens; NF4: one MLP matrix.",
         f"Medians of {c['rounds']} interleaved rounds, ratios with 95% intervals. A/A: the range of Steadfast's ratios to itself.",
         f"Results and gradients agree with stock's, at worst to {max(record['agreement'].values(), default=0.0):.0e}.",
         *show.left_out(c["left_out"]), f"{origin(record)}."))


def draw(record: dict, figure) -> None:
    """Draw how many times as long stock code takes, for each operation and dtype."""
    dtypes, found = record["conditions"]["dtypes"], list(by_case(record).items())[::-1]
    axes = show.axes_of(figure, 8, 1.3 + 0.32 * len(found))
    for place, (dtype, colour) in enumerate(zip(dtypes, (show.OURS, show.SECOND))):
        offset = 0.2 - 0.4 * place if len(dtypes) > 1 else 0.0
        rows = [(i + offset, by_dtype[dtype]["ratio"]["value"]) for i, (_, by_dtype) in enumerate(found) if dtype in by_dtype]
        axes.barh([at for at, _ in rows], [value for _, value in rows], 0.38, color=colour, label=dtype)
    axes.axvline(1, color=show.GREY, linewidth=0.8)
    axes.set_yticks(range(len(found)), [f"{operation}: {stock}" for (operation, stock), _ in found])
    axes.set_xlabel("CPU time of stock code, × Steadfast")
    axes.legend(frameon=False)


VIEW = View(table, caption, draw, lambda record: "Operations on a CPU: how many times as long stock code takes", text_columns=2)
