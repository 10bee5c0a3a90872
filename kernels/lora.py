"""LoRA linears with a hand-derived backward; the projections that read one x share its small matmuls.

For projection i of x [T, K], with base W_i [N_i, K], b_i, and adapter A_i [R_i, K], B_i [N_i, R_i], s_i:

    S_i = (m_i ∘ x) A_iᵀ                     m_i: 0/1 dropout mask, its own for every projection
    V_i = x W_iᵀ + a_i S_i B_iᵀ              a_i = s_i / (fraction kept)
    y_i = c_i ∘ V_i + b_i                    c_i = 1; DoRA: c_i = magnitude_i / n_i, n_i = ‖W_i + s_i B_i A_i‖ by row

    G_i = c_i ∘ ∂y_i                         ∂b_i = Σ_t ∂y_i        ∂magnitude_i = Σ_t ∂y_i ∘ V_i / n_i
    D_i = a_i G_i B_i                        ∂A_i = D_iᵀ (m_i ∘ x)     ∂B_i = a_i G_iᵀ S_i    ∂W_i = G_iᵀ x (if trained)
    ∂x  = Σ_i G_i W_i + m_i ∘ (D_i A_i)

n_i is constant in the backward (DoRA, https://arxiv.org/abs/2402.09353, section 4.3). rsLoRA is another s_i.
Saved: x, S and the parameters; V_i only where a magnitude is trained; a seed instead of the masks. An NF4 weight is dequantised
before each matmul that reads it. With dropout and DoRA together only the adapter's x is dropped, so one base matmul is enough; PEFT
drops the base's x too. Both have the same expectation over masks.

kernels/_lora_passes.py serves on a GPU for ranks up to 256, kernels/_lora_reference.py elsewhere.
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
    TENSORS,
    Gradients,
    Needs,
    Projection,
    dense,
    dora_norm,
    gain,
    parameter_matmul,
    project_backward_reference,
    project_reference,
)
from kernels.nf4 import Nf4

N_TENSORS = len(TENSORS)
NF4_TENSORS = 5  # the first five fields of Nf4


class Lora(NamedTuple):
    """One adapter: y gains scaling * (drop(x) Aᵀ) Bᵀ. A [R, K], B [N, R]; magnitude [N] makes it DoRA."""

    A: Tensor
    B: Tensor
    scaling: float
    dropout: float = 0.0
    magnitude: Tensor | None = None


# ---------------------------------------------------------------- fused: base matmuls by torch, the rest by the Triton passes


class Adapters(NamedTuple):
    """The projections that have an adapter, as the Triton passes take them."""

    indices: list[int]  # among all projections
    A: list[Tensor]
    B: list[Tensor]
    biases: list[Tensor | None]  # those that no DoRA scaling has to precede
    dropout_args: tuple[Tensor | None, list[float], list[int], list[int]]  # seed, gains a_i, mask numbers, thresholds


def adapters_of(projections: list[Projection]) -> Adapters:
    """Return the adapters of the projections that have one."""
    indices = [i for i, projection in enumerate(projections) if projection.A is not None]
    adapted = [projections[i] for i in indices]
    seed = next((projection.seed for projection in adapted if projection.seed is not None), None)
    dropout_args = (seed, [gain(projection) for projection in adapted], [projection.stream for projection in adapted],
                    [lanes_kept(projection.dropout) for projection in adapted])
    biases = [None if projection.magnitude is not None else projection.bias for projection in adapted]
    return Adapters(indices, [projection.A for projection in adapted], [projection.B for projection in adapted], biases, dropout_args)


def fuses(x: Tensor, projections: list[Projection]) -> bool:
    """Return whether the Triton passes serve this call."""
    return triton_serves(x) and all(projection.A is None or projection.A.shape[0] <= MAX_RANK for projection in projections)


def project_fused(x: Tensor, projections: list[Projection]) -> tuple[Tensor | None, list[Tensor], list[Tensor | None]]:
    """Return what `project_reference` returns, with S [T, P * block_r]."""
    adapters = adapters_of(projections)
    S, adapter_outputs, values, norms = None, {}, [], []
    if adapters.indices:
        S, outputs = lora_forward(x, adapters.A, adapters.B, adapters.biases, *adapters.dropout_args)
        adapter_outputs = dict(zip(adapters.indices, outputs))
    for i, projection in enumerate(projections):
        weight = dense(projection.weight, x.dtype)
        if projection.A is None:
            values.append(F.linear(x, weight, None if projection.bias is None else projection.bias.to(x.dtype)))
        else:
            values.append(adapter_outputs[i].addmm_(x, weight.t()))
        norms.append(dora_norm(projection, weight))
    return S, values, norms


def input_gradient(G: list[Tensor], projections: list[Projection], adapters: Adapters, need_x: bool, needs: list[Needs]
                   ) -> tuple[Tensor | None, Tensor | None]:
    """Return ∂x [T, K] (None unless need_x) and D [T, P * block_r] (None where it is not needed)."""
    grad_x, D = None, None
    if adapters.indices and (need_x or any(need.A for need in needs)):
        D, adapter_grad_x = lora_backward([G[i] for i in adapters.indices], adapters.A, adapters.B, *adapters.dropout_args, need_x)
        grad_x = adapter_grad_x if need_x else None
    for g, projection in zip(G, projections, strict=True) if need_x else ():
        weight = dense(projection.weight, g.dtype)
        grad_x = g @ weight if grad_x is None else grad_x.addmm_(g, weight)
    return grad_x, D


def parameter_gradients(G: list[Tensor], x: Tensor, S: Tensor | None, D: Tensor | None, projections: list[Projection],
                        adapters: Adapters, needs: list[Needs], grads: list[Gradients]) -> None:
    """Write the needed gradients of each projection's weight, A and B into `grads`."""
    need_A, need_B = [needs[i].A for i in adapters.indices], [needs[i].B for i in adapters.indices]
    if any(need_A + need_B):
        ranks = [A.shape[0] for A in adapters.A]
        flat = lora_gradients(x, [G[i] for i in adapters.indices], S, D, ranks, need_A, need_B, *adapters.dropout_args)
        wanted = [(i, "A") for i, need in zip(adapters.indices, need_A) if need]
        wanted += [(i, "B") for i, need in zip(adapters.indices, need_B) if need]
        parameters = [getattr(projections[i], name) for i, name in wanted]
        for (i, name), parameter, grad in zip(wanted, parameters, flat.split([p.numel() for p in parameters]), strict=True):
            setattr(grads[i], name, grad.view(parameter.shape).to(parameter.dtype))
    for g, projection, need, grad in zip(G, projections, needs, grads, strict=True):
        if need.weight:
            grad.weight = parameter_matmul(g.t(), x, projection.weight.dtype)


# ---------------------------------------------------------------- fused or reference


def project(x: Tensor, projections: list[Projection], fused: bool) -> tuple[Tensor | None, list[Tensor], list[Tensor | None]]:
    """Return S, V_i [T, N_i] and n_i [N_i] of x [T, K] (`project_reference`)."""
    return project_fused(x, projections) if fused else project_reference(x, projections)


def output_of(value: Tensor, norm: Tensor | None, projection: Projection) -> Tensor:
    """Return y of V: V itself, or c ∘ V + b with DoRA."""
    return value if norm is None else finish(value, projection.magnitude, norm, projection.bias)


def output_backward(grads_y: list[Tensor], values: list[Tensor | None], norms: list[Tensor | None], projections: list[Projection],
                    needs: list[Needs]) -> tuple[list[Tensor], list[Gradients]]:
    """Return the G_i and every projection's gradients, so far those of bias and magnitude."""
    G, grads = [], []
    for grad_y, value, norm, projection, need in zip(grads_y, values, norms, projections, needs, strict=True):
        grad = Gradients()
        if norm is None:
            if need.bias:
                grad.bias = grad_y.sum(0, dtype=projection.bias.dtype)
        else:
            grad_y, sums = finish_backward(grad_y, value if need.magnitude else None, projection.magnitude, norm, need.bias)
            if need.magnitude:
                grad.magnitude = sums[0].to(projection.magnitude.dtype)
            if need.bias:
                grad.bias = sums[-1].to(projection.bias.dtype)
        G.append(grad_y)
        grads.append(grad)
    return G, grads


def project_backward(grads_y: list[Tensor], x: Tensor, S: Tensor | None, values: list[Tensor | None], norms: list[Tensor | None],
                     projections: list[Projection], need_x: bool, needs: list[Needs], fused: bool
                     ) -> tuple[Tensor | None, list[Gradients]]:
    """Return ∂x and every projection's gradients."""
    G, grads = output_backward(grads_y, values, norms, projections, needs)
    if not fused:
        return project_backward_reference(G, x, S, projections, need_x, needs, grads), grads
    adapters = adapters_of(projections)
    grad_x, D = input_gradient(G, projections, adapters, need_x, needs)
    parameter_gradients(G, x, S, D, projections, adapters, needs, grads)
    return grad_x, grads


# ---------------------------------------------------------------- autograd

# autograd.Function sees a tensor only as an argument of its own, and returns gradients in the same order. So the projections travel
# as (seed, constants, tensors): `tensors` has the TENSORS of each projection in turn, None where there is none, and then the frozen
# tensors of the NF4 weights; `constants` has all that is no tensor. `flatten` makes the three, `unflatten` reads them.


def flatten(x: Tensor, weights, loras, biases) -> tuple[Tensor | None, list[tuple], list[Tensor | None]]:
    """Return the masks' seed, per projection (scaling, dropout, its Nf4 without tensors), and all tensors."""
    constants, tensors, nf4_tensors = [], [], []
    for weight, lora, bias in zip(weights, loras, biases, strict=True):
        nf4 = None
        if isinstance(weight, Nf4):
            nf4_tensors += weight[:NF4_TENSORS]
            nf4, weight = Nf4(*[None] * NF4_TENSORS, *weight[NF4_TENSORS:]), None
        constants.append((1.0, 0.0, nf4) if lora is None else (lora.scaling, lora.dropout, nf4))
        tensors += [weight, bias, *((None, None, None) if lora is None else (lora.A, lora.B, lora.magnitude))]
    seed = draw_seed(x.device) if any(dropout for _, dropout, _ in constants) else None
    return seed, constants, tensors + nf4_tensors


def unflatten(seed: Tensor | None, constants, tensors) -> list[Projection]:
    """Return the projections that `flatten` was given."""
    nf4_tensors, projections = iter(tensors[N_TENSORS * len(constants):]), []
    for i, (scaling, dropout, nf4) in enumerate(constants):
        weight, *others = tensors[N_TENSORS * i:N_TENSORS * (i + 1)]
        if nf4 is not None:
            weight = Nf4(*[next(nf4_tensors) for _ in range(NF4_TENSORS)], *nf4[NF4_TENSORS:])
        projections.append(Projection(weight, *others, scaling, dropout, seed if dropout else None, i))
    return projections


def needs_by_projection(needs_input_grad, count: int) -> list[Needs]:
    """Return the needs of `count` projections from the flags of a Function's `tensors`."""
    return [Needs(*needs_input_grad[N_TENSORS * i:N_TENSORS * (i + 1)]) for i in range(count)]


def flat_gradients(grads: list[Gradients], count: int) -> list[Tensor | None]:
    """Return the gradients of `count` tensors as `flatten` orders them; those of NF4 weights have none."""
    flat = [getattr(grad, name) for grad in grads for name in TENSORS]
    return flat + [None] * (count - len(flat))


class _Projections(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, x, seed, constants, *tensors):
        projections = unflatten(seed, constants, tensors)
        rows = x.reshape(-1, x.shape[-1])
        ctx.constants, ctx.fused = constants, fuses(rows, projections)
        S, values, norms = project(rows, projections, ctx.fused)
        outputs = [output_of(value, norm, projection) for value, norm, projection in zip(values, norms, projections, strict=True)]

        needs = needs_by_projection(ctx.needs_input_grad[3:], len(projections))
        saved_values = [value if need.magnitude else None for value, need in zip(values, needs, strict=True)]
        ctx.save_for_backward(x, seed, S, *saved_values, *norms, *tensors)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, *grads_y):
        count = len(ctx.constants)
        x, seed, S, *rest = ctx.saved_tensors
        values, norms, tensors = rest[:count], rest[count:2 * count], rest[2 * count:]
        grad_x, grads = project_backward(
            list(grads_y), x.reshape(-1, x.shape[-1]), S, values, norms, unflatten(seed, ctx.constants, tensors), ctx.needs_input_grad[0],
            needs_by_projection(ctx.needs_input_grad[3:], count), ctx.fused)
        return None if grad_x is None else grad_x.view(x.shape), None, None, *flat_gradients(grads, len(tensors))


def like_rows_of(y: Tensor, x: Tensor) -> Tensor:
    """View y [T, N] as [..., N] for x [..., K].

    It is done outside the Functions: autograd lets nobody change in-place a view that a Function returns, and some models do.
    """
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def _projections(x, weights, loras, biases) -> tuple[Tensor, ...]:
    if all(lora is None for lora in loras) and not any(isinstance(weight, Nf4) for weight in weights):
        return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    seed, constants, tensors = flatten(x, weights, loras, biases)
    outputs = _Projections.apply(autocast_input(x), seed, constants, *tensors)
    return tuple(like_rows_of(y, x) for y in outputs)


# ---------------------------------------------------------------- public


def check_input(op: str, x: Tensor) -> None:
    """Raise ValueError unless x is floating and has a last dimension."""
    if x.dim() == 0 or not x.dtype.is_floating_point:
        raise ValueError(f"{op}: expected x floating and of shape (..., K), got {x.dtype} {tuple(x.shape)}")


def check_projection(op: str, x: Tensor, width: int, weight: Tensor | Nf4, lora: Lora | None, bias: Tensor | None) -> None:
    """Raise ValueError unless a projection's tensors fit each other, are floating and on x's device.

    Expected: weight [N, width], bias [N], A [R, width], B [N, R], magnitude [N].
    """

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
    """Return one [..., N_i] per weight [N_i, K] for x [..., K].

    Serves any number of projections of one x (q, k and v, say). weights: dense, or `Nf4`, frozen; loras: a `Lora` per weight, or None for
    no adapter; biases: likewise, or None for none at all. Matmuls run in x's dtype (autocast's where it is on); the gradients of A and B
    have their own dtypes. Raises ValueError where shapes, dtypes or devices do not fit.
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
    """Return the linear of x [..., K] with weight [N, K] plus its adapter: [..., N].

    Dtypes and errors as in `lora_qkv`.
    """
    check_input("lora_linear", x)
    check_projection("lora_linear", x, x.shape[-1], weight, lora, bias)
    return _projections(x, (weight,), (lora,), (bias,))[0]


def _aot(rank: int, dora: bool = False, N: tuple[int, ...] = (4096,), T: int = 8192, K: int = 4096) -> None:
    """Launch forward and backward of projections of Llama-3.1-8B: o; q, k and v."""
    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, *weights = (empty(rows, K, dtype=torch.bfloat16) for rows in (T, *N))
    loras = [Lora(empty(rank, K), empty(n, rank), 2.0, 0.05, empty(n) if dora else None) for n in N]
    projections, needs = unflatten(*flatten(x, weights, loras, [None] * len(N))), [Needs(False, False, True, True, dora)] * len(N)
    fused = fuses(x, projections)
    S, values, norms = project(x, projections, fused)
    ys = [output_of(value, norm, projection) for value, norm, projection in zip(values, norms, projections)]
    project_backward(ys, x, S, values, norms, projections, True, needs, fused)


AOT = {
    "lora_linear r16 dora": lambda: _aot(16, dora=True),
    "lora_qkv r16": lambda: _aot(16, N=(4096, 1024, 1024)),
    "lora_qkv r64": lambda: _aot(64, N=(4096, 1024, 1024)),
    "lora_linear r256 dora": lambda: _aot(256, dora=True),
}
