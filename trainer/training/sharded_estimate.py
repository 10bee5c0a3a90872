"""Estimate the memory of each rank where weights are sharded, from the model's shape.

Sharded are the weights, which are fp32 masters where they train, their gradients and the optimizer's states. Whole on every rank are
embedding, last norm and head, the decoder layer that is computed and the next one, the gradients of what is computed with the fp32 copy
that is summed over ranks, the scales of a 4-bit base, and what a pack needs: activations and loss.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trainer.config import Config
from trainer.model.forward import unwrap_peft
from trainer.model.fused_layers import decoder_layers
from trainer.model.quantization import bytes_per_weight, layers_to_quantize
from trainer.training.memory_estimate import estimate, frozen_bytes

RANKS = (2, 4, 8, 16, 32, 64)


def sharded_bytes(model: nn.Module, config: Config, dtype: torch.dtype, device: torch.device, ranks: int) -> float:
    """Estimate the bytes on the device of each of `ranks` that share the weights of `model`.

    It may be on the meta device.
    """
    whole, base, adapter, width = estimate(model, config, dtype, device), unwrap_peft(model), config.method != "full", dtype.itemsize
    in_4bit = layers_to_quantize(base, config.quantization.skip_modules) if config.method == "qlora" else []
    sizes = {id(layer.weight): layer.weight.numel() for layer in in_4bit}
    dequantised = max(sizes.values(), default=0) * width
    scales = sum(sizes.values()) * (bytes_per_weight(config.quantization.double_quant) - 0.5)

    def gathered(weights: Iterable[Tensor]) -> float:
        return sum(p.numel() * (0.5 if id(p) in sizes else 4 if p.requires_grad and adapter else width) for p in weights)

    def summed(weights: Iterable[Tensor]) -> float:
        return sum(p.numel() * ((4 if adapter else width) + 4) for p in weights if p.requires_grad)

    layers = [list(layer.parameters()) for layer in decoder_layers(base)]
    inside = {id(p) for layer in layers for p in layer}
    rest, largest = [p for p in model.parameters() if id(p) not in inside], max(layers, key=gathered)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shards = (frozen_bytes(model, config, width) - dequantised - scales + trained * 4 * (1 + bool(config.retention.l2_sp))
              + whole.gradients + whole.moments)
    return ((0 if config.fsdp.cpu_offload else shards / ranks) + scales + dequantised + gathered(rest) + summed(rest)
            + 2 * gathered(largest) + summed(largest) + whole.activations + whole.loss)


def describe(model: nn.Module, config: Config, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Return the line of the dry run on sharding; none for a model or an optimizer that it does not fit."""
    if config.optim.name != "adamw" or not decoder_layers(unwrap_peft(model)):
        return []
    each = ", ".join(f"{sharded_bytes(model, config, dtype, device, ranks) / 1e9:.2f} of {ranks}" for ranks in RANKS)
    return [f"memory with --fsdp.enabled: about this many GB on each of so many ranks: {each}"]
