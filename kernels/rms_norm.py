"""RMS norm over the last dimension, optionally of a residual sum.

Saves its input and one number per row.

    r = (mean_j x_j² + ε)^(-1/2)          y = w' ⊙ (r·x)                       w' = w + offset
    ∂x = r·(w' ⊙ ∂y) − x·r³·c/D           c = Σ_j w'_j·∂y_j·x_j                ∂w = Σ_rows r·(∂y ⊙ x)
    add_rms_norm:  h = x + z, y = norm(h)     ∂x = ∂z = ∂h + norm's gradient at h

Two roundings are in use. offset 0 is Llama's: r·x is cast to x's dtype, then multiplied by w. A nonzero offset
(Gemma's 1) multiplies by w + offset in fp32 and casts last. Statistics and the whole backward are fp32 (fp64 for fp64).

On a GPU each direction is one kernel. For a trained w the backward also writes fp32 partial sums [256 programs, D], which a second pass
adds up (no atomics).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._dispatch import operator, triton_serves
from kernels._launch import ANY, Launch, cdiv, constexpr, jit, launch, next_power_of_2, pick, tl

WIDEST = 16384  # the kernels hold a row in registers; wider ones get the reference
WIDEST_TRAINED = 8192  # beside ∂w's sums of this width; of wider ones torch makes ∂w
PROGRAMS = 256  # that share a trained weight's gradient: as many on every GPU, so that its sums are bit-identical


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """Return y in the shape of x [..., D], and r [..., 1] in the statistics dtype."""
    exact = torch.promote_types(x.dtype, torch.float32)
    x_exact = x.to(exact)
    # vector_norm reads x once and writes no [..., D] tensor, unlike x.pow(2).mean(-1)
    rstd = torch.linalg.vector_norm(x_exact, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y = x_exact * rstd
    if offset:
        return y.mul_(weight.to(exact) + offset).to(x.dtype), rstd
    y = y.to(x.dtype)
    return (y.mul_(weight) if weight.dtype == y.dtype else y * weight), rstd


def rms_norm_backward_reference(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, want_weight: bool,
                                dh: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return ∂x in x's dtype, plus dh where given, and ∂w in weight's if wanted.

    One buffer of x's size serves every pass.
    """
    exact, width = rstd.dtype, x.shape[-1]
    dy, x_exact, scale = dy.to(exact), x.to(exact), weight.to(exact) + offset
    buffer = dy * x_exact
    dweight = None
    if want_weight:
        dweight = _weight_gradient(buffer, weight, rstd)
    slope = (buffer @ scale).unsqueeze(-1).mul_(rstd.pow(3)).div_(-width)
    dx = torch.mul(dy, rstd, out=buffer).mul_(scale).addcmul_(x_exact, slope).to(x.dtype)
    if dh is not None:
        dx.add_(dh)  # rounded before, as autograd would: in bf16 on a CPU adding to fp32 is slower
    return dx, dweight


def _weight_gradient(dy_x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    return torch.mv(dy_x.reshape(-1, dy_x.shape[-1]).t(), rstd.reshape(-1)).to(weight.dtype)


# ---------------------------------------------------------------- Triton


@jit
def _rms_norm_kernel(x, z, weight, y, h, rstd, x_n, x_m, z_n, z_m, rows, M, eps, offset, D: constexpr, ROUND_FIRST: constexpr,
                     ROWS: constexpr, BLOCK: constexpr):
    """Write y and r of ROWS rows of x [N, M, D], or h = x + z and those of h.

    Row n·M + m of x begins at n·x_n + m·x_m.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n, m = (row // M).to(tl.int64)[:, None], (row % M).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (column < D)  # (ROWS, BLOCK)
    dense = row.to(tl.int64)[:, None] * D + column

    v = tl.load(x + n * x_n + m * x_m + column, mask=inside, other=0.0).to(tl.float32)
    if z is not None:
        v += tl.load(z + n * z_n + m * z_m + column, mask=inside, other=0.0).to(tl.float32)
        v = v.to(h.dtype.element_ty).to(tl.float32)
        tl.store(h + dense, v, mask=inside)

    r = tl.rsqrt(tl.sum(v * v, 1) / D + eps)  # (ROWS,)
    tl.store(rstd + row, r, mask=row < rows)
    v *= r[:, None]
    if ROUND_FIRST:
        v = v.to(x.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32) + offset
    tl.store(y + dense, v * w, mask=inside)


@jit
def _rms_norm_backward_kernel(dy, dh, x, weight, rstd, dx, partial, dy_n, dy_m, dh_n, dh_m, x_n, x_m, rows, M, span, offset,
                              D: constexpr, STAGES: constexpr, ROWS: constexpr, BLOCK: constexpr):
    """Write ∂x of `span` blocks of ROWS rows, plus ∂h where there is one.

    Their partial sum of ∂w goes into `partial` [programs, D] where there is one.
    """
    first = tl.program_id(0) * span
    column = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32) + offset
    if partial is not None:
        dw = tl.zeros((ROWS, BLOCK), tl.float32)

    for block in tl.range(first, first + span, num_stages=STAGES):
        row = block * ROWS + tl.arange(0, ROWS)
        n, m = (row // M).to(tl.int64)[:, None], (row % M).to(tl.int64)[:, None]
        inside = (row < rows)[:, None] & (column < D)

        d = tl.load(dy + n * dy_n + m * dy_m + column, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(x + n * x_n + m * x_m + column, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]  # (ROWS, 1)

        v *= r
        if partial is not None:
            dw += d * v
        d *= w
        d = r * (d - v * (tl.sum(d * v, 1)[:, None] / D))
        if dh is not None:
            d += tl.load(dh + n * dh_n + m * dh_m + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + row.to(tl.int64)[:, None] * D + column, d, mask=inside)

    if partial is not None:
        tl.store(partial + tl.program_id(0).to(tl.int64) * D + tl.arange(0, BLOCK), tl.sum(dw, 0), mask=tl.arange(0, BLOCK) < D)


LAUNCH = {
    (ANY, 128): Launch({"ROWS": 16}), (ANY, 256): Launch({"ROWS": 8}), (ANY, 1024): Launch({"ROWS": 2}),
    (ANY, 4096): Launch({"ROWS": 1}, 8), (ANY, None): Launch({"ROWS": 1}, 16),
}


def heads_of(x: Tensor) -> Tensor:
    """Return x [..., M, D] as [N, M, D] with a dense last dimension; a view wherever possible."""
    x = x[(None,) * (3 - x.dim())] if x.dim() < 3 else x.flatten(0, -3)
    return x if x.stride(2) == 1 else x.contiguous()


def strides(x: Tensor | None) -> tuple[int, int]:
    """Return the first two strides of x; zeros without an x."""
    return (0, 0) if x is None else x.stride()[:2]


def _kernels_serve(x: Tensor, weight: Tensor) -> bool:
    return triton_serves(x) and triton_serves(weight) and x.shape[-1] <= WIDEST


def result_dtype(x: Tensor, weight: Tensor, offset: float) -> torch.dtype:
    """Return the dtype of y."""
    return x.dtype if offset else torch.promote_types(x.dtype, weight.dtype)


def _fake_forward(x, z, weight, eps, offset):
    statistics = torch.promote_types(x.dtype, torch.float32)
    return (x.new_empty(x.shape, dtype=result_dtype(x, weight, offset)), x.new_empty(0 if z is None else x.shape),
            x.new_empty((*x.shape[:-1], 1), dtype=statistics))


@operator(_fake_forward)
def rms_norm_forward(x: Tensor, z: Tensor | None, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, h = x + z (empty without a z) and r, dense, from the backend that serves x."""
    if not _kernels_serve(x, weight):
        h = x.new_empty(0) if z is None else (x + z).contiguous()
        y, rstd = rms_norm_reference(x if z is None else h, weight, eps, offset)
        return y.contiguous(), h, rstd.contiguous()
    y = torch.empty(x.shape, dtype=result_dtype(x, weight, offset), device=x.device)
    h = torch.empty(0 if z is None else x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    x, z = heads_of(x), None if z is None else heads_of(z)
    (N, M, D), settings = x.shape, pick(LAUNCH, x.shape[2], x.device)
    launch(_rms_norm_kernel, (cdiv(N * M, settings.blocks["ROWS"]),), settings, x, z, weight, y, h, rstd, *strides(x), *strides(z), N * M,
           M, eps, offset, D=D, ROUND_FIRST=not offset, BLOCK=next_power_of_2(D))
    return y, h, rstd


def _fake_backward(dy, dh, x, weight, rstd, offset, want_weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape if want_weight else 0)


@operator(_fake_backward)
def rms_norm_backward(dy: Tensor, dh: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, want_weight: bool
                      ) -> tuple[Tensor, Tensor]:
    """Return ∂x plus dh where given, and ∂w (empty unless wanted), from the backend that serves x."""
    if not _kernels_serve(x, weight):
        dx, dweight = rms_norm_backward_reference(dy, x, weight, rstd, offset, want_weight, dh)
        return dx.contiguous(), weight.new_empty(0) if dweight is None else dweight
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dy, dh, x = heads_of(dy), None if dh is None else heads_of(dh), heads_of(x)
    (N, M, D), settings = x.shape, pick(LAUNCH, x.shape[2], x.device)
    blocks = cdiv(N * M, settings.blocks["ROWS"])
    kernel_sums_weight = want_weight and D <= WIDEST_TRAINED
    span = max(1, cdiv(blocks, PROGRAMS)) if kernel_sums_weight else 1
    programs = cdiv(blocks, span)
    partial = torch.empty(programs, D, dtype=torch.float32, device=x.device) if kernel_sums_weight else None
    prefetches = span > 1 and D * dy.element_size() <= 16384  # the next rows, into shared memory: three rows are at most 48 KB
    launch(_rms_norm_backward_kernel, (programs,), settings, dy, dh, x, weight, rstd, dx, partial, *strides(dy), *strides(dh), *strides(x),
           N * M, M, span, offset, D=D, STAGES=1 + prefetches, BLOCK=next_power_of_2(D))
    if kernel_sums_weight:
        return dx, partial.sum(0).to(weight.dtype)
    return dx, _weight_gradient(dy.float() * x, weight, rstd) if want_weight else weight.new_empty(0)


# ---------------------------------------------------------------- autograd


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset):
        y, _, rstd = rms_norm_forward(x, None, weight, eps, offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        want_weight = ctx.needs_input_grad[1]
        dx, dweight = rms_norm_backward(dy, None, *ctx.saved_tensors, ctx.offset, want_weight)
        return dx, dweight if want_weight else None, None, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z, weight, eps, offset):
        y, h, rstd = rms_norm_forward(x, z, weight, eps, offset)
        ctx.save_for_backward(h, weight, rstd)
        ctx.offset = offset
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh):
        want_weight = ctx.needs_input_grad[2]
        dx, dweight = rms_norm_backward(dy, dh, *ctx.saved_tensors, ctx.offset, want_weight)
        return dx, dx, dweight if want_weight else None, None, None


def _check(op: str, x: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless weight fits x."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"{op}: expected weight of shape {tuple(x.shape[-1:])} to match x's last dim, got {tuple(weight.shape)}")
    if x.device != weight.device or not x.is_floating_point() or not weight.is_floating_point():
        raise ValueError(f"{op}: expected floating x and weight on one device, got {x.dtype} on {x.device} and {weight.dtype} on "
                         f"{weight.device}")


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """Return x [..., D] over its root mean square, times weight [D] + offset.

    A nonzero offset also changes the rounding, see the top of this file. Raises ValueError where weight does not fit x.
    """
    _check("rms_norm", x, weight)
    return _RmsNorm.apply(x, weight, eps, float(offset))


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return rms_norm(h) and h = x + residual, rounded to their dtype, for x and residual [..., D].

    Raises ValueError where the tensors do not fit each other.
    """
    _check("add_rms_norm", x, weight)
    if x.shape != residual.shape or x.device != residual.device:
        raise ValueError(f"add_rms_norm: expected x and residual of one shape and device, got {tuple(x.shape)} on {x.device} and "
                         f"{tuple(residual.shape)} on {residual.device}")
    if x.dtype != residual.dtype:  # possible under autocast; the sum has the wider dtype
        h = x + residual
        return rms_norm(h, weight, eps, offset=offset), h
    return _AddRmsNorm.apply(x, residual, weight, eps, float(offset))


def _aot(width: int, residual: bool, trained: bool):
    x, z, dy = (torch.empty(8192, width, dtype=torch.bfloat16, device="meta") for _ in range(3))
    weight = torch.empty(width, dtype=torch.bfloat16, device="meta")
    _, _, rstd = rms_norm_forward(x, z if residual else None, weight, 1e-5, 0.0)
    rms_norm_backward(dy, z if residual else None, x, weight, rstd, 0.0, trained)


AOT = {
    "rms_norm": lambda: _aot(4096, False, True),
    "rms_norm 8192": lambda: _aot(8192, True, True),
    "rms_norm 128": lambda: _aot(128, False, False),
    "add_rms_norm": lambda: _aot(4096, True, False),
    "add_rms_norm 16384": lambda: _aot(16384, True, False),
}
