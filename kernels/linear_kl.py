"""Two language-model heads and the divergence of their predictions in one operation.

The [S, V] logits are never materialised. For row i with weight w_i, student hidden state x_i under the head (W, b) and reference hidden
state y_i under (W', b'):

    u_i = W x_i + b        u'_i = W' y_i + b'        d_i = divergence of softmax(logits(u_i)) and softmax(logits(u'_i))
    sum:   L = Σ w_i d_i        mean: L = Σ w_i d_i / Σ w_i        none: w_i d_i
    g_i = ∂d_i/∂u_i                                    kernels/_kl_rows.py has the divergences, their gradients and the row kernel
    ∂L/∂x_i = w_i·Wᵀg_i          ∂L/∂W = Σ w_i·g_i x_iᵀ          ∂L/∂b = Σ w_i·g_i

The reference gets no gradient: neither y, W' and b', nor, where both sides share one trained head, W through u'.

Logits of both sides are computed for one chunk of rows at a time. Rows outside `keep` are dropped before the first matmul. The number of
matmuls (2·S·D·V FLOP each) is that of `linear_cross_entropy` plus one for the reference:
- frozen head: the forward computes Wᵀg_i and the backward scales its rows: 3 matmuls;
- trained head, sum or mean: the forward computes all gradients: 4 matmuls;
- trained head, none: the backward recomputes both sides' logits: 6 matmuls;
- nothing requires a gradient: 2 matmuls.
A shared head serves both sides with one call, on the student's rows stacked on the reference's, which reads W once.
Matmuls run in x's dtype (autocast does not apply); statistics and sums over chunks are fp32 (fp64 for fp64).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._autocast import without_autocast
from kernels._cross_entropy_rows import new_logits, statistics_dtype
from kernels._dispatch import operator
from kernels._kl_rows import DIVERGENCES, Rule, kl_rows
from kernels.linear_cross_entropy import accumulate_matmul, even_chunks, rows_per_chunk

REDUCTIONS = ("sum", "mean", "none")


class Sides(NamedTuple):
    """Hidden states and head of student and reference; weight_ref None: both sides use weight and bias."""

    x: Tensor
    weight: Tensor
    x_ref: Tensor
    weight_ref: Tensor | None
    bias: Tensor | None
    bias_ref: Tensor | None


class Wanted(NamedTuple):
    """Whether x, weight and bias need a gradient."""

    x: bool
    weight: bool
    bias: bool


NOTHING = Wanted(False, False, False)


# ---------------------------------------------------------------- the operator: divergences and gradients, chunk by chunk


def _fake_chunks(x, weight, x_ref, weight_ref, bias, bias_ref, row_weight, keep, masked_target, *, want_x, want_weight, want_bias, **_):
    exact = statistics_dtype(x)
    return (x.new_empty(x.shape[0], dtype=exact), x.new_empty(x.shape if want_x else 0),
            weight.new_empty(weight.shape if want_weight else 0, dtype=exact),
            weight.new_empty(weight.shape[0] if want_bias else 0, dtype=exact))


@operator(_fake_chunks)
def linear_kl_chunks(
        x: Tensor, weight: Tensor, x_ref: Tensor, weight_ref: Tensor | None, bias: Tensor | None, bias_ref: Tensor | None,
        row_weight: Tensor | None, keep: Tensor | None, masked_target: Tensor | None, *, divergence: str, beta: float,
        softcap: float | None, logit_scale: float, temperature: float, chunk_bytes: int | None, want_x: bool, want_weight: bool,
        want_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return divergences d_i [S] and the wanted gradients of Σ row_weight_i·d_i (row_weight None: all 1).

    Divergences are not weighted. ∂x [S, D] has x's dtype, ∂W [V, D] and ∂b [V] the statistics dtype; one that is not wanted is empty.
    Rows outside `keep` have divergence and ∂x 0.
    """
    exact, V = statistics_dtype(x), weight.shape[0]
    rule = Rule(divergence, beta, softcap, logit_scale, temperature)
    if x.device.type == "cpu":
        _check_masked_target(masked_target, V)
    losses = x.new_zeros(x.shape[0], dtype=exact)
    dx = x.new_zeros(x.shape if want_x else 0)
    dweight = weight.new_empty(weight.shape if want_weight else 0, dtype=exact)  # written by the first chunk
    dbias = weight.new_zeros(V if want_bias else 0, dtype=exact)
    # The only read from the device: the host needs the number of kept rows.
    kept_rows = None if keep is None else keep.nonzero()[:, 0]
    count = x.shape[0] if kept_rows is None else kept_rows.shape[0]
    if not count:
        dweight.zero_()
    chunks = even_chunks(count, rows_per_chunk(2 * V, x.dtype, x.device.type, chunk_bytes))
    buffer = new_logits(2 * max((stop - start for start, stop in chunks), default=0), V, x)
    for start, stop in chunks:
        rows, n = slice(start, stop) if kept_rows is None else kept_rows[start:stop], stop - start
        x_rows, student, reference = x[rows], buffer[:n], buffer[n:2 * n]
        if weight_ref is None:
            _linear(torch.cat([x_rows, x_ref[rows]]), weight, bias, out=buffer[:2 * n])
        else:
            _linear(x_rows, weight, bias, out=student)
            _linear(x_ref[rows], weight_ref, bias_ref, out=reference)
        scale = None if row_weight is None else row_weight[rows].contiguous()  # an upstream gradient may be an expanded scalar
        masked = None if masked_target is None else masked_target[rows].contiguous()
        losses[rows] = kl_rows(student, reference, scale, masked, rule, want_x or want_weight or want_bias)
        if want_bias:
            dbias += student.sum(0, dtype=exact)
        if want_x:
            dx[rows] = student @ weight
        if want_weight:
            accumulate_matmul(dweight, student.t(), x_rows, first=start == 0)
    return losses, dx, dweight, dbias


def _check_masked_target(masked_target: Tensor | None, vocabulary: int) -> None:
    """Raise ValueError for targets outside the vocabulary; on a CPU, where reading them does not wait."""
    if masked_target is not None and masked_target.numel():
        low, high = torch.stack(masked_target.aminmax()).tolist()
        if low < -1 or high >= vocabulary:
            raise ValueError(f"linear_kl: expected masked_target in [-1, {vocabulary}), got {low} to {high}")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


# ---------------------------------------------------------------- autograd


def _run(sides, row_weight: Tensor | None, keep: Tensor | None, masked_target: Tensor | None, rule: Rule, chunk_bytes: int | None,
         wanted: Wanted) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Call the operator."""
    return linear_kl_chunks(
        *sides, row_weight, keep, masked_target, divergence=rule.divergence, beta=rule.beta, softcap=rule.softcap,
        logit_scale=rule.logit_scale, temperature=rule.temperature, chunk_bytes=chunk_bytes, want_x=wanted.x, want_weight=wanted.weight,
        want_bias=wanted.bias)


# The inputs of all three Functions begin with the six fields of Sides, then `keep`, `masked_target`, the rule and chunk_bytes.


class _FrozenRows(torch.autograd.Function):
    """Divergences of all rows under a frozen head; the backward scales the rows of the saved Wᵀg_i."""

    @staticmethod
    @without_autocast
    def forward(ctx, x, weight, x_ref, weight_ref, bias, bias_ref, keep, masked_target, rule, chunk_bytes, want_x):
        losses, dx, _, _ = _run((x, weight, x_ref, weight_ref, bias, bias_ref), None, keep, masked_target, rule, chunk_bytes,
                                Wanted(want_x, False, False))
        ctx.save_for_backward(dx)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        dx, = ctx.saved_tensors
        return (dx * upstream[:, None]).to(dx.dtype), *(None,) * 10


class _TrainedRows(torch.autograd.Function):
    """Divergences of all rows under a trained head; the backward recomputes the logits.

    Only the backward knows the rows' weights.
    """

    @staticmethod
    @without_autocast
    def forward(ctx, x, weight, x_ref, weight_ref, bias, bias_ref, keep, masked_target, rule, chunk_bytes):
        ctx.save_for_backward(x, weight, x_ref, weight_ref, bias, bias_ref, keep, masked_target)
        ctx.rule, ctx.chunk_bytes = rule, chunk_bytes
        return _run((x, weight, x_ref, weight_ref, bias, bias_ref), None, keep, masked_target, rule, chunk_bytes, NOTHING)[0]

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, upstream):
        *sides, keep, masked_target = ctx.saved_tensors
        wanted = _wanted(ctx)
        _, *gradients = _run(sides, upstream, keep, masked_target, ctx.rule, ctx.chunk_bytes, wanted)
        return *_by_side(gradients, wanted, sides[1].dtype), None, None, None, None


class _TrainedSum(torch.autograd.Function):
    """Σ row_weight_i·d_i under a trained head; the backward scales gradients computed in the forward."""

    @staticmethod
    @without_autocast
    def forward(ctx, x, weight, x_ref, weight_ref, bias, bias_ref, keep, masked_target, rule, chunk_bytes, row_weight):
        ctx.wanted, ctx.dtype = _wanted(ctx), weight.dtype
        losses, *gradients = _run((x, weight, x_ref, weight_ref, bias, bias_ref), row_weight, keep, masked_target, rule, chunk_bytes,
                                  ctx.wanted)
        ctx.save_for_backward(losses, *gradients)
        return losses.dot(row_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        losses, dx, *gradients = ctx.saved_tensors
        scaled = [(dx * upstream).to(dx.dtype), *(g * upstream for g in gradients)]
        drow_weight = losses * upstream if ctx.needs_input_grad[10] else None
        return *_by_side(scaled, ctx.wanted, ctx.dtype), None, None, None, None, drow_weight


def _wanted(ctx) -> Wanted:
    x, weight, _, _, bias, *_ = ctx.needs_input_grad
    return Wanted(x, weight, bias)


def _by_side(gradients, wanted: Wanted, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Return the gradients of the six fields of Sides from those of x, weight and bias."""
    dx, dweight, dbias = (g if want else None for g, want in zip(gradients, wanted, strict=True))
    return dx, None if dweight is None else dweight.to(dtype), None, None, None if dbias is None else dbias.to(dtype), None


# ---------------------------------------------------------------- public


def _check(sides: Sides, token_weight: Tensor | None, keep: Tensor | None, masked_target: Tensor | None, rule: Rule,
           reduction: str) -> None:
    """Raise ValueError unless all arguments fit each other."""
    x, weight, x_ref, weight_ref, bias, bias_ref = sides

    def expect(right: bool, expected: str, got: str) -> None:
        if not right:
            raise ValueError(f"linear_kl: expected {expected}, got {got}")

    def vector(name: str, tensor: Tensor | None, length: int, dtype: torch.dtype | None) -> None:
        if tensor is not None:
            expect(tensor.shape == (length,) and tensor.dtype == (dtype or tensor.dtype) and tensor.device == x.device,
                   f"{name} {dtype or ''} of shape ({length},) on {x.device}".replace("  ", " "),
                   f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}")

    head_ref = weight if weight_ref is None else weight_ref
    expect(x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[1], "x [S, D] and weight [V, D]",
           f"{tuple(x.shape)} and {tuple(weight.shape)}")
    expect(x_ref.dim() == head_ref.dim() == 2 and x_ref.shape == (x.shape[0], head_ref.shape[1]) and head_ref.shape[0] == weight.shape[0],
           f"x_ref ({x.shape[0]}, D') and the reference's weight ({weight.shape[0]}, D')",
           f"{tuple(x_ref.shape)} and {tuple(head_ref.shape)}")
    kinds = {(t.dtype, t.device) for t in (x, weight, x_ref, head_ref)}
    expect(len(kinds) == 1 and x.is_floating_point(), "x, weight, x_ref and weight_ref in one floating dtype on one device",
           ", ".join(f"{t.dtype} on {t.device}" for t in (x, weight, x_ref, head_ref)))
    expect(weight_ref is not None or bias_ref is None, "no bias_ref where both sides share one head", "bias_ref without weight_ref")
    vector("bias", bias, weight.shape[0], x.dtype)
    vector("bias_ref", bias_ref, weight.shape[0], x.dtype)
    vector("token_weight", token_weight, x.shape[0], None)
    vector("keep", keep, x.shape[0], torch.bool)
    vector("masked_target", masked_target, x.shape[0], torch.int64)
    expect(masked_target is None or weight.shape[0] > 1, "a vocabulary of at least two tokens beside masked_target", str(weight.shape[0]))
    expect(rule.divergence in DIVERGENCES, f"divergence in {DIVERGENCES}", repr(rule.divergence))
    expect(0 < rule.beta < 1, 'beta between 0 and 1 (for the limits: "forward" and "reverse")', str(rule.beta))
    expect(rule.softcap is None or rule.softcap > 0, "softcap > 0 or None", str(rule.softcap))
    expect(rule.temperature > 0, "temperature > 0", str(rule.temperature))
    expect(reduction in REDUCTIONS, f"reduction in {REDUCTIONS}", repr(reduction))


def linear_kl(x: Tensor, weight: Tensor, x_ref: Tensor, weight_ref: Tensor | None = None, *, divergence: str = "forward",
              beta: float = 0.5, bias: Tensor | None = None, bias_ref: Tensor | None = None, token_weight: Tensor | None = None,
              keep: Tensor | None = None, masked_target: Tensor | None = None, softcap: float | None = None, logit_scale: float = 1.0,
              temperature: float = 1.0, reduction: str = "sum", chunk_bytes: int | None = None) -> Tensor:
    """Return the divergence of the student x Wᵀ + b from the reference x_ref W'ᵀ + b', in nats.

    The result is fp32 (fp64 for fp64 inputs). x [S, D], weight [V, D], bias [V]; x_ref [S, D'], weight_ref [V, D'], bias_ref [V], none of
    which gets a gradient; without weight_ref both sides use weight and bias. divergence: "forward" KL(reference‖student), "reverse"
    KL(student‖reference), or "jensen_shannon" with weight beta on KL(reference‖mixture). Logits are
    softcap·tanh(logit_scale·u/softcap)/temperature on both sides; the loss is not multiplied by temperature². token_weight [S] is
    differentiable. `keep` [S] bool drops the rows where it is False (without it nothing waits for the device); `mean` divides by the summed
    weight of the kept rows. `masked_target` [S] int64 is a token of each row that is left out of both sides, the rest renormalised; -1
    leaves out none. Without any row the result is a differentiable 0. `chunk_bytes` bounds one chunk of both sides' logits. Raises
    ValueError for arguments that do not fit each other and, on a CPU, for masked_target outside [-1, V).
    """
    rule = Rule(divergence, beta, softcap, logit_scale, temperature)
    _check(Sides(x, weight, x_ref, weight_ref, bias, bias_ref), token_weight, keep, masked_target, rule, reduction)
    exact = statistics_dtype(x)
    x_ref, weight_ref, bias_ref = (None if t is None else t.detach() for t in (x_ref, weight_ref, bias_ref))
    inputs = x, weight, x_ref, weight_ref, bias, bias_ref, keep, masked_target, rule, chunk_bytes
    row_weight = x.new_ones(x.shape[0], dtype=exact) if token_weight is None else token_weight.to(exact)
    trained = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    if trained and reduction != "none":
        loss = _TrainedSum.apply(*inputs, row_weight)
    else:
        losses = _TrainedRows.apply(*inputs) if trained else _FrozenRows.apply(*inputs, torch.is_grad_enabled() and x.requires_grad)
        loss = losses * row_weight if reduction == "none" else losses.dot(row_weight)
    if reduction != "mean":
        return loss
    total = (row_weight if keep is None else row_weight.masked_fill(~keep, 0.0)).sum()
    return loss / torch.where(total == 0, 1.0, total)


def _aot(divergence: str, trained: bool, softcap: float | None = None, masked: bool = False):
    """Launch one chunk of rows of Llama-3.1-8B's head."""
    x, x_ref, weight = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((1024, 4096), (1024, 4096), (128256, 4096)))
    row_weight = torch.empty(1024, device="meta") if trained else None
    masked_target = torch.empty(1024, dtype=torch.int64, device="meta") if masked else None
    rule = Rule(divergence, 0.5, softcap, 1.0, 1.0)
    _run(Sides(x, weight, x_ref, None, None, None), row_weight, None, masked_target, rule, None, Wanted(True, trained, False))


AOT = {
    "linear_kl forward": lambda: _aot("forward", False),
    "linear_kl reverse": lambda: _aot("reverse", True),
    "linear_kl jensen_shannon softcap": lambda: _aot("jensen_shannon", True, 30.0),
    "linear_kl forward, masked target": lambda: _aot("forward", False, masked=True),
    "linear_kl jensen_shannon softcap, masked target": lambda: _aot("jensen_shannon", True, 30.0, masked=True),
}
