"""Inputs, the oracle and checks for the tests of the divergence between two heads."""

import math

import torch
import torch.nn.functional as F

from kernels._cross_entropy_rows import new_logits
from kernels._kl_rows import Rule, kl_rows
from kernels.linear_kl import linear_kl

S, D, D_REF, V = 13, 6, 5, 17
ROW = 2 * V * 8  # bytes of both sides' fp64 logits of one row
EVERY_OPTION = dict(softcap=3.0, logit_scale=0.7, temperature=1.5, beta=0.3)


def inputs(dtype=torch.float64, trained=False, rows=S, width=D, vocabulary=V, scale=1.0, device="cpu"):
    """x, weight, bias of the student, x_ref, weight_ref, bias_ref of the reference."""

    def normal(*shape, requires_grad=False):
        return torch.randn(shape, dtype=torch.float64).mul(scale).to(device, dtype).requires_grad_(requires_grad)

    return (normal(rows, width, requires_grad=True), normal(vocabulary, width, requires_grad=trained),
            normal(vocabulary, requires_grad=trained), normal(rows, D_REF), normal(vocabulary, D_REF), normal(vocabulary))


def weights_and_mask(rows=S, dtype=torch.float64):
    keep = torch.ones(rows, dtype=torch.bool)
    keep[1::3] = False
    return torch.rand(rows, dtype=torch.promote_types(dtype, torch.float32)) + 0.1, keep


def divergence_of(z, z_ref, divergence, beta):
    """Per row, from full logits, by torch's own kl_div; the mixture as TRL's GKDTrainer makes it."""
    log_p, log_q = z.log_softmax(-1), z_ref.log_softmax(-1)

    def kl(of, to):
        return F.kl_div(to, of, reduction="none", log_target=True).sum(-1)

    if divergence == "forward":
        return kl(log_q, log_p)
    if divergence == "reverse":
        return kl(log_p, log_q)
    log_m = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def masked_targets(rows=S, vocabulary=V):
    """A token to leave out of each row, among them the first and the last; of some rows none."""
    masked = torch.randint(vocabulary, (rows,))
    masked[:3] = torch.tensor([0, vocabulary - 1, -1])[:rows]
    return masked


def without(z, masked):
    """The logits [S, V - 1] of all tokens but one."""
    others = torch.arange(z.shape[1] - 1, device=z.device)[None]
    return z.gather(1, others + (others >= masked[:, None]).long())


def stock(x, weight, x_ref, weight_ref=None, *, divergence="forward", beta=0.5, bias=None, bias_ref=None, token_weight=None, keep=None,
          masked_target=None, softcap=None, logit_scale=1.0, temperature=1.0, reduction="sum"):
    """Return the loss from full logits, statistics in fp32 or better, the reference detached."""
    if weight_ref is None:
        weight_ref, bias_ref = weight.detach(), None if bias is None else bias.detach()
    exact = torch.promote_types(x.dtype, torch.float32)
    z, z_ref = (F.linear(*side).to(exact) * logit_scale for side in ((x, weight, bias), (x_ref, weight_ref, bias_ref)))
    if softcap is not None:
        z, z_ref = (softcap * torch.tanh(t / softcap) for t in (z, z_ref))
    losses = divergence_of(z / temperature, z_ref / temperature, divergence, beta)
    if masked_target is not None:
        masked = divergence_of(without(z, masked_target) / temperature, without(z_ref, masked_target) / temperature, divergence, beta)
        losses = torch.where(masked_target < 0, losses, masked)
    scale = torch.ones_like(losses) if token_weight is None else token_weight.to(exact)
    scale = scale if keep is None else torch.where(keep, scale, 0.0)
    if reduction == "none":
        return losses * scale
    total = (losses * scale).sum()
    return total / scale.sum() if reduction == "mean" else total


def gradients(loss, tensors):
    """Gradients under an uneven upstream, which a backward that ignores it would not survive."""
    upstream = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype, device=loss.device).view_as(loss)
    return torch.autograd.grad(loss, tensors, upstream, retain_graph=True)


def assert_same(ours, theirs, leaves, tolerance=1e-11):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradients(ours, leaves), gradients(theirs, leaves), rtol=tolerance, atol=tolerance)


def flags(want_x, want_weight, want_bias, chunk_bytes=None, **rule):
    """Return the operator's keyword arguments."""
    rule = dict(divergence="forward", beta=0.5, softcap=None, logit_scale=1.0, temperature=1.0) | rule
    return rule | dict(chunk_bytes=chunk_bytes, want_x=want_x, want_weight=want_weight, want_bias=want_bias)


def check_extremes(divergence, device):
    """Check a student that equals its reference, huge logits, a common shift and logits of −∞."""
    x, weight, _, x_ref, weight_ref, _ = inputs(torch.float32, rows=5, vocabulary=300, scale=2.0, device=device)
    call = dict(divergence=divergence, reduction="none", beta=0.3)

    same = linear_kl(x, weight, x.detach(), **call)
    assert (same == 0).all() and torch.autograd.grad(same.sum(), x)[0].abs().max() <= 1e-5

    near = linear_kl(x, weight, x.detach() + 1e-3 * torch.randn_like(x), **call)
    assert (near > -1e-7).all() and (near < 1e-3).all() and near.sum() > 0

    huge = linear_kl(x * 1e4, weight, x_ref * 1e4, weight_ref, **call)
    slope, = torch.autograd.grad(huge.sum(), x)
    exact = stock(*(t.double() for t in (x * 1e4, weight, x_ref * 1e4, weight_ref)), **call)
    torch.testing.assert_close(huge.double(), exact, rtol=1e-5, atol=1e-5)
    assert slope.isfinite().all()

    shift = torch.full((300,), 8192.0, device=device)  # of logits that are whole numbers, so that the sum rounds nothing away
    bias = torch.zeros_like(shift)
    moved, still = (linear_kl(x.detach().round(), weight.round(), x_ref.round(), weight_ref.round(), bias=b, **call) for b in (shift, bias))
    torch.testing.assert_close(moved, still, rtol=1e-5, atol=1e-6)

    masked = torch.zeros(300, device=device)
    masked[::2] = -math.inf
    loss = linear_kl(x, weight, x_ref, weight_ref, bias=masked, bias_ref=masked, **call)
    rest = linear_kl(x, weight[1::2], x_ref, weight_ref[1::2], **call)
    torch.testing.assert_close(loss, rest, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (loss, rest)), rtol=1e-4, atol=1e-5)


def check_masked_extremes(divergence, device):
    """Check rows whose masked token has all of the probability, on the student's side, the reference's, or both."""
    x, weight, _, x_ref, weight_ref, _ = inputs(torch.float32, rows=9, vocabulary=300, device=device)
    masked = torch.full((9,), 7, device=device)
    call = dict(divergence=divergence, reduction="none", beta=0.3)
    sure, unsure = torch.zeros(2, 300, device=device)
    sure[7] = 300.0  # p = 1, and 1 - p is 0 in any precision
    quiet = linear_kl(x, weight, x_ref, weight_ref, masked_target=masked, bias=unsure, bias_ref=unsure, **call)
    slope = torch.autograd.grad(quiet.sum(), x)[0]
    for bias, bias_ref in ((sure, unsure), (unsure, sure), (sure, sure)):
        loud = linear_kl(x, weight, x_ref, weight_ref, masked_target=masked, bias=bias, bias_ref=bias_ref, **call)
        torch.testing.assert_close(loud, quiet, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.autograd.grad(loud.sum(), x)[0], slope, rtol=1e-4, atol=1e-5)
    every, = torch.autograd.grad(linear_kl(x, weight.requires_grad_(), x_ref, weight_ref, masked_target=masked, **call).sum(), weight)
    assert (every[7] == 0).all() and every.isfinite().all() and every[8].abs().max() > 0


def check_small_divergences_keep_their_digits(divergence, device):
    """Check logits 0.004 apart in fp32, where adding Σ(p − q) reduces the rounding error of kl_div."""
    z = torch.randn(32, 1000).mul(3).to(device)
    z_ref = z + torch.randn(32, 1000).mul(4e-3).to(device)
    truth = divergence_of(z.double(), z_ref.double(), divergence, 0.5)
    u, u_ref = (new_logits(32, 1000, z).copy_(t) for t in (z, z_ref))
    loss = kl_rows(u, u_ref, None, None, Rule(divergence, 0.5, None, 1.0, 1.0), False)
    assert (loss - truth).abs().max() <= 1.2e-7 and loss.min() > 0
