"""List the model families that have fused layers, and what distinguishes each.

To add a family: add a row to FAMILIES; the tests run every row, and failing tests show what else differs.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.activations import ACT2FN


@dataclass(frozen=True)
class Family:
    """Differences of a family's modules from Llama's."""

    norm_offset: float = 0.0  # 1.0: norms multiply by 1 + weight
    norm_eps: str = "variance_epsilon"  # the attribute of a norm that is its epsilon
    activation: str = "act_fn"  # the attribute of the MLP that is its activation
    # The norm applied to the residual stream right after attention is added to it; None: decoder layers keep their own forward.
    stream_norm: str | None = "post_attention_layernorm"
    attention_norm: str | None = None  # the norm of attention's output, before it is added
    mlp_norm: str | None = None  # the norm of the MLP's output, before it is added
    attention: bool = True  # False: attention keeps its own forward
    mlp: bool = True  # False: the MLP keeps its own forward
    window_in_config: bool = False  # every layer has the config's sliding window; otherwise the module's own, if any
    softcap: bool = False  # attention logits are capped
    own_rope: bool = False  # RoPE by the function of its module: it turns neighbouring channels, not j with j + half, or has other angles
    rope_in_windows: bool = False  # where layers have a sliding window, only those have positions
    output_gate: bool = False  # q_proj also makes a gate, whose sigmoid multiplies attention's output
    query_scale: bool = False  # queries are scaled by their position
    probed: bool = False  # packs run only if the packing probe, which finds mixers other than attention, shows that they are exact


GEMMA = Family(norm_offset=1.0, norm_eps="eps")
GEMMA_SANDWICH = dict(norm_offset=1.0, norm_eps="eps", stream_norm="pre_feedforward_layernorm",
                      attention_norm="post_attention_layernorm", mlp_norm="post_feedforward_layernorm")
OWN_LAYERS = Family(stream_norm=None)  # what attention and MLP return is scaled or normalised before it is added
GATED = Family(norm_offset=1.0, norm_eps="eps", output_gate=True, probed=True)
PAIRS = Family(own_rope=True)
GLM4 = Family(own_rope=True, activation="activation_fn", attention_norm="post_self_attn_layernorm", mlp_norm="post_mlp_layernorm")
HYBRID = Family(stream_norm=None, attention=False, probed=True)  # convolutions or state spaces in most layers
LATENT = Family(attention=False)  # keys and values are projected from a latent vector
GEMMA4 = Family(norm_eps="eps", stream_norm=None, attention=False)  # layers share keys and values, and have heads of two widths
FAMILIES = {
    "afmoe": Family(stream_norm="pre_mlp_layernorm", attention_norm="post_attention_layernorm", mlp_norm="post_mlp_layernorm"),
    "arcee": Family(),
    "aria_text": Family(),
    "cohere": Family(stream_norm=None, own_rope=True),  # attention and MLP side by side
    "cohere2": Family(stream_norm=None, own_rope=True, rope_in_windows=True),
    "cohere2_moe": Family(stream_norm=None, own_rope=True, rope_in_windows=True),
    "cwm": Family(),
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "dots1": Family(),
    "ernie4_5": PAIRS,
    "ernie4_5_moe": PAIRS,
    "exaone4": Family(stream_norm=None, rope_in_windows=True),
    "exaone_moe": Family(rope_in_windows=True),
    "falcon_h1": Family(stream_norm=None, attention=False, mlp=False, probed=True),  # its MLP has multipliers inside
    "flex_olmo": OWN_LAYERS,
    "gemma": GEMMA,
    "gemma2": Family(**GEMMA_SANDWICH, softcap=True),
    "gemma3_text": Family(**GEMMA_SANDWICH),
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": GEMMA4,
    "glm": Family(own_rope=True, activation="activation_fn"),
    "glm4": GLM4,
    "glm4_moe": Family(),
    "glm4_moe_lite": LATENT,
    "glm4v_moe_text": Family(),
    "glm4v_text": GLM4,
    "gpt_oss": Family(stream_norm=None, own_rope=True),  # the MLP also returns the router's scores
    "granite": OWN_LAYERS,
    "granite_swa": OWN_LAYERS,
    "granitemoe": OWN_LAYERS,
    "granitemoe_swa": OWN_LAYERS,
    "granitemoehybrid": Family(stream_norm=None, probed=True),
    "granitemoeshared": OWN_LAYERS,
    "helium": PAIRS,
    "hunyuan_v1_dense": Family(attention=False),  # norms of queries and keys come after RoPE
    "hunyuan_v1_moe": Family(attention=False),
    "hy_v3": Family(),
    "hyperclovax": OWN_LAYERS,
    "laguna": Family(),
    "lfm2": HYBRID,
    "lfm2_moe": HYBRID,
    "llama": Family(),
    "mellum": Family(),
    "minimax_m2": Family(),
    "ministral": Family(),
    "ministral3": Family(window_in_config=True, query_scale=True),
    "mistral": Family(window_in_config=True),
    "mistral4": LATENT,
    "mixtral": Family(window_in_config=True),
    "nemotron_h": HYBRID,
    "olmo2": OWN_LAYERS,  # in bf16 the stock norms round after the weight, ours before: as exact, not bit-identical
    "olmo3": OWN_LAYERS,
    "olmo_hybrid": HYBRID,
    "olmoe": Family(),
    "paddleocr_vl_text": Family(),
    "phi3": Family(activation="activation_fn", window_in_config=True),
    "qwen2": Family(),
    "qwen2_5_omni_text": Family(),
    "qwen2_5_vl_text": Family(),
    "qwen2_moe": Family(),
    "qwen2_vl_text": Family(),
    "qwen3": Family(),
    "qwen3_5_moe_text": GATED,
    "qwen3_5_text": GATED,
    "qwen3_moe": Family(),
    "qwen3_next": GATED,
    "qwen3_omni_moe_text": Family(),
    "qwen3_vl_moe_text": Family(),
    "qwen3_vl_text": Family(),
    "seed_oss": Family(),
    "smollm3": Family(),
    "solar_open": Family(),
    "vaultgemma": Family(norm_offset=1.0, norm_eps="eps", stream_norm="pre_feedforward_layernorm", softcap=True),
    "youtu": LATENT,
}
ACTIVATIONS = {type(ACT2FN[name]): ours for name, ours in (("silu", "silu"), ("swish", "silu"), ("gelu_pytorch_tanh", "gelu_tanh"))}


def family_of(model: PreTrainedModel) -> Family | None:
    """Return the row in FAMILIES of the model, or of the language model in one that also sees or hears.

    None for other families, for code that came with the model, and for bidirectional attention of text.
    """
    config = model.config.get_text_config()
    own_code = type(model).__module__.startswith("transformers.models.")
    bidirectional = getattr(config, "use_bidirectional_attention", None) in (True, "all")  # "vision": only inside pictures
    return FAMILIES.get(config.model_type) if own_code and not bidirectional else None
