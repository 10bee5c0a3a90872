"""Compute decoder layers, attention, MLPs and norms with fused operations.

Each `*_forward` takes the stock module as its first argument and becomes that module's `forward` (patch.py). It runs the class's own
forward where the fused operation does not apply. Where one fused operation includes a norm, the norm module's forward is skipped,
unless it has hooks.

Shapes: T tokens, S selected rows, W model width, H query heads, Hk key heads, D head width.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from kernels.attention import packed_attention
from kernels.glu import glu
from kernels.lora_mlp import lora_mlp
from kernels.qk_norm_rope import qk_norm_rope
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import apply_rope
from trainer.model import lora
from trainer.model.families import BEFORE_MLP, Family
from trainer.model.pack_context import running_pack


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
    forward = norm.forward
    return None if hooks or not isinstance(forward, partial) or forward.func is not norm_forward else NormSettings(*forward.args[1:])


def layer_forward(layer: nn.Module, stream_norm: str, last: bool, hidden_states: Tensor, *args, **kwargs) -> Tensor:
    """Compute a decoder layer, fusing the residual addition after attention with the next norm.

    If the running pack has `rows` [S], the last layer returns only these tokens [1,S,W]: its output projection and MLP skip the others.
    """
    pack = running_pack()
    rows = pack.rows if last and pack is not None else None
    norm = getattr(layer, stream_norm)
    settings = fusable_norm(norm)
    if args or settings is None:
        out = type(layer).forward(layer, hidden_states, *args, **kwargs)
        return out if rows is None else out.index_select(1, rows)
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), rows=rows, **kwargs)
    if rows is not None:
        hidden_states = hidden_states.index_select(1, rows)
    if stream_norm == BEFORE_MLP:
        attended = layer.post_attention_layernorm(attended)
    normed, stream = add_rms_norm(attended, hidden_states, norm.weight, settings.eps, offset=settings.offset)
    out = layer.mlp(normed)
    return stream + (layer.post_feedforward_layernorm(out) if stream_norm == BEFORE_MLP else out)


class AttentionTraits(NamedTuple):
    """Arguments of one attention layer's forward beside its weights."""

    head_dim: int
    heads: int
    scale: float
    window: int | None
    softcap: float | None
    rope: bool
    norm: str | None  # of queries and keys: "head" (each head by itself), "width" (all heads as one vector), or none


def attention_traits(attention: nn.Module, family: Family) -> AttentionTraits:
    """Read the traits of one attention module."""
    config, q_norm = attention.config, getattr(attention, "q_norm", None)
    holder = config if family.window_in_config else attention
    return AttentionTraits(
        head_dim=attention.head_dim,
        heads=config.num_attention_heads,
        scale=attention.scaling,
        window=getattr(holder, "sliding_window", None),
        softcap=attention.attn_logit_softcapping if family.softcap else None,
        rope=bool(getattr(attention, "use_rope", True)),
        norm=None if q_norm is None else "head" if q_norm.weight.numel() == attention.head_dim else "width",
    )


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
    q, k, v = project_heads(attention, traits, hidden_states.squeeze(0))
    q, k = position_heads(attention, traits, q, k, position_embeddings)
    out = packed_attention(q, k, v, pack.cu_seqlens, pack.max_seqlen, scale=traits.scale, window=traits.window, softcap=traits.softcap,
                           dropout=attention.attention_dropout if attention.training else 0.0)
    out = out.flatten(1)
    return attention.o_proj(out if rows is None else out.index_select(0, rows)).unsqueeze(0), None


def project_heads(attention: nn.Module, traits: AttentionTraits, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project x [T,W] to q [T,H,D] and k, v [T,Hk,D], normalised if the norm is over all heads."""
    if hasattr(attention, "qkv_proj"):
        fused = attention.qkv_proj(x).unflatten(-1, (-1, traits.head_dim))
        key_heads = (fused.shape[1] - traits.heads) // 2
        return fused.split((traits.heads, key_heads, key_heads), dim=1)
    q, k, v = lora.project(x, (attention.q_proj, attention.k_proj, attention.v_proj))
    if traits.norm == "width":
        q, k = attention.q_norm(q), attention.k_norm(k)
    return tuple(y.unflatten(-1, (-1, traits.head_dim)) for y in (q, k, v))


def position_heads(attention: nn.Module, traits: AttentionTraits, q: Tensor, k: Tensor, position_embeddings) -> tuple[Tensor, Tensor]:
    """Normalise q [T,H,D] and k [T,Hk,D] per head and apply RoPE, each where the layer does so."""
    cos, sin = (x.squeeze(0) for x in position_embeddings) if traits.rope else (None, None)
    if traits.norm == "head":
        settings = fusable_norm(attention.q_norm)
        if traits.rope and settings is not None and settings == fusable_norm(attention.k_norm):
            return qk_norm_rope(q, k, attention.q_norm.weight, attention.k_norm.weight, cos, sin, settings.eps, offset=settings.offset)
        q, k = attention.q_norm(q), attention.k_norm(k)
    return apply_rope(q, k, cos, sin) if traits.rope else (q, k)


def mlp_forward(mlp: nn.Module, activation: str, x: Tensor) -> Tensor:
    """Compute down(activation(gate(x)) * up(x)), in one operation if any layer has an adapter."""
    layers = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if lora.any_adapter(layers) and lora.fusable(layers):
        weights, biases, loras = zip(*map(lora.projection, layers), strict=True)
        return lora_mlp(x, weights, loras, biases, activation)
    return mlp.down_proj(glu(mlp.gate_proj(x), mlp.up_proj(x), activation))


def fused_mlp_forward(mlp: nn.Module, activation: str, x: Tensor) -> Tensor:
    """Compute the MLP of families whose gate and up projections are one layer."""
    gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
    return mlp.down_proj(glu(gate, up, activation))


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def row_selecting_layer(model: nn.Module) -> nn.Module | None:
    """Return the last decoder layer if its forward takes `rows`, else None."""
    last = next(reversed(decoder_layers(model)), None)
    forward = getattr(last, "forward", None)
    return last if isinstance(forward, partial) and forward.func is layer_forward and forward.args[2] else None
