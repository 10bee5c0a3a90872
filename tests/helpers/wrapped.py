"""Small checkpoints whose class wraps a text model and a tower, in every layout that hubs hold."""

from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from tests.helpers import tiny

TEXT = dict(vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, max_position_embeddings=512, pad_token_id=2, bos_token_id=0, eos_token_id=4)
WINDOWS = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4)
QWEN_TOWER = dict(depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, patch_size=4, num_position_embeddings=16)
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
DELTA_NET = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
                 layer_types=["linear_attention", "full_attention"],
                 rope_parameters=MROPE | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1], "mrope_interleaved": True})
PIXTRAL = dict(TOWER, head_dim=16, model_type="pixtral")

WRAPPED = {  # kind -> what its config changes; a kind is a model type, and of several text models the type and the text's
    "gemma3": dict(text_config=TEXT | WINDOWS, vision_config=TOWER, mm_tokens_per_image=4, image_token_index=7, boi_token_index=5,
                   eoi_token_index=6),
    "gemma4": dict(text_config=TEXT | WINDOWS | dict(vocab_size_per_layer_input=400, hidden_size_per_layer_input=8),
                   vision_config=dict(TOWER, head_dim=16, num_key_value_heads=2), image_token_id=7, boi_token_id=5, eoi_token_id=6),
    "mistral3 mistral": dict(text_config=dict(TEXT, model_type="mistral"), vision_config=PIXTRAL, image_token_index=7),
    "mistral3 ministral3": dict(text_config=dict(TEXT, model_type="ministral3"), vision_config=PIXTRAL, image_token_index=7),
    "qwen2_5_vl": dict(text_config=dict(TEXT, rope_parameters=MROPE), vision_config=dict(QWEN_TOWER, fullatt_block_indexes=[0])),
    "qwen3_vl": dict(text_config=dict(TEXT, rope_parameters=MROPE), vision_config=dict(QWEN_TOWER, deepstack_visual_indexes=[0])),
    "qwen3_5": dict(text_config=TEXT | DELTA_NET, vision_config=QWEN_TOWER),
    "llama4": dict(text_config=dict(TEXT, intermediate_size_mlp=96, num_local_experts=2, num_experts_per_tok=1),
                   vision_config=dict(TOWER, vision_output_dim=32, projector_input_dim=32, projector_output_dim=32)),
    "muse_glimmer": dict(text_config=TEXT, vision_config=dict(TOWER, layer_types=["full_attention"], pos_emb_height=4, pos_emb_width=4),
                         out_hidden_size=32, projector_hidden_size=32),
    "llava llama": dict(text_config=dict(TEXT, model_type="llama"), vision_config=dict(TOWER, model_type="clip_vision_model"),
                        image_token_index=7),
    "internvl qwen3": dict(text_config=dict(TEXT, model_type="qwen3"), vision_config=dict(TOWER, image_size=[16, 16], patch_size=[4, 4]),
                           image_token_id=7),
    "qwen2_audio qwen2": dict(text_config=dict(TEXT, model_type="qwen2"),
                              audio_config=dict(d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=48)),
}


def wrapped_class(kind: str) -> type[PreTrainedModel]:
    """Return the class of a kind's checkpoints."""
    return getattr(transformers, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[kind.split()[0]])


def save_wrapped(folder: Path, kind: str, **saving) -> Path:
    """Save a whole checkpoint of a kind, with a tokenizer; by default under the names of hub checkpoints."""
    generator = torch.Generator().manual_seed(0)
    model = wrapped_class(kind)._from_config(AutoConfig.for_model(kind.split()[0], **WRAPPED[kind]), dtype=torch.float32)
    for weight in model.parameters():
        weight.data.normal_(0.3 if weight.ndim == 1 else 0.0, 0.06, generator=generator)
    model.save_pretrained(folder, **saving)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a model folder, of all its files."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found
