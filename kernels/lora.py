"""LoRA linears with a hand-derived backward; the projections that read one x share its small products.

For projection i of x [T, K], with base W_i [N_i, K], b_i, and adapter A_i [R_i, K], B_i [N_i, R_i], s_i:

    S_i = (m_i ∘ x) A_iᵀ                     m_i: 0/1 dropout mask, its own for every projection
    V_i = x W_iᵀ + a_i S_i B_iᵀ              a_i = s_i / (fraction kept)
    y_i = c_i ∘ V_i + b_i                    c_i = 1; DoRA: c_i = magnitude_i / n_i, n_i = ‖W_i + s_i B_i A_i‖ by row

    G_i = c_i ∘ ∂y_i                         ∂b_i = Σ_t ∂y_i        ∂magnitude_i = Σ_t ∂y_i ∘ V_i / n_i
    D_i = a_i G_i B_i                        ∂A_i = D_iᵀ (m_i ∘ x)     ∂B_i = a_i G_iᵀ S_i    ∂W_i = G_iᵀ x (if trained)
    ∂x  = Σ_i G_i W_i + m_i ∘ (D_i A_i)

n_i is held constant in the backward (DoRA, https://arxiv.org/abs/2402.09353, section 4.3). rsLoRA is another s_i.
Saved: x, S and the parameters; V_i only where a magnitude is trained; a seed, never a mask. An NF4 weight is made dense
just before each product that reads it.

With dropout and DoRA together PEFT drops the base product's x as well, which costs a second base product. Here only the
adapter's x is dropped: the expectation over masks is the same, the variance smaller, and the cost one base product.

On a GPU, for P projections with adapters of rank 256 or less (kernels/_lora_passes.py):

    forward     P base products, 1 launch for all S_i and everything else of the V_i (DoRA: + P row norms, + P scalings)
    backward    P base products, 1 launch for all D_i and ∂x's other half, 1 for all ∂A_i and ∂B_i, 1 that sums them (DoRA: + P
                for the G_i and the sums over t, + P that sum those)

so no narrow product is a launch of its own and none is made twice. Up to 3 projections go together, fewer above rank 64 (32
on smaller GPUs). Frozen base weights get no ∂W_i; where x needs no gradient the P products, where A or B needs none its share
falls away.

Overhead over the base products, forward + backward, T=8192, bf16, R=16, dropout 0.05, on an H200 (4.8 TB/s, 750 TFLOP/s),
from the bytes moved and, where it outlasts them, from the mask's 6 to 7 instructions an element. Predicted, not measured:

    Llama-3.1-8B      4096 -> 4096    q, k, v    gate and up    14336 -> 4096    the MLP    all seven
    overhead             11.7%         12.2%        6.7%            7.5%          7.0%        8.0%
    without dropout      11.7%          9.9%        6.7%            7.5%          7.0%        7.7%

Elsewhere, and for a call with a rank above 256, kernels/_lora_reference.py serves; what was measured on a CPU stands there.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._autocast import autocast_input, without_autocast
from kernels._dispatch import triton_serves
from kernels._dora import finish, finish_backward
from kernels._dropout import draw_seed, lanes_kept
from kernels._lora_passes import MAX_RANK, lora_backward, lora_forward, lora_gradients
from kernels._lora_reference import (
    Projection,
    dense,
    gain,
    master_product,
    norms_of,
    project_backward_reference,
    project_reference,
)
from kernels.nf4 import Nf4

N_TENSORS = 5  # of a projection that may want a gradient: the first five of Projection
NF4_TENSORS = 5  # the first five of Nf4


class Lora(NamedTuple):
    """One adapter: y gains scaling * (drop(x) Aᵀ) Bᵀ. A [R, K], B [N, R]; magnitude [N] makes it DoRA."""

    A: Tensor
    B: Tensor
    scaling: float
    dropout: float = 0.0
    magnitude: Tensor | None = None


# ---------------------------------------------------------------- base products by torch, the rest by the passes


def fuses(x: Tensor, parts: list[Projection]) -> bool:
    """Whether the passes serve."""
    return triton_serves(x) and all(part.A is None or part.A.shape[0] <= MAX_RANK for part in parts)


def adapters(parts: list[Projection]) -> tuple[list[Projection], tuple]:
    """The projections that have one, and what all passes want to know of them: seed, gains, mask numbers, thresholds."""
    adapted = [part for part in parts if part.A is not None]
    seed = next((part.seed for part in adapted if part.seed is not None), None)
    lanes = [lanes_kept(part.dropout) for part in adapted]
    return adapted, (seed, [gain(part) for part in adapted], [part.stream for part in adapted], lanes)


def project_fused(x: Tensor, parts: list[Projection]) -> tuple[Tensor | None, list[Tensor], list[Tensor | None]]:
    """What `project_reference` returns; S [T, P * block_r]."""
    adapted, drawn = adapters(parts)
    S, under, values, norms = None, iter(()), [], []
    if adapted:
        biases = [None if part.magnitude is not None else part.bias for part in adapted]
        S, lows = lora_forward(x, [part.A for part in adapted], [part.B for part in adapted], biases, *drawn)
        under = iter(lows)
    for part in parts:
        weight = dense(part.weight, x.dtype)
        if part.A is None:
            values.append(F.linear(x, weight, None if part.bias is None else part.bias.to(x.dtype)))
        else:
            values.append(next(under).addmm_(x, weight.t()))
        norms.append(norms_of(part, weight))
    return S, values, norms


def input_gradient(G: list[Tensor], parts: list[Projection], need_x: bool, needs: list[tuple[bool, ...]]):
    """∂x [T, K] (None unless need_x) and D [T, P * block_r] (None where nobody wants it)."""
    adapted, drawn = adapters(parts)
    grad_x, D = None, None
    if adapted and (need_x or any(need[2] for need in needs)):
        mine = [g for g, part in zip(G, parts, strict=True) if part.A is not None]
        D, low = lora_backward(mine, [part.A for part in adapted], [part.B for part in adapted], *drawn, need_x)
        grad_x = low if need_x else None
    for g, part in zip(G, parts, strict=True) if need_x else ():
        weight = dense(part.weight, g.dtype)
        grad_x = g @ weight if grad_x is None else grad_x.addmm_(g, weight)
    return grad_x, D


def parameter_gradients(G: list[Tensor], x: Tensor, S: Tensor | None, D: Tensor | None, parts: list[Projection],
                        needs: list[tuple[bool, ...]], grads: list[list[Tensor | None]]) -> None:
    """Into `grads` the gradients of each projection's weight, A and B where `needs` wants them."""
    adapted, drawn = adapters(parts)
    places = [i for i, part in enumerate(parts) if part.A is not None]
    need_A, need_B = ([needs[i][k] for i in places] for k in (2, 3))
    if any(need_A + need_B):
        ranks = [part.A.shape[0] for part in adapted]
        flat = lora_gradients(x, [G[i] for i in places], S, D, ranks, need_A, need_B, *drawn)
        wanted = [(i, 2) for i, need in zip(places, need_A) if need] + [(i, 3) for i, need in zip(places, need_B) if need]
        for (i, k), grad in zip(wanted, flat.split([parts[i][k].numel() for i, k in wanted]), strict=True):
            grads[i][k] = grad.view(parts[i][k].shape).to(parts[i][k].dtype)
    for g, part, need, grad in zip(G, parts, needs, grads, strict=True):
        if need[0]:
            grad[0] = master_product(g.t(), x, part.weight.dtype)


# ---------------------------------------------------------------- either form


def project(x: Tensor, parts: list[Projection], fused: bool) -> tuple[Tensor | None, list[Tensor], list[Tensor | None]]:
    """x [T, K] -> S, V_i [T, N_i] (the bias already in it unless DoRA has still to scale it), n_i [N_i]."""
    return project_fused(x, parts) if fused else project_reference(x, parts)


def finished(value: Tensor, norm: Tensor | None, part: Projection) -> Tensor:
    """y of V: V itself, or c ∘ V + b with DoRA."""
    return value if norm is None else finish(value, part.magnitude, norm, part.bias)


def finished_backward(
    grads_y: list[Tensor], values: list[Tensor | None], norms: list[Tensor | None], parts: list[Projection],
    needs: list[tuple[bool, ...]],
) -> tuple[list[Tensor], list[list[Tensor | None]]]:
    """G_i, and for every projection its five tensors' gradients, so far those of bias and magnitude; `needs` says which are wanted."""
    G, grads = [], []
    for grad_y, value, norm, part, need in zip(grads_y, values, norms, parts, needs, strict=True):
        grad = [None] * N_TENSORS
        if norm is None:
            if need[1]:
                grad[1] = grad_y.sum(0, dtype=part.bias.dtype)
        else:
            grad_y, sums = finish_backward(grad_y, value if need[4] else None, part.magnitude, norm, need[1])
            for k, row in zip([k for k in (4, 1) if need[k]], sums, strict=True):
                grad[k] = row.to(part[k].dtype)
        G.append(grad_y)
        grads.append(grad)
    return G, grads


def project_backward(
    grads_y: list[Tensor], x: Tensor, S: Tensor | None, values: list[Tensor | None], norms: list[Tensor | None],
    parts: list[Projection], need_x: bool, needs: list[tuple[bool, ...]], fused: bool,
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """∂x and, for every projection, the gradients of its five tensors."""
    G, grads = finished_backward(grads_y, values, norms, parts, needs)
    if not fused:
        return project_backward_reference(G, x, S, parts, need_x, needs, grads), grads
    grad_x, D = input_gradient(G, parts, need_x, needs)
    parameter_gradients(G, x, S, D, parts, needs, grads)
    return grad_x, grads


# ---------------------------------------------------------------- autograd: flat tensors in, flat gradients out


def flatten(x: Tensor, weights, loras, biases) -> tuple[Tensor | None, list[tuple], list[Tensor | None]]:
    """The masks' seed; per projection (scaling, dropout, an NF4 weight without its tensors); all tensors in one flat list,
    N_TENSORS for each projection and then those of the NF4 weights."""
    settings, tensors, codes = [], [], []
    for weight, lora, bias in zip(weights, loras, biases, strict=True):
        frozen = None
        if isinstance(weight, Nf4):
            codes += weight[:NF4_TENSORS]
            frozen, weight = Nf4(*[None] * NF4_TENSORS, *weight[NF4_TENSORS:]), None
        settings.append((1.0, 0.0, frozen) if lora is None else (lora.scaling, lora.dropout, frozen))
        tensors += [weight, bias, *((None, None, None) if lora is None else (lora.A, lora.B, lora.magnitude))]
    seed = draw_seed(x.device) if any(dropout for _, dropout, _ in settings) else None
    return seed, settings, tensors + codes


def projections(seed: Tensor | None, settings, tensors) -> list[Projection]:
    """The inverse of `flatten`."""
    codes, parts = iter(tensors[N_TENSORS * len(settings):]), []
    for i, (scaling, dropout, frozen) in enumerate(settings):
        weight, *others = tensors[N_TENSORS * i:N_TENSORS * (i + 1)]
        if frozen is not None:
            weight = Nf4(*[next(codes) for _ in range(NF4_TENSORS)], *frozen[NF4_TENSORS:])
        parts.append(Projection(weight, *others, scaling, dropout, seed if dropout else None, i))
    return parts


def by_projection(flags, count: int) -> list[tuple[bool, ...]]:
    return [tuple(flags[N_TENSORS * i:N_TENSORS * (i + 1)]) for i in range(count)]


def flat_gradients(grads: list[list[Tensor | None]], count: int) -> list[Tensor | None]:
    """For `count` tensors as `flatten` lays them out: NF4 weights get none."""
    flat = [g for grad in grads for g in grad]
    return flat + [None] * (count - len(flat))


class _Projections(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, x, seed, settings, *tensors):
        parts = projections(seed, settings, tensors)
        rows = x.reshape(-1, x.shape[-1])
        ctx.settings, ctx.fused = settings, fuses(rows, parts)
        S, values, norms = project(rows, parts, ctx.fused)
        outputs = [finished(value, norm, part) for value, norm, part in zip(values, norms, parts, strict=True)]

        needs = by_projection(ctx.needs_input_grad[3:], len(parts))
        kept = [value if need[4] else None for value, need in zip(values, needs, strict=True)]
        ctx.save_for_backward(x, seed, S, *kept, *norms, *tensors)
        return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in outputs)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, *grads_y):
        count = len(ctx.settings)
        x, seed, S, *rest = ctx.saved_tensors
        values, norms, tensors = rest[:count], rest[count:2 * count], rest[2 * count:]
        grad_x, grads = project_backward(
            [grad.reshape(-1, grad.shape[-1]) for grad in grads_y], x.reshape(-1, x.shape[-1]), S, values, norms,
            projections(seed, ctx.settings, tensors), ctx.needs_input_grad[0], by_projection(ctx.needs_input_grad[3:], count), ctx.fused,
        )
        return None if grad_x is None else grad_x.view(x.shape), None, None, *flat_gradients(grads, len(tensors))


def _projections(x, weights, loras, biases) -> tuple[Tensor, ...]:
    if all(lora is None for lora in loras) and not any(isinstance(weight, Nf4) for weight in weights):
        return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    seed, settings, tensors = flatten(x, weights, loras, biases)
    return _Projections.apply(autocast_input(x), seed, settings, *tensors)


def check_input(op: str, x: Tensor) -> None:
    if x.dim() == 0 or not x.dtype.is_floating_point:
        raise ValueError(f"{op}: expected x floating and of shape (..., K), got {x.dtype} {tuple(x.shape)}")


def check_projection(op: str, x: Tensor, width: int, weight: Tensor | Nf4, lora: Lora | None, bias: Tensor | None) -> None:
    """ValueError unless weight [N, width], bias [N], A [R, width], B [N, R], magnitude [N] fit, are floating and on x's device."""

    def expect(name: str, tensor: Tensor, *shape: int):
        if tensor.shape != shape:
            raise ValueError(f"{op}: expected {name} of shape {shape}, got {tuple(tensor.shape)}")
        if not tensor.dtype.is_floating_point or tensor.device != x.device:
            raise ValueError(f"{op}: expected {name} floating and on {x.device} like x, got {tensor.dtype} on {tensor.device}")

    if len(weight.shape) != 2 or weight.shape[1] != width:
        raise ValueError(f"{op}: expected weight of shape (N, {width}) for x [..., {width}], got {tuple(weight.shape)}")
    expect("weight", weight, *weight.shape)
    if bias is not None:
        expect("bias", bias, weight.shape[0])
    if lora is None:
        return
    if lora.A.dim() != 2:
        raise ValueError(f"{op}: expected A of shape (R, {width}), got {tuple(lora.A.shape)}")
    expect("A", lora.A, lora.A.shape[0], width)
    expect("B", lora.B, weight.shape[0], lora.A.shape[0])
    if lora.magnitude is not None:
        expect("magnitude", lora.magnitude, weight.shape[0])
    if not 0 <= lora.dropout < 1:
        raise ValueError(f"{op}: expected dropout in [0, 1), got {lora.dropout}")


def lora_qkv(x: Tensor, weights, loras, biases=None) -> tuple[Tensor, ...]:
    """x [..., K] -> one [..., N_i] per weight [N_i, K]: any number of projections of one x (query, key and value, say).

    weights: dense, or `Nf4`, frozen; loras: a `Lora` per weight, or None for no adapter; biases: likewise, or None for none
    at all. Products run in x's dtype (autocast's where it is on); the gradients of A and B come in their own. ValueError
    where shapes, dtypes or devices do not fit.
    """
    biases = (None,) * len(weights) if biases is None else biases
    if not len(weights) == len(loras) == len(biases) > 0:
        counts = f"{len(weights)}, {len(loras)} and {len(biases)}"
        raise ValueError(f"lora_qkv: expected as many loras and biases as weights, got {counts}")
    check_input("lora_qkv", x)
    for weight, lora, bias in zip(weights, loras, biases, strict=True):
        check_projection("lora_qkv", x, x.shape[-1], weight, lora, bias)
    return _projections(x, weights, loras, biases)


def lora_linear(x: Tensor, weight: Tensor | Nf4, lora: Lora | None, bias: Tensor | None = None) -> Tensor:
    """x [..., K], weight [N, K] -> [..., N]: the base linear and its adapter in one node. Dtypes as in `lora_qkv`."""
    check_input("lora_linear", x)
    check_projection("lora_linear", x, x.shape[-1], weight, lora, bias)
    return _projections(x, (weight,), (lora,), (bias,))[0]


def _aot(rank: int, dora: bool = False, N: tuple[int, ...] = (4096,), T: int = 8192, K: int = 4096) -> None:
    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, *weights = (empty(rows, K, dtype=torch.bfloat16) for rows in (T, *N))
    loras = [Lora(empty(rank, K), empty(n, rank), 2.0, 0.05, empty(n) if dora else None) for n in N]
    parts, needs = projections(*flatten(x, weights, loras, [None] * len(N))), [(False, False, True, True, dora)] * len(N)
    S, values, norms = project(x, parts, fuses(x, parts))
    ys = [finished(value, norm, part) for value, norm, part in zip(values, norms, parts)]
    project_backward(ys, x, S, values, norms, parts, True, needs, fuses(x, parts))


# Llama-3.1-8B's o; q, k and v
AOT = {
    "lora_linear r16 dora": lambda: _aot(16, dora=True),
    "lora_qkv r16": lambda: _aot(16, N=(4096, 1024, 1024)),
    "lora_qkv r64": lambda: _aot(64, N=(4096, 1024, 1024)),
    "lora_linear r256 dora": lambda: _aot(256, dora=True),
}
