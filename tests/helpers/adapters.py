"""Make adapters for tests without training them."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from trainer.config import Lora
from trainer.model.export import save_adapter
from trainer.model.lora import add_adapter


def save_random_adapter(base: Path, folder: Path, rank: int, spread: float, **options) -> Path:
    """Save an adapter whose B is drawn at random, so that its strength grows with `spread`; return its folder.

    `options` are those of Lora.
    """
    model = add_adapter(AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32), Lora(rank=rank, alpha=8, **options))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, spread, generator=generator)
    save_adapter(model, folder)
    return folder
