"""Head and cross entropy in one op: the S x V logits never exist, only one chunk of rows at a time.

For row i with target t_i, weight w_i and the loss l of a row of logits that `_cross_entropy_rows.py` states, optionally with LoRA:

    y_i = W x_i + b + a·B A x_i                          LoRA on the head: A [R, D], B [V, R], a its scaling
    sum:   L = Σ w_i l(y_i)     mean: L = Σ w_i l(y_i) / Σ w_i     none: w_i l(y_i)
    g_i = w_i·∂l/∂y_i            h_i = Bᵀg_i
    ∂L/∂x_i = Wᵀg_i + a·Aᵀh_i    ∂L/∂W = Σ g_i x_iᵀ    ∂L/∂b = Σ g_i    ∂L/∂A = a Σ h_i x_iᵀ    ∂L/∂B = a Σ g_i (A x_i)ᵀ

Why it pays. At V = 128k the logits of 8192 rows are 2 GB in bf16 and 4 GB in fp32, written and read several times; the three products
(y, ∂x, ∂W) cost 2·S·D·V FLOP each and are nearly all of the time. So the only real gains are fewer rows and fewer products:
- rows whose target is `ignore_index` are left out before the first product;
- frozen head: g_i depends on row i alone, so the forward keeps the unit gradient Wᵀg_i (S x D) and the backward is a row scale: 2 products
  for any upstream gradient, where recomputing takes 3;
- trained head, sum or mean: the upstream is one number, so the gradients are made in the forward: 3 products (LoRA alone: 2);
- trained head, none: the upstream is not known in the forward, so the backward computes the logits again: 4 products (LoRA alone: 3);
- nothing to differentiate: 1 product.
LoRA adds small ones: A x_i and B(A x_i) to each y; h and Aᵀh to ∂x; one each to ∂A and ∂B. Statistics of the rows cost no product.

Products run in x's dtype (autocast is not consulted), statistics and the sums over chunks in fp32 (fp64 for fp64), rounded once. On a GPU
a chunk is one launch each for y, the rows, ∂x and ∂W, whose product adds to the fp32 sum in place; ignored rows add a gather, a scatter
and the one wait for the host that learns how many rows are left.

On an H200 at 8192 x 4096 x 128256 in bf16, predicted, not measured (11.6 ms a product, at 75% of 989 TFLOP/s; memory at 4.8 TB/s):
- frozen 23.2 + 0.9 (rows) = 24 ms, half of the rows ignored 12. Memory: one chunk of 2048 rows, 0.53 GB, and the unit gradient, 0.07 GB;
- trained 34.8 + 0.9 + up to 1.3 (the fp32 ∂W is written by the first of two chunks, read and written by the second) = 36 to 37 ms. Memory
  3.3 GB: the fp32 ∂W, 2.1 GB, and a chunk of D rows, whose 1.05 GB go to the rounded ∂W when the chunk is gone. With 3 products and exact
  sums it cannot be less than min(2·S, 4·D) bytes per token of the vocabulary, 2.1 GB: every row's 16-bit g, or the sums.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._autocast import autocast_is_on
from kernels._cross_entropy_rows import Loss, check_targets, cross_entropy_rows, new_logits, padded, statistics_dtype
from kernels._dispatch import operator, serving
from kernels.lora import Lora

# One chunk of fp32 logits. Forward + backward, best ms on one core at S=500, D=256, V=8192, fp32 / bf16:
#   chunk           1 MB        4 MB        8 MB        16 MB       stock, full logits
#   head frozen     55 / 17     51 / 15     52 / 14     48 / 15     54 / 17
#   head trained    84 / 39     78 / 25     76 / 22     73 / 22     82 / 23
CPU_CHUNK_BYTES = 8 << 20
# Each chunk reads all of W, so a wide vocabulary needs rows more than a cache-sized chunk. ms on one core, head frozen,
# at S=512, D=1024, V=128256 in bf16 by rows: 16 -> 1694, 64 -> 850, 128 -> 752, 256 -> 690, 512 -> 710.
CPU_MIN_ROWS = 256
# At 2048 rows a product does 2048 FLOP per byte of W that it reads, ten times what a GPU needs to be bound by arithmetic; rows come in
# whole tiles of the product.
DEVICE_CHUNK_BYTES = 1 << 29
DEVICE_MIN_ROWS = 2048
TILE_ROWS = 128

Head = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]  # x, weight, bias, A, B


class Settings(NamedTuple):
    """What the op takes beside its tensors."""

    loss: Loss
    ignore_index: int | None
    lora_scaling: float
    chunk_bytes: int | None
    statistics: bool


class TokenStatistics(NamedTuple):
    """The loss, and by row what its logits say of the target; an ignored row has 0, 0, False."""

    loss: Tensor  # as `linear_cross_entropy` returns it
    log_prob: Tensor  # [S] log p_t
    entropy: Tensor  # [S] of p, in nats
    correct: Tensor  # [S] bool: p is largest at t (of equal ones the first counts)


def rows_per_chunk(vocabulary: int, dtype: torch.dtype, device_type: str, chunk_bytes: int | None = None) -> int:
    """Rows whose logits fill `chunk_bytes`: in `dtype` where Triton serves it, in the statistics dtype in the reference.

    The defaults keep at least CPU_MIN_ROWS or DEVICE_MIN_ROWS. The reference also holds a copy of 16-bit logits in their own dtype.
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


def _results(x, weight, target, bias, A, B, row_weight, label_smoothing, z_loss, softcap, logit_scale, temperature, ignore_index,
             lora_scaling, chunk_bytes, statistics, wanted):
    """What `_linear_cross_entropy` returns, uninitialised."""
    exact, S = statistics_dtype(x), x.shape[0]
    sums = (x.new_empty(t.shape if want else 0, dtype=exact) for t, want in zip((weight, bias, A, B), wanted[1:]))
    return (x.new_empty(S, dtype=exact), x.new_empty(3 if statistics else 0, S, dtype=exact), x.new_empty(x.shape if wanted[0] else 0),
            *sums)


@operator(_results)
def _linear_cross_entropy(
        x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, A: Tensor | None, B: Tensor | None, row_weight: Tensor | None,
        label_smoothing: float, z_loss: float, softcap: float | None, logit_scale: float, temperature: float, ignore_index: int | None,
        lora_scaling: float, chunk_bytes: int | None, statistics: bool, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses l_i [S], unweighted; statistics [3, S]; and the wanted gradients of Σ row_weight_i·l_i (row_weight None: all 1).

    `wanted` are those of x, weight, bias, A, B: x's in its dtype, the others in the statistics dtype; what is not wanted is empty.
    """
    loss = Loss(label_smoothing, z_loss, softcap, logit_scale, temperature)
    exact, (S, D), V = statistics_dtype(x), x.shape, weight.shape[0]
    if x.device.type == "cpu":
        check_targets(target, ignore_index, V)
    target, row_weight = target.contiguous(), None if row_weight is None else row_weight.to(exact).contiguous()
    # The one place that reads the device: how many rows are left is known to the host only after a sync.
    kept = None if ignore_index is None else (target != ignore_index).nonzero()[:, 0]
    count = S if kept is None else kept.shape[0]
    results = _results(x, weight, target, bias, A, B, row_weight, *loss, ignore_index, lora_scaling, chunk_bytes, statistics, wanted)
    losses, figures, dx, dweight, dbias, dA, dB = results
    want_x, want_weight, want_bias, want_A, want_B = wanted
    for result in (losses, figures, dx, dbias) if count else results:  # the other sums are written by the first chunk
        result.zero_()

    step = rows_per_chunk(V, x.dtype, x.device.type, chunk_bytes)
    if want_weight and chunk_bytes is None and x.is_cuda:
        step = max(step, D)  # as much as the rounded ∂W will take when the chunks are gone
    buffer = new_logits(min(step, count), V, x)
    A, B = (None if t is None else t.to(x.dtype) for t in (A, B))
    with torch.autocast(x.device.type, enabled=False) if autocast_is_on(x.device) else nullcontext():
        for start in range(0, count, step):
            rows = slice(start, min(start + step, count)) if kept is None else kept[start:start + step]
            x_rows = x[rows]
            logits = buffer[:x_rows.shape[0]]
            squeezed = _logits((x_rows, weight, bias, A, B), lora_scaling, out=logits)
            g = cross_entropy_rows(logits, rows, target, row_weight, losses, figures if statistics else None, loss, any(wanted))
            if g is None:
                continue
            if want_bias:
                dbias += g.sum(0, dtype=exact)
            g = g if g.dtype == x.dtype else logits.copy_(g)
            h = g @ B if want_A or (want_x and B is not None) else None
            if want_x:
                part = g @ weight
                dx[rows] = part if h is None else part.addmm_(h, A, alpha=lora_scaling)
            if want_weight:
                add_product(dweight, g.t(), x_rows, start)
            if want_A:
                add_product(dA, h.t(), x_rows, start)
            if want_B:
                add_product(dB, g.t(), squeezed, start)
    for result in (dA, dB) if A is not None else ():
        result.mul_(lora_scaling)
    return results


def _logits(head: Head, scaling: float, out: Tensor) -> Tensor | None:
    """Writes y [n, V] to `out`; returns x Aᵀ [n, R] where there is LoRA."""
    x, weight, bias, A, B = head
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
    if A is None:
        return None
    squeezed = x @ A.t()
    out.addmm_(squeezed, B.t(), alpha=scaling)
    return squeezed


def add_product(total: Tensor, a: Tensor, b: Tensor, start: int) -> None:
    """total += a b, or total = a b of the first chunk, in total's dtype. On a GPU the product itself adds: no second matrix of its size."""
    beta = 1.0 if start else 0.0
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    elif start:
        total += a @ b
    else:
        total.copy_(a @ b)


# ---------------------------------------------------------------- autograd


def _run(head: Head, target: Tensor, row_weight: Tensor | None, settings: Settings, wanted: list[bool]) -> tuple[Tensor, ...]:
    x, weight, bias, A, B = head
    return _linear_cross_entropy(x, weight, target, bias, A, B, row_weight, *settings.loss, *settings[1:], wanted)


class _InForward(torch.autograd.Function):
    """Gradients made in the forward, scaled in the backward: of every row's loss under a frozen head, or of Σ row_weight_i·l_i."""

    @staticmethod
    def forward(ctx, target, settings, row_weight, *head):
        wanted = list(ctx.needs_input_grad[3:])
        losses, statistics, *gradients = _run(head, target, row_weight, settings, wanted)
        ctx.save_for_backward(losses, *gradients)
        ctx.dtypes = [t.dtype if want else None for t, want in zip(head, wanted)]
        ctx.mark_non_differentiable(statistics)
        return losses if row_weight is None else losses.dot(row_weight), statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        losses, *gradients = ctx.saved_tensors
        scale = upstream[:, None] if upstream.dim() else upstream
        # rounded once, on a GPU without an fp32 copy on the way
        scaled = (torch.mul(g, scale, out=torch.empty_like(g, dtype=dtype)) if dtype else None for g, dtype in zip(gradients, ctx.dtypes))
        return None, None, losses * upstream if ctx.needs_input_grad[2] else None, *scaled


class _Recomputed(torch.autograd.Function):
    """Losses of all rows under a trained head: the backward computes the logits again, the rows' weights now known."""

    @staticmethod
    def forward(ctx, target, settings, *head):
        ctx.save_for_backward(target, *head)
        ctx.settings = settings._replace(statistics=False)
        losses, statistics, *_ = _run(head, target, None, settings, [False] * 5)
        ctx.mark_non_differentiable(statistics)
        return losses, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        target, *head = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[2:])
        _, _, *gradients = _run(head, target, upstream, ctx.settings, wanted)
        return None, None, *(g.to(t.dtype) if want else None for g, t, want in zip(gradients, head, wanted))


def _losses(head: Head, target: Tensor, token_weight: Tensor | None, reduction: str, settings: Settings) -> tuple[Tensor, Tensor]:
    """The public loss, differentiable by the cheapest way, and statistics [3, S]."""
    exact = statistics_dtype(head[0])
    row_weight = torch.ones_like(target, dtype=exact) if token_weight is None else token_weight.to(exact)
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in head[1:])
    if trained and reduction != "none":
        loss, statistics = _InForward.apply(target, settings, row_weight, *head)
    else:
        if trained:
            losses, statistics = _Recomputed.apply(target, settings, *head)
        elif torch.is_grad_enabled() and head[0].requires_grad:
            losses, statistics = _InForward.apply(target, settings, None, *head)
        else:
            losses, statistics, *_ = _run(head, target, None, settings, [False] * 5)
        loss = losses * row_weight if reduction == "none" else losses.dot(row_weight)
    if reduction == "mean":
        kept = row_weight if settings.ignore_index is None else row_weight.masked_fill(target == settings.ignore_index, 0.0)
        total = kept.sum()
        loss = loss / torch.where(total == 0, 1.0, total)
    return loss, statistics


# ---------------------------------------------------------------- public


def _check(op: str, x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, lora: Lora | None, token_weight: Tensor | None,
           reduction: str, chunk_bytes: int | None, loss: Loss) -> None:
    """ValueError unless all arguments fit each other."""

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
    if lora is not None:
        R = lora.A.shape[:1]
        expect_tensor("lora.A", lora.A, (*R, D), None)
        expect_tensor("lora.B", lora.B, (V, *R), None)
        expect(lora.dropout == 0, "a lora without dropout on the head", lora.dropout)
        expect(lora.magnitude is None, "a lora without magnitude on the head", "one")
    expect(reduction in ("sum", "mean", "none"), "reduction 'sum', 'mean' or 'none'", repr(reduction))
    expect(chunk_bytes is None or chunk_bytes > 0, "chunk_bytes > 0 or None", chunk_bytes)
    expect(0 <= loss.label_smoothing < 1, "label_smoothing in [0, 1)", loss.label_smoothing)
    expect(loss.softcap is None or loss.softcap > 0, "softcap > 0 or None", loss.softcap)
    expect(loss.temperature > 0, "temperature > 0", loss.temperature)


def _checked_losses(op: str, statistics: bool, x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, lora: Lora | None,
                    token_weight: Tensor | None, reduction: str, ignore_index: int | None, chunk_bytes: int | None,
                    loss: Loss) -> tuple[Tensor, Tensor]:
    _check(op, x, weight, target, bias, lora, token_weight, reduction, chunk_bytes, loss)
    A, B, scaling = (None, None, 1.0) if lora is None else lora[:3]
    settings = Settings(loss, ignore_index, float(scaling), chunk_bytes, statistics)
    return _losses((x, weight, bias, A, B), target, token_weight, reduction, settings)


def linear_log_prob(x: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None, lora: Lora | None = None,
                    ignore_index: int | None = -100, softcap: float | None = None, logit_scale: float = 1.0, temperature: float = 1.0,
                    chunk_bytes: int | None = None) -> Tensor:
    """log p(target_i | x_i) [S] in fp32 for x [S, D], weight [V, D], target [S]; 0 where the target is ignore_index.

    Options and errors as in `linear_cross_entropy`.
    """
    loss = Loss(0.0, 0.0, softcap, logit_scale, temperature)
    return -_checked_losses("linear_log_prob", False, x, weight, target, bias, lora, None, "none", ignore_index, chunk_bytes, loss)[0]


def linear_cross_entropy_statistics(
        x: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None, lora: Lora | None = None,
        token_weight: Tensor | None = None, ignore_index: int | None = -100, label_smoothing: float = 0.0, z_loss: float = 0.0,
        softcap: float | None = None, logit_scale: float = 1.0, temperature: float = 1.0, reduction: str = "none",
        chunk_bytes: int | None = None) -> TokenStatistics:
    """`linear_cross_entropy`, and what else its pass over the logits sees, at no extra product.

    Only the loss is differentiable; log_prob, entropy and correct are marked as not. A log-probability with a gradient is
    `linear_log_prob`: this loss times -1 for reduction "none" without weights, smoothing and z-loss.
    """
    loss = Loss(label_smoothing, z_loss, softcap, logit_scale, temperature)
    value, (log_prob, entropy, correct) = _checked_losses(
        "linear_cross_entropy_statistics", True, x, weight, target, bias, lora, token_weight, reduction, ignore_index, chunk_bytes, loss)
    return TokenStatistics(value, log_prob, entropy, correct != 0)


def linear_cross_entropy(
        x: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None, lora: Lora | None = None,
        token_weight: Tensor | None = None, ignore_index: int | None = -100, label_smoothing: float = 0.0, z_loss: float = 0.0,
        softcap: float | None = None, logit_scale: float = 1.0, temperature: float = 1.0, reduction: str = "sum",
        chunk_bytes: int | None = None) -> Tensor:
    """Cross entropy of softcap(logit_scale·(x Wᵀ + b + LoRA)) / temperature with target, in fp32 (fp64 for fp64 inputs).

    x [S, D], weight [V, D], bias [V], target [S] int64, token_weight [S] (differentiable); lora: A [R, D] and B [V, R] in any floating
    dtype, no dropout, no magnitude. `mean` divides by the summed weight of the rows that are not ignored. With nothing to sum the result
    is a differentiable 0. `ignore_index=None` says that no row is ignored: then nothing waits for the device. `chunk_bytes` bounds the
    largest tensor of logits: one chunk's, in x's dtype with Triton and in fp32 (fp64) in the reference (`rows_per_chunk`).
    ValueError for arguments that do not fit. A target outside [0, V) is one on a CPU, and on a GPU makes loss and gradients NaN.
    """
    loss = Loss(label_smoothing, z_loss, softcap, logit_scale, temperature)
    return _checked_losses("linear_cross_entropy", False, x, weight, target, bias, lora, token_weight, reduction, ignore_index,
                           chunk_bytes, loss)[0]
