"""DoRA's row norms and scaling, with the symbols of kernels/lora.py.

DoRA: https://arxiv.org/abs/2402.09353.

    n = ‖W + s B A‖ by row                                                         row_norms
    y = c ∘ V + b                 c = magnitude / n                                finish
    G = c ∘ ∂y                    ∂magnitude = Σ_t ∂y ∘ V / n       ∂b = Σ_t ∂y    finish_backward

On a GPU each is one launch, and finish_backward one more for the sums of its slices of T. row_norms reads W once and never materialises
the sum.
"""

import torch
from torch import Tensor

from kernels._dispatch import operator, triton_serves
from kernels._launch import ANY, Launch, cdiv, constexpr, jit, launch, pick, rows_of, tl
from kernels._lora_passes import LARGE, MAX_RANK, block_r

# The reference computes row norms on as many rows of W as fit this in fp32: 4 MB.
NORM_CHUNK_BYTES = 4 << 20


def row_norms_reference(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Return n [N], a few rows at a time, so that W + s B A is never materialised."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    A, B = A.to(dtype), B.to(dtype)
    rows = max(1, NORM_CHUNK_BYTES // (weight.shape[1] * dtype.itemsize))
    chunks = zip(weight.split(rows), B.split(rows), strict=True)
    return torch.cat([torch.addmm(w.to(dtype), b, A, alpha=scaling).norm(dim=1) for w, b in chunks])


def finish_reference(value: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None) -> Tensor:
    """Return y = c ∘ V + b."""
    y = (value * (magnitude / norm)).to(value.dtype)
    return y if bias is None else y.add_(bias.to(y.dtype))


def finish_backward_reference(dy: Tensor, value: Tensor | None, magnitude: Tensor, norm: Tensor, need_bias: bool) -> tuple[Tensor, Tensor]:
    """Return G and the sums of `finish_backward`."""
    sums = [] if value is None else [(dy * value).sum(0, dtype=norm.dtype) / norm]
    sums += [dy.sum(0, dtype=norm.dtype)] if need_bias else []
    return (dy * (magnitude / norm)).to(dy.dtype), torch.stack(sums) if sums else norm.new_empty(0, *norm.shape)


# ---------------------------------------------------------------- Triton


@jit
def _row_norms_kernel(weight, A, B, norm, scaling, stride, N, K, R, BLOCK_N: constexpr, BLOCK_K: constexpr, BLOCK_R: constexpr):
    """Write n of BLOCK_N rows; the adapter is rounded to W's dtype, as in the projection's matmuls."""
    rows, r = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    inside = (rows < N)[:, None]
    b = tl.load(B + rows[:, None] * R + r[None, :], mask=inside & (r < R)[None, :], other=0.0).to(weight.dtype.element_ty)

    squares = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        within = (columns < K)[None, :]
        w = tl.load(weight + rows[:, None] * stride + columns[None, :], mask=inside & within, other=0.0).to(tl.float32)
        a = tl.load(A + r[:, None] * K + columns[None, :], mask=(r < R)[:, None] & within, other=0.0).to(b.dtype)
        w += scaling * tl.dot(b, a, input_precision="ieee")
        squares += tl.sum(w * w, axis=1)
    tl.store(norm + rows, tl.sqrt(squares), mask=rows < N)


@jit
def _finish_kernel(value, magnitude, norm, bias, y, N, BLOCK: constexpr):
    """Write y [T, N]: one program per row and block of columns."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N

    v = tl.load(value + row * N + columns, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(magnitude + columns, mask=inside, other=0.0).to(tl.float32)
    n = tl.load(norm + columns, mask=inside, other=1.0)

    v *= m / n
    if bias is not None:
        v += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * N + columns, v, mask=inside)


@jit
def _finish_backward_kernel(dy, value, magnitude, norm, G, dmagnitude, dbias, stride, T, N, slice_rows, BLOCK_T: constexpr,
                            BLOCK_C: constexpr):
    """Write G [T, N] and the sums of one slice of rows for ∂magnitude and ∂b [slices, N].

    A program owns BLOCK_C columns of a slice of rows.
    """
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    within = columns < N
    m = tl.load(magnitude + columns, mask=within, other=0.0).to(tl.float32)
    n = tl.load(norm + columns, mask=within, other=1.0)
    first = tl.program_id(1) * slice_rows
    last = tl.minimum(first + slice_rows, T)

    magnitudes, biases = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    for start in range(first, last, BLOCK_T):
        rows = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        inside = (rows < last)[:, None] & within[None, :]
        d = tl.load(dy + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(G + rows[:, None] * N + columns[None, :], d * (m / n)[None, :], mask=inside)
        biases += tl.sum(d, axis=0)
        if value is not None:
            v = tl.load(value + rows[:, None] * N + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            magnitudes += tl.sum(d * v, axis=0)

    place = tl.program_id(1) * N + columns
    if dmagnitude is not None:
        tl.store(dmagnitude + place, magnitudes / n, mask=within)
    if dbias is not None:
        tl.store(dbias + place, biases, mask=within)


# by bytes of a row of B in W's dtype; there are few programs (of 64 rows), so on a large GPU each keeps much in flight
NORMS = {(ANY, 128): Launch({"BLOCK_N": 64, "BLOCK_K": 64}, 4, 3), (ANY, None): Launch({"BLOCK_N": 64, "BLOCK_K": 32}, 8, 2)} | {
    (name, bound): Launch({"BLOCK_N": 64, "BLOCK_K": block}, 8, 4) for name in LARGE for bound, block in ((128, 128), (None, 32))}
FINISH = {(ANY, 512): Launch({"BLOCK": 512}, 2), (ANY, None): Launch({"BLOCK": 2048}, 8)}
FINISH_BACKWARD = {(ANY, None): Launch({"BLOCK_T": 32, "BLOCK_C": 128}, 4)}
PROGRAMS = 1024  # of finish_backward, approximately: eight per multiprocessor of an H200


def _fake_norms(weight, A, B, scaling):
    return weight.new_empty(weight.shape[0], dtype=torch.promote_types(weight.dtype, torch.float32))


@operator(_fake_norms)
def row_norms(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Return n [N] = ‖W + s B A‖ by row of W [N, K], in fp32 (fp64 for fp64)."""
    if not triton_serves(weight) or A.shape[0] > MAX_RANK:
        return row_norms_reference(weight, A, B, scaling)
    weight, A, B = rows_of(weight), A.contiguous(), B.contiguous()
    (N, K), R = weight.shape, A.shape[0]
    norm, width = _fake_norms(weight, A, B, scaling), block_r([A])
    settings = pick(NORMS, width * weight.itemsize, weight.device)
    launch(_row_norms_kernel, (cdiv(N, settings.blocks["BLOCK_N"]),), settings, weight, A, B, norm, scaling, weight.stride(0), N, K, R,
           BLOCK_R=width)
    return norm


@operator(lambda value, magnitude, norm, bias: value.new_empty(value.shape))
def finish(value: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None) -> Tensor:
    """Return y [T, N], in V's dtype, of a dense V [T, N]."""
    if not triton_serves(value):
        return finish_reference(value, magnitude, norm, bias)
    y, (T, N) = torch.empty_like(value), value.shape
    settings = pick(FINISH, N, value.device)
    launch(_finish_kernel, (T, cdiv(N, settings.blocks["BLOCK"])), settings, value, magnitude, norm, bias, y, N)
    return y


def _fake_finish_backward(dy, value, magnitude, norm, need_bias):
    return dy.new_empty(dy.shape), norm.new_empty((value is not None) + need_bias, *norm.shape)


@operator(_fake_finish_backward)
def finish_backward(dy: Tensor, value: Tensor | None, magnitude: Tensor, norm: Tensor, need_bias: bool) -> tuple[Tensor, Tensor]:
    """Return G [T, N] in ∂y's dtype and, stacked in n's, ∂magnitude if V is given and ∂b if needed."""
    if not triton_serves(dy):
        return finish_backward_reference(dy, value, magnitude, norm, need_bias)
    dy, (T, N), settings = rows_of(dy), dy.shape, pick(FINISH_BACKWARD, dy.shape[1], dy.device)
    blocks = cdiv(N, settings.blocks["BLOCK_C"])
    slices = max(1, min(cdiv(PROGRAMS, blocks), cdiv(T, 4 * settings.blocks["BLOCK_T"])))
    G = torch.empty(T, N, dtype=dy.dtype, device=dy.device)
    partial = torch.empty((value is not None) + need_bias, slices, N, dtype=torch.float32, device=dy.device)
    launch(_finish_backward_kernel, (blocks, slices), settings, dy, value, magnitude, norm, G, None if value is None else partial[0],
           partial[-1] if need_bias else None, dy.stride(0), T, N, cdiv(T, slices))
    return G, partial.sum(1)
