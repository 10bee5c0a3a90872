"""Log-probs of given answers in packs, and how far a model has moved from its base over them.

For a scored token y after context x:   log p(y | x)   and   KL(base || model) = Σ_v p_base(v | x) (log p_base(v | x) - log p_model(v | x)),
both in nats. The base is measured first, and its last hidden states wait on the host: S vectors, instead of S x V log-probs, from which
its distributions come back through its head. So one model is on the device at a time, and an adapter is switched off for one pass.

Shapes: T tokens of a pack, S scored tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from kernels.linear_cross_entropy import linear_log_prob
from kernels.linear_kl import linear_kl
from trainer.data.batch import PackedBatch, collate
from trainer.data.packing import pack
from trainer.data.samples import Piece
from trainer.evaluation.tokens import Sample
from trainer.model.forward import LmHead, forward_hidden, lm_head

DOCUMENTS = 1024  # samples in one pack, at most
SLICE = 256  # rows of full logits at a time, where heads differ in scale or cap


@dataclass
class Likelihood:
    """One sample under one model."""

    logprob: float  # nats, of all scored tokens together
    kl: float | None = None  # nats, summed over the scored tokens; None where it was not measured


@dataclass
class BaseStates:
    """What a base leaves for the model that is compared with it: its head, and the last hidden states of some samples."""

    head: LmHead
    hidden: dict[int, Tensor] = field(default_factory=dict)  # number of a sample -> [S, D], on the host
    ids: dict[int, np.ndarray] = field(default_factory=dict)  # and its tokens

    def why_no_kl(self, samples: Sequence[Sample], other: LmHead) -> str | None:
        """Why no divergence can be measured with it; None where one can."""
        if self.head.weight.shape[0] != other.weight.shape[0]:
            return f"the base predicts {self.head.weight.shape[0]:,} tokens, the model {other.weight.shape[0]:,}"
        if any(i >= len(samples) or not np.array_equal(ids, samples[i].ids) for i, ids in self.ids.items()):
            return "the base and the model spell the items in different tokens"
        return None


def chosen(samples: Sequence[Sample], roles: Sequence[str], tokens: int, seed: int) -> set[int]:
    """Reference samples over which the divergence is measured: in a random order of each role, until they have `tokens` scored ones."""
    picked: set[int] = set()
    order = np.random.default_rng(seed).permutation(len(samples))
    for role in set(roles):
        room = tokens
        for i in order.tolist():
            if samples[i].reference and roles[i] == role:
                room -= samples[i].tokens
                if room < 0:
                    break
                picked.add(i)
    return picked


@torch.no_grad()
def measure(model: nn.Module, samples: Sequence[Sample], capacity: int, *, remember: BaseStates | None = None, keep: Iterable[int] = (),
            base: BaseStates | None = None) -> list[Likelihood]:
    """The log-prob of each sample, and its KL from `base` where the base remembers it.

    The hidden states of the samples in `keep` go into `remember`. Packs hold `capacity` tokens at most, each sample seeing itself alone.
    """
    found, keep, out = [Likelihood(0.0) for _ in samples], set(keep), lm_head(model)
    device = out.weight.device
    for numbers in pack([len(sample.ids) for sample in samples], capacity, DOCUMENTS, seed=0) if samples else ():
        batch = collate([Piece(samples[i].ids, samples[i].scored) for i in numbers]).to(device)
        rows = forward_hidden(model, batch, batch.supervised_rows)  # (S, D)
        logprobs = linear_log_prob(rows, out.weight, batch.targets, bias=out.bias, ignore_index=None, softcap=out.softcap,
                                   logit_scale=out.logit_scale)
        for i, total in zip(numbers, per_sample(logprobs, batch)):
            found[i].logprob = total
        counts = [samples[i].tokens for i in numbers]
        if remember is not None:
            for i, part in zip(numbers, rows.split(counts)):
                if i in keep:
                    remember.hidden[int(i)], remember.ids[int(i)] = part.cpu(), samples[i].ids
        if base is not None:
            for i, total in divergences(numbers, rows.split(counts), out, base):
                found[i].kl = total
    return found


def per_sample(values: Tensor, batch: PackedBatch) -> list[float]:
    """Sums over each sample's scored tokens of values [S], in double precision."""
    sample = torch.searchsorted(batch.cu_seqlens[1:].long(), batch.supervised_rows, right=True)
    sums = torch.zeros(len(batch.cu_seqlens) - 1, dtype=torch.float64, device=values.device)
    return sums.index_add_(0, sample, values.double()).tolist()


def divergences(numbers: np.ndarray, rows: Sequence[Tensor], out: LmHead, base: BaseStates) -> list[tuple[int, float]]:
    """KL(base || model), summed over its scored tokens, of each sample of a pack that the base remembers; rows [S, D] of each sample."""
    known = [(int(i), part) for i, part in zip(numbers, rows) if int(i) in base.hidden]
    if not known:
        return []
    model_rows = torch.cat([part for _, part in known])
    base_rows = torch.cat([base.hidden[i] for i, _ in known]).to(model_rows.device)
    parts = kl_rows(model_rows, out, base_rows, base.head).split([len(part) for _, part in known])
    return [(i, float(part.double().sum())) for (i, _), part in zip(known, parts)]


def kl_rows(x: Tensor, out: LmHead, x_base: Tensor, out_base: LmHead) -> Tensor:
    """KL(base || model) [S] in nats, of hidden states x [S, D] under one head from x_base [S, D'] under the other."""
    if out.softcap == out_base.softcap and out.logit_scale == out_base.logit_scale and x.dtype == x_base.dtype:
        shared = out.weight is out_base.weight
        return linear_kl(x, out.weight, x_base, None if shared else out_base.weight, divergence="forward", bias=out.bias,
                         bias_ref=None if shared else out_base.bias, softcap=out.softcap, logit_scale=out.logit_scale, reduction="none")
    found = []
    for mine, theirs in zip(x.split(SLICE), x_base.split(SLICE)):
        log_p, log_q = out_base.logits(theirs).log_softmax(-1), out.logits(mine).log_softmax(-1)
        found.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(found)
