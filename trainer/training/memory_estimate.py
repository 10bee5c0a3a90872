"""Estimate the memory of a run from the model's shape: nothing is loaded and nothing is run.

Activations are those that the fused layers keep for the backward pass, per token and layer: inputs and outputs of both norms, rotated
queries and keys, values, attention's output, and gate and up of the MLP,

    4 W + (2 H + 2 Hk) D + 2 I

elements, with W model width, H query heads, Hk key heads, D head width, I MLP width, and on a CPU at most KEEP H D more for attention's
probabilities. Stock layers, DoRA and norms of queries and keys keep up to three quarters more.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import nn

from kernels import serving
from kernels.attention import KEEP
from kernels.linear_cross_entropy import rows_per_chunk
from trainer.config import Config
from trainer.model.forward import unwrap_peft
from trainer.model.quantization import bytes_per_weight, layers_to_quantize
from trainer.optim.adamw import has_8bit_moments
from trainer.optim.adamw_8bit import AdamW8bit


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device, by use."""

    weights: float  # QLoRA: 4-bit codes, scales, and the largest layer dequantised; full fine-tuning with a KL: the frozen copy too
    masters: float  # fp32 copies of trained weights of lower precision; with retention.l2_sp, a copy of the initial weights too
    gradients: float
    moments: float  # AdamW's two, with the scales of 8-bit ones
    activations: float  # of one pack
    loss: float  # of one pack; with cached base states, those of this step and the next too, at most

    @property
    def total(self) -> float:
        """Return the sum in bytes."""
        return sum(getattr(self, f.name) for f in fields(self))

    def __str__(self) -> str:
        by_use = ", ".join(f"{f.name} {getattr(self, f.name) / 1e9:.2f}" for f in fields(self))
        return f"about {self.total / 1e9:.2f} GB on the device with one pack at a time: {by_use}"


def estimate(model: nn.Module, config: Config, dtype: torch.dtype, device: torch.device) -> MemoryEstimate:
    """Estimate what a run with `model`, computing in `dtype`, holds on `device`.

    `model` may be on the meta device, where its weights are dense, whatever the run makes of them. Adapters are fp32.
    """
    width = dtype.itemsize
    trainable = [p for p in model.parameters() if p.requires_grad]
    trained = sum(p.numel() for p in trainable)
    adapter = config.method != "full"
    cached, head = config.retention.caches_base, model.get_output_embeddings()
    frozen_copy = (head if cached else model).parameters() if config.retention.kl_weight and not adapter else ()
    copied = sum(p.numel() for p in frozen_copy)
    states = 2 * config.batch.tokens_per_step * head.weight.shape[1] * width if cached else 0
    return MemoryEstimate(
        weights=frozen_bytes(model, config, width) + trained * (4 if adapter else width) + copied * width,
        masters=(0 if adapter or width == 4 else trained * 4) + (trained * 4 if config.retention.l2_sp else 0),
        gradients=trained * 4,
        moments=sum(p.numel() * (AdamW8bit.BYTES_PER_ELEMENT if has_8bit_moments(p, config.optim) else 8) for p in trainable),
        activations=activation_bytes(model, config.batch.tokens_per_pack, width, config.activation_checkpointing, device),
        loss=loss_bytes(model, config.batch.tokens_per_pack, dtype, device) + states,
    )


def frozen_bytes(model: nn.Module, config: Config, width: int) -> float:
    """Return the bytes of weights that are not trained.

    With QLoRA these are the 4-bit weights, the dense ones, and the largest 4-bit layer dequantised.
    """
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    layers = layers_to_quantize(unwrap_peft(model), config.quantization.skip_modules) if config.method == "qlora" else []
    sizes = [layer.weight.numel() for layer in layers]
    packed = sum(sizes) * bytes_per_weight(config.quantization.double_quant)
    return (frozen - sum(sizes)) * width + packed + max(sizes, default=0) * width


def loss_bytes(model: nn.Module, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the bytes that the loss of a pack holds.

    They are two rows a token, a chunk of logits (torch's backend keeps it in fp32 too), and a trained head's fp32 gradient, whose rounding
    to `dtype` takes the chunk's place.
    """
    head = model.get_output_embeddings().weight
    vocabulary, width = head.shape
    rows = rows_per_chunk(vocabulary, dtype, device.type)
    if head.requires_grad and device.type == "cuda":
        rows = max(rows, width)
    logit_bytes = dtype.itemsize if serving(device, dtype) == "triton" else 4 + dtype.itemsize
    rounded = head.numel() * dtype.itemsize if head.requires_grad else 0
    logits = max(min(tokens, rows) * vocabulary * logit_bytes, rounded)
    return 2 * tokens * width * dtype.itemsize + logits + (head.numel() * 4 if head.requires_grad else 0)


def activation_bytes(model: nn.Module, tokens: int, width: int, checkpointing: str, device: torch.device) -> float:
    """Return the bytes that a pack of `tokens` keeps for the backward pass, `width` bytes an element."""
    shape = model.config.get_text_config()
    heads = shape.num_attention_heads
    key_heads = getattr(shape, "num_key_value_heads", None) or heads
    head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // heads
    inner = getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size
    probabilities = KEEP * heads * head_dim if device.type == "cpu" else 0
    layer = 4 * shape.hidden_size + (2 * heads + 2 * key_heads) * head_dim + 2 * inner + probabilities
    kept = {"none": shape.num_hidden_layers, "selective": (shape.num_hidden_layers + 1) // 2, "full": 1}[checkpointing]
    inputs = shape.hidden_size * (shape.num_hidden_layers - kept)
    return tokens * width * (kept * layer + inputs)
