"""Triton passes of LoRA linears: everything but the base matmuls.

One launch forward and two backward, for all projections of one x. With the symbols of kernels/lora.py, T tokens, x [T, K], y_i [T, N_i],
ranks R_i <= 256:

    lora_forward     S_i = (m_i ∘ x) A_iᵀ,  Y⁰_i = a_i S_i B_iᵀ + b_i          the base matmul is then added: Y⁰_i += x W_iᵀ
    lora_backward    D_i = a_i G_i B_i,     X⁰ = Σ m_i ∘ (D_i A_i)             then X⁰ += G_i W_i
    lora_gradients   ∂B_i = a_i G_iᵀ S_i,   ∂A_i = D_iᵀ (m_i ∘ x)              in slices of T, summed by one more launch

The adapter comes first and the base matmul accumulates into its output, so cuBLAS gets plain operands. A program of the first two
kernels owns a few rows: it reduces the long side to rank R, keeps the narrow result, and expands to the other side. The third transposes
its matmuls, so that the long side fills the tensor cores' rows and R their columns. Masks are recomputed wherever they are needed
(kernels/_dropout.py); A and B are read in their own dtype (fp32 masters, say) and rounded to x's dtype in registers.
"""

import torch
from torch import Tensor

from kernels._dispatch import operator
from kernels._dropout import RESOLUTION, kept
from kernels._launch import ANY, Launch, arch_of, cdiv, constexpr, jit, launch, next_power_of_2, pick, rows_of, tl

MAX_RANK = 256
MAX_TOGETHER = 3  # projections in one launch
PROGRAMS = 512  # of lora_gradients, approximately: four per multiprocessor of an H200
SLICE_ROWS = 32  # times a projection's width: the fewest rows of a slice


@jit
def _load(matrix, rows, columns, stride, height, width):
    """Load a tile of a matrix [height, width] with dense rows, `stride` apart; zeros outside."""
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    return tl.load(matrix + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@jit
def _store(matrix, value, rows, columns, stride, height, width):
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    tl.store(matrix + rows[:, None] * stride + columns[None, :], value, mask=inside)


@jit
def _drop(value, key, stream, rows, column, lanes, BLOCK: constexpr):
    """Return m ∘ value for columns [column, column + BLOCK) of x or ∂x; without dropout lanes is None."""
    if lanes is not None:
        value = tl.where(kept(key, stream, rows, column, lanes, BLOCK), value, 0.0)
    return value


@jit
def _lora_forward_kernel(x, A, B, bias, S, Y, seed, gains, streams, lanes, x_stride, S_stride, T, K, N, R,
                         BLOCK_M: constexpr, BLOCK_K: constexpr, BLOCK_N: constexpr, BLOCK_R: constexpr):
    """Write S [T, P·BLOCK_R], zeros beyond each R, and the Y⁰_i [T, N_i]; a program owns BLOCK_M rows."""
    P: constexpr = len(A)
    rows, r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    key = 0 if seed is None else tl.load(seed)

    sums = ()
    for _ in tl.static_range(P):
        sums += (tl.zeros([BLOCK_M, BLOCK_R], tl.float32),)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        tile = _load(x, rows, columns, x_stride, T, K)
        grown = ()
        for i in tl.static_range(P):
            a = _load(A[i], r, columns, K, R[i], K).to(tile.dtype)  # (BLOCK_R, BLOCK_K)
            dropped = _drop(tile, key, streams[i], rows, start, lanes[i], BLOCK_K)
            grown += (tl.dot(dropped, tl.trans(a), sums[i], input_precision="ieee"),)
        sums = grown

    for i in tl.static_range(P):
        s = sums[i].to(S.dtype.element_ty)
        _store(S + i * BLOCK_R, s, rows, r, S_stride, T, BLOCK_R)
        for start in range(0, N[i], BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            b = _load(B[i], columns, r, R[i], N[i], R[i]).to(s.dtype)  # (BLOCK_N, BLOCK_R)
            y = gains[i] * tl.dot(s, tl.trans(b), input_precision="ieee")
            if bias[i] is not None:
                y += tl.load(bias[i] + columns, mask=columns < N[i], other=0.0).to(tl.float32)[None, :]
            _store(Y[i], y, rows, columns, N[i], T, N[i])


@jit
def _lora_backward_kernel(D, G, A, B, dx, seed, gains, streams, lanes, G_strides, D_stride, T, K, N, R, ADD: constexpr,
                          BLOCK_M: constexpr, BLOCK_K: constexpr, BLOCK_N: constexpr, BLOCK_R: constexpr):
    """Write D [T, P·BLOCK_R], zeros beyond each R, and X⁰ [T, K] unless dx is None.

    ADD: X⁰ is added to dx. A program owns BLOCK_M rows.
    """
    P: constexpr = len(A)
    rows, r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    key = 0 if seed is None else tl.load(seed)

    narrow = ()
    for i in tl.static_range(P):
        d = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for start in range(0, N[i], BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            g = _load(G[i], rows, columns, G_strides[i], T, N[i])
            b = _load(B[i], columns, r, R[i], N[i], R[i]).to(g.dtype)  # (BLOCK_N, BLOCK_R)
            d = tl.dot(g, b, d, input_precision="ieee")
        narrow += ((gains[i] * d).to(D.dtype.element_ty),)
        _store(D + i * BLOCK_R, narrow[i], rows, r, D_stride, T, BLOCK_R)

    if dx is not None:
        for start in range(0, K, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            total = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
            if ADD:
                total += _load(dx, rows, columns, K, T, K).to(tl.float32)
            for i in tl.static_range(P):
                a = _load(A[i], r, columns, K, R[i], K).to(narrow[i].dtype)  # (BLOCK_R, BLOCK_K)
                total += _drop(tl.dot(narrow[i], a, input_precision="ieee"), key, streams[i], rows, start, lanes[i], BLOCK_K)
            _store(dx, total, rows, columns, K, T, K)


@jit
def _lora_gradients_kernel(x, G, S, D, dA, dB, seed, gains, streams, lanes, x_stride, G_strides, S_stride, T, K, N, R, slice_rows,
                           slice_stride, BLOCK_T: constexpr, BLOCK_C: constexpr, BLOCK_R: constexpr):
    """Write the ∂A_i and ∂B_i, fp32, of one slice of rows (grid axis 1).

    Along grid axis 2, job 0 takes BLOCK_C columns of x for all ∂A_i, job i + 1 columns of G_i for ∂B_i.
    """
    P: constexpr = len(G)
    column, job = tl.program_id(0) * BLOCK_C, tl.program_id(2)
    columns, r = column + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * slice_rows
    last = tl.minimum(first + slice_rows, T)
    place = tl.program_id(1).to(tl.int64) * slice_stride

    if x is not None and (job == 0) & (column < K):
        key = 0 if seed is None else tl.load(seed)
        sums = ()
        for _ in tl.static_range(P):
            sums += (tl.zeros([BLOCK_C, BLOCK_R], tl.float32),)
        for start in range(first, last, BLOCK_T):
            rows = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
            tile = _load(x, rows, columns, x_stride, last, K)
            grown = ()
            for i in tl.static_range(P):
                d = _load(D + i * BLOCK_R, rows, r, S_stride, last, BLOCK_R)
                dropped = _drop(tile, key, streams[i], rows, column, lanes[i], BLOCK_C)
                grown += (tl.dot(tl.trans(dropped), d, sums[i], input_precision="ieee"),)
            sums = grown
        for i in tl.static_range(P):
            if dA[i] is not None:
                _store(dA[i] + place, tl.trans(sums[i]), r, columns, K, R[i], K)

    for i in tl.static_range(P):
        if dB[i] is not None and (job == i + 1) & (column < N[i]):
            total = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
            for start in range(first, last, BLOCK_T):
                rows = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
                g = _load(G[i], rows, columns, G_strides[i], last, N[i])
                s = _load(S + i * BLOCK_R, rows, r, S_stride, last, BLOCK_R)
                total = tl.dot(tl.trans(g), s, total, input_precision="ieee")
            _store(dB[i] + place, gains[i] * total, columns, r, R[i], N[i], R[i])


# Launch settings by `_size`. A large GPU runs one program of the first two kernels per multiprocessor, so that program's stages have to
# hold all loads in flight: 36 KB on an H200.
LARGE = ("sm_90", "sm_100")
ROWS = {
    (ANY, 32): Launch({"BLOCK_K": 128, "BLOCK_N": 128}, 8, 3),
    (ANY, 96): Launch({"BLOCK_K": 64, "BLOCK_N": 128}, 8, 3),
    (ANY, 192): Launch({"BLOCK_K": 32, "BLOCK_N": 64}, 8, 3),
    (ANY, 256): Launch({"BLOCK_K": 32, "BLOCK_N": 64}, 8, 2),
    (ANY, None): Launch({"BLOCK_K": 32, "BLOCK_N": 32}, 8, 2),
}
ROWS |= {("sm_120", bound): settings for (_, bound), settings in ROWS.items() if bound != 32}  # Triton 3.7 spills its tiles of 128 there
ROWS |= {(name, bound): settings for name in LARGE for bound, settings in {
    32: Launch({"BLOCK_K": 128, "BLOCK_N": 128}, 8, 4),
    96: Launch({"BLOCK_K": 64, "BLOCK_N": 128}, 8, 4),
    384: Launch({"BLOCK_K": 64, "BLOCK_N": 64}, 8, 3),
    None: Launch({"BLOCK_K": 32, "BLOCK_N": 32}, 8, 3),
}.items()}
FORWARD = ROWS | {(name, 96): Launch({"BLOCK_K": 64, "BLOCK_N": 256}, 8, 4) for name in LARGE}
GRADIENTS = {
    (ANY, 96): Launch({"BLOCK_T": 32, "BLOCK_C": 128}, 8, 4),
    (ANY, 384): Launch({"BLOCK_T": 64, "BLOCK_C": 64}, 8, 2),
    (ANY, None): Launch({"BLOCK_T": 32, "BLOCK_C": 64}, 8, 2),
}


def block_r(A: list[Tensor]) -> int:
    """Return how many columns each projection has in S and D: the largest rank, rounded up to a tile."""
    return max(16, next_power_of_2(max(a.shape[0] for a in A)))


def _groups(count: int, width: int, like: Tensor) -> list[slice]:
    """Return the slices of projections that are launched together, each with `width` columns of S."""
    room = 384 if arch_of(like.device) in LARGE else 256  # bytes a row; fewer where matmuls read their operands from registers
    size = max(1, min(MAX_TOGETHER, room // (width * like.itemsize)))
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def _size(width: int, dtype: torch.dtype) -> int:
    """Return the bytes per row of a launch's narrow results; doubled in fp32, whose other tiles grow too."""
    return width * dtype.itemsize * (dtype.itemsize // 2)


def _block_m(T: int) -> int:
    """Return the rows per program: fewer where T is small, since a large GPU needs about 100 programs."""
    return 64 if T > 6144 else 32 if T > 3072 else 16


def _by_rows(table: dict, T: int, size: int, device: torch.device) -> Launch:
    settings = pick(table, size, device)
    return settings._replace(blocks=settings.blocks | {"BLOCK_M": _block_m(T)})


def _lanes(lanes: list[int]) -> tuple[int | None, ...]:
    return tuple(None if n == RESOLUTION else n for n in lanes)


def _dense(tensors: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _fake_forward(x, A, B, biases, seed, gains, streams, lanes):
    return x.new_empty(x.shape[0], len(A) * block_r(A)), [x.new_empty(x.shape[0], b.shape[0]) for b in B]


@operator(_fake_forward)
def lora_forward(x: Tensor, A: list[Tensor], B: list[Tensor], biases: list[Tensor | None], seed: Tensor | None, gains: list[float],
                 streams: list[int], lanes: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Return S [T, P·block_r(A)] and the Y⁰_i [T, N_i] of x [T, K], in x's dtype.

    streams and lanes are those of each projection's mask (kernels/_dropout.py), gains the a_i.
    """
    x, A, B, biases, lanes = rows_of(x), _dense(A), _dense(B), _dense(biases), _lanes(lanes)
    (T, K), width = x.shape, block_r(A)
    S, Y = _fake_forward(x, A, B, biases, seed, gains, streams, lanes)
    for group in _groups(len(A), width, x):
        P = len(A[group])
        settings = _by_rows(FORWARD, T, _size(P * width, x.dtype), x.device)
        launch(_lora_forward_kernel, (cdiv(T, settings.blocks["BLOCK_M"]),), settings, x, A[group], B[group], biases[group],
               S[:, group.start * width:], tuple(Y[group]), seed, tuple(gains[group]), tuple(streams[group]), lanes[group], x.stride(0),
               S.stride(0), T, K, tuple(b.shape[0] for b in B[group]), tuple(a.shape[0] for a in A[group]), BLOCK_R=width)
    return S, Y


def _fake_backward(G, A, B, seed, gains, streams, lanes, need_x):
    T, K = G[0].shape[0], A[0].shape[1]
    return G[0].new_empty(T, len(A) * block_r(A)), G[0].new_empty((T, K) if need_x else 0)


@operator(_fake_backward)
def lora_backward(G: list[Tensor], A: list[Tensor], B: list[Tensor], seed: Tensor | None, gains: list[float], streams: list[int],
                  lanes: list[int], need_x: bool) -> tuple[Tensor, Tensor]:
    """Return D [T, P·block_r(A)] and X⁰ [T, K] (empty unless need_x) of the G_i [T, N_i], in their dtype."""
    D, dx = _fake_backward(G, A, B, seed, gains, streams, lanes, need_x)
    G, A, B, lanes = tuple(rows_of(g) for g in G), _dense(A), _dense(B), _lanes(lanes)
    (T, K), width = (G[0].shape[0], A[0].shape[1]), block_r(A)
    for group in _groups(len(A), width, D):
        settings = _by_rows(ROWS, T, _size(len(A[group]) * width, D.dtype), D.device)
        grid = cdiv(T, settings.blocks["BLOCK_M"]),
        launch(_lora_backward_kernel, grid, settings, D[:, group.start * width:], G[group], A[group], B[group], dx if need_x else None,
               seed, tuple(gains[group]), tuple(streams[group]), lanes[group], tuple(g.stride(0) for g in G[group]),
               D.stride(0), T, K, tuple(b.shape[0] for b in B[group]), tuple(a.shape[0] for a in A[group]), ADD=group.start > 0,
               BLOCK_R=width)
    return D, dx


def _sizes(K: int, N: list[int], ranks: list[int], need_A: list[bool], need_B: list[bool]) -> list[int]:
    """Return the elements of each ∂A_i, then of each ∂B_i; 0 where it is not needed."""
    return [R * K * need for R, need in zip(ranks, need_A)] + [R * n * need for R, n, need in zip(ranks, N, need_B)]


def _fake_gradients(x, G, S, D, ranks, need_A, need_B, seed, gains, streams, lanes):
    return x.new_empty(sum(_sizes(x.shape[1], [g.shape[1] for g in G], ranks, need_A, need_B)), dtype=torch.float32)


@operator(_fake_gradients)
def lora_gradients(x: Tensor, G: list[Tensor], S: Tensor, D: Tensor | None, ranks: list[int], need_A: list[bool], need_B: list[bool],
                   seed: Tensor | None, gains: list[float], streams: list[int], lanes: list[int]) -> Tensor:
    """Return the needed ∂A_i [R_i, K], then ∂B_i [N_i, R_i], end to end in one flat fp32 tensor."""
    x, G, lanes = rows_of(x), tuple(rows_of(g) for g in G), _lanes(lanes)
    (T, K), P, N = x.shape, len(G), [g.shape[1] for g in G]
    width, sizes = S.shape[1] // P, _sizes(K, N, ranks, need_A, need_B)
    groups = _groups(P, width, x)
    settings = pick(GRADIENTS, _size(width * (groups[0].stop - groups[0].start), x.dtype), x.device)
    blocks = [cdiv(n, settings.blocks["BLOCK_C"]) for n in (K, *N)]
    # many programs, but slices so long that their sums (8 R bytes per column, written and read) are small beside their rows (2 bytes each)
    slices = max(1, min(cdiv(PROGRAMS, sum(blocks)), T // (SLICE_ROWS * width)))
    slice_rows = cdiv(T, slices * settings.blocks["BLOCK_T"]) * settings.blocks["BLOCK_T"]
    partial = torch.empty(slices, sum(sizes), dtype=torch.float32, device=x.device)
    # the first slice's gradients; each further slice's are one row of `partial` away
    first_slice = [gradient if size else None for gradient, size in zip(partial[0].split(sizes), sizes)]
    for group in groups:
        dA, dB = tuple(first_slice[:P][group]), tuple(first_slice[P:][group])
        need_any_A = any(gradient is not None for gradient in dA)
        launch(_lora_gradients_kernel, (max(blocks), slices, 1 + len(dA)), settings, x if need_any_A else None, G[group],
               S[:, group.start * width:], D[:, group.start * width:] if need_any_A else None, dA, dB, seed, tuple(gains[group]),
               tuple(streams[group]), lanes[group], x.stride(0), tuple(g.stride(0) for g in G[group]), S.stride(0), T, K, tuple(N[group]),
               tuple(ranks[group]), slice_rows, partial.stride(0), BLOCK_R=width)
    return partial.sum(0) if slices > 1 else partial.view(-1)
