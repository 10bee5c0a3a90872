"""Compute the training objective of a pack."""

from __future__ import annotations

from torch import Tensor, nn

from kernels import linear_cross_entropy
from trainer.data.batch import PackedBatch
from trainer.model.forward import LmHead, lm_head, supervised_hidden
from trainer.retention.token_weighting import own_probability


def batch_loss(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Sum of weight * cross entropy over the supervised tokens of a pack; logits exist for those rows only, chunk by chunk."""
    return cross_entropy(lm_head(model), supervised_hidden(model, batch), batch)


def cross_entropy(out: LmHead, hidden: Tensor, batch: PackedBatch) -> Tensor:
    """The same of hidden states [S, D]. Tokens of the batch's DFT mask weigh their own probability too."""
    fixed = {"bias": out.bias, "ignore_index": None, "softcap": out.softcap, "logit_scale": out.logit_scale}
    if batch.dft_mask is None:
        return linear_cross_entropy(hidden, out.weight, batch.targets, token_weight=batch.weights, reduction="sum", **fixed)
    losses = linear_cross_entropy(hidden, out.weight, batch.targets, reduction="none", **fixed)
    return losses.dot((batch.weights * own_probability(losses, batch.dft_mask)).to(losses.dtype))
