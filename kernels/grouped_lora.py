"""Several LoRAs in one batch: a linear whose every row picks its adapter, forward and backward.

For row t of x [T, K] with base W [N, K], bias b, and adapter g = index_t of G (−1: none): A_g [R, K], B_g [N, R], scaling s_g

    S_t = s_g·x_t A_gᵀ                  y_t = x_t Wᵀ + b + S_t B_gᵀ
    D_t = s_g·∂y_t B_g                  ∂x_t = ∂y_t W + D_t A_g
    ∂A_g = Σ_{t: index_t = g} D_tᵀ x_t                                  ∂B_g = Σ_{t: index_t = g} ∂y_tᵀ S_t
    ∂W = Σ_t ∂y_tᵀ x_t, ∂b = Σ_t ∂y_t (where they are trained)

Why one op: a loop over adapters gathers x, scatters y and launches six products for each, and learns on the host which rows
are whose; here nothing is gathered, sorted or read back. A tile of rows walks from the least to the greatest index in it and
computes each adapter with the other rows masked off (their loads are not made). Samples packed one after the other cost one
step a tile, and two where they meet; any order of rows is right, but rows shuffled over G adapters cost up to G steps of the
small products.

On a GPU, with an adapter seen as [R, width], three kernels serve both directions: squeeze (rows to rank: S, D), expand (rank
to rows: S B, D A) and outer (the gradients). The adapter's part comes first and the base product is added on top by cuBLAS,
which reads its addend while it multiplies; so no pass reads and writes y (or ∂x) for the adapter alone.

    forward    3 launches: squeeze, expand (+ b), base product
    backward   2 for D and its base product: squeeze, then expand and base product (where x wants a gradient: 4 in all);
               1 for each of ∂A and ∂B, and 2 more where their rows are summed in parts and come in the parameter's dtype
    products   1 base + 2 small forward; 1 base + 4 small backward (and ∂W where it is trained)

Saved: x, S [T, R] and the parameters. Sums in fp32; S and D are rounded to x's dtype once, y and ∂x twice, as an adapter
beside a plain linear would be. The gradients of an adapter that no row chose are exactly 0.

Predicted on an H200 (4.8 TB/s) at T=8192, 4096 -> 14336, R=16, packed, bf16: 0.25 ms of memory traffic beside the 2.6 ms of the two
base products: forward 14 µs squeeze, 49 expand, up to 49 reading the addend; backward 49, 14, up to 14, and 63 for ∂A and ∂B.

On a CPU an adapter whose rows are contiguous is served by views. Best of one core at T=1000, R=16, four adapters packed (rows
shuffled; autograd through a loop of index_select and index_add), forward + backward as a multiple of the bare base products:
fp32 256 -> 256 1.67 (1.79; 1.82), 256 -> 688 1.34 (1.39; 1.43); bf16 3.1 (3.8; 3.8), 2.1 (2.4; 2.4).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._autocast import autocast_input, without_autocast
from kernels._dispatch import operator, triton_serves
from kernels._launch import ANY, Launch, cdiv, constexpr, jit, launch, next_power_of_2, pick, rows_of, tl
from kernels._lora_reference import master_product


def rows_by_adapter(index: Tensor, G: int) -> list[slice | Tensor]:
    """Every adapter's rows: a slice where they are contiguous, else their numbers. Waits for the device."""
    index = torch.where((index >= 0) & (index < G), index, -1)
    counts = torch.bincount(index + 1, minlength=G + 1).tolist()
    rows = index.argsort(stable=True).split(counts)[1:]
    return [slice(int(r[0]), int(r[-1]) + 1) if len(r) and int(r[-1] - r[0]) < len(r) else r for r in rows]


def grouped_lora_reference(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: Tensor, index: Tensor,
                           bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """y [T, N] and S [T, R] of x [T, K]."""
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    S = x.new_zeros(x.shape[0], A.shape[1])
    for g, (rows, s) in enumerate(zip(rows_by_adapter(index, A.shape[0]), scaling.tolist(), strict=True)):
        S[rows] = small = (x[rows] @ A[g].to(x.dtype).t()).mul_(s)
        _add_product(y, rows, small, B[g].to(x.dtype).t())
    return y, S


def grouped_lora_backward_reference(dy: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, S: Tensor, scaling: Tensor,
                                    index: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """∂x [T, K] (None: not wanted), ∂A [G, R, K] and ∂B [G, N, R]."""
    dx = dy @ weight.to(x.dtype) if need_x else None
    dA, dB = torch.zeros_like(A, memory_format=torch.contiguous_format), torch.zeros_like(B, memory_format=torch.contiguous_format)
    for g, (rows, s) in enumerate(zip(rows_by_adapter(index, A.shape[0]), scaling.tolist(), strict=True)):
        dy_rows = dy[rows]
        D = (dy_rows @ B[g].to(x.dtype)).mul_(s)
        if need_x:
            _add_product(dx, rows, D, A[g].to(x.dtype))
        dA[g] = D.t() @ x[rows]
        dB[g] = (S[rows].t() @ dy_rows).t()  # the tall operand on the right is the faster way round on a CPU
    return dx, dA, dB


def _add_product(total: Tensor, rows: slice | Tensor, a: Tensor, b: Tensor) -> None:
    """total[rows] += a @ b"""
    if isinstance(rows, slice):
        total[rows].addmm_(a, b)
    else:
        total.index_add_(0, rows, a @ b)


# ---------------------------------------------------------------- Triton
# An adapter's matrix M [G, R, W] is A, or B with its last two dimensions swapped: the kernels take its three strides.


@jit
def _adapters(index, rows, T, G):
    """Every row's adapter (−1: none) and the range of adapters in the tile, high < low where there is none."""
    chosen = tl.load(index + rows, mask=rows < T, other=-1).to(tl.int64)
    chosen = tl.where((chosen >= 0) & (chosen < G), chosen, -1)
    return chosen, tl.min(tl.where(chosen < 0, G, chosen), 0), tl.max(chosen, 0)


@jit
def _squeeze_kernel(x, M, scaling, index, out, x_stride, M_group, M_rank, M_wide, T, W, R, G, BLOCK_T: constexpr, BLOCK_W: constexpr,
                    BLOCK_R: constexpr):
    """out [T, R] = s_g·x [T, W] M_gᵀ: one program per tile of rows and of ranks."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    chosen, low, high = _adapters(index, rows, T, G)
    x_rows = x + rows[:, None].to(tl.int64) * x_stride

    total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for g in range(low, high + 1):
        mine = chosen == g
        part = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for start in range(0, W, BLOCK_W):
            columns = start + tl.arange(0, BLOCK_W)
            a = tl.load(x_rows + columns[None, :], mask=mine[:, None] & (columns < W)[None, :], other=0.0)
            m = tl.load(M + g * M_group + columns[:, None].to(tl.int64) * M_wide + ranks[None, :] * M_rank,
                        mask=(columns < W)[:, None] & (ranks < R)[None, :], other=0.0)
            part = tl.dot(a, m.to(a.dtype), part, input_precision="ieee")
        total = tl.where(mine[:, None], part, total)

    scale = tl.load(scaling + chosen, mask=chosen >= 0, other=0.0).to(tl.float32)
    tl.store(out + rows[:, None].to(tl.int64) * R + ranks[None, :], total * scale[:, None], mask=(rows < T)[:, None] & (ranks < R)[None, :])


@jit
def _expand_kernel(S, M, bias, index, out, M_group, M_rank, M_wide, T, W, R, G, BLOCK_T: constexpr, BLOCK_W: constexpr,
                   BLOCK_R: constexpr):
    """out [T, W] = S [T, R] M_g (+ bias [W]): one program per tile of rows and of columns."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    chosen, low, high = _adapters(index, rows, T, G)

    total = tl.zeros((BLOCK_T, BLOCK_W), tl.float32)
    for g in range(low, high + 1):
        part = tl.zeros((BLOCK_T, BLOCK_W), tl.float32)
        for start in range(0, R, BLOCK_R):
            ranks = start + tl.arange(0, BLOCK_R)
            s = tl.load(S + rows[:, None].to(tl.int64) * R + ranks[None, :], mask=(rows < T)[:, None] & (ranks < R)[None, :], other=0.0)
            m = tl.load(M + g * M_group + ranks[:, None] * M_rank + columns[None, :].to(tl.int64) * M_wide,
                        mask=(ranks < R)[:, None] & (columns < W)[None, :], other=0.0)
            part = tl.dot(s, m.to(s.dtype), part, input_precision="ieee")
        total = tl.where((chosen == g)[:, None], part, total)

    if bias is not None:
        total += tl.load(bias + columns, mask=columns < W, other=0.0).to(tl.float32)[None, :]
    tl.store(out + rows[:, None].to(tl.int64) * W + columns[None, :], total, mask=(rows < T)[:, None] & (columns < W)[None, :])


@jit
def _outer_kernel(S, x, index, out, x_stride, out_split, M_group, M_rank, M_wide, T, W, R, splits, BLOCK_T: constexpr, BLOCK_W: constexpr,
                  BLOCK_R: constexpr, BLOCK_SCAN: constexpr):
    """out [splits, G, R, W] = Σ_t S_tᵀ x_t over an adapter's rows: one program per tile of columns and ranks, adapter and split."""
    blocks = tl.cdiv(W, BLOCK_W)
    columns = tl.program_id(0) % blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    ranks = tl.program_id(0) // blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    g = tl.program_id(1)
    split = tl.program_id(2)

    # the adapter's first and last row
    first = tl.full((BLOCK_SCAN,), T, tl.int32)
    last = tl.full((BLOCK_SCAN,), -1, tl.int32)
    for start in range(0, T, BLOCK_SCAN):
        rows = start + tl.arange(0, BLOCK_SCAN)
        mine = tl.load(index + rows, mask=rows < T, other=-1) == g
        first = tl.minimum(first, tl.where(mine, rows, T))
        last = tl.maximum(last, tl.where(mine, rows, -1))
    begin, end = tl.min(first, 0), tl.max(last, 0) + 1

    # this split's share of them, in whole tiles
    share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), splits), BLOCK_T) * BLOCK_T
    begin += split * share
    end = tl.minimum(end, begin + share)

    total = tl.zeros((BLOCK_W, BLOCK_R), tl.float32)
    for tile in range(0, tl.cdiv(end - begin, BLOCK_T)):  # range(begin, end, BLOCK_T) is not pipelined (no LDGSTS)
        rows = begin + tile * BLOCK_T + tl.arange(0, BLOCK_T)
        mine = tl.load(index + rows, mask=rows < end, other=-1) == g
        wide = tl.load(x + rows[None, :].to(tl.int64) * x_stride + columns[:, None], mask=mine[None, :] & (columns < W)[:, None], other=0.0)
        narrow = tl.load(S + rows[:, None].to(tl.int64) * R + ranks[None, :], mask=mine[:, None] & (ranks < R)[None, :], other=0.0)
        total = tl.dot(wide, narrow, total, input_precision="ieee")

    place = split.to(tl.int64) * out_split + g.to(tl.int64) * M_group + columns[:, None].to(tl.int64) * M_wide + ranks[None, :] * M_rank
    tl.store(out + place, total, mask=(columns < W)[:, None] & (ranks < R)[None, :])


# The bound is the bytes of one row of a rank tile: 32 is rank 16 in 16 bits.
SQUEEZE = {(ANY, 32): Launch({"BLOCK_T": 64, "BLOCK_W": 64}, 4, 6), (ANY, 64): Launch({"BLOCK_T": 64, "BLOCK_W": 32}, 4, 5),
           (ANY, 128): Launch({"BLOCK_T": 64, "BLOCK_W": 32}, 4, 4), (ANY, None): Launch({"BLOCK_T": 32, "BLOCK_W": 32}, 4, 3)}
EXPAND = {(ANY, 32): Launch({"BLOCK_T": 64, "BLOCK_W": 128}, 8), (ANY, 128): Launch({"BLOCK_T": 64, "BLOCK_W": 64}, 8),
          (ANY, None): Launch({"BLOCK_T": 32, "BLOCK_W": 32}, 4), ("sm_120", 32): Launch({"BLOCK_T": 64, "BLOCK_W": 128}, 8),
          ("sm_120", 128): Launch({"BLOCK_T": 64, "BLOCK_W": 32}, 4), ("sm_120", None): Launch({"BLOCK_T": 32, "BLOCK_W": 32}, 4)}
OUTER = {(ANY, 32): Launch({"BLOCK_T": 64, "BLOCK_W": 128, "BLOCK_SCAN": 1024}, 4, 3),
         (ANY, 128): Launch({"BLOCK_T": 64, "BLOCK_W": 64, "BLOCK_SCAN": 1024}, 4, 3),
         (ANY, None): Launch({"BLOCK_T": 32, "BLOCK_W": 32, "BLOCK_SCAN": 1024}, 4, 3)}
MAX_BLOCK_R = 64
PROGRAMS = 512  # that `outer` splits an adapter's rows for


def _how(table: dict, R: int, x: Tensor) -> Launch:
    """The row of `table`, with the ranks in a tile: tl.dot takes 16 at the least."""
    block_r = min(MAX_BLOCK_R, max(16, next_power_of_2(R)))
    how = pick(table, block_r * x.element_size(), x.device)
    return how._replace(blocks=how.blocks | {"BLOCK_R": block_r})


def _squeeze(x: Tensor, M: Tensor, scaling: Tensor, index: Tensor) -> Tensor:
    (T, W), (G, R, _), how = x.shape, M.shape, _how(SQUEEZE, M.shape[1], x)
    out = x.new_empty(T, R)
    launch(_squeeze_kernel, (cdiv(T, how.blocks["BLOCK_T"]), cdiv(R, how.blocks["BLOCK_R"])), how, x, M, scaling, index, out, x.stride(0),
           *M.stride(), T, W, R, G)
    return out


def _expand(S: Tensor, M: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
    (T, R), (G, _, W), how = S.shape, M.shape, _how(EXPAND, S.shape[1], S)
    out = S.new_empty(T, W)
    launch(_expand_kernel, (cdiv(T, how.blocks["BLOCK_T"]), cdiv(W, how.blocks["BLOCK_W"])), how, S, M, bias, index, out, *M.stride(),
           T, W, R, G)
    return out


def _outer(S: Tensor, x: Tensor, like: Tensor, wide_first: bool, index: Tensor) -> Tensor:
    """The gradient, dense and in the dtype, of parameter `like`: A [G, R, W], or B [G, W, R] (`wide_first`)."""
    (T, R), W, G = S.shape, x.shape[1], like.shape[0]
    how = _how(OUTER, R, x)
    tiles = cdiv(W, how.blocks["BLOCK_W"]) * cdiv(R, how.blocks["BLOCK_R"])
    splits = max(1, min(cdiv(PROGRAMS, tiles * max(G, 1)), cdiv(T, 4 * how.blocks["BLOCK_T"])))
    out = torch.empty(splits, *like.shape, dtype=torch.float32, device=like.device)
    _, group, *inner = out.stride()
    rank, wide = reversed(inner) if wide_first else inner
    launch(_outer_kernel, (tiles, G, splits), how, S, x, index, out, x.stride(0), out.stride(0), group, rank, wide, T, W, R, splits)
    return (out.sum(0) if splits > 1 else out[0]).to(like.dtype)


# ---------------------------------------------------------------- operators


def _check_index(index: Tensor, G: int) -> None:
    """Only on the CPU, where reading values costs nothing; on a GPU an index out of range means no adapter."""
    wrong = (index < -1) | (index >= G)
    if index.device.type == "cpu" and wrong.any():
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(f"grouped_lora_linear: expected index in [-1, {G}), got {int(index[row])} at row {row}")


def _fake_forward(x, weight, A, B, scaling, index, bias):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], A.shape[1])


@operator(_fake_forward)
def grouped_lora_forward(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: Tensor, index: Tensor,
                         bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """y [T, N] and S [T, R] of x [T, K], from the backend that serves x."""
    _check_index(index, A.shape[0])
    if not triton_serves(x):
        return grouped_lora_reference(x, weight, A, B, scaling, index, bias)
    x = rows_of(x)
    S = _squeeze(x, A, scaling, index)
    return _expand(S, B.mT, index, bias).addmm_(x, weight.to(x.dtype).t()), S


def _fake_backward(dy, x, weight, A, B, S, scaling, index, need_x, need_weight, need_bias, need_A, need_B):
    wanted = (x.new_empty(x.shape), need_x), (weight, need_weight), (weight[:, 0], need_bias), (A, need_A), (B, need_B)
    return tuple(t.new_empty(t.shape if need else 0) for t, need in wanted)


@operator(_fake_backward)
def grouped_lora_backward(dy: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, S: Tensor, scaling: Tensor, index: Tensor,
                          need_x: bool, need_weight: bool, need_bias: bool, need_A: bool, need_B: bool
                          ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, A and B from the backend that serves x; one that is not needed is empty."""
    dx = dA = dB = None
    if not triton_serves(x):
        dx, dA, dB = grouped_lora_backward_reference(dy, x, weight, A, B, S, scaling, index, need_x)
    else:
        dy, x = rows_of(dy), rows_of(x)
        D = _squeeze(dy, B.mT, scaling, index) if need_x or need_A else None
        dx = _expand(D, A, index, None).addmm_(dy, weight.to(x.dtype)) if need_x else None
        dA = _outer(D, x, A, False, index) if need_A else None
        dB = _outer(S, dy, B, True, index) if need_B else None
    dweight = master_product(dy.t(), x, weight.dtype) if need_weight else None
    dbias = dy.sum(0, dtype=weight.dtype) if need_bias else None
    wanted = (dx, need_x), (dweight, need_weight), (dbias, need_bias), (dA, need_A), (dB, need_B)
    return tuple(t if need else x.new_empty(0) for t, need in wanted)


# ---------------------------------------------------------------- autograd


class _GroupedLora(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, x, weight, A, B, scaling, index, bias):
        y, S = grouped_lora_forward(x, weight, A, B, scaling, index, bias)
        ctx.save_for_backward(x, weight, A, B, S, scaling, index)
        return y

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dy):
        x, weight, A, B, _, _, bias = ctx.needs_input_grad
        dx, dweight, dbias, dA, dB = grouped_lora_backward(dy, *ctx.saved_tensors, x, weight, bias, A, B)
        return (dx if x else None, dweight if weight else None, dA if A else None, dB if B else None, None, None,
                dbias if bias else None)


def _check(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: Tensor, index: Tensor, bias: Tensor | None) -> None:
    def expect(name: str, tensor: Tensor, *shape: int) -> None:
        if tensor.shape != shape or tensor.device != x.device:
            raise ValueError(f"grouped_lora_linear: expected {name} of shape {shape} on {x.device}, got {tuple(tensor.shape)} on "
                             f"{tensor.device}")

    if x.dim() < 1 or weight.dim() != 2 or A.dim() != 3 or not A.shape[1]:
        raise ValueError("grouped_lora_linear: expected x [..., K], weight [N, K] and A [G, R, K], got "
                         f"{tuple(x.shape)}, {tuple(weight.shape)} and {tuple(A.shape)}")
    (N, K), (G, R, _) = weight.shape, A.shape
    expect("x", x, *x.shape[:-1], K)
    expect("weight", weight, N, K)
    expect("A", A, G, R, K)
    expect("B", B, G, N, R)
    expect("scaling", scaling, G)
    expect("index", index, *x.shape[:-1])
    if bias is not None:
        expect("bias", bias, N)
    for name, tensor in (("x", x), ("weight", weight), ("A", A), ("B", B), ("scaling", scaling)):
        if not tensor.is_floating_point():
            raise ValueError(f"grouped_lora_linear: expected {name} of a floating dtype, got {tensor.dtype}")
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"grouped_lora_linear: expected index int32 or int64, got {index.dtype}")


def grouped_lora_linear(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: Tensor | Sequence[float], index: Tensor,
                        bias: Tensor | None = None) -> Tensor:
    """x [..., K], weight [N, K] -> [..., N], each row with the adapter that index [...] names; −1: the base alone.

    A [G, R, K], B [G, N, R], scaling [G] (constants: a tensor on x's device spares a copy a call). Adapters of lower rank are
    padded with zeros by the caller. Products run in x's dtype (autocast's where it is on); the gradients of A and B come in their
    own. ValueError where shapes do not fit and, on a CPU, for an index outside [-1, G); a GPU takes that for −1.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    scaling = torch.as_tensor(scaling, dtype=exact, device=x.device if not isinstance(scaling, Tensor) else None)
    _check(x, weight, A, B, scaling, index, bias)
    dense = (t if t is None else t.contiguous() for t in (scaling, index.reshape(-1), bias))
    y = _GroupedLora.apply(autocast_input(rows_of(x)), weight, A, B, *dense)
    return y.view(*x.shape[:-1], weight.shape[0])


def _aot(T: int, K: int, N: int, R: int, G: int):
    """Llama-3.1-8B's gate projection, fp32 masters."""
    x, dy, weight = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((T, K), (T, N), (N, K)))
    A, B, scaling = (torch.empty(shape, device="meta") for shape in ((G, R, K), (G, N, R), (G,)))
    index = torch.empty(T, dtype=torch.int64, device="meta")
    _, S = grouped_lora_forward(x, weight, A, B, scaling, index, None)
    grouped_lora_backward(dy, x, weight, A, B, S, scaling, index, True, False, False, True, True)


AOT = {f"grouped_lora r={R}": lambda R=R: _aot(8192, 4096, 14336, R, 8) for R in (16, 64)}
