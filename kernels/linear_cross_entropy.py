"""Language-model head and cross entropy in one operation, without materialising the [S, V] logits.

For row i with target t_i, weight w_i and the loss l of a row of logits that `_cross_entropy_rows.py` defines, optionally with LoRA:

    y_i = W x_i + b + a·B A x_i                          LoRA on the head: A [R, D], B [V, R], a its scaling
    sum:   L = Σ w_i l(y_i)     mean: L = Σ w_i l(y_i) / Σ w_i     none: w_i l(y_i)
    g_i = w_i·∂l/∂y_i            h_i = Bᵀg_i
    ∂L/∂x_i = Wᵀg_i + a·Aᵀh_i    ∂L/∂W = Σ g_i x_iᵀ    ∂L/∂b = Σ g_i    ∂L/∂A = a Σ h_i x_iᵀ    ∂L/∂B = a Σ g_i (A x_i)ᵀ

Rows in `entropy_weighted` are weighted by EAFT: their l is multiplied by the normalised entropy of their 20 most probable tokens, held
constant in the gradient (kernels/_top_entropy_rows.py), which is known before the row's gradient is and so costs no matmul.

Logits are computed for one chunk of rows at a time. Rows whose target is `ignore_index` are dropped before the first matmul. Nearly all
of the time goes into the three matmuls (y, ∂x, ∂W; 2·S·D·V FLOP each), so each case computes as few as it can:
- frozen head: g_i depends on row i only, so the forward computes Wᵀg_i and the backward scales its rows: 2 matmuls;
- trained head, sum or mean: the upstream gradient is a scalar, so the forward computes all gradients: 3 matmuls;
- trained head, none: the upstream gradient is unknown in the forward, so the backward recomputes the logits: 4 matmuls;
- nothing requires a gradient: 1 matmul.
Matmuls run in x's dtype (autocast does not apply); statistics and sums over chunks are fp32 (fp64 for fp64), rounded once.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._autocast import autocast_is_on
from kernels._cross_entropy_rows import Loss, check_targets, cross_entropy_rows, new_logits, padded, statistics_dtype
from kernels._dispatch import operator, serving
from kernels._top_entropy_rows import top_entropy_weights
from kernels.lora import Lora

# Chunks on a CPU: logits that fit its caches, but at least CPU_MIN_ROWS rows, since every chunk reads all of W.
CPU_CHUNK_BYTES = 8 << 20
CPU_MIN_ROWS = 256
# Chunks on a GPU: at 2048 rows a matmul does 2048 FLOP per byte of W, which makes it bound by arithmetic. Rows come in whole tiles of it.
DEVICE_CHUNK_BYTES = 1 << 29
DEVICE_MIN_ROWS = 2048
TILE_ROWS = 128


class Head(NamedTuple):
    """Hidden states and the head that turns them into logits."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora: Lora | None


class Options(NamedTuple):
    """Every argument of the public functions that is no tensor."""

    loss: Loss
    ignore_index: int | None
    chunk_bytes: int | None
    reduction: str = "none"
    statistics: bool = False  # also compute the rows' log-probabilities, entropies and whether they are correct


class TokenStatistics(NamedTuple):
    """The loss, and per row what the logits say of the target; ignored rows have 0, 0, False."""

    loss: Tensor  # as `linear_cross_entropy` returns it
    log_prob: Tensor  # [S] log p_t
    entropy: Tensor  # [S] of p, in nats
    correct: Tensor  # [S] bool: p is largest at t (of equal ones the first counts)


def rows_per_chunk(vocabulary: int, dtype: torch.dtype, device_type: str, chunk_bytes: int | None = None) -> int:
    """Return how many rows of logits fit into `chunk_bytes`.

    Logits have `dtype` with Triton and the statistics dtype in the reference, which also holds a copy of 16-bit logits in their own dtype.
    The default chunk_bytes keep at least CPU_MIN_ROWS or DEVICE_MIN_ROWS.
    """
    device = torch.device(device_type)
    if serving(device, dtype) == "triton":
        row_bytes = padded(vocabulary) * dtype.itemsize
    else:
        row_bytes = vocabulary * torch.promote_types(dtype, torch.float32).itemsize
    if chunk_bytes is not None:
        return max(1, chunk_bytes // row_bytes)
    if device.type == "cpu":
        return max(CPU_MIN_ROWS, CPU_CHUNK_BYTES // row_bytes)
    return max(DEVICE_MIN_ROWS, DEVICE_CHUNK_BYTES // row_bytes // TILE_ROWS * TILE_ROWS)


def even_chunks(count: int, most: int) -> list[tuple[int, int]]:
    """Divide `count` rows into the fewest chunks of at most `most`, as (start, stop).

    They are equal to within a tile, in whole tiles but the last where `most` is, since every chunk reads all of W, however few its rows.
    """
    tile = TILE_ROWS if most % TILE_ROWS == 0 else 1
    chunks, tiles = -(-count // most), -(-count // tile)
    return [(i * tiles // chunks * tile, min((i + 1) * tiles // chunks * tile, count)) for i in range(chunks)]


# ---------------------------------------------------------------- the operator: losses, statistics and gradients, chunk by chunk


def _empty_results(x, weight, bias, A, B, target, row_weight, entropy_weighted, *, statistics, wanted, **_):
    """Return uninitialised results of `linear_cross_entropy_chunks`."""
    exact, S = statistics_dtype(x), x.shape[0]
    sums = (x.new_empty(t.shape if want else 0, dtype=exact) for t, want in zip((weight, bias, A, B), wanted[1:]))
    return (x.new_empty(S, dtype=exact), x.new_empty(3 if statistics else 0, S, dtype=exact), x.new_empty(x.shape if wanted[0] else 0),
            *sums)


@operator(_empty_results)
def linear_cross_entropy_chunks(
        x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor | None, B: Tensor | None, target: Tensor, row_weight: Tensor | None,
        entropy_weighted: Tensor | None, *, lora_scaling: float, label_smoothing: float, z_loss: float, softcap: float | None,
        logit_scale: float, temperature: float, ignore_index: int | None, chunk_bytes: int | None, statistics: bool, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return losses l_i [S], statistics [3, S] and the wanted gradients of Σ row_weight_i·l_i.

    Losses are not weighted, but for rows in `entropy_weighted` by their entropy; row_weight None means all 1. `wanted` says whether x,
    weight, bias, A, B need a gradient: x's comes in its dtype, the others in the statistics dtype; one that is not wanted is empty.
    """
    loss = Loss(label_smoothing, z_loss, softcap, logit_scale, temperature)
    exact, (S, D), V = statistics_dtype(x), x.shape, weight.shape[0]
    if x.device.type == "cpu":
        check_targets(target, ignore_index, V)
    target, row_weight = target.contiguous(), None if row_weight is None else row_weight.to(exact).contiguous()
    # The only read from the device: the host needs the number of rows that are not ignored.
    used_rows = None if ignore_index is None else (target != ignore_index).nonzero()[:, 0]
    count = S if used_rows is None else used_rows.shape[0]
    results = _empty_results(x, weight, bias, A, B, target, row_weight, entropy_weighted, statistics=statistics, wanted=wanted)
    losses, row_statistics, dx, dweight, dbias, dA, dB = results
    want_x, want_weight, want_bias, want_A, want_B = wanted
    for result in (losses, row_statistics, dx, dbias) if count else results:  # the other sums are written by the first chunk
        result.zero_()

    most = rows_per_chunk(V, x.dtype, x.device.type, chunk_bytes)
    if want_weight and chunk_bytes is None and x.is_cuda:
        most = max(most, D // TILE_ROWS * TILE_ROWS)  # as much memory as the rounded ∂W takes once the chunks are freed
    chunks = even_chunks(count, most)
    buffer = new_logits(max((stop - start for start, stop in chunks), default=0), V, x)
    A, B = (None if t is None else t.to(x.dtype) for t in (A, B))
    if entropy_weighted is not None:
        entropy_weight = x.new_ones(S, dtype=exact)
        row_weight = entropy_weight.clone() if row_weight is None else row_weight.clone()
    with torch.autocast(x.device.type, enabled=False) if autocast_is_on(x.device) else nullcontext():
        for start, stop in chunks:
            first = start == 0
            rows = slice(start, stop) if used_rows is None else used_rows[start:stop]
            x_rows = x[rows]
            logits = buffer[:x_rows.shape[0]]
            x_A = _write_logits(x_rows, weight, bias, A, B, lora_scaling, out=logits)
            if entropy_weighted is not None:
                entropy_weight[rows] = torch.where(entropy_weighted[rows], top_entropy_weights(logits, loss), 1.0)
                row_weight[rows] *= entropy_weight[rows]
            g = cross_entropy_rows(logits, rows, target, row_weight, losses, row_statistics if statistics else None, loss, any(wanted))
            if g is None:
                continue
            if want_bias:
                dbias += g.sum(0, dtype=exact)
            g = g if g.dtype == x.dtype else logits.copy_(g)
            h = g @ B if want_A or (want_x and B is not None) else None
            if want_x:
                dx_rows = torch.mm(g, weight, out=dx[rows]) if used_rows is None else g @ weight
                if h is not None:
                    dx_rows.addmm_(h, A, alpha=lora_scaling)
                if used_rows is not None:
                    dx[rows] = dx_rows
            if want_weight:
                accumulate_matmul(dweight, g.t(), x_rows, first)
            if want_A:
                accumulate_matmul(dA, h.t(), x_rows, first)
            if want_B:
                accumulate_matmul(dB, g.t(), x_A, first)
    for result in (dA, dB) if A is not None else ():
        result.mul_(lora_scaling)
    if entropy_weighted is not None:
        losses.mul_(entropy_weight)
    return results


def _write_logits(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor | None, B: Tensor | None, scaling: float, out: Tensor
                  ) -> Tensor | None:
    """Write y [n, V] to `out`; return x Aᵀ [n, R], or None without LoRA."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
    if A is None:
        return None
    x_A = x @ A.t()
    out.addmm_(x_A, B.t(), alpha=scaling)
    return x_A


def accumulate_matmul(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Add a @ b to `total` in total's dtype; overwrite it if `first`.

    On a GPU the matmul itself accumulates, so no second matrix of total's size exists.
    """
    beta = 0.0 if first else 1.0
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b


# ---------------------------------------------------------------- autograd


def _run(tensors: tuple[Tensor | None, ...], target: Tensor, row_weight: Tensor | None, entropy_weighted: Tensor | None,
         lora_scaling: float, options: Options, wanted: list[bool]) -> tuple[Tensor, ...]:
    """Call the operator for `tensors` = (x, weight, bias, A, B)."""
    loss = options.loss
    return linear_cross_entropy_chunks(
        *tensors, target, row_weight, entropy_weighted, lora_scaling=lora_scaling, label_smoothing=loss.label_smoothing, z_loss=loss.z_loss,
        softcap=loss.softcap, logit_scale=loss.logit_scale, temperature=loss.temperature, ignore_index=options.ignore_index,
        chunk_bytes=options.chunk_bytes, statistics=options.statistics, wanted=wanted)


class _GradientsInForward(torch.autograd.Function):
    """Compute the gradients in the forward and scale them in the backward.

    They are those of every row's loss (row_weight None, frozen head), or of Σ row_weight_i·l_i.
    """

    @staticmethod
    def forward(ctx, target, entropy_weighted, lora_scaling, options, row_weight, *tensors):
        wanted = list(ctx.needs_input_grad[5:])
        losses, statistics, *gradients = _run(tensors, target, row_weight, entropy_weighted, lora_scaling, options, wanted)
        ctx.save_for_backward(losses, *gradients)
        ctx.dtypes = [t.dtype if want else None for t, want in zip(tensors, wanted)]
        ctx.mark_non_differentiable(statistics)
        return losses if row_weight is None else losses.dot(row_weight), statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        losses, *gradients = ctx.saved_tensors
        scale = upstream[:, None] if upstream.dim() else upstream
        # rounded once, on a GPU without an fp32 copy on the way
        scaled = (torch.mul(g, scale, out=torch.empty_like(g, dtype=dtype)) if dtype else None for g, dtype in zip(gradients, ctx.dtypes))
        return None, None, None, None, losses * upstream if ctx.needs_input_grad[4] else None, *scaled


class _GradientsInBackward(torch.autograd.Function):
    """Losses of all rows under a trained head; the backward recomputes the logits.

    Only the backward knows the rows' weights.
    """

    @staticmethod
    def forward(ctx, target, entropy_weighted, lora_scaling, options, *tensors):
        ctx.save_for_backward(target, entropy_weighted, *tensors)
        ctx.lora_scaling, ctx.options = lora_scaling, options._replace(statistics=False)
        losses, statistics, *_ = _run(tensors, target, None, entropy_weighted, lora_scaling, options, [False] * 5)
        ctx.mark_non_differentiable(statistics)
        return losses, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        target, entropy_weighted, *tensors = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[4:])
        _, _, *gradients = _run(tensors, target, upstream, entropy_weighted, ctx.lora_scaling, ctx.options, wanted)
        return None, None, None, None, *(g.to(t.dtype) if want else None for g, t, want in zip(gradients, tensors, wanted))


def _reduced_loss(head: Head, target: Tensor, token_weight: Tensor | None, options: Options, entropy_weighted: Tensor | None = None
                  ) -> tuple[Tensor, Tensor]:
    """Return the reduced loss and statistics [3, S] (empty unless wanted); pick the cheapest backward."""
    A, B, lora_scaling = (None, None, 1.0) if head.lora is None else (head.lora.A, head.lora.B, float(head.lora.scaling))
    tensors = head.x, head.weight, head.bias, A, B
    exact = statistics_dtype(head.x)
    row_weight = torch.ones_like(target, dtype=exact) if token_weight is None else token_weight.to(exact)
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[1:])
    if trained and options.reduction != "none":
        loss, statistics = _GradientsInForward.apply(target, entropy_weighted, lora_scaling, options, row_weight, *tensors)
    else:
        if trained:
            losses, statistics = _GradientsInBackward.apply(target, entropy_weighted, lora_scaling, options, *tensors)
        elif torch.is_grad_enabled() and head.x.requires_grad:
            losses, statistics = _GradientsInForward.apply(target, entropy_weighted, lora_scaling, options, None, *tensors)
        else:
            losses, statistics, *_ = _run(tensors, target, None, entropy_weighted, lora_scaling, options, [False] * 5)
        loss = losses * row_weight if options.reduction == "none" else losses.dot(row_weight)
    if options.reduction == "mean":
        used = row_weight if options.ignore_index is None else row_weight.masked_fill(target == options.ignore_index, 0.0)
        total = used.sum()
        loss = loss / torch.where(total == 0, 1.0, total)
    return loss, statistics


# ---------------------------------------------------------------- public


def _check(op: str, head: Head, target: Tensor, token_weight: Tensor | None, options: Options, entropy_weighted: Tensor | None = None
           ) -> None:
    """Raise ValueError unless all arguments fit each other."""
    x, weight, bias, lora = head
    loss = options.loss

    def expect(right: bool, expected: str, *got):
        if not right:
            raise ValueError(f"{op}: expected {expected}, got {' and '.join(map(str, got))}")

    def expect_tensor(name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None):
        if t.shape != shape or t.device != x.device or (t.dtype != dtype if dtype else not t.is_floating_point()):
            expect(False, f"{name} {dtype or 'floating'} of shape {shape} on {x.device}", f"{t.dtype} {tuple(t.shape)} on {t.device}")

    fit = x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[1]
    expect(fit, "x [S, D] and weight [V, D]", tuple(x.shape), tuple(weight.shape))
    expect(x.dtype == weight.dtype and x.is_floating_point(), "x and weight in one floating dtype", x.dtype, weight.dtype)
    (S, D), V = x.shape, weight.shape[0]
    expect_tensor("weight", weight, (V, D), x.dtype)
    expect(V > 0, "a vocabulary of at least one token", V)
    expect_tensor("target", target, (S,), torch.int64)
    if bias is not None:
        expect_tensor("bias", bias, (V,), x.dtype)
    if token_weight is not None:
        expect_tensor("token_weight", token_weight, (S,), None)
    if entropy_weighted is not None:
        expect_tensor("entropy_weighted", entropy_weighted, (S,), torch.bool)
    if lora is not None:
        R = lora.A.shape[:1]
        expect_tensor("lora.A", lora.A, (*R, D), None)
        expect_tensor("lora.B", lora.B, (V, *R), None)
        expect(lora.dropout == 0, "a lora without dropout on the head", lora.dropout)
        expect(lora.magnitude is None, "a lora without magnitude on the head", "one")
    expect(options.reduction in ("sum", "mean", "none"), "reduction 'sum', 'mean' or 'none'", repr(options.reduction))
    expect(options.chunk_bytes is None or options.chunk_bytes > 0, "chunk_bytes > 0 or None", options.chunk_bytes)
    expect(0 <= loss.label_smoothing < 1, "label_smoothing in [0, 1)", loss.label_smoothing)
    expect(loss.softcap is None or loss.softcap > 0, "softcap > 0 or None", loss.softcap)
    expect(loss.temperature > 0, "temperature > 0", loss.temperature)


def linear_log_prob(x: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None, lora: Lora | None = None,
                    ignore_index: int | None = -100, softcap: float | None = None, logit_scale: float = 1.0, temperature: float = 1.0,
                    chunk_bytes: int | None = None) -> Tensor:
    """Return log p(target_i | x_i) [S] in fp32, differentiable, for x [S, D], weight [V, D], target [S].

    Rows whose target is ignore_index have 0. Options and errors as in `linear_cross_entropy`.
    """
    head = Head(x, weight, bias, lora)
    options = Options(Loss(0.0, 0.0, softcap, logit_scale, temperature), ignore_index, chunk_bytes)
    _check("linear_log_prob", head, target, None, options)
    losses, _ = _reduced_loss(head, target, None, options)
    return -losses


def linear_cross_entropy_statistics(
        x: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None, lora: Lora | None = None,
        token_weight: Tensor | None = None, ignore_index: int | None = -100, label_smoothing: float = 0.0, z_loss: float = 0.0,
        softcap: float | None = None, logit_scale: float = 1.0, temperature: float = 1.0, reduction: str = "none",
        chunk_bytes: int | None = None) -> TokenStatistics:
    """Return `linear_cross_entropy` and per-token statistics, which cost no further matmul.

    Only the loss is differentiable; use `linear_log_prob` for a log-probability with a gradient.
    """
    head = Head(x, weight, bias, lora)
    loss = Loss(label_smoothing, z_loss, softcap, logit_scale, temperature)
    options = Options(loss, ignore_index, chunk_bytes, reduction, statistics=True)
    _check("linear_cross_entropy_statistics", head, target, token_weight, options)
    value, (log_prob, entropy, correct) = _reduced_loss(head, target, token_weight, options)
    return TokenStatistics(value, log_prob, entropy, correct != 0)


def linear_cross_entropy(
        x: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None, lora: Lora | None = None,
        token_weight: Tensor | None = None, entropy_weighted: Tensor | None = None, ignore_index: int | None = -100,
        label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None, logit_scale: float = 1.0, temperature: float = 1.0,
        reduction: str = "sum", chunk_bytes: int | None = None) -> Tensor:
    """Return the cross entropy of softcap(logit_scale·(x Wᵀ + b + LoRA)) / temperature with target.

    x [S, D], weight [V, D], bias [V], target [S] int64, token_weight [S] (differentiable); lora: A [R, D] and B [V, R] in any floating
    dtype, no dropout, no magnitude; entropy_weighted [S] bool: rows that EAFT weights too, by the normalised entropy of their 20 most
    probable tokens, a constant in the gradient. The result is fp32 (fp64 for fp64 inputs). `mean` divides by the summed token_weight of
    the rows that are not ignored; without any row the result is a differentiable 0. With `ignore_index=None` no row is ignored and nothing
    waits for the device. `chunk_bytes` bounds the largest tensor of logits (`rows_per_chunk`).
    Raises ValueError for arguments that do not fit each other and, on a CPU, for targets outside [0, V); on a GPU such a target makes the
    loss and its gradients NaN.
    """
    head = Head(x, weight, bias, lora)
    loss = Loss(label_smoothing, z_loss, softcap, logit_scale, temperature)
    options = Options(loss, ignore_index, chunk_bytes, reduction)
    _check("linear_cross_entropy", head, target, token_weight, options, entropy_weighted)
    return _reduced_loss(head, target, token_weight, options, entropy_weighted)[0]
