"""Compute loss, statistics and in-place gradient of rows of logits, for `linear_cross_entropy`.

For the raw logits y of a row with target t, weight w, label smoothing ε, z-loss ζ, logit scale s, softcap c, temperature τ:

    z   = c·tanh(s·y / c) / τ                            (c absent: z = s·y / τ)
    lse = log Σ_v exp z_v                                p = exp(z − lse)
    l   = lse − (1−ε)·z_t − (ε/V)·Σ_v z_v + ζ·lse²
    ∂(w·l)/∂y = w·(s/τ)·(1 − tanh²)·((1 + 2ζ·lse)·p − (1−ε)·1_t − ε/V)
    statistics: log p_t,  entropy −Σ_v p_v log p_v,  and whether t is the (first) largest z

One program per row. It reads the row once for an online sum of exponentials (Milakov and Gimelshein, https://arxiv.org/abs/1805.02867)
and everything else of that list, and once more, from the end, where it is still cached, to write the gradient over the logits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels._dispatch import triton_serves
from kernels._launch import ANY, Launch, cdiv, constexpr, jit, launch, pick, tl

ALIGNED = 16  # elements: rows that begin at multiples of it are read and written 16 bytes at a time, even if the vocabulary is odd


class Loss(NamedTuple):
    """Options of the loss of a row of logits."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0


def transform_factors(loss: Loss) -> tuple[float, float]:
    """Return s/c and c/τ; without a softcap 0 and s/τ."""
    if loss.softcap is None:
        return 0.0, loss.logit_scale / loss.temperature
    return loss.logit_scale / loss.softcap, loss.softcap / loss.temperature


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of statistics and sums: fp32, and fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def padded(vocabulary: int) -> int:
    """Return the stride of rows of logits, in elements, with Triton."""
    return cdiv(vocabulary, ALIGNED) * ALIGNED


def new_logits(rows: int, vocabulary: int, like: Tensor) -> Tensor:
    """Return uninitialised logits [rows, V] with the strides that `cross_entropy_rows` needs.

    They have the dtype and device of `like`.
    """
    return like.new_empty(rows, padded(vocabulary) if triton_serves(like) else vocabulary)[:, :vocabulary]


def check_targets(target: Tensor, ignore_index: int | None, vocabulary: int) -> None:
    """Raise ValueError for targets outside the vocabulary.

    Only for the CPU, where reading values does not wait; on a GPU such a row's loss and gradient are NaN.
    """
    wrong = (target < 0) | (target >= vocabulary)
    if ignore_index is not None:
        wrong &= target != ignore_index
    if wrong.any().tolist():
        row = int(wrong.nonzero()[0, 0])
        also = "" if ignore_index is None else f" or ignore_index {ignore_index}"
        raise ValueError(f"linear_cross_entropy: expected targets in [0, {vocabulary}){also}, got {int(target[row])} at row {row}")


def cross_entropy_rows_reference(logits: Tensor, target: Tensor, row_weight: Tensor | None, loss: Loss, want_statistics: bool,
                                 want_gradient: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return l [n], statistics [3, n] and ∂(w·l)/∂y [n, V] of logits [n, V], in the statistics dtype.

    The logits may be overwritten; statistics and gradient are None where not wanted.
    """
    smoothing, z_loss, softcap, logit_scale, temperature = loss
    columns = target[:, None]
    z = logits.to(statistics_dtype(logits))
    if logit_scale != 1.0:
        z.mul_(logit_scale)
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    if temperature != 1.0:
        z.div_(temperature)
    z_max, z_target = z.amax(1, keepdim=True), z.gather(1, columns)
    z_mean = z.mean(1, keepdim=True) if smoothing else 0.0
    correct = z.argmax(1) == target if want_statistics else None
    # torch's fused softmax is faster than logsumexp; its largest entry is exp(z_max - lse), which never underflows.
    p = torch.softmax(z, 1) if softcap is not None and want_gradient else torch.softmax(z, 1, out=z)
    lse = z_max - p.amax(1, keepdim=True).log()
    losses = (lse - (1.0 - smoothing) * z_target - smoothing * z_mean + z_loss * lse.square())[:, 0]
    statistics = None
    if want_statistics:
        statistics = torch.stack([(z_target - lse)[:, 0], torch.special.entr(p).sum(1), correct.to(p.dtype)])
    if not want_gradient:
        return losses, statistics, None
    if z_loss:
        p.mul_(1.0 + 2.0 * z_loss * lse)
    if smoothing:
        p.sub_(smoothing / p.shape[1])
    p.scatter_add_(1, columns, torch.full_like(lse, smoothing - 1.0))
    if softcap is not None:
        p.mul_(z.div_(softcap / temperature).square_().neg_().add_(1.0))
    scale = logit_scale / temperature
    if row_weight is not None:
        p.mul_(scale * row_weight[:, None])
    elif scale != 1.0:
        p.mul_(scale)
    return losses, statistics, p


# ---------------------------------------------------------------- Triton


@jit
def _transformed(y, inner, outer, SOFTCAP: constexpr):
    """Return z of raw logits y, and the softcap's tanh.

    inner and outer are s/c and c/τ; without a softcap inner is unused and outer is s/τ.
    """
    if SOFTCAP:
        t = 2.0 * tl.sigmoid(2.0 * inner * y) - 1.0
    else:
        t = y
    return outer * t, t


@jit
def _rows_kernel(logits, rows, target, row_weight, losses, statistics, stride, V, first, total, inner, outer, slope, smoothing, z_loss,
                 SOFTCAP: constexpr, SMOOTHING: constexpr, STATISTICS: constexpr, GRADIENT: constexpr, BLOCK: constexpr, GROUP: constexpr,
                 ALIGNED: constexpr):
    """Process row i of logits [n, V]: row rows[i], or first + i, of the `total` rows of the other tensors.

    A target outside [0, V) makes the row's loss and its gradient NaN. A thread keeps online sums of its GROUP neighbouring logits
    (a 16-byte access), which need one rescaling, and threads combine them only at the end of the row.
    """
    i = tl.program_id(0).to(tl.int64)
    if rows is None:
        row = first + i
    else:
        row = tl.load(rows + i)
    logits += i * stride
    t = tl.load(target + row)
    valid = (t >= 0) & (t < V)
    z_target = _transformed(tl.load(logits + t, mask=valid, other=float("nan")).to(tl.float32), inner, outer, SOFTCAP)[0]
    t = tl.where(valid, t, -1).to(tl.int32)
    width = (V + ALIGNED - 1) // ALIGNED * ALIGNED
    columns = GROUP * tl.arange(0, BLOCK // GROUP)[:, None] + tl.arange(0, GROUP)[None, :]  # (BLOCK / GROUP, GROUP)

    # by group: largest z, Σ exp(z − largest), Σ exp(z − largest)·(z − largest), Σ z, whether an entry precedes the target's in the order
    top = tl.full([BLOCK // GROUP], -1e30, tl.float32)  # finite, so that a group without any entry is no inf − inf
    mass = tl.zeros([BLOCK // GROUP], tl.float32)
    moment = tl.zeros([BLOCK // GROUP], tl.float32)
    z_sum = tl.zeros([BLOCK // GROUP], tl.float32)
    beaten = tl.zeros([BLOCK // GROUP], tl.int32)
    for start in range(0, width, BLOCK):
        column = start + columns
        y = tl.load(logits + column, mask=column < width, other=0.0, eviction_policy="evict_last").to(tl.float32)
        z = _transformed(y, inner, outer, SOFTCAP)[0]
        z = tl.where(column < V, z, float("-inf"))
        higher = tl.maximum(top, tl.max(z, 1))
        distance = z - higher[:, None]
        e = tl.exp(distance)
        decay = tl.exp(top - higher)
        if STATISTICS:
            moment = decay * (moment + mass * (top - higher)) + tl.sum(e * tl.maximum(distance, -1e30), 1)
            ahead = (z > z_target) | ((z == z_target) & (column < t))
            beaten = tl.maximum(beaten, tl.max(ahead.to(tl.int32), 1))
        mass = mass * decay + tl.sum(e, 1)
        if SMOOTHING:
            z_sum += tl.sum(tl.where(column < V, z, 0.0), 1)
        top = higher

    peak = tl.max(top, 0)
    share = tl.exp(top - peak)
    whole = tl.sum(mass * share, 0)
    log_whole = tl.log(whole)
    lse = peak + log_whole
    log_prob = (z_target - peak) - log_whole  # in this order large logits cancel before they round
    loss = z_loss * lse * lse - (1.0 - smoothing) * log_prob
    if SMOOTHING:
        loss += smoothing * (lse - tl.sum(z_sum, 0) / V)
    tl.store(losses + row, loss)
    if STATISTICS:
        mean = tl.sum(share * (moment + mass * (top - peak)), 0) / whole
        tl.store(statistics + row, log_prob)
        tl.store(statistics + total + row, log_whole - mean)
        tl.store(statistics + 2 * total + row, (tl.max(beaten, 0) == 0).to(tl.float32))

    if GRADIENT:
        scale = tl.where(valid, slope, float("nan"))
        if row_weight is not None:
            scale *= tl.load(row_weight + row)
        of_p = scale * (1.0 + 2.0 * z_loss * lse) / whole
        of_target = scale * (1.0 - smoothing)
        of_all = scale * smoothing / V
        for done in range(0, width, BLOCK):
            column = (width - 1) // BLOCK * BLOCK - done + columns
            y = tl.load(logits + column, mask=column < width, other=0.0, eviction_policy="evict_first").to(tl.float32)
            z, tanh = _transformed(y, inner, outer, SOFTCAP)
            g = of_p * tl.exp(z - peak) - tl.where(column == t, of_target, 0.0) - of_all
            if SOFTCAP:
                g *= 1.0 - tanh * tanh
            tl.store(logits + column, g, mask=column < width)


LAUNCH = {
    (ANY, 512): Launch({"BLOCK": 512}, 2),
    (ANY, 4096): Launch({"BLOCK": 2048}, 4),
    (ANY, None): Launch({"BLOCK": 8192}, 32),
    ("gfx942", 512): Launch({"BLOCK": 512}, 1),
    ("gfx942", 4096): Launch({"BLOCK": 2048}, 4),
    ("gfx942", None): Launch({"BLOCK": 8192}, 16),
}


def cross_entropy_rows(logits: Tensor, rows: slice | Tensor, target: Tensor, row_weight: Tensor | None, losses: Tensor,
                       statistics: Tensor | None, loss: Loss, want_gradient: bool) -> Tensor | None:
    """Write the losses and statistics of `rows`, and return their gradients ∂(w·l)/∂y [n, V] or None.

    l goes to losses[rows], the statistics to statistics[:, rows]. logits [n, V] from `new_logits` are overwritten; with Triton the gradient
    replaces them, otherwise it is in the statistics dtype. target, row_weight, losses [S] and statistics [3, S] are dense; the last three
    have the statistics dtype.
    """
    if not triton_serves(logits):
        weight = None if row_weight is None else row_weight[rows]
        losses[rows], row_statistics, gradient = cross_entropy_rows_reference(logits, target[rows], weight, loss, statistics is not None,
                                                                              want_gradient)
        if statistics is not None:
            statistics[:, rows] = row_statistics
        return gradient
    n, V = logits.shape
    smoothing, z_loss, softcap, logit_scale, temperature = loss
    index, first = (None, rows.start) if isinstance(rows, slice) else (rows, 0)
    launch(_rows_kernel, (n,), pick(LAUNCH, V, logits.device), logits, index, target, row_weight, losses, statistics, logits.stride(0), V,
           first, target.shape[0], *transform_factors(loss), logit_scale / temperature, float(smoothing), float(z_loss),
           SOFTCAP=softcap is not None, SMOOTHING=smoothing != 0, STATISTICS=statistics is not None, GRADIENT=want_gradient,
           GROUP=16 // logits.itemsize, ALIGNED=ALIGNED)
    return logits if want_gradient else None


def _aot(vocabulary: int, loss: Loss, statistics: bool, want_gradient: bool):
    S = 8192
    logits = new_logits(2048, vocabulary, torch.empty(0, dtype=torch.bfloat16, device="meta"))
    target = torch.empty(S, dtype=torch.int64, device="meta")
    weight, losses, row_statistics = (torch.empty(shape, device="meta") for shape in (S, S, (3, S)))
    cross_entropy_rows(logits, target[:2048], target, weight, losses, row_statistics if statistics else None, loss, want_gradient)


AOT = {
    "cross entropy rows": lambda: _aot(128256, Loss(), False, True),
    "cross entropy rows, loss only": lambda: _aot(128256, Loss(), False, False),
    "cross entropy rows, every option": lambda: _aot(262145, Loss(0.1, 1e-4, 30.0, 1.0, 0.7), True, True),
}
