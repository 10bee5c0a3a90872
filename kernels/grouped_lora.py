"""Linear layers of experts with adapters: each group of rows has its own weight and adapter.

Rows are sorted by expert. For the rows t of expert e of x [S, K], with W_e [N, K], A_e [R, K], B_e [N, R] and scaling s

    U_t = x_t A_eᵀ                          y_t = x_t W_eᵀ + s·U_t B_eᵀ
    D_t = s·∂y_t B_e                        ∂x_t = ∂y_t W_e + D_t A_e
    ∂A_e = Σ_t D_tᵀ x_t                     ∂B_e = s·Σ_t ∂y_tᵀ U_t                  ∂W_e = Σ_t ∂y_tᵀ x_t (where it is trained)

PEFT adds s·B_e A_e to the weights of all experts before their product: a second copy of them that lives until the backward, and there a
third for the full ∂W_e, with a product as large as the forward's. Here the adapter costs R (K + N) multiplications a row, in each of three
passes, beside K N of the frozen weight in each of two.

Saved: x, U [S, R] and the parameters. A CPU loops over the experts that have rows; a GPU runs torch's grouped product, which does not wait
for the sizes of the groups.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._dispatch import operator
from kernels._lora_reference import parameter_matmul

ALIGNMENT = 16  # bytes; torch's grouped product takes rows of a multiple


def groups(ends: Tensor) -> list[tuple[int, slice]]:
    """Return each expert that has rows, with its rows. Waits for the device."""
    bounds = [0, *ends.tolist()]
    return [(e, slice(start, end)) for e, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)) if end > start]


@operator(lambda x, weight, A, B, scaling, ends: (x.new_empty(x.shape[0], weight.shape[1]), x.new_empty(x.shape[0], A.shape[1])))
def grouped_lora_forward(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Return y [S, N] and U [S, R] of x [S, K]."""
    y, U = x.new_empty(x.shape[0], weight.shape[1]), x.new_empty(x.shape[0], A.shape[1])
    A, B = A.to(x.dtype), B.to(x.dtype)
    for e, rows in groups(ends):
        torch.mm(x[rows], A[e].t(), out=U[rows])
        torch.mm(x[rows], weight[e].t(), out=y[rows])
        y[rows].addmm_(U[rows], B[e].t(), alpha=scaling)
    return y, U


def _fake_backward(dy, x, weight, A, B, U, scaling, ends, need_x, need_weight, need_A, need_B):
    wanted = (x, need_x), (weight, need_weight), (A, need_A), (B, need_B)
    return tuple(t.new_empty(t.shape if need else 0) for t, need in wanted)


@operator(_fake_backward)
def grouped_lora_backward(dy: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, U: Tensor, scaling: float, ends: Tensor,
                          need_x: bool, need_weight: bool, need_A: bool, need_B: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, A and B; one that is not needed is empty."""
    dx = x.new_empty(x.shape if need_x else 0)
    dweight, dA, dB = (t.new_zeros(t.shape if need else 0) for t, need in ((weight, need_weight), (A, need_A), (B, need_B)))
    A_dtype, B_dtype, A, B = A.dtype, B.dtype, A.to(x.dtype), B.to(x.dtype)
    for e, rows in groups(ends):
        D = (dy[rows] @ B[e]).mul_(scaling) if need_x or need_A else None
        if need_x:
            torch.mm(dy[rows], weight[e], out=dx[rows])
            dx[rows].addmm_(D, A[e])
        if need_weight:
            dweight[e] = parameter_matmul(dy[rows].t(), x[rows], weight.dtype)
        if need_A:
            dA[e] = parameter_matmul(D.t(), x[rows], A_dtype)
        if need_B:
            dB[e] = parameter_matmul(U[rows].t(), dy[rows], B_dtype).t().mul_(scaling)
    return dx, dweight, dA, dB


class _GroupedLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, A, B, scaling, ends):
        y, U = grouped_lora_forward(x, weight, A, B, scaling, ends)
        ctx.save_for_backward(x, weight, A, B, U, ends)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, A, B, U, ends = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        grads = grouped_lora_backward(dy.contiguous(), x, weight, A, B, U, ctx.scaling, ends, *needs)
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None


def grouped_lora_by_torch(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, ends: Tensor) -> Tensor:
    """Compute it with torch's grouped product and its gradients; ranks are padded to its alignment."""
    missing = -A.shape[1] % (ALIGNMENT // x.element_size())
    A, B = F.pad(A.to(x.dtype), (0, 0, 0, missing)), F.pad(B.to(x.dtype), (0, missing))
    U = F.grouped_mm(x, A.transpose(1, 2), offs=ends)
    return torch.add(F.grouped_mm(x, weight.transpose(1, 2), offs=ends), F.grouped_mm(U, B.transpose(1, 2), offs=ends), alpha=scaling)


def grouped_lora_linear(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, ends: Tensor) -> Tensor:
    """Return [S, N] of x [S, K], whose rows are sorted by expert.

    weight is [E, N, K], A [E, R, K] and B [E, N, R]. `ends` int32[E] is the row after each expert's last, so its last entry is S. Products
    run in x's dtype, which is weight's; the gradients of A and B come in their own. Raises ValueError where shapes do not fit.
    """
    (E, N, K), R = weight.shape, A.shape[1]
    found = x.shape[1:], A.shape, B.shape, ends.shape
    if found != ((K,), (E, R, K), (E, N, R), (E,)) or x.dtype != weight.dtype:
        raise ValueError(f"grouped_lora_linear: expected x [S, {K}] of {weight.dtype}, A [{E}, R, {K}], B [{E}, {N}, R] and ends [{E}], "
                         f"got {x.dtype} {tuple(x.shape)}, {', '.join(str(tuple(t.shape)) for t in (A, B, ends))}")
    compute = _GroupedLora.apply if x.device.type == "cpu" else grouped_lora_by_torch
    return compute(x, weight, A.contiguous(), B.contiguous(), scaling, ends)
