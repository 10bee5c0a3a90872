"""RMS norm of each head of q and k, then rotary embedding, in one operation (Qwen3, Gemma 3).

    n = norm(x)     y = R(θ)·n          per head x [Dh] of q and of k, with the roundings of rms_norm: n is cast before it turns
    ∂n = R(−θ)·∂y   ∂x = r·(w' ⊙ ∂n) − x·r³·c/Dh    c = Σ_j w'_j·∂n_j·x_j    ∂w = Σ_(tokens, heads) r·(∂n ⊙ x)     w' = w + offset

Notation as in `rms_norm` and `rope`. Saved for the backward: q and k from before the norm, and r. The norm covers whole heads even where
only the first Dr of Dh channels rotate. On a GPU each direction is one kernel; for trained weights the backward also writes partial sums
[512 programs, Dh], which a second pass adds up (no atomics).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._dispatch import operator, triton_serves
from kernels._launch import ANY, Launch, cdiv, constexpr, jit, launch, pick, tl
from kernels.rms_norm import heads_of, result_dtype, rms_norm_backward_reference, rms_norm_reference, strides
from kernels.rope import angle_rows, channels, check_heads, load_angles, rope_reference

PROGRAMS = 512  # that share the gradients of trained weights


def qk_norm_rope_reference(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """Return y [..., T, H, Dh] for q or k, and r [..., T, H, 1]."""
    normed, rstd = rms_norm_reference(x, weight, eps, offset)
    return rope_reference(normed, cos, sin), rstd


def qk_norm_rope_backward_reference(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, cos: Tensor, sin: Tensor, offset: float,
                                    want_weight: bool) -> tuple[Tensor, Tensor | None]:
    """Return ∂x, and ∂w if wanted, for q or k."""
    return rms_norm_backward_reference(rope_reference(dy, cos, -sin), x, weight, rstd, offset, want_weight)


# ---------------------------------------------------------------- Triton


@jit
def _normed(x, r, w, to, ROUND_FIRST: constexpr, DTYPE: constexpr):
    """Return w ⊙ (r·x), rounded to the dtype of `to`, the norm's result."""
    x *= r
    if ROUND_FIRST:
        x = x.to(DTYPE).to(tl.float32)
    return (x * w).to(to.dtype.element_ty).to(tl.float32)


@jit
def _load(pointer, mask, offset):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32) + offset


@jit
def _forward(x, weight, y, rstd, x_n, x_h, cos, sin, block, tokens, eps, offset, HEADS: constexpr, DIM: constexpr,
             ROTARY: constexpr, ROUND_FIRST: constexpr, ROWS: constexpr, HALF: constexpr, REST: constexpr):
    """Write the dense y and r of ROWS heads of x [tokens, HEADS, DIM].

    a and b are the halves that rotate, p the channels that pass through.
    """
    half: constexpr = ROTARY // 2
    row = block * ROWS + tl.arange(0, ROWS)
    token, head = row // HEADS, row % HEADS
    present = row < tokens * HEADS
    source = x + (token.to(tl.int64) * x_n + head.to(tl.int64) * x_h)[:, None]
    target = y + (row.to(tl.int64) * DIM)[:, None]
    j, k = tl.arange(0, HALF)[None, :], ROTARY + tl.arange(0, REST)[None, :]
    inside, beyond = present[:, None] & (j < half), present[:, None] & (k < DIM)

    a, b = _load(source + j, inside, 0.0), _load(source + half + j, inside, 0.0)  # (ROWS, HALF)
    square = tl.sum(a * a + b * b, 1)
    if ROTARY < DIM:
        p = _load(source + k, beyond, 0.0)  # (ROWS, REST)
        square += tl.sum(p * p, 1)
    r = tl.rsqrt(square / DIM + eps)
    tl.store(rstd + row, r, mask=present)

    dtype: constexpr = x.dtype.element_ty
    a = _normed(a, r[:, None], _load(weight + j, j < half, offset), y, ROUND_FIRST, dtype)
    b = _normed(b, r[:, None], _load(weight + half + j, j < half, offset), y, ROUND_FIRST, dtype)
    c, s = load_angles(cos, sin, token, present, False, ROTARY, HALF)
    tl.store(target + j, a * c - b * s, mask=inside)
    tl.store(target + half + j, b * c + a * s, mask=inside)
    if ROTARY < DIM:
        tl.store(target + k, _normed(p, r[:, None], _load(weight + k, k < DIM, offset), y, ROUND_FIRST, dtype), mask=beyond)


@jit
def _qk_norm_rope_kernel(q, k, q_weight, k_weight, q_out, k_out, q_rstd, k_rstd, q_n, q_h, k_n, k_h, cos, sin, q_blocks,
                         tokens, eps, offset, Q_HEADS: constexpr, K_HEADS: constexpr, DIM: constexpr, ROTARY: constexpr,
                         ROUND_FIRST: constexpr, ROWS: constexpr, HALF: constexpr, REST: constexpr):
    """Process ROWS heads of q in each of the first q_blocks programs, of k in the others."""
    block = tl.program_id(0)
    if block < q_blocks:
        _forward(q, q_weight, q_out, q_rstd, q_n, q_h, cos, sin, block, tokens, eps, offset, Q_HEADS, DIM, ROTARY,
                 ROUND_FIRST, ROWS, HALF, REST)
    else:
        _forward(k, k_weight, k_out, k_rstd, k_n, k_h, cos, sin, block - q_blocks, tokens, eps, offset, K_HEADS, DIM, ROTARY,
                 ROUND_FIRST, ROWS, HALF, REST)


@jit
def _backward(dy, x, weight, rstd, dx, partial, dy_n, dy_h, x_n, x_h, cos, sin, first, span, tokens, offset,
              HEADS: constexpr, DIM: constexpr, ROTARY: constexpr, ROWS: constexpr, HALF: constexpr, REST: constexpr):
    """Write ∂x of `span` blocks of ROWS heads, and their sum of ∂w into the row `partial` if any.

    v is r·x; d is ∂n, then w'·∂n.
    """
    half: constexpr = ROTARY // 2
    j, k = tl.arange(0, HALF)[None, :], ROTARY + tl.arange(0, REST)[None, :]
    wa, wb, wp = _load(weight + j, j < half, offset), _load(weight + half + j, j < half, offset), _load(weight + k, k < DIM, offset)
    if partial is not None:
        dwa, dwb, dwp = tl.zeros((ROWS, HALF), tl.float32), tl.zeros((ROWS, HALF), tl.float32), tl.zeros((ROWS, REST), tl.float32)

    for block in range(first, first + span):
        row = block * ROWS + tl.arange(0, ROWS)
        token, head = (row // HEADS).to(tl.int64), (row % HEADS).to(tl.int64)
        present = row < tokens * HEADS
        upstream, source = dy + (token * dy_n + head * dy_h)[:, None], x + (token * x_n + head * x_h)[:, None]
        target = dx + (row.to(tl.int64) * DIM)[:, None]
        inside, beyond = present[:, None] & (j < half), present[:, None] & (k < DIM)

        c, s = load_angles(cos, sin, token, present, True, ROTARY, HALF)
        c, s = tl.where(inside, c, 0.0), tl.where(inside, s, 0.0)
        da, db = _load(upstream + j, inside, 0.0), _load(upstream + half + j, inside, 0.0)
        da, db = da * c - db * s, db * c + da * s
        r = tl.load(rstd + row, mask=present, other=0.0)[:, None]
        va, vb = _load(source + j, inside, 0.0) * r, _load(source + half + j, inside, 0.0) * r
        if partial is not None:
            dwa += da * va
            dwb += db * vb
        da, db = da * wa, db * wb
        slope = tl.sum(da * va + db * vb, 1)
        if ROTARY < DIM:
            dp, vp = _load(upstream + k, beyond, 0.0), _load(source + k, beyond, 0.0) * r
            if partial is not None:
                dwp += dp * vp
            dp = dp * wp
            slope += tl.sum(dp * vp, 1)
        slope = slope[:, None] / DIM
        tl.store(target + j, r * (da - va * slope), mask=inside)
        tl.store(target + half + j, r * (db - vb * slope), mask=inside)
        if ROTARY < DIM:
            tl.store(target + k, r * (dp - vp * slope), mask=beyond)

    if partial is not None:
        j, k = tl.arange(0, HALF), ROTARY + tl.arange(0, REST)
        tl.store(partial + j, tl.sum(dwa, 0), mask=j < half)
        tl.store(partial + half + j, tl.sum(dwb, 0), mask=j < half)
        if ROTARY < DIM:
            tl.store(partial + k, tl.sum(dwp, 0), mask=k < DIM)


@jit
def _qk_norm_rope_backward_kernel(dq, dk, q, k, q_weight, k_weight, q_rstd, k_rstd, q_grad, k_grad, partial, dq_n, dq_h, dk_n, dk_h, q_n,
                                  q_h, k_n, k_h, cos, sin, q_programs, span, tokens, offset, Q_HEADS: constexpr,
                                  K_HEADS: constexpr, DIM: constexpr, ROTARY: constexpr, ROWS: constexpr, HALF: constexpr, REST: constexpr):
    """Process span·ROWS heads of q in each of the first q_programs programs, of k in the others.

    `partial` is [programs, DIM] or None.
    """
    program = tl.program_id(0)
    if partial is not None:
        partial += program.to(tl.int64) * DIM
    if program < q_programs:
        _backward(dq, q, q_weight, q_rstd, q_grad, partial, dq_n, dq_h, q_n, q_h, cos, sin, program * span, span, tokens,
                  offset, Q_HEADS, DIM, ROTARY, ROWS, HALF, REST)
    else:
        _backward(dk, k, k_weight, k_rstd, k_grad, partial, dk_n, dk_h, k_n, k_h, cos, sin, (program - q_programs) * span,
                  span, tokens, offset, K_HEADS, DIM, ROTARY, ROWS, HALF, REST)


LAUNCH = {
    (ANY, 64): Launch({"ROWS": 32}), (ANY, 128): Launch({"ROWS": 16}), (ANY, 256): Launch({"ROWS": 8}), (ANY, None): Launch({"ROWS": 2}),
}


def _kernels_serve(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> bool:
    return all(map(triton_serves, (q, k, q_weight, k_weight)))


def _fake_forward(q, k, q_weight, k_weight, cos, sin, eps, offset):
    results = [x.new_empty(x.shape, dtype=result_dtype(x, w, offset)) for x, w in ((q, q_weight), (k, k_weight))]
    return *results, *(x.new_empty((*x.shape[:-1], 1), dtype=torch.promote_types(x.dtype, torch.float32)) for x in (q, k))


@operator(_fake_forward)
def qk_norm_rope_forward(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, offset: float
                         ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q and k, normalised and rotated, and their r, dense, from the backend that serves them."""
    if not _kernels_serve(q, k, q_weight, k_weight):
        (q_out, q_rstd), (k_out, k_rstd) = (qk_norm_rope_reference(x, w, cos, sin, eps, offset) for x, w in ((q, q_weight), (k, k_weight)))
        return q_out.contiguous(), k_out.contiguous(), q_rstd.contiguous(), k_rstd.contiguous()
    q_out, k_out = (torch.empty(x.shape, dtype=result_dtype(x, w, offset), device=x.device) for x, w in ((q, q_weight), (k, k_weight)))
    q_rstd, k_rstd = (torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device) for x in (q, k))
    lead, q, k = q.shape[:-2], heads_of(q), heads_of(k)
    (tokens, q_heads, dim), k_heads = q.shape, k.shape[1]
    cos, sin = (angle_rows(x, tokens, lead) for x in (cos, sin))
    settings = pick(LAUNCH, dim, q.device)
    q_blocks, k_blocks = (cdiv(tokens * heads, settings.blocks["ROWS"]) for heads in (q_heads, k_heads))
    launch(_qk_norm_rope_kernel, (q_blocks + k_blocks,), settings, q, k, q_weight, k_weight, q_out, k_out, q_rstd, k_rstd, *strides(q),
           *strides(k), cos, sin, q_blocks, tokens, eps, offset, Q_HEADS=q_heads, K_HEADS=k_heads, ROUND_FIRST=not offset,
           **channels(dim, cos.shape[-1]))
    return q_out, k_out, q_rstd, k_rstd


def _fake_backward(dq, dk, q, k, q_weight, k_weight, q_rstd, k_rstd, cos, sin, offset, want_weights):
    return q.new_empty(q.shape), k.new_empty(k.shape), *(w.new_empty(w.shape if want_weights else 0) for w in (q_weight, k_weight))


@operator(_fake_backward)
def qk_norm_rope_backward(dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, q_rstd: Tensor, k_rstd: Tensor,
                          cos: Tensor, sin: Tensor, offset: float, want_weights: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ∂q, ∂k, and the two ∂w (empty unless wanted), from the backend that serves q and k."""
    if not _kernels_serve(q, k, q_weight, k_weight):
        sides = ((dq, q, q_weight, q_rstd), (dk, k, k_weight, k_rstd))
        (dq, dqw), (dk, dkw) = (qk_norm_rope_backward_reference(*side, cos, sin, offset, want_weights) for side in sides)
        return dq.contiguous(), dk.contiguous(), *((dqw, dkw) if want_weights else (q_weight.new_empty(0), k_weight.new_empty(0)))
    q_grad, k_grad = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    lead = q.shape[:-2]
    dq, dk, q, k = map(heads_of, (dq, dk, q, k))
    (tokens, q_heads, dim), k_heads = q.shape, k.shape[1]
    cos, sin = (angle_rows(x, tokens, lead) for x in (cos, sin))
    settings = pick(LAUNCH, dim, q.device)
    q_blocks, k_blocks = (cdiv(tokens * heads, settings.blocks["ROWS"]) for heads in (q_heads, k_heads))
    span = max(1, cdiv(q_blocks + k_blocks, PROGRAMS)) if want_weights else 1
    q_programs, k_programs = cdiv(q_blocks, span), cdiv(k_blocks, span)
    partial = torch.empty(q_programs + k_programs, dim, dtype=torch.float32, device=q.device) if want_weights else None
    launch(_qk_norm_rope_backward_kernel, (q_programs + k_programs,), settings, dq, dk, q, k, q_weight, k_weight, q_rstd, k_rstd,
           q_grad, k_grad, partial, *strides(dq), *strides(dk), *strides(q), *strides(k), cos, sin, q_programs, span, tokens, offset,
           Q_HEADS=q_heads, K_HEADS=k_heads, **channels(dim, cos.shape[-1]))
    if not want_weights:
        return q_grad, k_grad, q_weight.new_empty(0), k_weight.new_empty(0)
    return q_grad, k_grad, partial[:q_programs].sum(0).to(q_weight.dtype), partial[q_programs:].sum(0).to(k_weight.dtype)


# ---------------------------------------------------------------- autograd


class _QkNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, cos, sin, eps, offset):
        q_out, k_out, q_rstd, k_rstd = qk_norm_rope_forward(q, k, q_weight, k_weight, cos, sin, eps, offset)
        ctx.save_for_backward(q, k, q_weight, k_weight, q_rstd, k_rstd, cos, sin)
        ctx.offset = offset
        return q_out, k_out

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        _, _, want_q, want_k, *_ = ctx.needs_input_grad
        dq, dk, dqw, dkw = qk_norm_rope_backward(dq, dk, *ctx.saved_tensors, ctx.offset, want_q or want_k)
        return dq, dk, dqw if want_q else None, dkw if want_k else None, None, None, None, None


def qk_norm_rope(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, *, offset: float = 0.0
                 ) -> tuple[Tensor, Tensor]:
    """Return q [..., T, Hq, Dh] and k [..., T, Hk, Dh] with each head normalised, then rotated.

    Like rms_norm with weights [Dh], then apply_rope. cos and sin [..., T, Dr] hold each angle twice and have no gradient; Dr <= Dh, even.
    q and k may be strided views. Raises ValueError where shapes, dtypes or devices do not fit.
    """
    check_heads("qk_norm_rope", q, k, cos, sin)
    for name, w in (("q_weight", q_weight), ("k_weight", k_weight)):
        if w.shape != q.shape[-1:] or w.device != q.device or not w.is_floating_point():
            raise ValueError(f"qk_norm_rope: expected floating {name} of shape {tuple(q.shape[-1:])} on {q.device}, got {w.dtype} "
                             f"{tuple(w.shape)} on {w.device}")
    return _QkNormRope.apply(q, k, q_weight, k_weight, cos, sin, eps, float(offset))


def _aot(dim: int, rotary: int, trained: bool):
    dq, dk, q, k = (torch.empty(8192, heads, dim, dtype=torch.bfloat16, device="meta") for heads in (32, 8, 32, 8))
    weight = torch.empty(dim, dtype=torch.bfloat16, device="meta")
    cos = torch.empty(8192, rotary, dtype=torch.bfloat16, device="meta")
    _, _, q_rstd, k_rstd = qk_norm_rope_forward(q, k, weight, weight, cos, cos, 1e-6, 0.0)
    qk_norm_rope_backward(dq, dk, q, k, weight, weight, q_rstd, k_rstd, cos, cos, 0.0, trained)


AOT = {
    "qk_norm_rope": lambda: _aot(128, 128, False), "qk_norm_rope trained": lambda: _aot(256, 256, True),
    "qk_norm_rope partial": lambda: _aot(128, 64, True),
}
