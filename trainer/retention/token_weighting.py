"""Which tokens are learnt from, and how much: three ways to keep what is improbable under a model from pulling it away from what it knows.

dft     Dynamic Fine-Tuning (Wu et al., arXiv 2508.05629). A token's loss is weighted by the model's own probability of it, p, held
        constant in the gradient: p · -log p. The gradient of cross entropy is one over p times that of p, and so largest for what the
        model finds least likely; the weight takes that factor out. Made anew at each step, in the loop.
stm     Selective token masking (Wu et al., arXiv 2501.14315). Tokens whose perplexity under the base, 1 / p, is above a threshold are
        not learnt from at all; the paper's is 2.5, and masks about a fifth of the tokens of human text.
flow    Fine-tuning with pre-trained loss-oriented weighting (Sanyal et al., arXiv 2502.02797). A sample weighs exp(-f / median f), f being
        its mean loss per supervised token under the base: what is easy for the base weighs more.

The latter two are decided by the base alone, so one pass over the samples before training settles them, and the loop sees samples with
other masks or other weights. A resumed run makes the pass again; on the same machine it has the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from kernels import linear_log_prob
from trainer import config
from trainer.data.batch import batches
from trainer.data.packing import pack
from trainer.data.samples import Samples
from trainer.errors import UserError
from trainer.model.forward import lm_head
from trainer.retention.kl import FrozenBase, chosen
from trainer.runtime.distributed import Distributed


def own_probability(losses: Tensor, dft_mask: Tensor) -> Tensor:
    """DFT's weights [S] of tokens with these losses [S]: the probability of those in `dft_mask`, 1 of the others."""
    return torch.where(dft_mask, torch.exp(-losses.detach()), 1.0)


def reweighted(samples: Samples, settings: config.Config, model: nn.Module, roles: Sequence[str], device: torch.device,
                   dist: Distributed
               ) -> tuple[Samples, str | None]:
    """The samples as `retention.token_weighting` wants them, and a line that says so; the same samples and None where it asks for nothing.

    `model` is not trained yet. UserError where nothing would be left to learn from.
    """
    asked = settings.retention
    if asked.token_weighting not in ("stm", "flow"):
        return samples, None
    indices = np.flatnonzero(chosen(roles, asked.token_weighting_sources)[samples.sources])
    begun = time.perf_counter()
    log_probs = base_log_probs(model, samples, indices, settings.batch, device, dist)
    spent = f"the base read {len(indices):,} samples in {time.perf_counter() - begun:.1f} s"
    if asked.token_weighting == "stm":
        keep = log_probs >= -np.log(asked.stm_threshold)
        if not keep.any():
            raise UserError(f"retention.stm_threshold: expected a perplexity of at most {asked.stm_threshold:g} under the base in some "
                            f"of the {len(keep):,} supervised tokens ({asked.token_weighting_sources} rows), found none; raise it")
        return samples.supervising(indices, keep), f"stm: {1 - keep.mean():.1%} of {len(keep):,} supervised tokens are masked; {spent}"
    weights = flow_weights(mean_losses(log_probs, samples.supervised[indices]))
    low, middle, high = np.percentile(weights, [10, 50, 90])
    told = f"flow: samples weigh {low:.2f} to {high:.2f} (10% to 90%), median {middle:.2f}; {spent}"
    return samples.weighted(indices, weights), told


def mean_losses(log_probs: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean loss of each sample [n] from the log-probabilities of all their tokens, of which sample i has counts[i], at least one."""
    starts = np.cumsum(counts) - counts
    return -np.add.reduceat(log_probs.astype(np.float64), starts) / counts


def flow_weights(losses: np.ndarray) -> np.ndarray:
    """exp(-f / median f) [n], between 0 and 1; where the median is 0, those of loss 0 weigh 1."""
    return np.exp(-losses / max(float(np.median(losses)), 1e-12)).astype(np.float32)


@torch.no_grad()
def base_log_probs(model: nn.Module, samples: Samples, indices: np.ndarray, settings: config.BatchSize, device: torch.device,
                   dist: Distributed
                   ) -> np.ndarray:
    """log p of every supervised token under the base, float32, sample by sample in the order of `indices`. Each rank runs its packs."""
    base, out = FrozenBase(model), lm_head(model)
    counts = samples.supervised[indices]
    starts = np.cumsum(counts) - counts
    found = torch.zeros(int(counts.sum()), device=device)
    packs = pack(samples.lengths[indices], settings.tokens_per_pack, settings.max_samples_per_pack, seed=0)
    for members in packs[dist.rank :: dist.size]:
        batch, = batches(samples, [indices[members]], device)
        place = np.concatenate([np.arange(starts[i], starts[i] + counts[i]) for i in members])
        hidden = base.hidden(batch, batch.supervised_rows)  # (S, W)
        log_probs = linear_log_prob(hidden, out.weight, batch.targets, bias=out.bias, ignore_index=None, softcap=out.softcap,
                                    logit_scale=out.logit_scale)
        found[torch.from_numpy(place).to(device)] = log_probs.float()
    dist.sum([found])  # every place is written by one rank, and 0 on the others
    return found.cpu().numpy()
