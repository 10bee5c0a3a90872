"""Compute log-probs of given answers in packs, and the KL between a model and its base over them.

For a scored token y after context x:   log p(y | x)   and   KL(base || model) = Σ_v p_base(v | x) (log p_base(v | x) - log p_model(v | x)),
both in nats. The base runs first, and its last hidden states are kept on the host: S vectors instead of S x V log-probs. Its head turns
them into distributions when the model runs. So one model is on the device at a time; with an adapter the base runs with the adapter off.

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
from trainer.data.packing import pack
from trainer.evaluation.shared_context import group_by_context, lay_out, to_device
from trainer.evaluation.tokens import Sample
from trainer.model.forward import LmHead, can_branch, forward_hidden, lm_head, padding_for

MAX_SAMPLES_PER_PACK = 1024  # groups of samples in one pack, at most
ROWS_AT_ONCE = 256  # rows of full logits at a time, if the heads differ in scale or cap


@dataclass
class Likelihood:
    """One sample under one model."""

    logprob: float  # nats, of all scored tokens together
    greedy: bool | None = None  # every scored token is the likeliest; None where it was not asked for
    kl: float | None = None  # nats, summed over the scored tokens; None where it was not measured


@dataclass
class BaseStates:
    """The head of a base, and its last hidden states of some samples, for the KL of another model."""

    head: LmHead
    hidden: dict[int, Tensor] = field(default_factory=dict)  # number of a sample -> [S, D], on the host
    ids: dict[int, np.ndarray] = field(default_factory=dict)  # number of a sample -> its token ids

    def why_no_kl(self, samples: Sequence[Sample], other: LmHead) -> str | None:
        """Return the reason why no KL to a model with this head can be measured; None if it can."""
        if self.head.weight.shape[0] != other.weight.shape[0]:
            return f"the base predicts {self.head.weight.shape[0]:,} tokens, the model {other.weight.shape[0]:,}"
        if any(i >= len(samples) or not np.array_equal(ids, samples[i].ids) for i, ids in self.ids.items()):
            return "the base and the model spell the items in different tokens"
        return None


def choose_kl_samples(samples: Sequence[Sample], roles: Sequence[str], tokens: int, seed: int) -> set[int]:
    """Return the numbers of the samples over which the KL is measured.

    Of each role they are taken in random order while they have at most `tokens` scored tokens together.
    """
    chosen: set[int] = set()
    order = np.random.default_rng(seed).permutation(len(samples))
    for role in set(roles):
        budget = tokens
        for i in order.tolist():
            if samples[i].gives_logprob and roles[i] == role:
                budget -= samples[i].tokens
                if budget < 0:
                    break
                chosen.add(i)
    return chosen


@torch.no_grad()
def measure_likelihoods(model: nn.Module, samples: Sequence[Sample], capacity: int, *, remember: BaseStates | None = None,
                        keep: Iterable[int] = (), base: BaseStates | None = None) -> list[Likelihood]:
    """Return the log-prob of each sample, and its KL to the base for the samples in `base`.

    The hidden states of the samples in `keep` are put into `remember`. Packs have at most `capacity` tokens, and their samples do not see
    each other. Tokens that several samples begin with, such as the prompt of an item's choices, run through the model once.
    """
    likelihoods, keep, head = [Likelihood(0.0) for _ in samples], set(keep), lm_head(model)
    device, multiples, groups = head.weight.device, padding_for(model), group_by_context(samples, capacity, can_branch(model))
    for packed in pack([group.tokens for group in groups], capacity, MAX_SAMPLES_PER_PACK, seed=0) if samples else ():
        batch, branches, numbers, places = lay_out([groups[g] for g in packed], samples, capacity, multiples)
        counts = [samples[i].tokens for i in numbers]
        asked, row_of = np.unique(np.concatenate(places), return_inverse=True)
        hidden = forward_hidden(model, batch.to(device), torch.from_numpy(asked).to(device), to_device(branches, device))
        rows = hidden[torch.from_numpy(row_of).to(device)]  # (S, D)
        targets = torch.from_numpy(np.concatenate([samples[i].ids[samples[i].scored] for i in numbers]).astype(np.int64)).to(device)
        logprobs = linear_log_prob(rows, head.weight, targets, bias=head.bias, ignore_index=None, softcap=head.softcap,
                                   logit_scale=head.logit_scale)
        for i, total in zip(numbers, sum_per_sample(logprobs, counts)):
            likelihoods[i].logprob = total
        for i, sample_rows, sample_targets in zip(numbers, rows.split(counts), targets.split(counts)):
            if samples[i].asks_greedy:
                likelihoods[i].greedy = bool((head.logits(sample_rows).argmax(-1) == sample_targets).all())
        if remember is not None:
            for i, sample_rows in zip(numbers, rows.split(counts)):
                if i in keep:
                    remember.hidden[int(i)], remember.ids[int(i)] = sample_rows.cpu(), samples[i].ids
        if base is not None:
            for i, total in kl_per_sample(numbers, rows.split(counts), head, base):
                likelihoods[i].kl = total
    return likelihoods


def sum_per_sample(values: Tensor, counts: Sequence[int]) -> list[float]:
    """Return the sum of `values` [S] over the scored tokens of each sample, in double precision."""
    sample = torch.arange(len(counts), device=values.device).repeat_interleave(torch.tensor(counts, device=values.device))
    sums = torch.zeros(len(counts), dtype=torch.float64, device=values.device)
    return sums.index_add_(0, sample, values.double()).tolist()


def kl_per_sample(numbers: Sequence[int], rows: Sequence[Tensor], head: LmHead, base: BaseStates) -> list[tuple[int, float]]:
    """Return number and KL(base || model) of the samples of a pack that are in `base`.

    The KL is the sum over a sample's scored tokens. `rows` has the hidden states [S, D] of each sample.
    """
    known = [(int(i), sample_rows) for i, sample_rows in zip(numbers, rows) if int(i) in base.hidden]
    if not known:
        return []
    model_rows = torch.cat([sample_rows for _, sample_rows in known])
    base_rows = torch.cat([base.hidden[i] for i, _ in known]).to(model_rows.device)
    kl = kl_per_row(model_rows, head, base_rows, base.head).split([len(sample_rows) for _, sample_rows in known])
    return [(i, float(sample_kl.double().sum())) for (i, _), sample_kl in zip(known, kl)]


def kl_per_row(x: Tensor, head: LmHead, x_base: Tensor, head_base: LmHead) -> Tensor:
    """Return KL(base || model) [S] in nats from hidden states x [S, D], x_base [S, D'] and their heads."""
    if head.softcap == head_base.softcap and head.logit_scale == head_base.logit_scale and x.dtype == x_base.dtype:
        shared = head.weight is head_base.weight
        return linear_kl(x, head.weight, x_base, None if shared else head_base.weight, divergence="forward", bias=head.bias,
                         bias_ref=None if shared else head_base.bias, softcap=head.softcap, logit_scale=head.logit_scale, reduction="none")
    kl = []
    for rows, base_rows in zip(x.split(ROWS_AT_ONCE), x_base.split(ROWS_AT_ONCE)):
        log_p, log_q = head_base.logits(base_rows).log_softmax(-1), head.logits(rows).log_softmax(-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(kl)
