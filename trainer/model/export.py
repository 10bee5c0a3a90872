"""What a run leaves for others to load: PEFT's adapter folder, or a safetensors model folder of transformers.

A folder is written beside its place and renamed into it, so whoever looks finds it whole or not at all.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kernels.nf4 import dequantize_nf4
from trainer.errors import UserError
from trainer.files import atomic_folder
from trainer.model.lora import is_adapted, projection, why_not_fused
from trainer.model.quantization import is_quantized, nf4_of, quantized_layers


def save_adapter(model: PeftModel, folder: Path | str, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` for `PeftModel.from_pretrained`, vLLM and others, and the tokenizer.

    The adapter names its base model as it was loaded: an absolute path, or a name on the hub.
    """
    with atomic_folder(folder) as aside:
        model.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)


def merge_and_save(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path | str) -> None:
    """Write a model folder for `AutoModelForCausalLM.from_pretrained`, with the adapter, if any, added into the weights.

    The model in memory stays as it is, adapter and all. Merged weights are on the CPU while they are written. A base in 4 bits is
    written dense, in the dtype it computes in: the adapter was trained on its dequantised weights, and is added to those.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    state = merged_state(base)
    shell = _dense_shell(base) if quantized_layers(base) else base
    with atomic_folder(folder) as aside:
        shell.save_pretrained(aside, state_dict=state)
        tokenizer.save_pretrained(aside)


def _dense_shell(base: PreTrainedModel) -> PreTrainedModel:
    """The model that a 4-bit one would be without quantisation: its class and settings, no weights."""
    settings = copy.deepcopy(base.config)
    del settings.quantization_config
    with torch.device("meta"):
        shell = type(base)(settings).to(nf4_of(quantized_layers(base)[0]).dtype)
    shell.generation_config = base.generation_config
    return shell


@torch.no_grad()
def merged_state(base: nn.Module) -> dict[str, Tensor]:
    """The state dict that `base` would have without adapters and 4-bit layers: updates added to dense weights, stock names."""
    state = base.state_dict()
    for name, module in base.named_modules():
        if is_quantized(module):
            for part in [key for key in state if key.startswith(f"{name}.weight.")]:
                del state[part]
            state[f"{name}.weight"] = dequantize_nf4(nf4_of(module)).cpu()
    for name, module in base.named_modules():
        if is_adapted(module):
            state[f"{name}.base_layer.weight"] = _merged_nf4(module) if is_quantized(module.base_layer) else _merged_weight(module)
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}


def _merged_weight(module: nn.Module) -> Tensor:
    """The layer's weight with its active adapter, by PEFT's own arithmetic: a safe merge makes a new tensor, the old one is put back."""
    layer = module.base_layer
    weight = layer.weight.data
    try:
        module.merge(safe_merge=True)
    except ValueError as error:  # weights that are not finite
        raise UserError(f"cannot merge the adapter: {error}") from error
    merged = layer.weight.data.cpu()
    layer.weight.data = weight
    module.merged_adapters.clear()
    return merged


def _merged_nf4(module: nn.Module) -> Tensor:
    """The same onto the dequantised weight, in fp32 and rounded once. (PEFT would quantise the sum again.)"""
    if reason := why_not_fused(module):
        raise UserError(f"cannot merge the adapter: {reason}")
    weight, _, lora = projection(module)
    merged = dequantize_nf4(weight, torch.float32) + lora.scaling * (lora.B.float() @ lora.A.float())
    if lora.magnitude is not None:
        merged *= (lora.magnitude.float() / merged.norm(dim=1))[:, None]
    if not merged.isfinite().all():
        raise UserError("cannot merge the adapter: its weights are not finite")
    return merged.to(weight.dtype).cpu()


