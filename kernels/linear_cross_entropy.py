"""Head and cross entropy in one op: the T x V logits never exist, only one chunk of rows at a time.

For row i with target t, weight w_i, label smoothing ε, z-loss ζ, logit scale s and softcap c:

    z   = c·tanh(s·(W x_i + b) / c)                      (c absent: z = s·(W x_i + b))
    lse = log Σ_v exp z_v                                p = exp(z − lse)
    l_i = lse − (1−ε)·z_t − (ε/V)·Σ_v z_v + ζ·lse²
    ∂l_i/∂z = (1 + 2ζ·lse)·p − (1−ε)·1_t − ε/V
    g_i = s·(1 − (z/c)²)·∂l_i/∂z                         the gradient of the product W x_i + b
    sum:   L = Σ w_i l_i        mean: L = Σ w_i l_i / Σ w_i        none: w_i l_i
    ∂L/∂x_i = w_i·Wᵀg_i          ∂L/∂W = Σ w_i·g_i x_iᵀ          ∂L/∂b = Σ w_i·g_i

Why it pays. At V = 128k the logits of 8192 rows are 2 GB in bf16 and 4 GB in fp32, written and read several times; the
three products (z, ∂x, ∂W) cost 2·S·D·V FLOP each and are nearly all of the time. So the only real gains are fewer rows
and fewer products:
- rows whose target is `ignore_index` are left out before the first product;
- frozen head: g_i depends on row i alone, so the forward keeps the unit gradient Wᵀg_i (S x D) and the backward is a
  row scale: 2 products for any upstream gradient, where recomputing takes 3;
- trained head, sum or mean: the upstream is one number, so the gradients are made in the forward: 3 products;
- trained head, none: the upstream is not known in the forward, so the backward computes the logits again: 4 products;
- nothing to differentiate: 1 product.

Products run in x's dtype (autocast is not consulted), statistics and the sums over chunks in fp32 (fp64 for fp64).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# One chunk of fp32 logits. Forward + backward, best ms on one core at S=500, D=256, V=8192, fp32 / bf16:
#   chunk           1 MB        4 MB        8 MB        16 MB       stock, full logits
#   head frozen     55 / 17     51 / 15     52 / 14     48 / 15     54 / 17
#   head trained    84 / 39     78 / 25     76 / 22     73 / 22     82 / 23
CPU_CHUNK_BYTES = 8 << 20
# Each chunk reads all of W, so a wide vocabulary needs rows more than a cache-sized chunk. ms on one core, head frozen,
# at S=512, D=1024, V=128256 in bf16 by rows: 16 -> 1694, 64 -> 850, 128 -> 752, 256 -> 690, 512 -> 710.
MIN_ROWS = 256
# An accelerator wants 2048-4096 rows a chunk.
DEVICE_CHUNK_BYTES = 1 << 30


class Settings(NamedTuple):
    """What the op takes beside its tensors, in the order of its schema."""

    ignore_index: int | None
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float
    chunk_bytes: int | None


def rows_per_chunk(vocabulary: int, dtype: torch.dtype, device_type: str, chunk_bytes: int | None = None) -> int:
    """Rows whose logits in the statistics dtype fill `chunk_bytes`; the default keeps at least MIN_ROWS."""
    row_bytes = vocabulary * torch.promote_types(dtype, torch.float32).itemsize
    if chunk_bytes is not None:
        return max(1, chunk_bytes // row_bytes)
    return max(MIN_ROWS, (CPU_CHUNK_BYTES if device_type == "cpu" else DEVICE_CHUNK_BYTES) // row_bytes)


def statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def linear_cross_entropy_reference(
        x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, row_weight: Tensor | None, settings: Settings,
        want_x: bool, want_weight: bool, want_bias: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Losses l_i [S], unweighted, and the wanted gradients of Σ row_weight_i·l_i (row_weight None: all 1).

    dx [S, D] is in x's dtype, dweight [V, D] and dbias [V] in the statistics dtype. Ignored rows have loss and dx 0.
    """
    exact = statistics_dtype(x)
    losses = x.new_zeros(x.shape[0], dtype=exact)
    dx = torch.zeros_like(x) if want_x else None
    dweight = torch.zeros_like(weight, dtype=exact) if want_weight else None
    dbias = weight.new_zeros(weight.shape[0], dtype=exact) if want_bias else None
    # The one place that reads the device: how many rows are left is known to the host only after a sync.
    kept = None if settings.ignore_index is None else (target != settings.ignore_index).nonzero()[:, 0]
    count = x.shape[0] if kept is None else kept.shape[0]
    step = max(1, min(rows_per_chunk(weight.shape[0], weight.dtype, weight.device.type, settings.chunk_bytes), count))
    buffer = x.new_empty(step, weight.shape[0])
    for start in range(0, count, step):
        stop = min(start + step, count)
        rows = slice(start, stop) if kept is None else kept[start:stop]
        x_rows, product = x[rows], buffer[: stop - start]
        _product(x_rows, weight, bias, out=product)
        losses[rows], gradient = _loss_and_slope(product, target[rows], settings, want_x or want_weight or want_bias)
        if gradient is None:
            continue
        scale = settings.logit_scale if row_weight is None else settings.logit_scale * row_weight[rows, None].to(exact)
        if row_weight is not None or scale != 1.0:
            gradient.mul_(scale)
        if want_bias:
            dbias += gradient.sum(0)
        gradient = gradient if gradient.dtype == x.dtype else product.copy_(gradient)
        if want_x:
            dx[rows] = gradient @ weight
        if want_weight and exact == x.dtype:
            dweight.addmm_(gradient.t(), x_rows)
        elif want_weight:
            dweight += gradient.t() @ x_rows
    return losses, dx, dweight, dbias


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def _loss_and_slope(product: Tensor, target: Tensor, settings: Settings,
                    want_slope: bool) -> tuple[Tensor, Tensor | None]:
    """l [n] and s⁻¹·g [n, V] of one chunk of products [n, V], which it may overwrite."""
    _, smoothing, z_loss, softcap, logit_scale, _ = settings
    columns = target[:, None]
    z = product.to(statistics_dtype(product))
    if logit_scale != 1.0:
        z.mul_(logit_scale)
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    z_max, z_target = z.amax(1, keepdim=True), z.gather(1, columns)
    z_mean = z.mean(1, keepdim=True) if smoothing else 0.0
    # torch's fused softmax takes half the time of logsumexp; its largest entry is exp(z_max - lse), never an underflow.
    p = torch.softmax(z, 1) if softcap is not None and want_slope else torch.softmax(z, 1, out=z)
    lse = z_max - p.amax(1, keepdim=True).log()
    loss = lse - (1.0 - smoothing) * z_target - smoothing * z_mean + z_loss * lse.square()
    if not want_slope:
        return loss[:, 0], None
    if z_loss:
        p.mul_(1.0 + 2.0 * z_loss * lse)
    if smoothing:
        p.sub_(smoothing / p.shape[1])
    p.scatter_add_(1, columns, torch.full_like(lse, smoothing - 1.0))
    if softcap is not None:
        p.mul_(z.div_(softcap).square_().neg_().add_(1.0))
    return loss[:, 0], p


@torch.library.custom_op("steadfast::linear_cross_entropy", mutates_args=())
def _op(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, row_weight: Tensor | None,
        ignore_index: int | None, label_smoothing: float, z_loss: float, softcap: float | None, logit_scale: float,
        chunk_bytes: int | None, want_x: bool, want_weight: bool, want_bias: bool
        ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reference as one opaque node, so torch.compile neither unrolls the chunks nor breaks on the compaction.

    A gradient that is not wanted comes back empty: a schema has no optional results.
    """
    settings = Settings(ignore_index, label_smoothing, z_loss, softcap, logit_scale, chunk_bytes)
    if x.device.type == "cpu":
        _check_targets(target, ignore_index, weight.shape[0])
    wanted = want_x, want_weight, want_bias
    results = linear_cross_entropy_reference(x, weight, target, bias, row_weight, settings, *wanted)
    return tuple(x.new_empty(0) if result is None else result for result in results)


@_op.register_fake
def _(x, weight, target, bias, row_weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale, chunk_bytes,
      want_x, want_weight, want_bias):
    exact = statistics_dtype(x)
    return (x.new_empty(x.shape[0], dtype=exact),
            torch.empty_like(x) if want_x else x.new_empty(0),
            torch.empty_like(weight, dtype=exact) if want_weight else x.new_empty(0),
            weight.new_empty(weight.shape[0], dtype=exact) if want_bias else x.new_empty(0))


class _FrozenRows(torch.autograd.Function):
    """Losses of all rows under a head that gets no gradient: the saved unit gradients wait for their row's scale."""

    @staticmethod
    def forward(ctx, x, weight, target, bias, settings):
        losses, unit, _, _ = _op(x, weight, target, bias, None, *settings, True, False, False)
        ctx.save_for_backward(unit)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (unit,) = ctx.saved_tensors
        return (unit * upstream[:, None]).to(unit.dtype), None, None, None, None


class _TrainedRows(torch.autograd.Function):
    """Losses of all rows under a trained head: the backward computes the logits again, the rows' weights now known."""

    @staticmethod
    def forward(ctx, x, weight, target, bias, settings):
        ctx.save_for_backward(x, weight, target, bias)
        ctx.settings = settings
        return _op(x, weight, target, bias, None, *settings, False, False, False)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        x, weight, target, bias = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        _, dx, dweight, dbias = _op(x, weight, target, bias, upstream, *ctx.settings, *wanted)
        return (dx if wanted[0] else None, dweight.to(weight.dtype) if wanted[1] else None, None,
                dbias.to(weight.dtype) if wanted[2] else None, None)


class _TrainedSum(torch.autograd.Function):
    """Σ row_weight_i·l_i under a trained head: all gradients are made in the forward, the backward scales them."""

    @staticmethod
    def forward(ctx, x, weight, target, bias, row_weight, settings):
        ctx.wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        losses, dx, dweight, dbias = _op(x, weight, target, bias, row_weight, *settings, *ctx.wanted)
        ctx.save_for_backward(dx, dweight, dbias, losses)
        ctx.dtype = weight.dtype
        return losses.dot(row_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        dx, dweight, dbias, losses = ctx.saved_tensors
        want_x, want_weight, want_bias = ctx.wanted
        return ((dx * upstream).to(dx.dtype) if want_x else None,
                (dweight * upstream).to(ctx.dtype) if want_weight else None, None,
                (dbias * upstream).to(ctx.dtype) if want_bias else None,
                losses * upstream if ctx.needs_input_grad[4] else None, None)


def _row_losses(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    """Unweighted losses [S], differentiable by the cheapest of the three ways."""
    if torch.is_grad_enabled() and _trained(weight, bias):
        return _TrainedRows.apply(x, weight, target, bias, settings)
    if torch.is_grad_enabled() and x.requires_grad:
        return _FrozenRows.apply(x, weight, target, bias, settings)
    return _op(x, weight, target, bias, None, *settings, False, False, False)[0]


def _trained(weight: Tensor, bias: Tensor | None) -> bool:
    return weight.requires_grad or (bias is not None and bias.requires_grad)


def _check(op: str, x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, softcap: float | None) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"{op}: expected x [S, D] and weight [V, D], got {tuple(x.shape)} and {tuple(weight.shape)}")
    if x.dtype != weight.dtype or not x.is_floating_point():
        raise ValueError(f"{op}: expected x and weight in one floating dtype, got {x.dtype} and {weight.dtype}")
    if target.shape != x.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"{op}: expected target int64 of shape ({x.shape[0]},), "
                         f"got {target.dtype} {tuple(target.shape)}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(f"{op}: expected bias {weight.dtype} of shape ({weight.shape[0]},), "
                         f"got {bias.dtype} {tuple(bias.shape)}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"{op}: expected softcap > 0 or None, got {softcap}")


def _check_targets(target: Tensor, ignore_index: int | None, vocabulary: int) -> None:
    """Only on the CPU, where reading values costs nothing; elsewhere the gather's device-side assert stands guard."""
    wrong = (target < 0) | (target >= vocabulary)
    if ignore_index is not None:
        wrong &= target != ignore_index
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        also = "" if ignore_index is None else f" or ignore_index {ignore_index}"
        raise ValueError(f"linear_cross_entropy: expected targets in [0, {vocabulary}){also}, "
                         f"got {int(target[row])} at row {row}")


def linear_log_prob(x: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None,
                    ignore_index: int | None = -100, softcap: float | None = None, logit_scale: float = 1.0,
                    chunk_bytes: int | None = None) -> Tensor:
    """log p(target_i | x_i) [S] in fp32 for x [S, D], weight [V, D], target [S]; 0 where the target is ignore_index."""
    _check("linear_log_prob", x, weight, target, bias, softcap)
    return -_row_losses(x, weight, target, bias, Settings(ignore_index, 0.0, 0.0, softcap, logit_scale, chunk_bytes))


def linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None,
                         token_weight: Tensor | None = None, ignore_index: int | None = -100,
                         label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None,
                         logit_scale: float = 1.0, reduction: str = "sum", chunk_bytes: int | None = None) -> Tensor:
    """Cross entropy of softcap(logit_scale·(x Wᵀ + b)) with target, in fp32 (fp64 for fp64 inputs).

    x [S, D], weight [V, D], bias [V], target [S] int64, token_weight [S] (differentiable). `mean` divides by the summed
    weight of the rows that are not ignored. With nothing to sum the result is a differentiable 0. `ignore_index=None`
    says that no row is ignored: then nothing waits for the device. `chunk_bytes` bounds one chunk of fp32 logits.
    """
    _check("linear_cross_entropy", x, weight, target, bias, softcap)
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f"linear_cross_entropy: expected reduction 'sum', 'mean' or 'none', got {reduction!r}")
    if token_weight is not None and token_weight.shape != target.shape:
        raise ValueError(f"linear_cross_entropy: expected token_weight of shape {tuple(target.shape)}, "
                         f"got {tuple(token_weight.shape)}")
    settings = Settings(ignore_index, label_smoothing, z_loss, softcap, logit_scale, chunk_bytes)
    exact = statistics_dtype(x)
    row_weight = torch.ones_like(target, dtype=exact) if token_weight is None else token_weight.to(exact)
    if reduction == "mean":
        kept = row_weight if ignore_index is None else row_weight.masked_fill(target == ignore_index, 0.0)
        total = kept.sum()
        row_weight = row_weight / torch.where(total == 0, 1.0, total)
    if reduction != "none" and torch.is_grad_enabled() and _trained(weight, bias):
        return _TrainedSum.apply(x, weight, target, bias, row_weight, settings)
    losses = _row_losses(x, weight, target, bias, settings)
    return losses * row_weight if reduction == "none" else losses.dot(row_weight)
