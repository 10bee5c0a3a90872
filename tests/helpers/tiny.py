"""Small tokenizers and models of every family we know, made on the spot: no test touches the network."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast

from benchmarks.families.tiny_configs import tiny_config
from trainer.model.text_part import auto_class

CHATML = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "system user assistant What is 3 + 4? The answer is 7.",
    "How many clips did Natalia sell altogether in April and May?",
] * 20

WRAPPERS = {  # of text models that have no class with a head of their own
    "glm4v_moe_text": "glm4v_moe", "glm4v_text": "glm4v", "paddleocr_vl_text": "paddleocr_vl",
    "qwen2_5_omni_text": "qwen2_5_omni_thinker", "qwen2_5_vl_text": "qwen2_5_vl", "qwen2_vl_text": "qwen2_vl",
    "qwen3_omni_moe_text": "qwen3_omni_moe_thinker", "qwen3_vl_moe_text": "qwen3_vl_moe", "qwen3_vl_text": "qwen3_vl",
}
# Families whose tiny models have a shape of their own, on which tests rely; of other families the benchmarks know one.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "granite", "olmo2", "smollm3")


def tokenizer(texts=TEXT, vocab_size: int = 400, chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML turns; <s>, </s> and <pad> are three different tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    core.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>",
                                   additional_special_tokens=["<|im_start|>"])
    made.chat_template = chat_template
    return made


def model_config(family: str, vocab_size: int = 400, **overrides):
    """A small config of `family` with grouped heads and tied-ness, windows and softcaps as the family has them."""
    if family in WRAPPERS:
        return tiny_config(WRAPPERS[family], text_config=tiny_config(family, vocab_size=vocab_size, use_cache=False, **overrides))
    if family not in FAMILIES:
        return tiny_config(family, **(dict(vocab_size=vocab_size, use_cache=False) | overrides))
    settings = dict(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=4, pad_token_id=2, use_cache=False,
    )
    if family.startswith(("gemma", "qwen3")):
        settings["head_dim"] = 32
    if family in ("gemma2", "gemma3_text", "mistral"):
        settings["sliding_window"] = 8
    if family == "gemma3_text":
        settings["layer_types"] = ["sliding_attention", "full_attention"]
    if family == "phi3":
        settings["partial_rotary_factor"] = 0.5
    if family == "granite":
        settings |= dict(embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.2, logits_scaling=2.0)
    return AutoConfig.for_model(family, **(settings | overrides))


def model(family: str, dtype=torch.float32, **overrides):
    torch.manual_seed(0)
    config = model_config(family, **overrides)
    made = auto_class(config).from_config(config, dtype=dtype).eval()
    if dtype == torch.float64:
        made.set_experts_implementation("eager")  # torch's grouped products of experts have no fp64
    return made


def save_model(folder: Path, family: str, **overrides) -> Path:
    made = tokenizer()
    model(family, vocab_size=len(made), **overrides).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder
