"""What a run leaves for others to load: PEFT's adapter folder, or a safetensors model folder of transformers.

A folder is written beside its place and renamed into it, so whoever looks finds it whole or not at all.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.checkpoint import sync
from trainer.errors import UserError
from trainer.lora import is_adapted


def save_adapter(model: PeftModel, folder: Path | str, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` for `PeftModel.from_pretrained`, vLLM and others, and the tokenizer.

    The adapter names its base model as it was loaded: an absolute path, or a name on the hub.
    """
    with _whole_folder(folder) as aside:
        model.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)


def merge_and_save(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path | str) -> None:
    """Write a model folder for `AutoModelForCausalLM.from_pretrained`, with the adapter, if any, added into the weights.

    The model in memory stays as it is, adapter and all. Merged weights are on the CPU while they are written.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    state = merged_state(base)
    with _whole_folder(folder) as aside:
        base.save_pretrained(aside, state_dict=state)
        tokenizer.save_pretrained(aside)


@torch.no_grad()
def merged_state(base: nn.Module) -> dict[str, Tensor]:
    """The state dict that `base` would have without adapters in its modules: their updates added to the weights, stock names."""
    state = base.state_dict()
    for name, module in base.named_modules():
        if is_adapted(module):
            state[f"{name}.base_layer.weight"] = _merged_weight(module)
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


@contextmanager
def _whole_folder(folder: Path | str) -> Iterator[Path]:
    """Yield an empty folder to write into; afterwards it takes the place of `folder`. UserError if the disk does not take it."""
    folder = Path(folder)
    aside, old = (folder.with_name(f".{folder.name}.{what}") for what in ("partial", "old"))
    try:
        for leftover in (aside, old):
            shutil.rmtree(leftover, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        for path in [*aside.rglob("*"), aside]:
            sync(path)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
