"""Stock and packed models side by side: their packs, logits, gradients and errors."""

import numpy as np
import torch
from torch import nn

from trainer.data.batch import collate
from trainer.data.samples import Piece
from trainer.model.forward import forward_hidden, lm_head
from trainer.model.loading import use_packed_attention

LENGTHS = (13, 1, 20, 13)
SETTINGS = {  # what tiny.py leaves at its default
    "qwen2": dict(use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "smollm3": dict(no_rope_layers=[1, 0], use_sliding_window=True, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    "phi3": dict(sliding_window=7),
    "gemma2": dict(attn_logit_softcapping=0.5),
}


def pack(lengths=LENGTHS, vocab_size=400):
    rng = np.random.default_rng(1)
    return collate([Piece(rng.integers(5, vocab_size, n).astype(np.int32), np.ones(n, bool)) for n in lengths])


def unlike_initial(model):
    """Give norms and biases values that matter, in place."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data = torch.empty_like(parameter).normal_(0.5, 0.3, generator=generator)
    return model


def stock_logits(model, batch):
    """Return the logits of each sample by itself, by the model's own forward."""
    lengths = batch.cu_seqlens.diff().tolist()
    return torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in batch.input_ids.split(lengths)])


def our_logits(model, batch):
    return lm_head(model).logits(forward_hidden(model, batch))


def with_packed_attention(model):
    """Prepare a model as load_model does after loading it."""
    use_packed_attention(model)
    return model


def relative_error(ours, exact):
    ours, exact = ours.detach().double(), exact.detach().double()
    return float((ours - exact).norm() / exact.norm())


def gradients(model, logits):
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(logits.dtype)
    (logits * weight).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def stir(model: nn.Module) -> None:
    """Move every trained weight a little, the same way in every process."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=generator)
