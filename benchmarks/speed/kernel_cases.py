"""Define the cases of `benchmarks.speed.kernels`: inputs of each operation, and ways to compute it.

"torch eager" is the plain formula, as models are written; torch.compile gets the same function. A library that is not installed, or lacks
the operation, is left out. (So are Liger's RoPE and SwiGLU, which write over their inputs: these are read again here.)
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.kernel_predictions import DOCUMENT, DROPOUT, RANK, ModelShape
from kernels.attention import packed_attention
from kernels.glu import glu, glu_backward, glu_forward
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_kl import linear_kl
from kernels.lora import Lora, lora_linear, lora_qkv
from kernels.lora_mlp import lora_mlp
from kernels.nf4 import Nf4, dequantize_nf4, dequantize_nf4_reference
from kernels.qk_norm_rope import qk_norm_rope
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import apply_rope

OURS, EAGER, COMPILED, BARE = "Steadfast", "torch eager", "torch.compile", "base products"
EPS, IGNORED = 1e-5, -100


@dataclass
class Setup:
    """Inputs, and functions of them by contender; gradients are taken of those inputs that require one."""

    inputs: tuple
    forwards: dict[str, Callable]
    bare: Callable | None = None  # does what the layer would do without the operation, and returns nothing to compare
    calls: int = 1  # of a forward, in one measurement


class Source:
    """Random tensors on one device in one dtype, equal for equal seeds."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0):
        self.device, self.dtype, self.generator = device, dtype, torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0, grad: bool = False) -> Tensor:
        t = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32).mul_(scale).to(self.dtype)
        return t.requires_grad_(grad)

    def integers(self, high: int, *shape: int, dtype=torch.int64) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device, dtype=dtype)


def library(name: str):
    """Return a module of a package that nothing here needs, or None where it is not installed."""
    return importlib.import_module(name) if importlib.util.find_spec(name.partition(".")[0]) else None


# ---------------------------------------------------------------- head and loss


def hidden_states(source: Source, weight: Tensor, target: Tensor) -> Tensor:
    """Return hidden states [T, D] whose logits look like a trained model's: a loss of 1 to 2 nats.

    Logits are noise of deviation 2, and the target's is raised by 15 ± 5. Under purely random states every row is nearly uniform, which
    favours or penalises implementations that skip small terms.
    """
    V, D = weight.shape
    size = weight.float().square().sum(1).mean().sqrt()  # of a row
    raised = 15 + 5 * torch.randn(len(target), 1, generator=source.generator, device=source.device)
    noise = torch.randn(len(target), D, generator=source.generator, device=source.device) * (2 / size)
    return (noise + weight[target].float() * (raised / size**2)).to(weight.dtype)


def cross_entropy(source: Source, model: ModelShape, tokens: int, trained: bool = False, ignored: float = 0.0) -> Setup:
    weight = source(model.vocabulary, model.width, scale=model.width**-0.5, grad=trained)
    target = source.integers(model.vocabulary, tokens)
    x = hidden_states(source, weight.detach(), target).requires_grad_()
    if ignored:
        target[torch.rand(tokens, generator=source.generator, device=source.device) < ignored] = IGNORED
    index = IGNORED if ignored else None
    forwards = {
        OURS: lambda x, W: linear_cross_entropy(x, W, target, ignore_index=index),
        EAGER: lambda x, W: F.cross_entropy(F.linear(x, W).float(), target, reduction="sum"),
    }
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        forwards["torch linear_cross_entropy"] = lambda x, W: F.linear_cross_entropy(x, W, target, reduction="sum", ignore_index=index)
    if liger := library("liger_kernel.transformers"):
        fused = liger.LigerFusedLinearCrossEntropyLoss(reduction="sum")
        forwards["Liger"] = lambda x, W: fused(W, x, target)
    if cut := library("cut_cross_entropy"):
        forwards["CCE"] = lambda x, W: cut.linear_cross_entropy(x, W, target, reduction="sum")
    return Setup((x, weight), forwards)


def kl(source: Source, model: ModelShape, tokens: int) -> Setup:
    weight = source(model.vocabulary, model.width, scale=model.width**-0.5)
    x_ref = hidden_states(source, weight, source.integers(model.vocabulary, tokens))
    x = (x_ref + source(tokens, model.width)).requires_grad_()

    def plain(x, x_ref):
        student, reference = (F.linear(t, weight).float().log_softmax(-1) for t in (x, x_ref))
        return F.kl_div(student, reference, reduction="sum", log_target=True)

    return Setup((x, x_ref), {OURS: lambda x, x_ref: linear_kl(x, weight, x_ref), EAGER: plain})


# ---------------------------------------------------------------- LoRA


def adapter(source: Source, inner: int, outer: int) -> tuple[Tensor, Tensor]:
    return source(RANK, inner, scale=inner**-0.5, grad=True), source(outer, RANK, scale=0.02, grad=True)


def adapted(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, dropout: float) -> Tensor:
    """Compute a LoRA layer as PEFT does."""
    return F.linear(x, weight) + 2.0 * F.linear(F.linear(F.dropout(x, dropout), A), B)


def loras(tensors: tuple[Tensor, ...], dropout: float) -> list[Lora]:
    return [Lora(A, B, 2.0, dropout) for A, B in zip(tensors[::2], tensors[1::2])]


def projections(source: Source, model: ModelShape, tokens: int, outputs: tuple[int, ...], dropout: float) -> Setup:
    x = source(tokens, model.width, grad=True)
    weights = [source(n, model.width, scale=model.width**-0.5) for n in outputs]
    tensors = sum((adapter(source, model.width, n) for n in outputs), ())
    upstream = [source(tokens, n) for n in outputs]

    def ours(x, *tensors):
        if len(weights) == 1:
            return lora_linear(x, weights[0], *loras(tensors, dropout))
        return lora_qkv(x, weights, loras(tensors, dropout))

    def plain(x, *tensors):
        return tuple(adapted(x, W, A, B, dropout) for W, A, B in zip(weights, tensors[::2], tensors[1::2]))

    def bare():
        dx = None
        with torch.no_grad():
            for W, dy in zip(weights, upstream):
                F.linear(x, W)
                dx = dy @ W if dx is None else dx.addmm_(dy, W)

    return Setup((x, *tensors), {OURS: ours, EAGER: plain}, bare)


def mlp(source: Source, model: ModelShape, tokens: int, dropout: float) -> Setup:
    D, N = model.width, model.mlp
    x, dy = source(tokens, D, grad=True), source(tokens, D)
    weights = [source(N, D, scale=D**-0.5), source(N, D, scale=D**-0.5), source(D, N, scale=N**-0.5)]
    tensors = (*adapter(source, D, N), *adapter(source, D, N), *adapter(source, N, D))

    def plain(x, *t):
        h = F.silu(adapted(x, weights[0], *t[:2], dropout)) * adapted(x, weights[1], *t[2:4], dropout)
        return adapted(h, weights[2], *t[4:], dropout)

    def bare():
        with torch.no_grad():
            gate, up = F.linear(x, weights[0]), F.linear(x, weights[1])
            F.linear(glu_forward(gate, up, "silu"), weights[2])
            dgate, dup, _ = glu_backward(dy @ weights[2], gate, up, "silu", False)
            (dgate @ weights[0]).addmm_(dup, weights[1])

    return Setup((x, *tensors), {OURS: lambda x, *t: lora_mlp(x, weights, loras(t, dropout)), EAGER: plain}, bare)


# ---------------------------------------------------------------- memory-bound operations


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Compute RMSNorm as models in transformers do."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def plain_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos[:, None] + torch.cat((-x[..., half:], x[..., :half]), -1) * sin[:, None]


def angles(source: Source, tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    inverse = 10000.0 ** (-torch.arange(0, dim, 2, device=source.device) / dim)
    theta = torch.cat([torch.outer(torch.arange(tokens, device=source.device).float(), inverse)] * 2, -1)
    return theta.cos().to(source.dtype), theta.sin().to(source.dtype)


def norm(source: Source, model: ModelShape, tokens: int) -> Setup:
    weight = source(model.width)
    forwards = {OURS: lambda x: rms_norm(x, weight, EPS), EAGER: lambda x: plain_norm(x, weight),
                "torch rms_norm": lambda x: F.rms_norm(x, weight.shape, weight, EPS)}
    if liger := library("liger_kernel.ops.rms_norm"):
        forwards["Liger"] = lambda x: liger.LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)  # False: not in place
    return Setup((source(tokens, model.width, grad=True),), forwards)


def add_norm(source: Source, model: ModelShape, tokens: int) -> Setup:
    weight = source(model.width)

    def plain(x, z):
        h = x + z
        return plain_norm(h, weight), h

    return Setup((source(tokens, model.width, grad=True), source(tokens, model.width, grad=True)),
                 {OURS: lambda x, z: add_rms_norm(x, z, weight, EPS), EAGER: plain})


def heads(source: Source, model: ModelShape, tokens: int) -> tuple[Tensor, Tensor]:
    return tuple(source(tokens, n, model.head_dim, grad=True) for n in (model.heads, model.kv_heads))


def rope(source: Source, model: ModelShape, tokens: int) -> Setup:
    cos, sin = angles(source, tokens, model.head_dim)
    return Setup(heads(source, model, tokens), {
        OURS: lambda q, k: apply_rope(q, k, cos, sin), EAGER: lambda q, k: (plain_rope(q, cos, sin), plain_rope(k, cos, sin))})


def norm_rope(source: Source, model: ModelShape, tokens: int) -> Setup:
    cos, sin = angles(source, tokens, model.head_dim)
    wq, wk = source(model.head_dim), source(model.head_dim)
    return Setup(heads(source, model, tokens), {
        OURS: lambda q, k: qk_norm_rope(q, k, wq, wk, cos, sin, EPS),
        EAGER: lambda q, k: (plain_rope(plain_norm(q, wq), cos, sin), plain_rope(plain_norm(k, wk), cos, sin))})


def gated(source: Source, model: ModelShape, tokens: int) -> Setup:
    return Setup((source(tokens, model.mlp, grad=True), source(tokens, model.mlp, grad=True)),
                 {OURS: glu, EAGER: lambda gate, up: F.silu(gate) * up})


def dequantisation(source: Source, model: ModelShape, tokens: int) -> Setup:
    """Dequantise one layer's seven matrices, once for every layer.

    They are quantised by bitsandbytes where it is installed, else they are random codes.
    """
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    D, N = model.width, model.mlp
    shapes = [(q, D), (kv, D), (kv, D), (D, q), (N, D), (N, D), (D, N)]
    bnb = library("bitsandbytes")
    quantised, states = zip(*(nf4(source, shape, bnb) for shape in shapes), strict=True)

    forwards = {OURS: lambda: [dequantize_nf4(w) for w in quantised],
                EAGER: lambda: [dequantize_nf4_reference(w, w.dtype) for w in quantised]}
    if bnb:
        forwards["bitsandbytes"] = lambda: [bnb.functional.dequantize_4bit(*s) for s in states]
    return Setup((), forwards, calls=model.layers)


def nf4(source: Source, shape: tuple[int, int], bnb) -> tuple[Nf4, tuple | None]:
    """Return a weight in our form and in bitsandbytes'."""
    if bnb:
        codes, state = bnb.functional.quantize_4bit(source(*shape), quant_type="nf4", compress_statistics=True)
        made = Nf4(codes, state.absmax, state.state2.code, state.state2.absmax, state.offset, shape, source.dtype, state.blocksize)
        return made, (codes, state)
    blocks = shape[0] * shape[1] // 64
    one_block, nested = source.integers(256, blocks, dtype=torch.uint8), torch.linspace(-1, 1, 256, device=source.device)
    scales = torch.rand(-(-blocks // 256), generator=source.generator, device=source.device)
    codes = source.integers(256, shape[0] * shape[1] // 2, dtype=torch.uint8)
    return Nf4(codes, one_block, nested, scales, torch.ones((), device=source.device), shape, source.dtype, 64), None


def attention(source: Source, model: ModelShape, tokens: int) -> Setup:
    """Attend within documents of one length, so that plain torch needs no padding: its best case."""
    length = min(DOCUMENT, tokens // 2)
    bounds = torch.arange(0, tokens + 1, length, device=source.device, dtype=torch.int32)
    q, k = heads(source, model, tokens)
    v = source(tokens, model.kv_heads, model.head_dim, grad=True)

    def plain(q, k, v):
        apart = (t.unflatten(0, (-1, length)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(*apart, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)

    return Setup((q, k, v), {OURS: lambda q, k, v: packed_attention(q, k, v, bounds, length), EAGER: plain})


# Builders take a Source, a Model, the tokens and, for LoRA, the dropout: none while lines are compared, since their masks differ.
CASES: dict[str, Callable[..., Setup]] = {
    "linear CE, frozen head": cross_entropy,
    "linear CE, half ignored": partial(cross_entropy, ignored=0.5),
    "linear CE, trained head": partial(cross_entropy, trained=True),
    "linear KL, frozen head": kl,
    "LoRA linear": lambda s, m, T, dropout=DROPOUT: projections(s, m, T, (m.mlp,), dropout),
    "LoRA QKV": lambda s, m, T, dropout=DROPOUT: projections(
        s, m, T, (m.heads * m.head_dim, m.kv_heads * m.head_dim, m.kv_heads * m.head_dim), dropout),
    "LoRA MLP": lambda s, m, T, dropout=DROPOUT: mlp(s, m, T, dropout),
    "RMSNorm": norm,
    "add + RMSNorm": add_norm,
    "RoPE": rope,
    "QK-norm + RoPE": norm_rope,
    "GLU": gated,
    "NF4, all layers": dequantisation,
    "packed attention": attention,
}
RANDOM = {"LoRA linear", "LoRA QKV", "LoRA MLP"}


def results_and_gradients(forward: Callable, inputs: tuple[Tensor, ...], upstream: list[Tensor], calls: int = 1) -> list[Tensor]:
    """Return the results of `forward`, and gradients of the inputs that require one.

    Forward runs `calls` times, backward once. `upstream`, the upstream gradients, is filled at the first call and used by every contender.
    """
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
