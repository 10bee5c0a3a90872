"""Compute attention inside packs, for the attention modules of any transformers model.

Samples lie end to end in one sequence of T tokens, and each token sees only earlier tokens of its own sample. `packed` is registered
with transformers as an attention implementation, so stock modules call it; it reads the bounds of the samples from the running pack. No
mask is built: transformers makes none for an implementation it does not know.

Shapes: B batch, T tokens, H heads, D head width.
"""

from __future__ import annotations

import functools
import inspect
import sys
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from trainer.model.pack_context import attend, pack_of, running_pack

PACKED = "steadfast_packed"
SHARDED_FORWARD = "sharded_forward"  # method of a sharded model that gathers its weights around `decoder_states`
UNSAID = -1  # a window that an attention call does not name: the mask may have one, or there is none
SEES_ALL_EARLIER = {"full_attention", "attention", "hybrid"}  # kinds of layers whose mask is causal


class Reach(NamedTuple):
    """Earlier tokens of its sample that a token sees; both None: all."""

    window: int | None = None  # this many, itself included
    chunk: int | None = None  # those of its own chunk of this many


def packed(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *,
           scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = UNSAID, softcap: float | None = None,
           s_aux: Tensor | None = None, **kwargs) -> tuple[Tensor, None]:
    """Compute causal attention in the signature of transformers' attention interface.

    Of query and key [B,H,T,D] and [B,Hk,T,D], value [B,Hk,T,Dv], and sinks s_aux [H], it returns [B,T,H,Dv]. The batch is the one row of
    the running pack; without a pack each row is one sample. Raises ValueError for what packs cannot express, such as a mask or a cache.
    """
    batch, _, tokens, dim = query.shape
    if attention_mask is not None or key.shape[2] != tokens:
        found = "a mask" if attention_mask is not None else f"{key.shape[2] - tokens} cached tokens"
        raise ValueError(f"packed attention: expected neither mask nor cache, got {found}; "
                         "call model.set_attn_implementation('sdpa') for padded batches and generation")
    reach = _reach(module, sliding_window)
    if (pack := running_pack()) is None:
        pack = pack_of(torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=query.device), tokens)
    elif batch != 1:
        raise ValueError(f"packed attention: expected the pack as one row, got a batch of {batch}")
    scaling, value_dim = dim ** -0.5 if scaling is None else scaling, value.shape[3]
    widest = max(dim, value_dim)  # the kernels have one width: zeros change neither scores nor the outputs that are kept
    rows = [F.pad(x, (0, widest - x.shape[3])).transpose(1, 2).flatten(0, 1) for x in (query, key, value)]  # [B*T, H, D]
    out = attend(pack, *rows, scale=scaling, window=reach.window, chunk=reach.chunk, softcap=softcap, sinks=s_aux, dropout=dropout)
    return out[..., :value_dim].unflatten(0, (batch, tokens)), None


def _reach(module: nn.Module, window: int | None) -> Reach:
    """Return the reach of an attention call with this window, or UNSAID.

    Some stock code says nothing of it and leaves it to the mask. Raises ValueError for a kind of layer that is neither.
    """
    config, kind = getattr(module, "config", None), _kind(module)
    if kind == "chunked_attention":
        return Reach(chunk=config.attention_chunk_size)
    if kind == "sliding_attention" and window in (None, UNSAID):
        return Reach(window=config.sliding_window)
    if kind not in SEES_ALL_EARLIER | {"sliding_attention", None}:
        raise ValueError(f"packed attention: {type(module).__name__} is {kind}, which its call does not describe")
    if window == UNSAID:
        return Reach(window=getattr(config, "sliding_window", None) if kind is None and _masks_windows(module) else None)
    return Reach(window=window)


def _kind(module: nn.Module) -> str | None:
    """Return the kind of an attention module's layer, in transformers' words.

    None for a config without kinds, and for a module that several layers share.
    """
    kinds, layer = getattr(getattr(module, "config", None), "layer_types", None), getattr(module, "layer_idx", None)
    return kinds[layer] if kinds and layer is not None else None


def _masks_windows(module: nn.Module) -> bool:
    """Return whether the code of a module's model builds masks with a window."""
    return hasattr(sys.modules[type(module).__module__], "create_sliding_window_causal_mask")


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
    return decoder(model).config._attn_implementation == PACKED


def set_attention(model: PreTrainedModel, implementation: str) -> None:
    """Set the attention implementation of a model and its text decoder.

    Towers, in memory or not, keep theirs.
    """
    config, text = model.config, decoder(model).config
    names = ["", *(name for name in config.sub_configs if getattr(config, name) is text)]
    model.set_attn_implementation(dict.fromkeys(names, implementation))


def decoder(model: PreTrainedModel) -> nn.Module:
    """Return the part of a causal language model that ends in the last hidden state."""
    part = model.get_decoder()
    if part is model:
        return model.model
    return part if part.get_output_embeddings() is None else decoder(part)  # a wrapper's text model may have the head


def last_hidden_states(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Return the last hidden states [B,T,W] of tokens [B,T], in the model's dtype.

    A decoder without positions, such as Mamba's, gets none; Mamba's residual stream, and so what it returns, is fp32.
    """
    return getattr(model, SHARDED_FORWARD, partial(decoder_states, model))(input_ids, position_ids)


def decoder_states(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Return the last hidden states of a model whose weights are there."""
    part = decoder(model)
    positions = {"position_ids": position_ids} if _takes_positions(type(part)) else {}
    return part(input_ids=input_ids, use_cache=False, **positions).last_hidden_state.to(model.dtype)


@functools.cache
def _takes_positions(decoder_class: type) -> bool:
    return "position_ids" in inspect.signature(decoder_class.forward).parameters
