"""Compute attention inside packs, for the attention modules of any transformers model.

Samples lie end to end in one sequence of T tokens, and each token sees only earlier tokens of its own sample. `packed` is registered
with transformers as an attention implementation, so stock modules call it; the bounds of the samples reach it as keyword arguments of
the model's call. No mask is built: transformers makes none for an implementation it does not know.

A model outside our families gets this implementation only if a probe shows that no other operation mixes samples.

Shapes: B batch, T tokens, H heads, D head width.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from kernels.attention import packed_attention

PACKED = "steadfast_packed"
SEES_EARLIER = {"full_attention", "sliding_attention"}  # kinds of layers whose mask is causal, with or without a window


def packed(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *,
           scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None, softcap: float | None = None,
           cu_seqlens: Tensor | None = None, max_seqlen: int | None = None, **kwargs) -> tuple[Tensor, None]:
    """Compute causal attention in the signature of transformers' attention interface.

    Of query [B,H,T,D], key and value [B,Hk,T,D] it returns [B,T,H,D]. `cu_seqlens[n+1]` bounds the n samples of a batch of one row;
    without it each row is one sample. Raises ValueError for what packs cannot express: a mask, a cache, chunked attention.
    """
    batch, _, tokens, _ = query.shape
    _check_call(module, key.shape[2] - tokens, attention_mask, sliding_window)
    if cu_seqlens is None:
        cu_seqlens, max_seqlen = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=query.device), tokens
    elif batch != 1:
        raise ValueError(f"packed attention: expected one row with cu_seqlens, got a batch of {batch}")
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]  # [B*T, H, D]
    out = packed_attention(*rows, cu_seqlens, max_seqlen, scale=scaling, window=sliding_window, softcap=softcap, dropout=dropout)
    return out.unflatten(0, (batch, tokens)), None


def _check_call(module: nn.Module, cached: int, attention_mask: Tensor | None, sliding_window: int | None) -> None:
    """Refuse a call that packed attention cannot compute."""
    if attention_mask is not None or cached:
        found = "a mask" if attention_mask is not None else f"{cached} cached tokens"
        raise ValueError(f"packed attention: expected neither mask nor cache, got {found}; "
                         "call model.set_attn_implementation('sdpa') for padded batches and generation")
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    kind = kinds[module.layer_idx] if kinds else "full_attention"
    if kind not in SEES_EARLIER or (kind == "sliding_attention" and sliding_window is None):
        raise ValueError(f"packed attention: {type(module).__name__} is {kind}, which its call does not describe")


AttentionInterface.register(PACKED, packed)


def refuse_mask(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Refuse the mask of a padded batch, in a forward pre-hook.

    transformers would drop it silently for an implementation that it does not know.
    """
    if kwargs.get("attention_mask") is not None and module.config._attn_implementation == PACKED:
        raise ValueError("packed attention: expected no attention_mask, got one; drop it for packed batches, or "
                         "call model.set_attn_implementation('sdpa') for padded batches and generation")


def is_packed(model: PreTrainedModel) -> bool:
    """Return whether `model` runs a pack in one call; otherwise its samples run one at a time."""
    return model.config._attn_implementation == PACKED


def decoder(model: PreTrainedModel) -> nn.Module:
    """Return the part of a causal language model that ends in the last hidden state."""
    part = model.get_decoder()
    return model.model if part is model else part


@torch.no_grad()
def packing_fault(model: PreTrainedModel) -> str | None:
    """Return why a model cannot run packs, or None if it can.

    Compares two samples in one pack, with our attention, to each by itself with stock attention. It runs for families whose code we have
    not read, and detects leaks between samples (state-space layers, convolutions, dropped keyword arguments), attention that the
    interface does not describe (biases, sinks), and positions that do not come from position_ids.
    """
    run = partial(decoder(model), use_cache=False)
    if not model._can_set_attn_implementation():
        return "its code does not use the attention interface of transformers"
    was_training, stock = model.training, model.config._attn_implementation
    lengths = (7, 5)
    ids = torch.arange(sum(lengths), device=model.device) * 7 % model.config.get_text_config().vocab_size
    cu_seqlens = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=model.device)
    positions = torch.cat([torch.arange(n, device=model.device) for n in lengths])
    model.eval()
    separate = torch.cat([run(input_ids=part[None]).last_hidden_state[0] for part in ids.split(lengths)])
    model.set_attn_implementation(PACKED)
    try:
        together = run(input_ids=ids[None], position_ids=positions[None], cu_seqlens=cu_seqlens, max_seqlen=max(lengths),
                       rows=None).last_hidden_state[0]
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:  # arguments refused by its code or by `packed`
        return str(error).splitlines()[0]
    finally:
        model.set_attn_implementation(stock)
        model.train(was_training)
    error = float((together - separate).float().norm() / separate.float().norm())
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    return None if error < tolerance else f"samples in one pack change each other, by {error:.0%}"
