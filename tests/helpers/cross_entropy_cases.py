"""Inputs and the oracle for the tests of the LM head with cross entropy."""

import math

import torch
import torch.nn.functional as F

from kernels._cross_entropy_rows import Loss
from kernels.lora import Lora

S, D, V = 13, 6, 17
FLAGS = dict(lora_scaling=1.0, **Loss()._asdict(), ignore_index=-100, chunk_bytes=None, statistics=False)  # of the operator
ROW = V * 8  # bytes of one fp64 row of logits


def inputs(dtype=torch.float64, trained=False, rows=S, width=D, vocabulary=V, scale=1.0):
    x = (torch.randn(rows, width) * scale).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width).to(dtype).requires_grad_(trained)
    bias = torch.randn(vocabulary).to(dtype).requires_grad_(trained)
    target = torch.randint(vocabulary, (rows,))
    target[1::3] = -100
    return x, weight, bias, target, torch.rand(rows, dtype=torch.promote_types(dtype, torch.float32)) + 0.1


def adapter(dtype=torch.float64, rank=3, width=D, vocabulary=V):
    A, B = torch.randn(rank, width, dtype=dtype), torch.randn(vocabulary, rank, dtype=dtype)
    return Lora(A.requires_grad_(), B.requires_grad_(), 0.6)


def entropy_weights(z):
    """EAFT's weights [S] of logits z [S, V], from the sorted probabilities, without a gradient."""
    p = z.detach().softmax(1).sort(1, descending=True).values[:, :20]
    q = p / p.sum(1, keepdim=True)
    return torch.special.entr(q).sum(1) / math.log(q.shape[1]) if q.shape[1] > 1 else torch.zeros_like(q[:, 0])


def stock(x, weight, target, *, bias=None, lora=None, token_weight=None, entropy_weighted=None, ignore_index=-100, label_smoothing=0.0,
          z_loss=0.0, softcap=None, logit_scale=1.0, temperature=1.0, reduction="sum"):
    """Return the loss from full logits, computed in the dtype of x and reduced in fp32 (fp64 for fp64)."""
    y = F.linear(x, weight, bias)
    if lora is not None:
        y = y + lora.scaling * F.linear(F.linear(x, lora.A.to(x.dtype)), lora.B.to(x.dtype))
    z = y.to(torch.promote_types(y.dtype, torch.float32)) * logit_scale
    z = (z if softcap is None else torch.tanh(z / softcap) * softcap) / temperature
    kept = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    losses = F.cross_entropy(z, torch.where(kept, target, -1), ignore_index=-1, reduction="none",
                             label_smoothing=label_smoothing)
    losses = losses + torch.where(kept, z_loss * z.logsumexp(-1) ** 2, 0.0)
    if entropy_weighted is not None:
        losses = losses * torch.where(entropy_weighted, entropy_weights(z), 1.0)
    scale = torch.ones_like(losses) if token_weight is None else token_weight.to(losses.dtype)
    if reduction == "none":
        return losses * scale
    total = (losses * scale).sum()
    return total / scale[kept].sum() if reduction == "mean" else total


def gradients(loss, tensors):
    """Gradients under an uneven upstream, which a backward that ignores it would not survive."""
    upstream = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).view_as(loss)
    return torch.autograd.grad(loss, tensors, upstream)
