"""Estimate the memory of a run from the model's shape: nothing is loaded and nothing is run.

Activations are those that the fused layers keep for the backward pass, per token and layer: the outputs of both norms, of every matrix
(rotated queries and keys, values, gate and up of the MLP, what is added to the residual stream) and of attention,

    2 W + sum of the matrices' rows + H D

elements, with W model width, H query heads, D width of values, and on a CPU at most KEEP H D more for attention's probabilities. Of an
expert that a token is sent to, inputs and outputs. Stock layers, DoRA and norms of queries and keys keep up to twice as much, and
mixers without attention (state spaces, linear attention) more than that.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernels import serving
from kernels.attention import KEEP
from kernels.linear_cross_entropy import rows_per_chunk
from trainer.config import Config, Optim
from trainer.model.attention_shapes import attention_shapes
from trainer.model.experts import expert_share, expert_weights
from trainer.model.forward import lm_head, unwrap_peft
from trainer.model.fused_layers import decoder_layers
from trainer.model.packed_attention import decoder
from trainer.model.quantization import bytes_per_weight, layers_to_quantize
from trainer.model.text_part import head_layer
from trainer.on_policy.sdft import retention_of
from trainer.optim.adamw import has_8bit_moments
from trainer.optim.adamw_8bit import AdamW8bit
from trainer.optim.apart import apart
from trainer.optim.per_matrix import Adafactor, Muon


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device, by use."""

    weights: float  # QLoRA: 4-bit codes, scales, and the largest layer dequantised; full fine-tuning with a KL: the frozen copy too
    masters: float  # fp32 copies of trained weights of lower precision; also of their start (retention.l2_sp) and average (optim.ema_decay)
    gradients: float
    moments: float  # AdamW's two, with the scales of 8-bit ones, or what another optimizer keeps
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
    cached, head = config.retention.caches_base, head_layer(unwrap_peft(model))
    frozen_copy = (head if cached else model).parameters() if retention_of(config).kl_weight and not adapter else ()
    copied = sum(p.numel() for p in frozen_copy)
    states = 2 * config.batch.tokens_per_step * head.weight.shape[1] * width if cached else 0
    return MemoryEstimate(
        weights=frozen_bytes(model, config, width) + trained * (4 if adapter else width) + copied * width,
        masters=(0 if adapter or width == 4 else trained * 4) + trained * 4 * (bool(config.retention.l2_sp) + bool(config.optim.ema_decay)),
        gradients=trained * 4,
        moments=moment_bytes(trainable, {id(p) for p in apart(model, config)}, config.optim),
        activations=activation_bytes(model, config.batch.tokens_per_pack, width, config.activation_checkpointing, device),
        loss=loss_bytes(model, config.batch.tokens_per_pack, dtype, device) + states,
    )


def moment_bytes(trainable: Iterable[Tensor], apart_ids: Container[int], optim: Optim) -> float:
    """Return the bytes of the optimizer's states; those of weights `apart` are Muon's."""
    if optim.name == "adafactor":
        return sum(4 * sum(state.numel() for state in Adafactor.first_state(p.to("meta")).values()) for p in trainable)
    return sum(p.numel() * (AdamW8bit.BYTES_PER_ELEMENT if has_8bit_moments(p, optim) else
                            Muon.BYTES_PER_ELEMENT if optim.name == "muon" and id(p) in apart_ids else 8) for p in trainable)


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
    head = head_layer(unwrap_peft(model)).weight
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
    base = unwrap_peft(model)
    layers = layer_widths(base, KEEP if device.type == "cpu" else 0)
    kept = {"none": layers, "selective": layers[::-2], "full": [max(layers)]}[checkpointing]
    inputs = model_width(base) * (len(layers) - len(kept))
    return tokens * width * (sum(kept) + inputs)


def layer_widths(base: PreTrainedModel, probabilities: int) -> list[float]:
    """Return the elements that each decoder layer keeps of a token.

    For the weights of attention they are `probabilities` times its output.
    """
    config = base.config.get_text_config()
    routed, share = expert_weights(base), expert_share(config) or 1.0
    layers, shapes = decoder_layers(base) or [decoder(base)], attention_shapes(config)
    attended = [shape.heads * shape.value_width if shape else 0 for shape in shapes]
    if len(layers) != len(shapes):
        attended = [sum(attended) / len(layers)] * len(layers)
    return [2 * model_width(base) + matrix_outputs(layer, routed, share) + (1 + probabilities) * heads
            for layer, heads in zip(layers, attended)]


def matrix_outputs(layer: nn.Module, routed: set[Tensor], share: float) -> float:
    """Return the sum of the rows of a layer's weights, without adapters.

    Of the `share` of experts that a token is sent to, columns count too.
    """
    total = 0.0
    for name, weight in layer.named_parameters():
        if weight.ndim >= 2 and ".lora_" not in name:
            *experts, rows, columns = weight.shape
            total += share * math.prod(experts) * (rows + columns) if weight in routed else weight.shape[0]
    return total


def model_width(base: PreTrainedModel) -> int:
    """Return the width of the residual stream."""
    return lm_head(base).weight.shape[1]
