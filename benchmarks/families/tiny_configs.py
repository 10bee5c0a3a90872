"""Shrink the default configuration of any family of transformers to a tiny model.

Fields are recognised by their names, which families share; of layers, the first of each kind is kept. EXCEPTIONS holds what does not
follow from names.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCABULARY = 400
PLACEHOLDER = VOCABULARY - 1  # the id of every special token beside the four below: of images, audio
SIZES = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    512: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions",
    96: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner ffn_hidden_size dff dim_ff d_inner dense_intermediate_size "
        "intermediate_size_mlp shared_intermediate_size feed_forward_size mlp_dim",
    64: "hidden_size d_model n_embd embedding_dim embedding_size emb_dim word_embed_proj_dim out_hidden_size hidden_size_global "
        "projection_dim projector_input_dim projector_output_dim vision_output_dim alignment_intermediate_size output_channels output_dim "
        "projector_hidden_size image_token_embed_dim num_embeddings max_image_size merged_hidden_size vision_hidden_size",
    32: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size global_head_dim "
        "base_channels",
    24: "q_lora_rank",
    16: "head_dim kv_channels dim_head d_head v_head_dim qk_head_dim swa_head_dim kv_lora_rank o_lora_rank index_head_dim linear_head_dim "
        "linear_key_head_dim linear_value_head_dim mamba_d_head mamba_head_dim mamba_headdim local_attention attention_head_size "
        "image_size downsample_hidden_size latent_channels embed_dim",
    8: "sliding_window attention_chunk_size window_size sliding_window_size attention_window_size qk_rope_head_dim qk_nope_head_dim "
       "index_topk mamba_d_state ssm_state_size state_size mamba_n_heads mamba_num_heads mamba_chunk_size chunk_size rotary_dim "
       "hidden_size_per_layer_input indexer_budget",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
       "swa_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads linear_num_heads "
       "time_step_rank mamba_dt_rank patch_size",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_key_value_heads num_kv_heads swa_num_key_value_heads "
       "num_experts_per_tok num_experts_per_token moe_topk moe_k index_n_heads linear_num_key_heads n_groups n_mamba_heads "
       "attn_layer_period expert_layer_period num_query_groups",
    1: "max_window_layers n_group topk_group first_k_dense_replace num_dense_layers mamba_n_groups encoder_layers depth "
       "attn_layer_offset expert_layer_offset",
}
BY_NAME: dict[str, Any] = {name: size for size, names in SIZES.items() for name in names.split()}
BY_NAME |= dict(bos_token_id=0, eos_token_id=4, pad_token_id=2, is_decoder=True, use_sliding_window=True, use_qk_norm=True)
BY_NAME |= dict(embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.2, logits_scaling=2.0, lm_head_multiplier=0.5)
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
LAYER_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "indexer_types", "no_rope_layers", "layer_rope_theta",
               "activation_sparsity_pattern")
WINDOW_FIRST = ["sliding_attention", "full_attention"]
STATE_FIRST = ["linear_attention", "full_attention"]
STATE_IN_ATTENTION = dict(num_hidden_layers=3, layers_block_type=["linear_attention", "hybrid", "hybrid"], num_key_value_heads=4)
ROPE = dict(rope_type="default", rope_theta=10000.0)
ROPE_3D = dict(mrope_section=[4, 2, 2], **ROPE)
MROPE = dict(rope_parameters=ROPE_3D)
IMAGE_WORD = dict(vocabulary_map={"<image>": PLACEHOLDER})
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": dict(attn_layer_indices=[1]),
    "blt": dict(encoder_hash_byte_group_vocab=50),
    "chameleon": IMAGE_WORD,
    "cohere_compass_text": dict(rope_parameters={kind: ROPE_3D for kind in WINDOW_FIRST}),
    "cosmos3_edge_text": MROPE,
    "dbrx": dict(attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
                 ffn_config=dict(ffn_hidden_size=64, moe_num_experts=4, moe_top_k=2)),
    "deepseek_ocr2_text": dict(mlp_layer_types=["dense", "sparse"]),
    "dots1": dict(n_shared_experts=1),
    "emu3": IMAGE_WORD,
    "ernie4_5_vl_moe_text": dict(moe_intermediate_size=[32, 32], rope_parameters=dict(mrope_section=[3, 3, 2], **ROPE)),
    "falcon_h1": dict(mamba_d_ssm=128, mamba_d_head=16, mlp_multipliers=[0.5, 2.0], ssm_multipliers=[0.5, 2.0, 0.5, 2.0, 0.5],
                      key_multiplier=0.5, attention_in_multiplier=0.5, attention_out_multiplier=0.5, ssm_in_multiplier=2.0),
    "gemma3n_text": dict(num_hidden_layers=4, layer_types=WINDOW_FIRST * 2, num_kv_shared_layers=2,
                         activation_sparsity_pattern=[0.9, 0.0, 0.0, 0.0], laurel_rank=8),
    "gemma4_text": dict(num_hidden_layers=4, layer_types=WINDOW_FIRST * 2, num_kv_shared_layers=2),
    "glm46v_text": MROPE,
    "glm4v_moe_text": dict(rope_parameters=dict(mrope_section=[2, 1, 1], partial_rotary_factor=0.5, **ROPE)),
    "glm4v_text": MROPE,
    "glm5_next_text": dict(qk_rope_head_dim=0, head_dim=0, qk_head_dim=8, index_kpool=2),
    "glm_ocr_text": MROPE,
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granite4_vision": dict(text_config=lambda: tiny_config("granite"), deepstack_layer_map=[], spatial_target_layers=[],
                            downsample_rate="4/8"),
    "granitemoehybrid": dict(layer_types=STATE_FIRST),
    "hrm_text": dict(num_layers_per_stack=1),
    "hunyuan_vl_text": dict(rope_parameters=dict(mrope_section=[2, 2, 2, 2], rope_type="dynamic", rope_theta=1e4, factor=1.0, alpha=1e3)),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "longcat_flash": dict(zero_expert_num=2),
    "mamba2": dict(num_heads=8, head_dim=16),
    "minimax_m3_vl_text": dict(index_block_size=4, index_topk_blocks=2, layer_types=["full_attention", "minimax_m3_sparse"],
                               mlp_layer_types=["dense", "sparse"]),
    "ministral3": dict(rope_parameters=dict(llama_4_scaling_beta=0.5, original_max_position_embeddings=4, **ROPE)),
    "paddleocr_vl_text": MROPE,
    "phi4_multimodal_audio": dict(num_blocks=1, ext_pw_out_channel=64, depthwise_separable_out_channel=64, nemo_conv_channels=16),
    "qwen2_5_omni_text": MROPE,
    "qwen2_5_vl_text": MROPE,
    "qwen2_vl_text": MROPE,
    "qwen4_exp_text": dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_compress_ratio=2, hc_lowrank=8,
                           ple_layer_ids=[1], ple_embed_dim=32, ngram_vocab_size_base=50, heads_per_ngram=2, split_ngram_parts=2),
    "radio": dict(video_temporal_patch_size=2),
    "roc_bert": dict(shape_vocab_size=50, pronunciation_vocab_size=50, shape_embed_dim=16, pronunciation_embed_dim=16),
    "xmod": dict(default_language="en_XX"),
    "youtu": dict(pad_token_id=None),  # transformers zeroes the padding's row of a head that is the embedding
    "zamba": dict(attention_head_dim=32, **STATE_IN_ATTENTION),
    "zamba2": dict(n_mamba_heads=8, **STATE_IN_ATTENTION),
    "zaya": dict(num_experts_per_tok=1),
}
VARIANTS: dict[str, dict[str, Any]] = {  # "family (what is different)": other forms in which a family is released
    "gemma4_text (experts)": dict(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=32,
                                 hidden_size_per_layer_input=0, num_kv_shared_layers=0, attention_k_eq_v=True),
    "granitemoehybrid (dense)": dict(layer_types=["full_attention"] * 2, num_local_experts=0),
}


def tiny_config(family: str | type[PreTrainedConfig], **settings: Any) -> PreTrainedConfig:
    """Return a small configuration of a family.

    `family` is a model type, one of VARIANTS, or a class of configurations.
    """
    made = CONFIG_MAPPING[model_type(family)] if isinstance(family, str) else family
    default = made()
    fields = default.to_dict()
    small = {name: BY_NAME.get(name, PLACEHOLDER) for name, value in fields.items() if name in BY_NAME or _is_token(name, value)}
    if "kv_lora_rank" in fields:  # keys from a latent vector: as many heads as queries have; head_dim may be the part that rotates
        small["num_key_value_heads"] = BY_NAME["num_attention_heads"]
        small |= {"head_dim": BY_NAME["qk_rope_head_dim"]} if fields.get("head_dim") == fields["qk_rope_head_dim"] else {}
    small |= _one_layer_of_each_kind(fields)
    parts = {name: getattr(default, name) for name in made.sub_configs}
    small |= {name: tiny_config(type(part)) for name, part in parts.items() if isinstance(part, PreTrainedConfig)}
    special = {name: value() if callable(value) else value for name, value in EXCEPTIONS.get(made.model_type, {}).items()}
    return made(**(small | special | VARIANTS.get(family, {}) | settings))


def model_type(family: str) -> str:
    """Return transformers' name of a family or variant."""
    return family.partition(" (")[0]


def _is_token(name: str, value: Any) -> bool:
    return isinstance(value, int) and name.endswith(("_token_id", "_token_index"))


def _one_layer_of_each_kind(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that describe layers one by one, cut to the first of each kind.

    The numbers of layers are among them.
    """
    lists = {name: fields[name] for name in LAYER_KINDS if isinstance(fields.get(name), list)}
    if not lists:
        return {}
    if set(lists.get("layer_types", ())) == {"full_attention"} and "sliding_window" in fields:
        lists["layer_types"] = ["sliding_attention", *lists["layer_types"][1:]]  # windows are off in the defaults, not in releases
    kinds = list(zip(*lists.values(), strict=True))
    kept = sorted({kinds.index(kind) for kind in kinds} | {0, min(1, len(kinds) - 1)})
    return {name: [values[i] for i in kept] for name, values in lists.items()} | {n: len(kept) for n in LAYER_COUNTS if n in fields}
