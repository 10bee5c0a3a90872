"""Weight or mask tokens, so that they do not pull a model away from what it knows.

dft     Dynamic Fine-Tuning (Wu et al., arXiv 2508.05629). A token's loss is weighted by the model's own probability of it, p, held
        constant in the gradient: p · -log p. The gradient of cross entropy is one over p times that of p, and so largest for the
        tokens that the model finds least likely; the weight takes that factor out. Computed at each step, in the loop.
eaft    Entropy-adaptive fine-tuning (Diao et al., arXiv 2601.02151). A token's loss is weighted by the normalised entropy of the model's 20
        most probable tokens there, between 0 and 1, held constant in the gradient. Where the model is sure and the token is another one,
        the gradient is large and the weight small; where it is unsure, it learns. Computed within the loss (kernels/_top_entropy_rows.py).
stm     Selective token masking (Wu et al., arXiv 2501.14315). Tokens whose perplexity under the base, 1 / p, is above a threshold are
        masked; the paper's threshold of 2.5 masks about a fifth of the tokens of human text.
flow    Fine-tuning with pre-trained loss-oriented weighting (Sanyal et al., arXiv 2502.02797). A sample weighs exp(-f / median f), f being
        its mean loss per supervised token under the base: samples that are easy for the base weigh more.

STM and FLOW depend on the base alone, so one pass over the samples before training gives them, and the loop sees samples with other
masks or other weights. A resumed run repeats the pass; on the same machine it is bit-identical.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from kernels import linear_log_prob
from trainer.config import BatchSize, Config
from trainer.data.batch import batches
from trainer.data.packing import pack
from trainer.data.samples import Samples
from trainer.errors import UserError
from trainer.retention.kl import FrozenBase, sources_of
from trainer.runtime.distributed import Distributed


def own_probability(losses: Tensor, dft_mask: Tensor) -> Tensor:
    """Return DFT's weights [S] of tokens with these losses [S].

    A token in `dft_mask` weighs its own probability, any other 1.
    """
    return torch.where(dft_mask, torch.exp(-losses.detach()), 1.0)


def apply_token_weighting(samples: Samples, config: Config, model: nn.Module, roles: Sequence[str], device: torch.device,
                          dist: Distributed) -> tuple[Samples, str | None]:
    """Return the samples masked (stm) or weighted (flow), and a console line.

    Without `retention.token_weighting: stm` or `flow` they are returned as they are, with None. `model` must not be trained yet. Raises
    UserError where no token would be left to learn from.
    """
    retention = config.retention
    if retention.token_weighting not in ("stm", "flow"):
        return samples, None
    indices = np.flatnonzero(sources_of(roles, retention.token_weighting_sources)[samples.sources])
    start = time.perf_counter()
    log_probs = base_log_probs(model, samples, indices, config.batch, device, dist)
    cost = f"the base read {len(indices):,} samples in {time.perf_counter() - start:.1f} s"
    if retention.token_weighting == "stm":
        keep = log_probs >= -np.log(retention.stm_threshold)
        if not keep.any():
            raise UserError(f"retention.stm_threshold: expected a perplexity of at most {retention.stm_threshold:g} under the base in some "
                            f"of the {len(keep):,} supervised tokens ({retention.token_weighting_sources} samples), got none; raise it")
        return samples.supervising(indices, keep), f"stm: {1 - keep.mean():.1%} of {len(keep):,} supervised tokens are masked; {cost}"
    weights = flow_weights(mean_losses(log_probs, samples.supervised[indices]))
    low, middle, high = np.percentile(weights, [10, 50, 90])
    line = f"flow: sample weights {low:.2f} to {high:.2f} (10% to 90%), median {middle:.2f}; {cost}"
    return samples.weighted(indices, weights), line


def mean_losses(log_probs: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return each sample's mean loss [n] from the log-probs of all tokens, counts[i] >= 1 of sample i."""
    starts = np.cumsum(counts) - counts
    return -np.add.reduceat(log_probs.astype(np.float64), starts) / counts


def flow_weights(losses: np.ndarray) -> np.ndarray:
    """Return exp(-f / median f) [n], between 0 and 1; where the median is 0, samples of loss 0 weigh 1."""
    return np.exp(-losses / max(float(np.median(losses)), 1e-12)).astype(np.float32)


@torch.no_grad()
def base_log_probs(model: nn.Module, samples: Samples, indices: np.ndarray, batch_size: BatchSize, device: torch.device,
                   dist: Distributed) -> np.ndarray:
    """Return log p of every supervised token under the base, float32, in the order of `indices`.

    Each rank runs its own packs.
    """
    base = FrozenBase(model)
    head = base.head()
    counts = samples.supervised[indices]
    starts = np.cumsum(counts) - counts
    log_probs = torch.zeros(int(counts.sum()), device=device)
    packs = pack(samples.lengths[indices], batch_size.tokens_per_pack, batch_size.max_samples_per_pack, seed=0)
    for members in packs[dist.rank :: dist.size]:
        batch, = batches(samples, [indices[members]], device)
        places = np.concatenate([np.arange(starts[i], starts[i] + counts[i]) for i in members])
        hidden = base.hidden(batch, batch.supervised_rows)  # (S, W)
        values = linear_log_prob(hidden, head.weight, batch.targets, bias=head.bias, ignore_index=None, softcap=head.softcap,
                                 logit_scale=head.logit_scale)
        log_probs[torch.from_numpy(places).to(device)] = values.float()
    dist.sum([log_probs])  # each place is written by one rank, and 0 on the others
    return log_probs.cpu().numpy()
