"""Make models with random weights, their tokenizers, and samples of random tokens."""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen3Config
from transformers.utils import logging as transformers_logging

from benchmarks.harness.model_shapes import SMALL, ModelShape
from benchmarks.harness.timing import TokenSamples

SPECIAL = ["<s>", "<pad>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
RANK = 16  # of the adapters that speed benchmarks train
LOG_DEVIATION = 0.8  # standard deviation of the logarithm of a log-normal length


def quiet() -> None:
    """Turn off the progress bars and warnings of transformers and datasets."""
    from datasets.utils import logging as datasets_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets_logging.disable_progress_bar()


# ---------------------------------------------------------------- models


def model_config(shape: ModelShape) -> PretrainedConfig:
    """Return the transformers configuration of a shape.

    Token ids 0, 1 and 3 begin, pad and end a text, as in `SPECIAL`.
    """
    return (Qwen3Config if shape.qk_norm else LlamaConfig)(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.mlp, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, max_position_embeddings=2048,
        tie_word_embeddings=False, use_cache=False, bos_token_id=0, pad_token_id=1, eos_token_id=3)


def stock_model(shape: ModelShape, device: torch.device, dtype: torch.dtype, attention: str = "sdpa", seed: int = 0) -> nn.Module:
    """Make a model as transformers ships it, with random weights drawn on the device by `seed`."""
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(model_config(shape), dtype=dtype, attn_implementation=attention).train()


def adapted(base: nn.Module, rank: int = RANK, dropout: float = 0.0) -> nn.Module:
    """Put PEFT's LoRA adapter, in fp32, on every linear layer but the head, with random A and B."""
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules="all-linear")
    model = get_peft_model(base, adapter)
    for p in trained(model):
        p.data = p.data.float()
        nn.init.normal_(p, std=0.02)  # a new B is zero, which would hide an adapter's faults
    return model.train()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def save_model(folder: Path, shape: ModelShape = SMALL, seed: int = 0) -> None:
    """Save a random model to folder/model, and a new LoRA adapter for it to folder/adapter."""
    model = stock_model(shape, torch.device("cpu"), torch.float32, seed=seed)
    model.save_pretrained(folder / "model")
    save_adapter(folder, model)


def save_adapter(folder: Path, model: nn.Module) -> None:
    """Save a new LoRA adapter for a model to folder/adapter."""
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    get_peft_model(model, adapter).save_pretrained(folder / "adapter")


# ---------------------------------------------------------------- tokenizers


def chat_tokenizer(core: Tokenizer) -> PreTrainedTokenizerFast:
    """Wrap a tokenizer that knows `SPECIAL` for transformers, with a chat template."""
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", pad_token="<pad>", eos_token="<|im_end|>",
                                   chat_template=TEMPLATE)


def words(vocabulary: int = SMALL.vocabulary) -> list[str]:
    """Return the words of a vocabulary beside the special tokens and the two roles."""
    return [f"w{i}" for i in range(vocabulary - len(SPECIAL) - 2)]


def word_level() -> Tokenizer:
    """Return a tokenizer in which each of `words()` is one token."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + ["user", "assistant"] + words())}, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(SPECIAL)
    return core


def byte_pair_encoding(texts: list[str], vocabulary: int = SMALL.vocabulary) -> Tokenizer:
    """Train a byte-level BPE tokenizer on texts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False))
    return core


# ---------------------------------------------------------------- lengths and samples


def log_normal_lengths(count: int, mean: float, rng: np.random.Generator, longest: int | None = None) -> np.ndarray:
    """Return the quantiles of a log-normal distribution in random order.

    int64[count], rounded, at least 1 and at most `longest`.
    """
    normal = np.array([NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)])
    factors = np.exp(LOG_DEVIATION * normal - LOG_DEVIATION**2 / 2)  # of mean 1
    return np.clip((mean * rng.permutation(factors)).round().astype(int), 1, longest)


def random_samples(lengths: list[int] | np.ndarray, vocabulary: int, seed: int) -> TokenSamples:
    """Return samples of random tokens, the second half of each supervised."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(vocabulary, size=n).astype(np.int32), np.arange(n) >= n // 2) for n in lengths]
