"""LoRA projections of one x in plain torch, with the letters of kernels/lora.py: what runs on a CPU, and wherever the passes of
kernels/_lora_passes.py do not serve.

Products for P projections without dropout: forward P base + 1 (all S_i, the A_i stacked) + P (S_i B_iᵀ); backward
P base + P (D_i) + 1 (Σ D_i A_i) + 1 (all ∂A_i) + P (∂B_i). Frozen base weights get no ∂W_i; where x needs no gradient
the backward's P base products and Σ D_i A_i fall away too. Dropout makes the stacked products one per projection.

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

from kernels._dora import row_norms
from kernels._dropout import draw_mask, kept_fraction
from kernels.nf4 import Nf4, dequantize_nf4


class Projection(NamedTuple):
    """One projection as forward and backward need it. A, B None: no adapter; seed None: no dropout."""

    weight: Tensor | Nf4
    bias: Tensor | None
    A: Tensor | None
    B: Tensor | None
    magnitude: Tensor | None
    scaling: float
    dropout: float
    seed: Tensor | None
    stream: int  # the number of its mask among those of the seed


def dense(weight: Tensor | Nf4, dtype: torch.dtype) -> Tensor:
    """W in the dtype of the products; an NF4 weight is made dense for the product at hand and not kept."""
    return dequantize_nf4(weight, dtype) if isinstance(weight, Nf4) else weight.to(dtype)


def masked(x: Tensor, part: Projection) -> tuple[Tensor, Tensor | None]:
    """(m ∘ x, m); (x, None) without dropout."""
    if part.seed is None:
        return x, None
    mask = draw_mask(x, part.seed, part.stream, part.dropout)
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


def norms_of(part: Projection, weight: Tensor) -> Tensor | None:
    """n_i of a DoRA projection, whose dense weight is at hand."""
    if part.magnitude is None:
        return None
    return row_norms(weight if isinstance(part.weight, Nf4) else part.weight, part.A, part.B, part.scaling)


def project_reference(x: Tensor, parts: list[Projection]) -> tuple[Tensor | None, list[Tensor], list[Tensor | None]]:
    """x [T, K] -> S [T, ΣR], V_i [T, N_i] (the bias already in it unless DoRA has still to scale it), n_i [N_i]."""
    S = squeeze(x, parts)
    values, norms = [], []
    for part, s in zip(parts, columns(S, parts), strict=True):
        weight = dense(part.weight, x.dtype)
        bias = None if part.bias is None or part.magnitude is not None else part.bias.to(x.dtype)
        value = F.linear(x, weight, bias)
        if s is not None:
            value.addmm_(s, part.B.to(x.dtype).t(), alpha=gain(part))
        values.append(value)
        norms.append(norms_of(part, weight))
    return S, values, norms


def master_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b for a parameter of `dtype`. CUDA delivers the fp32 sums; the CPU's bf16 product rounds them once."""
    if a.is_cuda and dtype == torch.float32 and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def project_backward_reference(
    G: list[Tensor], x: Tensor, S: Tensor | None, parts: list[Projection], need_x: bool, needs: list[tuple[bool, ...]],
    grads: list[list[Tensor | None]],
) -> Tensor | None:
    """∂x, and into `grads` the gradients of each projection's weight, A and B where `needs` wants them."""
    grad_x, D = None, None if S is None else torch.empty_like(S)
    for g, part, s, d, need, grad in zip(G, parts, columns(S, parts), columns(D, parts), needs, grads, strict=True):
        need_weight, _, need_A, need_B, _ = need
        if need_weight:
            grad[0] = master_product(g.t(), x, part.weight.dtype)
        if need_x:
            weight = dense(part.weight, x.dtype)
            grad_x = g @ weight if grad_x is None else grad_x.addmm_(g, weight)
        if need_B:
            # (SᵀG)ᵀ rather than GᵀS: the tall operand on the right is a third faster on the CPU
            grad[3] = master_product(s.t(), g, part.B.dtype).t().mul_(gain(part))
        if d is not None and (need_A or need_x):
            d.addmm_(g, part.B.to(x.dtype), beta=0, alpha=gain(part))
    if S is not None:
        grad_x = squeeze_backward(D, x, parts, grad_x, [need[2] for need in needs], grads)
    return grad_x


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
