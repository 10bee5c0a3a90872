"""Add noise to embeddings while training (NEFTune, Jain et al., arXiv 2310.05914).

Each element of a sample of n tokens gets a number drawn uniformly from ±alpha / sqrt(n d), d being the width of embeddings. In a pack n is
the length of each sample by itself. The numbers come from torch's generator, which each step seeds anew, so a resumed run draws them again.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from trainer.model.forward import unwrap_peft
from trainer.model.pack_context import running_pack


def add_noise(model: nn.Module, alpha: float) -> None:
    """Let the model's embeddings add noise in training passes.

    Where there is no gradient, as in the base's pass, they add none.
    """
    if alpha > 0:
        unwrap_peft(model).get_input_embeddings().register_forward_hook(partial(_noisy, alpha))


def _noisy(alpha: float, module: nn.Module, args: tuple, embeddings: Tensor) -> Tensor:
    """Return embeddings [..., T, d] with noise."""
    if not (module.training and torch.is_grad_enabled()):
        return embeddings
    noise = torch.rand_like(embeddings) * 2 - 1
    return embeddings + noise * (alpha * _lengths(embeddings).mul(embeddings.shape[-1]).rsqrt()).to(noise.dtype)


def _lengths(embeddings: Tensor) -> Tensor:
    """Return the number of tokens of each token's sample, fp32[T, 1]."""
    pack, tokens = running_pack(), embeddings.shape[-2]
    if pack is None:
        return torch.full((tokens, 1), tokens, dtype=torch.float32, device=embeddings.device)
    lengths = pack.cu_seqlens.diff()
    return lengths.float().repeat_interleave(lengths, output_size=tokens)[:, None]
