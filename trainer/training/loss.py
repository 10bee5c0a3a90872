"""Compute the training objective of a pack: cross entropy, and a KL to the base if the run has one.

    objective of a step  =  Σ_i w_i ce_i / Σ_i w_i  +  kl_weight · Σ_k w_k KL_k / Σ_k w_k  +  router_aux_loss_coef · Σ_p n_p b_p / Σ_p n_p

over the step's supervised tokens i and its KL rows k, in all packs and on all ranks (trainer/retention/kl.py). Both sums of weights are
known on the CPU before the step runs, so each pack adds its share and how a step is divided into packs and ranks changes nothing. That
is not so for the last term, the load-balancing loss b_p of each pack p of n_p tokens (trainer/model/router_balance.py).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

from torch import Tensor, nn

from kernels import linear_cross_entropy
from trainer.data.batch import PackedBatch
from trainer.metrics.timers import Phases
from trainer.model.forward import LmHead, lm_head, supervised_hidden
from trainer.model.router_balance import RouterBalance
from trainer.retention.kl import KlToBase
from trainer.retention.token_weighting import own_probability
from trainer.training.loader import StepWork


class PackLoss(NamedTuple):
    """One pack's shares of a step's objective, which is minimised, and of its terms, in nats."""

    objective: Tensor
    loss: Tensor
    kl: Tensor | None  # None where the pack has no KL rows
    router_aux_loss: Tensor | None  # the load-balancing loss, without its weight; None where the run has none

    def without_value(self) -> PackLoss:
        """Return shares of 0, whose backward gives gradients of 0."""
        return PackLoss(*(None if share is None else share * 0 for share in self))


def pack_loss(model: nn.Module, batch: PackedBatch, work: StepWork, kl: KlToBase | None, phases: Phases,
              balance: RouterBalance | None = None) -> PackLoss:
    """Compute the losses of one pack of `work`, running the base too where the KL needs it."""
    reference = kl.reference(batch, phases) if kl and work.has_kl else None
    with phases("forward"):
        divergence = router_aux_loss = None
        with balance.note() if balance else nullcontext():
            if reference is None:
                loss = sft_loss(model, batch)
            else:
                loss, divergence = sft_kl_loss(model, batch, kl, reference)
        objective = loss = loss / work.weight_sum
        if divergence is not None:
            divergence = divergence / work.kl_weight_sum
            objective = objective + kl.options.kl_weight * divergence
        if balance:
            router_aux_loss = balance.loss(batch.tokens) * (batch.tokens / work.counts.tokens)
            objective = objective + balance.coefficient * router_aux_loss
        return PackLoss(objective, loss, divergence, router_aux_loss)


def sft_loss(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Return the sum of weight * cross entropy over a pack's supervised tokens.

    Logits exist for their rows only, chunk by chunk.
    """
    hidden = supervised_hidden(model, batch)
    return cross_entropy(lm_head(model), hidden, batch)


def sft_kl_loss(model: nn.Module, batch: PackedBatch, kl: KlToBase, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Return `sft_loss` and the sum of weight * KL over the pack's KL rows, from one forward pass.

    `reference` [K, W] is the base's last hidden states at these rows.
    """
    hidden, divergence = kl.hidden_and_kl(model, batch, reference)
    return cross_entropy(lm_head(model), hidden, batch), divergence


def cross_entropy(head: LmHead, hidden: Tensor, batch: PackedBatch) -> Tensor:
    """Return the weighted sum of cross entropies from hidden states [S, W].

    Targets marked for DFT also weigh their own probability, those marked for EAFT the entropy of their prediction.
    """
    options = {"bias": head.bias, "ignore_index": None, "softcap": head.softcap, "logit_scale": head.logit_scale}
    if batch.dft_mask is None:
        return linear_cross_entropy(hidden, head.weight, batch.targets, token_weight=batch.weights, entropy_weighted=batch.eaft_mask,
                                    reduction="sum", **options)
    losses = linear_cross_entropy(hidden, head.weight, batch.targets, reduction="none", **options)
    return losses.dot((batch.weights * own_probability(losses, batch.dft_mask)).to(losses.dtype))
