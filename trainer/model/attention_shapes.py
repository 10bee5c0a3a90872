"""Read the shape of each layer's attention from a model's config.

transformers' configs name layers in `layer_types`, and may differ from layer to layer: Gemma 4 has wider heads in its global layers, and
refuses to tell one width for all. Latent attention (DeepSeek-V2, arXiv 2405.04434) has keys and values of different widths.
"""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedConfig

# Kinds of layers without softmax attention: state spaces, linear attention, convolutions, and what is an MLP alone.
WITHOUT_ATTENTION = {"linear_attention", "mamba", "recurrent", "conv", "mlp", "moe"}


class AttentionShape(NamedTuple):
    """Heads of one layer's softmax attention, and their widths."""

    heads: int
    key_heads: int  # 0 where a layer reads the keys and values of an earlier one
    key_width: int  # of a head's query and key
    value_width: int  # of a head's value and output
    cache_width: int  # numbers that a KV cache holds for a token


def attention_shapes(config: PreTrainedConfig) -> list[AttentionShape | None]:
    """Return the shape of each decoder layer's attention, None for layers without.

    `config` is a text config (`get_text_config`). A window, or a choice of keys by an indexer, does not change the shape.
    """
    layers = getattr(config, "num_hidden_layers", 0)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ["full_attention"] * layers
    first_shared = layers - getattr(config, "num_kv_shared_layers", 0)
    heads_of_layers = getattr(config, "num_attention_heads_per_layer", None) or [None] * layers  # Laguna
    return [None if kind in WITHOUT_ATTENTION else _shape(config.per_layer_config[i], kind, heads, i >= first_shared > 0)
            for i, (kind, heads) in enumerate(zip(kinds, heads_of_layers))]


def _shape(layer: PreTrainedConfig, kind: str, heads: int | None, shared: bool) -> AttentionShape | None:
    """Return the shape that one layer's config describes; None where it names no heads."""
    def read(name: str) -> int | None:
        own = getattr(layer, f"swa_{name}", None) if "sliding" in kind else None  # Inkling
        return own or getattr(layer, name, None)

    heads = heads or read("num_attention_heads")
    if not heads:
        return None
    latent, rope = getattr(layer, "kv_lora_rank", None), getattr(layer, "qk_rope_head_dim", None) or 0
    if latent:
        nope = layer.qk_nope_head_dim
        return AttentionShape(heads, heads, nope + rope, layer.v_head_dim or nope, latent + rope)
    width = read("head_dim") or layer.hidden_size // heads
    value_width = getattr(layer, "v_head_dim", None) or width
    key_heads = 0 if shared else read("num_key_value_heads") or heads
    return AttentionShape(heads, key_heads, width, value_width, key_heads * (width + value_width))
