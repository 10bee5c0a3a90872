"""Compute the divergence of two rows of logits, and its gradient in-place, for `linear_kl`.

For one row's raw logits u (student) and u' (reference), with logit scale s, softcap c and temperature τ:

    z = (c/τ)·tanh(s·u/c)    z' alike    (c absent: z = s·u/τ)          dz/du = (s/τ)·(1 − tanh²(s·u/c))
    p = softmax(z)           q = softmax(z')          t = log p − log q

    forward          KL(q‖p) = −Σ q·t                                ∂/∂z = p − q
    reverse          KL(p‖q) =  Σ p·t                                ∂/∂z = p ⊙ (t − Σ p·t)
    jensen_shannon   β·KL(q‖m) + (1−β)·KL(p‖m), m = β·q + (1−β)·p    ∂/∂z = (1−β)·p ⊙ (ℓ − Σ p·ℓ),  ℓ = log(p/m)

(The generalised Jensen-Shannon divergence of GKD, https://arxiv.org/abs/2306.13649, equation 1, with the reference as its
teacher; TRL's GKDTrainer has the same β. There β = 0 and 1 mean forward and reverse, which have names here.)

With a masked target m of the row, z_m = z'_m = −∞: the token is left out of both sides, whose other probabilities are divided by 1 − p_m
and 1 − q_m (target-masked KL, Xu et al., arXiv 2605.29498). Sums and maxima never see it, so a p_m that rounds to 1 costs no precision, as
log Σ exp z + log(1 − p_m) would; ∂/∂u_m = 0.

One program per row. Sweep 1 computes both log-sum-exps online (and, for reverse, Σ p·(z − z')), sweep 2 sums the divergence and writes
the gradient; for Jensen-Shannon sweep 2 computes Σ p·ℓ and sweep 3 writes. Each sweep starts at the end where the last one stopped,
while the row is still cached.
"""

# Gradients follow from ∂L/∂z = p ⊙ (a − Σ p·a), a = ∂L/∂p. Forward: a = −q/p. Reverse: a = t + 1. Jensen-Shannon:
# a = −β·q·(1−β)/m + (1−β)·(ℓ + 1 − (1−β)·p/m) = (1−β)·ℓ, because β·q + (1−β)·p is m. Constants in a drop out.
#
# Rounding: the two log-sum-exps have an error of about 10⁻⁶ in fp32, all of which enters a sum of q·t. Σ(p − q), which would be 0 without
# those errors, cancels them to first order, so it is added: the forward terms become p − q − q·t >= 0, with an error of about 10⁻⁷. With
# w = p/q and log(m/q) = log(1 + (1−β)·(w − 1)) the Jensen-Shannon terms are (1−β)·p·t − m·log(m/q) >= 0, which those errors do not affect.
# Where the weight (p or q) is 0 the term is 0 whatever the logarithms are, so logits of −∞ and underflow are safe. Sums are relative to
# the running maxima, so that a common shift of the logits costs no precision.

from typing import NamedTuple

import torch
from torch import Tensor

from kernels._cross_entropy_rows import statistics_dtype
from kernels._dispatch import triton_serves
from kernels._launch import ANY, Launch, constexpr, jit, launch, pick, tl

DIVERGENCES = ("forward", "reverse", "jensen_shannon")
LARGEST_RATIO = 80.0  # |log p/q| beyond which the smaller of the two is nothing beside the other, in fp64 too


class Rule(NamedTuple):
    """Options of the divergence of two rows of logits."""

    divergence: str
    beta: float
    softcap: float | None
    logit_scale: float
    temperature: float

    def factors(self) -> tuple[float, float]:
        """Return (a, b) of z = b·tanh(a·u), or without a softcap of z = a·u and b = 1."""
        if self.softcap is None:
            return self.logit_scale / self.temperature, 1.0
        return self.logit_scale / self.softcap, self.softcap / self.temperature


def kl_rows_reference(u: Tensor, u_ref: Tensor, row_scale: Tensor | None, masked_target: Tensor | None, rule: Rule, want_gradient: bool
                      ) -> Tensor:
    """Return divergences [n] of raw logits u and u_ref [n, V], which may be overwritten.

    masked_target [n] is the token that each row leaves out, −1 for none. With want_gradient, u becomes row_scale ⊙ ∂/∂u.
    """
    z, z_ref = _logits(u, rule), _logits(u_ref, rule)
    if masked_target is not None:
        column = masked_target[:, None].clamp_min(0)
        of_target = z.gather(1, column)
        for side in (z, z_ref):
            side.scatter_(1, column, side.gather(1, column).masked_fill_(masked_target[:, None] >= 0, -torch.inf))
    log_p, log_q = torch.log_softmax(z, 1), torch.log_softmax(z_ref, 1)
    p, q = log_p.exp(), log_q.exp()
    loss, gradient = _DIVERGE[rule.divergence](log_p.sub_(log_q), p, q, rule.beta, want_gradient)
    if not want_gradient:
        return loss
    a, b = rule.factors()
    if rule.softcap is not None:
        if masked_target is not None:
            z.scatter_(1, column, of_target)  # −∞ has no slope, and its gradient is 0 already
        gradient.mul_(z.div_(b).square_().neg_().add_(1.0))
    scale = a * b if row_scale is None else a * b * row_scale[:, None].to(gradient.dtype)
    torch.mul(gradient, scale, out=u) if u.dtype == gradient.dtype else u.copy_(gradient.mul_(scale))
    return loss


def _logits(u: Tensor, rule: Rule) -> Tensor:
    a, b = rule.factors()
    z = u.to(statistics_dtype(u))
    z = z if a == 1.0 else z.mul_(a)
    return z if rule.softcap is None else z.tanh_().mul_(b)


def _forward(t: Tensor, p: Tensor, q: Tensor, beta: float, want_gradient: bool) -> tuple[Tensor, Tensor | None]:
    difference = p.sub_(q)
    return difference.sum(1) - t.mul_(q).masked_fill_(q == 0, 0.0).sum(1), difference


def _reverse(t: Tensor, p: Tensor, q: Tensor, beta: float, want_gradient: bool) -> tuple[Tensor, Tensor | None]:
    terms = t.mul_(p).masked_fill_(p == 0, 0.0)
    mean = terms.sum(1, keepdim=True)
    loss = mean[:, 0] + q.sub_(p).sum(1)
    return loss, terms.sub_(p.mul_(mean)) if want_gradient else None


def _jensen_shannon(t: Tensor, p: Tensor, q: Tensor, beta: float, want_gradient: bool) -> tuple[Tensor, Tensor | None]:
    t.clamp_(-LARGEST_RATIO, LARGEST_RATIO).masked_fill_((p == 0) & (q == 0), 0.0)
    log_mixture = t.expm1().mul_(1.0 - beta).log1p_()  # log(m/q)
    loss = (t * p).sum(1).mul_(1.0 - beta) - q.lerp_(p, 1.0 - beta).mul_(log_mixture).sum(1)
    if not want_gradient:
        return loss, None
    terms = t.sub_(log_mixture).mul_(p)
    return loss, terms.sub_(p.mul_(terms.sum(1, keepdim=True))).mul_(1.0 - beta)


_DIVERGE = dict(zip(DIVERGENCES, (_forward, _reverse, _jensen_shannon)))


# ---------------------------------------------------------------- Triton


@jit
def _tanh(x):
    """Return tanh(x) to a few parts in 10⁷, from its series where 2σ(2x) − 1 would cancel."""
    square = x * x
    series = x * (1.0 + square * (-0.33333333 + square * (0.13333333 - 0.05396825 * square)))
    return tl.where(square < 0.04, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@jit
def _load_logits(u, columns, stride, V, masked, a, b, CAPPED: constexpr):
    """Load z (−∞ beyond V and at `masked`) and dz/du.

    Reads up to the stride, so that an odd V loads in whole vectors too.
    """
    z = tl.load(u + columns, mask=columns < stride, other=0.0).to(tl.float32) * a
    slope = a
    if CAPPED:
        z = _tanh(z)
        slope = a * b * (1.0 - z * z)
        z = z * b
    kept = columns < V
    if masked is not None:
        kept &= columns != masked
    return tl.where(kept, z, float("-inf")), slope


@jit
def _shares(z, z_ref, log_total, log_total_ref):
    """Return p, q and log(p/q) of logits relative to their maxima."""
    log_p, log_q = z - log_total, z_ref - log_total_ref
    return tl.exp(log_p), tl.exp(log_q), log_p - log_q


@jit
def _mixture(p, q, t, beta, LARGEST: constexpr):
    """Return log(p/q), clamped to stay finite, and log(m/q)."""
    t = tl.where(p + q > 0.0, tl.minimum(tl.maximum(t, -LARGEST), LARGEST), 0.0)
    return t, tl.log(1.0 + (1.0 - beta) * (tl.exp(t) - 1.0))


@jit
def _kl_rows_kernel(u, u_ref, row_scale, masked_target, losses, stride, ref_stride, V, a, b, beta, DIVERGENCE: constexpr, CAPPED: constexpr,
                    WANT_GRADIENT: constexpr, LARGEST: constexpr, BLOCK: constexpr, GROUP: constexpr):
    """Write losses [rows] and, where wanted, the gradient over u [rows, V]: one program per row."""
    row = tl.program_id(0).to(tl.int64)
    u += row * stride
    u_ref += row * ref_stride
    if masked_target is None:
        masked = None
    else:
        masked = tl.load(masked_target + row)
    block = GROUP * tl.arange(0, BLOCK // GROUP)[:, None] + tl.arange(0, GROUP)[None, :]  # (BLOCK / GROUP, GROUP)
    end = (V - 1) // BLOCK * BLOCK

    # sweep 1, by group: largest z, Σ exp(z − largest) and, for reverse, Σ exp(z − largest)·((z − largest) − (z' − largest'))
    top = tl.full((BLOCK // GROUP,), -1e30, tl.float32)  # not −∞: a group may hold nothing else
    top_ref = tl.full((BLOCK // GROUP,), -1e30, tl.float32)
    total = tl.zeros((BLOCK // GROUP,), tl.float32)
    total_ref = tl.zeros((BLOCK // GROUP,), tl.float32)
    moment = tl.zeros((BLOCK // GROUP,), tl.float32)
    for start in range(0, V, BLOCK):
        z, _ = _load_logits(u, start + block, stride, V, masked, a, b, CAPPED)
        z_ref, _ = _load_logits(u_ref, start + block, ref_stride, V, masked, a, b, CAPPED)
        drop, drop_ref = top, top_ref
        top, top_ref = tl.maximum(top, tl.max(z, 1)), tl.maximum(top_ref, tl.max(z_ref, 1))
        drop, drop_ref = drop - top, drop_ref - top_ref
        z, z_ref = z - top[:, None], z_ref - top_ref[:, None]
        e = tl.exp(z)
        if DIVERGENCE == "reverse":
            moment = (moment + total * (drop - drop_ref)) * tl.exp(drop) + tl.sum(tl.where(e > 0.0, e * (z - z_ref), 0.0), 1)
        total = total * tl.exp(drop) + tl.sum(e, 1)
        total_ref = total_ref * tl.exp(drop_ref) + tl.sum(tl.exp(z_ref), 1)
    peak, peak_ref = tl.max(top, 0), tl.max(top_ref, 0)
    share = tl.exp(top - peak)
    whole = tl.sum(total * share, 0)
    mean = tl.sum(share * (moment + total * ((top - peak) - (top_ref - peak_ref))), 0) / whole
    log_total, log_total_ref = tl.log(whole), tl.log(tl.sum(total_ref * tl.exp(top_ref - peak_ref), 0))

    scale = 1.0
    if row_scale is not None:
        scale = tl.load(row_scale + row).to(tl.float32)

    # sweep 2: the divergence, and the gradient where all that it needs is known
    terms = tl.zeros((BLOCK // GROUP,), tl.float32)
    moment = tl.zeros((BLOCK // GROUP,), tl.float32)
    for done in range(0, V, BLOCK):
        columns = end - done + block
        z, slope = _load_logits(u, columns, stride, V, masked, a, b, CAPPED)
        z_ref, _ = _load_logits(u_ref, columns, ref_stride, V, masked, a, b, CAPPED)
        p, q, t = _shares(z - peak, z_ref - peak_ref, log_total, log_total_ref)
        if DIVERGENCE == "forward":
            term = (p - q) - tl.where(q > 0.0, q * t, 0.0)
            gradient = p - q
        elif DIVERGENCE == "reverse":
            term = tl.where(p > 0.0, p * t, 0.0) - (p - q)
            gradient = tl.where(p > 0.0, p * ((z - peak) - (z_ref - peak_ref) - mean), 0.0)
        else:
            t, log_mixture = _mixture(p, q, t, beta, LARGEST)
            term = (1.0 - beta) * p * t - (beta * q + (1.0 - beta) * p) * log_mixture
            moment += tl.sum(p * (t - log_mixture), 1)
        terms += tl.sum(term, 1)
        if WANT_GRADIENT and DIVERGENCE != "jensen_shannon":
            tl.store(u + columns, gradient * slope * scale, mask=columns < stride)
    tl.store(losses + row, tl.sum(terms, 0))

    # sweep 3
    if WANT_GRADIENT and DIVERGENCE == "jensen_shannon":
        mean = tl.sum(moment, 0)
        for start in range(0, V, BLOCK):
            columns = start + block
            z, slope = _load_logits(u, columns, stride, V, masked, a, b, CAPPED)
            z_ref, _ = _load_logits(u_ref, columns, ref_stride, V, masked, a, b, CAPPED)
            p, q, t = _shares(z - peak, z_ref - peak_ref, log_total, log_total_ref)
            t, log_mixture = _mixture(p, q, t, beta, LARGEST)
            gradient = (1.0 - beta) * p * (t - log_mixture - mean)
            tl.store(u + columns, gradient * slope * scale, mask=columns < stride)


# With wide programs few rows are in flight at a time, so a row's end is still cached when the next sweep starts there.
LAUNCH = {(ANY, 512): Launch({"BLOCK": 512}, 2), (ANY, 4096): Launch({"BLOCK": 2048}, 4), (ANY, None): Launch({"BLOCK": 8192}, 32),
          ("gfx942", 512): Launch({"BLOCK": 512}, 1), ("gfx942", 4096): Launch({"BLOCK": 2048}, 4),
          ("gfx942", None): Launch({"BLOCK": 8192}, 16)}
GROUP = 8  # 16-bit logits that one thread reads at once


def kl_rows(u: Tensor, u_ref: Tensor, row_scale: Tensor | None, masked_target: Tensor | None, rule: Rule, want_gradient: bool) -> Tensor:
    """Run `kl_rows_reference` or its kernel; u and u_ref are rows of `new_logits`."""
    if not triton_serves(u):
        return kl_rows_reference(u, u_ref, row_scale, masked_target, rule, want_gradient)
    losses = torch.empty(u.shape[0], dtype=torch.float32, device=u.device)
    settings = pick(LAUNCH, u.shape[1], u.device)
    launch(_kl_rows_kernel, (u.shape[0],), settings, u, u_ref, row_scale, masked_target, losses, u.stride(0), u_ref.stride(0), u.shape[1],
           *rule.factors(), rule.beta, DIVERGENCE=rule.divergence, CAPPED=rule.softcap is not None, WANT_GRADIENT=want_gradient,
           LARGEST=LARGEST_RATIO, GROUP=GROUP)
    return losses
