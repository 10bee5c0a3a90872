"""Compute decoder layers, attention, MLPs and norms with fused operations.

Each `*_forward` takes the stock module as its first argument and becomes that module's `forward` (patch.py). It runs the class's own
forward where the fused operation does not apply. Where one fused operation includes a norm, the norm module's forward is skipped,
unless it has hooks.

Shapes: T tokens, S selected rows, W model width, H query heads, Hk key heads, D head width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.functional import dropout
from transformers.modeling_layers import GradientCheckpointingLayer

from kernels.glu import glu
from kernels.lora_mlp import lora_mlp
from kernels.qk_norm_rope import qk_norm_rope
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import apply_rope
from trainer.model import lora
from trainer.model.families import Family
from trainer.model.pack_context import attend, running_pack
from trainer.model.packed_attention import decoder


def norm_forward(norm: nn.Module, eps: float, offset: float, x: Tensor) -> Tensor:
    """Compute RMSNorm with weight offset + weight."""
    return rms_norm(x, norm.weight, eps, offset=offset)


class NormSettings(NamedTuple):
    """Arguments of an RMSNorm beside its weight."""

    eps: float
    offset: float


def fusable_norm(norm: nn.Module) -> NormSettings | None:
    """Return the settings of a norm that a larger fused operation may include, or None.

    Such a norm has our forward and no hooks, so skipping its module changes nothing.
    """
    hooks = norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks
    return None if hooks or not runs(norm, norm_forward) else NormSettings(*norm.forward.args[1:])


def runs(module: nn.Module | None, function: Callable) -> bool:
    """Return whether a module's forward is this one of ours."""
    forward = getattr(module, "forward", None)
    return isinstance(forward, partial) and forward.func is function


class LayerNorms(NamedTuple):
    """Names of a decoder layer's norms after the first; the last two may be missing."""

    stream: str  # of the residual stream, right after attention is added to it
    attention: str | None  # of attention's output, before it is added
    mlp: str | None  # of the MLP's output, before it is added


def layer_forward(layer: nn.Module, norms: LayerNorms, last: bool, hidden_states: Tensor, *args, **kwargs) -> Tensor:
    """Compute a decoder layer, fusing the residual addition after attention with the next norm.

    If the running pack has `rows` [S], the last layer returns only these tokens [1,S,W]: its output projection and MLP skip the others.
    """
    pack = running_pack()
    rows = pack.rows if last and pack is not None else None
    if rows is not None:
        pack.rows_are_selected = True
    norm = getattr(layer, norms.stream)
    settings = fusable_norm(norm)
    if args or settings is None:
        out = type(layer).forward(layer, hidden_states, *args, **kwargs)
        return out if rows is None else out.index_select(1, rows)
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), rows=rows, **kwargs)
    if rows is not None:
        hidden_states = hidden_states.index_select(1, rows)
        if not runs(layer.self_attn, attention_forward):
            attended = attended.index_select(1, rows)
    if norms.attention is not None:
        attended = getattr(layer, norms.attention)(attended)
    normed, stream = add_rms_norm(attended, hidden_states, norm.weight, settings.eps, offset=settings.offset)
    out = layer.mlp(normed)
    return stream + (out if norms.mlp is None else getattr(layer, norms.mlp)(out))


class AttentionTraits(NamedTuple):
    """Arguments of one attention layer's forward beside its weights."""

    head_dim: int
    heads: int
    scale: float
    window: int | None
    softcap: float | None
    rope: bool
    own_rope: Callable[..., tuple[Tensor, Tensor]] | None  # the family's function, where ours does not apply
    norm: str | None  # of queries and keys: "head" (each head by itself), "width" (all heads as one vector), or none
    gate: bool  # q_proj also makes a gate of the output
    query_scale: Callable[..., Tensor] | None  # the family's function of positions that scales queries


def attention_traits(attention: nn.Module, family: Family) -> AttentionTraits:
    """Read the traits of one attention module."""
    config, q_norm, its_code = attention.config, getattr(attention, "q_norm", None), sys.modules[type(attention).__module__]
    holder = config if family.window_in_config else attention
    window = getattr(holder, "sliding_window", None) if getattr(attention, "is_sliding", True) else None
    without_rope = (getattr(config, "position_embedding_type", "rope") != "rope"
                    or (family.rope_in_windows and config.sliding_window is not None and window is None))
    return AttentionTraits(
        head_dim=attention.head_dim,
        heads=config.num_attention_heads,
        scale=attention.scaling,
        window=window,
        softcap=attention.attn_logit_softcapping if family.softcap else None,
        rope=bool(getattr(attention, "use_rope", not without_rope)),
        own_rope=partial(its_code.apply_rotary_pos_emb, unsqueeze_dim=-2) if family.own_rope else None,
        norm=None if q_norm is None else "head" if q_norm.weight.shape[-1] == attention.head_dim else "width",
        gate=family.output_gate,
        query_scale=its_code.get_llama_4_attn_scale if family.query_scale else None,
    )


READ = {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm", "rotary_emb", "sinks"}


def why_not_fused_attention(attention: nn.Module) -> str | None:
    """Return what a fused forward would not compute of an attention module, or None."""
    unread = {name for name, _ in (*attention.named_children(), *attention.named_parameters(recurse=False))} - READ
    if unread or getattr(attention.config, "clip_qkv", None) is not None:
        return ", ".join(sorted(unread)) or "clip_qkv"
    return None


def attention_forward(attention: nn.Module, traits: AttentionTraits, hidden_states: Tensor, position_embeddings=None,
                      attention_mask=None, past_key_values=None, rows: Tensor | None = None, **kwargs) -> tuple[Tensor, Tensor | None]:
    """Compute attention of a pack [1,T,W], without transposing between projections and heads.

    Any other input runs the class's own forward. If `rows` [S] is given, return outputs only for these query positions [1,S,W]; keys and
    values still cover the whole pack.
    """
    pack = running_pack()
    if pack is None or attention_mask is not None or past_key_values is not None:
        out, weights = type(attention).forward(
            attention, hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask,
            past_key_values=past_key_values, **kwargs)
        return out if rows is None else out.index_select(1, rows), weights
    q, k, v, gate = project_heads(attention, traits, hidden_states.squeeze(0))
    q, k = position_heads(attention, traits, q, k, position_embeddings)
    if traits.query_scale is not None:
        q = scale_queries(attention, traits, q, kwargs["position_ids"])
    out = attend(pack, q, k, v, scale=traits.scale, window=traits.window, softcap=traits.softcap,
                 sinks=getattr(attention, "sinks", None), dropout=attention.attention_dropout if attention.training else 0.0)
    out = (out if gate is None else out * gate.sigmoid()).flatten(1)
    return residual_dropout(attention, attention.o_proj(out if rows is None else out.index_select(0, rows))).unsqueeze(0), None


def project_heads(attention: nn.Module, traits: AttentionTraits, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Project x [T,W] to q [T,H,D], k and v [T,Hk,D], and the gate [T,H,D], if any.

    q and k are normalised here if the norm is over all heads.
    """
    if hasattr(attention, "qkv_proj"):
        fused = attention.qkv_proj(x).unflatten(-1, (-1, traits.head_dim))
        key_heads = (fused.shape[1] - traits.heads) // 2
        return *fused.split((traits.heads, key_heads, key_heads), dim=1), None
    q, k, v = lora.project(x, (attention.q_proj, attention.k_proj, attention.v_proj))
    if traits.norm == "width":
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, gate = q.unflatten(-1, (traits.heads, -1)).chunk(2, dim=-1) if traits.gate else (q.unflatten(-1, (traits.heads, -1)), None)
    return q, *(y.unflatten(-1, (-1, traits.head_dim)) for y in (k, v)), gate


def position_heads(attention: nn.Module, traits: AttentionTraits, q: Tensor, k: Tensor, position_embeddings) -> tuple[Tensor, Tensor]:
    """Normalise q [T,H,D] and k [T,Hk,D] per head and apply RoPE, each where the layer does so."""
    cos, sin = (x.squeeze(0) for x in position_embeddings) if traits.rope else (None, None)
    if traits.norm == "head":
        settings = fusable_norm(attention.q_norm)
        if traits.rope and not traits.own_rope and settings is not None and settings == fusable_norm(attention.k_norm):
            return qk_norm_rope(q, k, attention.q_norm.weight, attention.k_norm.weight, cos, sin, settings.eps, offset=settings.offset)
        q, k = attention.q_norm(q), attention.k_norm(k)
    return (traits.own_rope or apply_rope)(q, k, cos, sin) if traits.rope else (q, k)


def scale_queries(attention: nn.Module, traits: AttentionTraits, q: Tensor, position_ids: Tensor) -> Tensor:
    """Scale q [T,H,D] by a function of the positions [1,T], as Llama 4's layers do for long contexts."""
    rope = attention.config.rope_parameters
    scale = traits.query_scale(position_ids, rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"])
    return q * scale.view(-1, 1, 1).to(q.dtype)


def residual_dropout(module: nn.Module, out: Tensor) -> Tensor:
    """Apply the dropout that some families have on what attention and MLP add to the residual stream."""
    return dropout(out, getattr(module, "residual_dropout", 0.0), module.training)


def mlp_forward(mlp: nn.Module, activation: str, x: Tensor) -> Tensor:
    """Compute down(activation(gate(x)) * up(x)), in one operation if any layer has an adapter."""
    layers = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if lora.any_adapter(layers) and lora.fusable(layers):
        weights, biases, loras = zip(*map(lora.projection, layers), strict=True)
        return residual_dropout(mlp, lora_mlp(x, weights, loras, biases, activation))
    return residual_dropout(mlp, mlp.down_proj(glu(mlp.gate_proj(x), mlp.up_proj(x), activation)))


def fused_mlp_forward(mlp: nn.Module, activation: str, x: Tensor) -> Tensor:
    """Compute the MLP of families whose gate and up projections are one layer."""
    gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
    return mlp.down_proj(glu(gate, up, activation))


def is_fused(module: nn.Module) -> bool:
    """Return whether a module's forward is one of those above."""
    return any(runs(module, ours) for ours in (norm_forward, attention_forward, mlp_forward, fused_mlp_forward, layer_forward))


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of the language model in order."""
    return [module for module in decoder(model).modules() if isinstance(module, GradientCheckpointingLayer)]


def keep_all_rows(model: nn.Module) -> None:
    """Let the last decoder layer compute every token, whatever rows are asked for."""
    if layer := row_selecting_layer(model):
        layer.forward = partial(layer_forward, *layer.forward.args[:2], False)


def row_selecting_layer(model: nn.Module) -> nn.Module | None:
    """Return the last decoder layer if its forward takes `rows`, else None."""
    last = next(reversed(decoder_layers(model)), None)
    return last if runs(last, layer_forward) and last.forward.args[2] else None
