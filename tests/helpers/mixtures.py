"""Small models of mixtures of experts and state-space hybrids, whose modules the families of tiny.py do not have."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.families.tiny_configs import tiny_config
from tests.helpers.models import unlike_initial

MIXTURES = (
    "qwen3_moe", "qwen2_moe", "qwen3_next", "qwen3_5_moe_text", "mixtral", "gpt_oss", "granitemoe", "glm4_moe", "phimoe", "llama4_text",
    "deepseek_v3", "gemma4_text (experts)", "afmoe", "jetmoe", "longcat_flash", "lfm2_moe", "hunyuan_v1_moe", "granitemoehybrid", "jamba",
    "nemotron_h")


def model(family: str, **overrides) -> PreTrainedModel:
    """A small model whose norms and biases are unlike their initial values."""
    torch.manual_seed(0)
    return unlike_initial(AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=torch.float32)).eval()


def sketch(family: str, **overrides) -> PreTrainedModel:
    """The same model on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
