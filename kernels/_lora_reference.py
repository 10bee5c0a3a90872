"""LoRA projections of one x in plain torch, with the symbols of kernels/lora.py.

Serves on a CPU and wherever the Triton passes of kernels/_lora_passes.py do not.

Matmuls for P projections without dropout: forward P base + 1 (all S_i, the A_i stacked) + P (S_i B_iᵀ); backward
P base + P (D_i) + 1 (Σ D_i A_i) + 1 (all ∂A_i) + P (∂B_i). Frozen base weights get no ∂W_i; where x needs no gradient
the backward's P base matmuls and Σ D_i A_i are skipped too. Dropout makes the stacked matmuls one per projection.

The small matmuls accumulate into the base matmul's output; as autograd nodes of their own they would also write and read y, ∂x and
the scaled adapter output several times.
"""

from dataclasses import dataclass
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


TENSORS = Projection._fields[:5]  # the fields of a projection that may need a gradient


class Needs(NamedTuple):
    """Whether each of a projection's TENSORS needs a gradient."""

    weight: bool
    bias: bool
    A: bool
    B: bool
    magnitude: bool


@dataclass
class Gradients:
    """The gradients of a projection's TENSORS; None where one is not needed."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    magnitude: Tensor | None = None


def dense(weight: Tensor | Nf4, dtype: torch.dtype) -> Tensor:
    """Return W in the dtype of the matmuls; an NF4 weight is dequantised anew for each matmul."""
    return dequantize_nf4(weight, dtype) if isinstance(weight, Nf4) else weight.to(dtype)


def apply_dropout(x: Tensor, projection: Projection) -> tuple[Tensor, Tensor | None]:
    """Return m ∘ x and m; x and None without dropout."""
    if projection.seed is None:
        return x, None
    mask = draw_mask(x, projection.seed, projection.stream, projection.dropout)
    return x * mask, mask


def gain(projection: Projection) -> float:
    """Return a_i: the scaling over the fraction that dropout keeps."""
    return projection.scaling / kept_fraction(projection.dropout)


def split_by_projection(S: Tensor | None, projections: list[Projection]) -> list[Tensor | None]:
    """Return each projection's columns of S [T, ΣR] as views; None where it has no adapter."""
    views, start = [], 0
    for projection in projections:
        width = 0 if projection.A is None else projection.A.shape[0]
        views.append(S[:, start:start + width] if projection.A is not None else None)
        start += width
    return views


def stacked_A(projections: list[Projection], dtype: torch.dtype) -> Tensor:
    """Return all A_i on top of one another, [ΣR, K], in the dtype of the matmuls."""
    stack = [projection.A.to(dtype) for projection in projections if projection.A is not None]
    return stack[0] if len(stack) == 1 else torch.cat(stack)


def compute_S(x: Tensor, projections: list[Projection]) -> Tensor | None:
    """Return S [T, ΣR] of x [T, K]; None without any adapter.

    One matmul, or one per projection with dropout.
    """
    adapted = [projection for projection in projections if projection.A is not None]
    if not adapted:
        return None
    if all(projection.seed is None for projection in adapted):
        return x @ stacked_A(adapted, x.dtype).t()
    return torch.cat([apply_dropout(x, projection)[0] @ projection.A.to(x.dtype).t() for projection in adapted], 1)


def dora_norm(projection: Projection, weight: Tensor) -> Tensor | None:
    """Return n_i of a DoRA projection, else None; `weight` is its dense weight."""
    if projection.magnitude is None:
        return None
    dense_weight = weight if isinstance(projection.weight, Nf4) else projection.weight
    return row_norms(dense_weight, projection.A, projection.B, projection.scaling)


def project_reference(x: Tensor, projections: list[Projection]) -> tuple[Tensor | None, list[Tensor], list[Tensor | None]]:
    """Return S [T, ΣR], V_i [T, N_i] and n_i [N_i] of x [T, K].

    V_i includes the bias unless DoRA has yet to scale V_i.
    """
    S = compute_S(x, projections)
    values, norms = [], []
    for projection, s in zip(projections, split_by_projection(S, projections), strict=True):
        weight = dense(projection.weight, x.dtype)
        bias = None if projection.bias is None or projection.magnitude is not None else projection.bias.to(x.dtype)
        value = F.linear(x, weight, bias)
        if s is not None:
            value.addmm_(s, projection.B.to(x.dtype).t(), alpha=gain(projection))
        values.append(value)
        norms.append(dora_norm(projection, weight))
    return S, values, norms


def parameter_matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b as the gradient of a parameter of `dtype`.

    CUDA returns the fp32 sums; the CPU's bf16 matmul rounds them once.
    """
    if a.is_cuda and dtype == torch.float32 and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def project_backward_reference(G: list[Tensor], x: Tensor, S: Tensor | None, projections: list[Projection], need_x: bool,
                               needs: list[Needs], grads: list[Gradients]) -> Tensor | None:
    """Return ∂x, and write the needed gradients of each projection's weight, A and B into `grads`."""
    grad_x, D = None, None if S is None else torch.empty_like(S)
    S_views, D_views = split_by_projection(S, projections), split_by_projection(D, projections)
    for g, projection, s, d, need, grad in zip(G, projections, S_views, D_views, needs, grads, strict=True):
        if need.weight:
            grad.weight = parameter_matmul(g.t(), x, projection.weight.dtype)
        if need_x:
            weight = dense(projection.weight, x.dtype)
            grad_x = g @ weight if grad_x is None else grad_x.addmm_(g, weight)
        if need.B:
            # (SᵀG)ᵀ rather than GᵀS: on a CPU the tall operand is faster on the right
            grad.B = parameter_matmul(s.t(), g, projection.B.dtype).t().mul_(gain(projection))
        if d is not None and (need.A or need_x):
            d.addmm_(g, projection.B.to(x.dtype), beta=0, alpha=gain(projection))
    if S is not None:
        grad_x = adapter_backward(D, x, projections, grad_x, needs, grads)
    return grad_x


def adapter_backward(D: Tensor, x: Tensor, projections: list[Projection], grad_x: Tensor | None, needs: list[Needs],
                     grads: list[Gradients]) -> Tensor | None:
    """Add Σ m_i ∘ (D_i A_i) to grad_x in-place (None: not needed), and write the needed ∂A_i into `grads`."""
    if all(projection.seed is None for projection in projections):
        if grad_x is not None:
            grad_x.addmm_(D, stacked_A(projections, x.dtype))
        if any(need.A for need in needs):
            adapted = [i for i, projection in enumerate(projections) if projection.A is not None]
            stack = parameter_matmul(D.t(), x, projections[adapted[0]].A.dtype)
            rows = stack.split([projections[i].A.shape[0] for i in adapted])
            for i, grad_A in zip(adapted, rows, strict=True):
                grads[i].A = grad_A.to(projections[i].A.dtype) if needs[i].A else None
        return grad_x
    for projection, d, need, grad in zip(projections, split_by_projection(D, projections), needs, grads, strict=True):
        if d is None:
            continue
        dropped, mask = apply_dropout(x, projection)
        if grad_x is not None:
            grad_dropped = d @ projection.A.to(x.dtype)
            grad_x = grad_x.add_(grad_dropped) if mask is None else grad_x.addcmul_(grad_dropped, mask)
        if need.A:
            grad.A = parameter_matmul(d.t(), dropped, projection.A.dtype)
    return grad_x
