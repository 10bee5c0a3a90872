"""Know how vLLM finds an adapter's layers, and say where it has to be told or cannot.

vLLM maps names of a checkpoint's files to its own modules, and names of an adapter by the same map. Where the two differ in a way that the
map does not know, it leaves the adapter out and says nothing. `python -m benchmarks.run served` compares what it serves with what was
trained.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from peft import PeftModel
from transformers.utils import CHAT_TEMPLATE_FILE

from trainer.model.lora import adapted_layers, adapted_weights
from trainer.model.mixtures import find_mixtures
from trainer.model.vocabulary import wrappers

LORA_RANKS = (8, 16, 32, 64, 128, 256, 512)  # the values of max_lora_rank that vLLM accepts
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # values of init_lora_weights that leave the base as it is
UNKNOWN_TO_VLLM = {  # settings of a saved adapter with which vLLM refuses it, or would not compute what was trained
    "use_dora": "it is DoRA", "modules_to_save": "it trains modules whole", "trainable_token_indices": "it trains rows of the embedding",
    "lora_bias": "it has biases", "layer_replication": "it replicates layers",
    "alora_invocation_tokens": "it is Activated LoRA", "use_bdlora": "it is block-diagonal", "use_qalora": "it is QALoRA"}


def how_to_serve(model: PeftModel) -> list[str]:
    """Return a line for whatever vLLM needs to be told to serve the adapter, or cannot serve."""
    lines = []
    if wrappers(model):
        lines.append("adapter: PEFT loads it on the base with model.resize_token_embeddings(len(tokenizer)); vLLM refuses trained rows and "
                     "modules, so it needs a merged model (--export.format merged)")
    elif any(getattr(layer, "lora_variant", None) for layer in adapted_layers(model)):
        lines.append("adapter: vLLM refuses DoRA; only a merged model can be served there (--export.format merged)")
    elif find_mixtures(base := model.get_base_model()).weights.keys() & adapted_weights(base).keys():
        lines.append("adapter: experts carry it, so vLLM needs enable_mixed_moe_lora_format, and is_3d_lora_weight in its LoRA module")
    return lines


def why_vllm_refuses(settings: dict) -> str | None:
    """Return why vLLM cannot apply an adapter of this saved configuration, None where it may be able to."""
    for name, reason in UNKNOWN_TO_VLLM.items():
        if settings.get(name):
            return reason
    if settings.get("bias", "none") != "none":
        return "it trains biases"
    if (start := settings.get("init_lora_weights")) not in PLAIN_STARTS:
        return f"it starts as {start}, which changes the base"
    rank = highest_rank(settings)
    return f"its rank is {rank}, vLLM's highest {LORA_RANKS[-1]}" if rank > LORA_RANKS[-1] else None


def max_lora_rank(settings: dict) -> int:
    """Return vLLM's max_lora_rank for an adapter of this saved configuration."""
    return next(allowed for allowed in LORA_RANKS if allowed >= highest_rank(settings))


def highest_rank(settings: dict) -> int:
    """Return the highest rank that an adapter of this saved configuration gives a layer."""
    return max(settings["r"], *(settings.get("rank_pattern") or {}).values(), 0)


def vllm_line(folder: Path, template: bool = False) -> str:
    """Return the command that serves an exported folder, or why vLLM cannot.

    With `template` vLLM takes an adapter's chat template, where it is not the base's.
    """
    folder, words = folder.absolute(), ["vllm", "serve"]
    if not (folder / "adapter_config.json").is_file():
        return f"serve: {shlex.join([*words, str(folder)])}"
    settings = json.loads((folder / "adapter_config.json").read_text())
    if reason := why_vllm_refuses(settings):
        return f"adapter: vLLM refuses it, as {reason}; merge it (--export.format merged)"
    words += [settings["base_model_name_or_path"], "--enable-lora", "--lora-modules", f"tuned={folder}", "--max-lora-rank",
              str(max_lora_rank(settings))]
    return f"serve: {shlex.join(words + (['--chat-template', str(folder / CHAT_TEMPLATE_FILE)] if template else []))}"
