"""Choose the parameters that LoRA+ or Muon treats otherwise than all others."""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.config import Config


def apart(model: nn.Module, config: Config) -> list[nn.Parameter]:
    """Return the matrices B of an adapter for LoRA+, the matrices in layers for Muon, else none."""
    if config.optim.loraplus_lr_ratio != 1:
        return [p for name, p in model.named_parameters() if ".lora_B." in name and p.requires_grad]
    if config.optim.name == "muon":
        layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        found = {id(p): p for layer in layers for p in layer.parameters() if p.ndim == 2 and p.requires_grad}
        return [*found.values()]
    return []
