"""LoRA linears with a hand-derived backward; the projections that read one x share its small products.

For projection i of x [T, K], with base W_i [N_i, K], b_i, and adapter A_i [R_i, K], B_i [N_i, R_i], s_i:

    S_i = (m_i ∘ x) A_iᵀ                     m_i: 0/1 dropout mask, its own for every projection
    V_i = x W_iᵀ + a_i S_i B_iᵀ              a_i = s_i / (fraction kept)
    y_i = c_i ∘ V_i + b_i                    c_i = 1; DoRA: c_i = magnitude_i / n_i, n_i = ‖W_i + s_i B_i A_i‖ by row

    G_i = c_i ∘ ∂y_i                         ∂b_i = Σ_t ∂y_i        ∂magnitude_i = Σ_t ∂y_i ∘ V_i / n_i
    D_i = a_i G_i B_i                        ∂A_i = D_iᵀ (m_i ∘ x)     ∂B_i = a_i G_iᵀ S_i    ∂W_i = G_iᵀ x (if trained)
    ∂x  = Σ_i G_i W_i + m_i ∘ (D_i A_i)

n_i is held constant in the backward (DoRA, https://arxiv.org/abs/2402.09353, section 4.3). rsLoRA is another s_i.

Products for P projections without dropout: forward P base + 1 (all S_i, the A_i stacked) + P (S_i B_iᵀ); backward
P base + P (D_i) + 1 (Σ D_i A_i) + 1 (all ∂A_i) + P (∂B_i). Frozen base weights get no ∂W_i; where x needs no gradient
the backward's P base products and Σ D_i A_i fall away too. Dropout makes the stacked products one per projection.
Saved: x, S and the parameters; V_i only where a magnitude is trained; a seed for each mask, never the mask.

With dropout and DoRA together PEFT drops the base product's x as well, which costs a second base product. Here only the
adapter's x is dropped: the expectation over masks is the same, the variance smaller, and the cost one base product.

The small products are 6TR(K+N) FLOP beside the base's 4TKN, but as autograd nodes they also write and read y, ∂x and
the scaled branch several times; here they accumulate into the base product's output. Measured on one Zen 5 core with
T=1000, R=16: forward + backward, fp32, as a multiple of the bare base products xWᵀ and ∂yW (PEFT's module in brackets):

                      plain           dropout 0.1      DoRA
    256 -> 256        1.33 (1.43)     1.60 (1.88)      1.49 (1.64)
    256 -> 688        1.26 (1.40)     1.33 (1.45)      1.38 (1.80)
    3 x 256 -> 256    1.28 (1.37)     1.58 (1.91)      1.38 (1.63)
    the same, bf16    1.55 (1.83)     2.69 (4.15)      2.14 (2.86)

The FLOPs alone make 256 -> 256 1.19. mm, F.linear and pre-transposed weights run within 5% of each other.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._autocast import autocast_input, without_autocast
from kernels._dropout import draw_seed, dropout_mask, kept_fraction

# Rows of W whose fp32 copy is alive at once while DoRA's row norms are taken: 4 MB.
NORM_CHUNK_BYTES = 4 << 20


class Lora(NamedTuple):
    """One adapter: y gains scaling * (drop(x) Aᵀ) Bᵀ. A [R, K], B [N, R]; magnitude [N] makes it DoRA."""

    A: Tensor
    B: Tensor
    scaling: float
    dropout: float = 0.0
    magnitude: Tensor | None = None


class Projection(NamedTuple):
    """One projection as the backward needs it: five tensors (A, B None: no adapter), then what is no tensor."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor | None
    B: Tensor | None
    magnitude: Tensor | None
    scaling: float
    dropout: float
    seed: int | None


N_TENSORS = 5


# The torch reference: plain functions on tensors, which autograd Functions here and in lora_mlp string together.


def masked(x: Tensor, part: Projection) -> tuple[Tensor, Tensor | None]:
    """(m ∘ x, m); (x, None) without dropout."""
    if part.seed is None:
        return x, None
    mask = dropout_mask(x.shape, part.dropout, x.dtype, torch.Generator(x.device).manual_seed(part.seed))
    return x * mask, mask


def gain(part: Projection) -> float:
    """a_i: the scaling over the fraction that dropout keeps."""
    return part.scaling / kept_fraction(part.dropout)


def columns(S: Tensor | None, parts: list[Projection]) -> list[Tensor | None]:
    """The views of S [T, ΣR] that belong to each projection; None where it has no adapter."""
    views, start = [], 0
    for part in parts:
        width = 0 if part.A is None else part.A.shape[0]
        views.append(S[:, start:start + width] if part.A is not None else None)
        start += width
    return views


def stacked_A(parts: list[Projection], dtype: torch.dtype) -> Tensor:
    """All A_i above one another, [ΣR, K], in the dtype of the products."""
    stack = [part.A.to(dtype) for part in parts if part.A is not None]
    return stack[0] if len(stack) == 1 else torch.cat(stack)


def squeeze(x: Tensor, parts: list[Projection]) -> Tensor | None:
    """S [T, ΣR] of x [T, K]: one product, or one per projection where x is dropped."""
    adapted = [part for part in parts if part.A is not None]
    if not adapted:
        return None
    if all(part.seed is None for part in adapted):
        return x @ stacked_A(adapted, x.dtype).t()
    return torch.cat([masked(x, part)[0] @ part.A.to(x.dtype).t() for part in adapted], 1)


def row_norms(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """n [N] = ‖W + s B A‖ by row, in fp32 (fp64 for fp64), a few rows at a time: the sum never exists whole."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    A, B = A.to(dtype), B.to(dtype)
    rows = max(1, NORM_CHUNK_BYTES // (weight.shape[1] * dtype.itemsize))
    chunks = zip(weight.split(rows), B.split(rows), strict=True)
    return torch.cat([torch.addmm(w.to(dtype), b, A, alpha=scaling).norm(dim=1) for w, b in chunks])


def project(x: Tensor, parts: list[Projection]) -> tuple[Tensor | None, list[Tensor], list[Tensor | None]]:
    """x [T, K] -> S [T, ΣR], V_i [T, N_i] (the bias already in it unless DoRA has still to scale it), n_i [N_i]."""
    S = squeeze(x, parts)
    values, norms = [], []
    for part, s in zip(parts, columns(S, parts), strict=True):
        dora = part.magnitude is not None
        bias = None if part.bias is None or dora else part.bias.to(x.dtype)
        value = F.linear(x, part.weight.to(x.dtype), bias)
        if s is not None:
            value.addmm_(s, part.B.to(x.dtype).t(), alpha=gain(part))
        values.append(value)
        norms.append(row_norms(part.weight, part.A, part.B, part.scaling) if dora else None)
    return S, values, norms


def finish(value: Tensor, norm: Tensor | None, part: Projection) -> Tensor:
    """y of V: V itself, or c ∘ V + b with DoRA."""
    if norm is None:
        return value
    y = (value * (part.magnitude / norm)).to(value.dtype)
    return y if part.bias is None else y.add_(part.bias.to(y.dtype))


def master_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b for a parameter of `dtype`. CUDA delivers the fp32 sums; the CPU's bf16 product rounds them once."""
    if a.is_cuda and dtype == torch.float32 and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def project_backward(
    grads_y: list[Tensor], x: Tensor, S: Tensor | None, values: list[Tensor | None], norms: list[Tensor | None],
    parts: list[Projection], need_x: bool, needs: list[tuple[bool, ...]],
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """∂x and, for every projection, the gradients of its five tensors; `needs` says which of them are wanted."""
    grad_x, grads = None, []
    D = None if S is None else torch.empty_like(S)
    for grad_y, value, norm, part, s, d, need in zip(
        grads_y, values, norms, parts, columns(S, parts), columns(D, parts), needs, strict=True
    ):
        need_weight, need_bias, need_A, need_B, need_magnitude = need
        grad = [None] * N_TENSORS
        grads.append(grad)
        if need_bias:
            grad[1] = grad_y.sum(0, dtype=part.bias.dtype)
        if need_magnitude:
            grad[4] = ((grad_y * value).sum(0, dtype=norm.dtype) / norm).to(part.magnitude.dtype)
        G = grad_y if norm is None else (grad_y * (part.magnitude / norm)).to(x.dtype)
        if need_weight:
            grad[0] = master_product(G.t(), x, part.weight.dtype)
        if need_x:
            weight = part.weight.to(x.dtype)
            grad_x = G @ weight if grad_x is None else grad_x.addmm_(G, weight)
        if need_B:
            # (SᵀG)ᵀ rather than GᵀS: the tall operand on the right is a third faster on the CPU
            grad[3] = master_product(s.t(), G, part.B.dtype).t().mul_(gain(part))
        if d is not None and (need_A or need_x):
            torch.mm(G, part.B.to(x.dtype), out=d).mul_(gain(part))
    if S is not None:
        grad_x = squeeze_backward(D, x, parts, grad_x, [need[2] for need in needs], grads)
    return grad_x, grads


def squeeze_backward(
    D: Tensor, x: Tensor, parts: list[Projection], grad_x: Tensor | None, needs_A: list[bool],
    grads: list[list[Tensor | None]],
) -> Tensor | None:
    """Adds Σ m_i ∘ (D_i A_i) to grad_x (None: not wanted) in place, and puts the ∂A_i into `grads`."""
    if all(part.seed is None for part in parts):
        if grad_x is not None:
            grad_x.addmm_(D, stacked_A(parts, x.dtype))
        if any(needs_A):
            adapted = [i for i, part in enumerate(parts) if part.A is not None]
            stack = master_product(D.t(), x, parts[adapted[0]].A.dtype)
            rows = stack.split([parts[i].A.shape[0] for i in adapted])
            for i, grad_A in zip(adapted, rows, strict=True):
                grads[i][2] = grad_A.to(parts[i].A.dtype) if needs_A[i] else None
        return grad_x
    for part, d, need_A, grad in zip(parts, columns(D, parts), needs_A, grads, strict=True):
        if d is None:
            continue
        dropped, mask = masked(x, part)
        if grad_x is not None:
            grad_dropped = d @ part.A.to(x.dtype)
            grad_x = grad_x.add_(grad_dropped) if mask is None else grad_x.addcmul_(grad_dropped, mask)
        if need_A:
            grad[2] = master_product(d.t(), dropped, part.A.dtype)
    return grad_x


# What both autograd Functions share: flat tensors in, flat gradients out.


def flatten(weights, loras, biases) -> tuple[list[tuple], list[Tensor | None]]:
    """Per projection (scaling, dropout, seed), and all tensors in one flat list."""
    settings, tensors = [], []
    for weight, lora, bias in zip(weights, loras, biases, strict=True):
        settings.append((1.0, 0.0, None) if lora is None else (lora.scaling, lora.dropout, draw_seed(lora.dropout)))
        tensors += [weight, bias, *((None, None, None) if lora is None else (lora.A, lora.B, lora.magnitude))]
    return settings, tensors


def projections(settings, tensors) -> list[Projection]:
    """The inverse of `flatten`."""
    return [Projection(*tensors[N_TENSORS * i:N_TENSORS * (i + 1)], *setting) for i, setting in enumerate(settings)]


def by_projection(flags) -> list[tuple[bool, ...]]:
    return [tuple(flags[i:i + N_TENSORS]) for i in range(0, len(flags), N_TENSORS)]


class _Projections(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, x, settings, *tensors):
        parts = projections(settings, tensors)
        S, values, norms = project(x.reshape(-1, x.shape[-1]), parts)
        outputs = [finish(value, norm, part) for value, norm, part in zip(values, norms, parts, strict=True)]

        needs = by_projection(ctx.needs_input_grad[2:])
        kept = [value if need[4] else None for value, need in zip(values, needs, strict=True)]
        ctx.save_for_backward(x, S, *kept, *norms, *tensors)
        ctx.settings = settings
        return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in outputs)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, *grads_y):
        count = len(ctx.settings)
        x, S, *rest = ctx.saved_tensors
        values, norms, tensors = rest[:count], rest[count:2 * count], rest[2 * count:]
        grad_x, grads = project_backward(
            [grad.reshape(-1, grad.shape[-1]) for grad in grads_y], x.reshape(-1, x.shape[-1]), S, values, norms,
            projections(ctx.settings, tensors), ctx.needs_input_grad[0], by_projection(ctx.needs_input_grad[2:]),
        )
        return None if grad_x is None else grad_x.view(x.shape), None, *(g for grad in grads for g in grad)


def _projections(x, weights, loras, biases) -> tuple[Tensor, ...]:
    if all(lora is None for lora in loras):
        return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    settings, tensors = flatten(weights, loras, biases)
    return _Projections.apply(autocast_input(x), settings, *tensors)


def check_projection(op: str, width: int, weight: Tensor, lora: Lora | None, bias: Tensor | None) -> None:
    """ValueError unless weight [N, width], bias [N], A [R, width], B [N, R], magnitude [N] fit each other."""

    def expect(name: str, tensor: Tensor, *shape: int):
        if tensor.shape != shape:
            raise ValueError(f"{op}: expected {name} of shape {shape}, got {tuple(tensor.shape)}")

    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(f"{op}: expected weight of shape (N, {width}) for x [..., {width}], got {tuple(weight.shape)}")
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

    loras: a `Lora` per weight, or None for no adapter; biases: likewise, or None for none at all. Products run in x's
    dtype (autocast's where it is on); the gradients of A and B come in their own. ValueError where shapes do not fit.
    """
    biases = (None,) * len(weights) if biases is None else biases
    if not len(weights) == len(loras) == len(biases) > 0:
        counts = f"{len(weights)}, {len(loras)} and {len(biases)}"
        raise ValueError(f"lora_qkv: expected as many loras and biases as weights, got {counts}")
    for weight, lora, bias in zip(weights, loras, biases, strict=True):
        check_projection("lora_qkv", x.shape[-1], weight, lora, bias)
    return _projections(x, weights, loras, biases)


def lora_linear(x: Tensor, weight: Tensor, lora: Lora | None, bias: Tensor | None = None) -> Tensor:
    """x [..., K], weight [N, K] -> [..., N]: the base linear and its adapter in one node. Dtypes as in `lora_qkv`."""
    check_projection("lora_linear", x.shape[-1], weight, lora, bias)
    return _projections(x, (weight,), (lora,), (bias,))[0]
