"""Rates a run reports: real and supervised tokens per second, model FLOP utilisation (MFU), peak memory, time by phase.

FLOP convention (a step of T real tokens, S supervised rows): matrices of frozen weights 4 P T (forward, and the gradient of
the input), trained ones 6 P T; the head 4 V D S frozen, 6 V D S trained; causal attention 6 * sum(len^2) * heads * head_dim a
layer. Padding, recomputation and ignored rows through the head count nothing: only useful work does; so ignored rows through what follows
attention in the last layer count nothing either, where the family's layers leave them out. Where a base is read beside the
model (`trainer/retention/kl.py`), its forward counts a third of a full training step over the samples that it reads, head included; the
model's own logits, which the divergence makes again, count once.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from trainer.metrics.timers import synchronize
from trainer.model.fused_layers import row_selecting_layer
from trainer.model.quantization import weight_count

# Dense bf16 product rates that the makers state, FLOP/s.
STATED_PEAK = {
    "H200": 989e12, "H100": 989e12, "H800": 989e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12,
    "L40S": 362e12, "RTX 4090": 165e12, "RTX 5090": 210e12, "MI300X": 1307e12,
}


@dataclass(frozen=True)
class ModelSize:
    """What the FLOP convention needs to know of a model."""

    parameters: int
    trainable: int
    frozen_matrices: int  # weights of frozen matrices that every token passes, without the head
    trained_matrices: int
    head: int  # V * D
    head_trained: bool
    experts: bool  # routes tokens to experts, of which the convention says nothing
    attention_width: int  # sum over layers of heads * head_dim; a window is not taken into account
    frozen_late: int = 0  # of the frozen matrices: those that supervised rows alone pass, as the head
    trained_late: int = 0

    def flops(self, tokens: int, supervised: int, squared_lengths: int) -> float | None:
        """FLOP of a training step over `tokens` real tokens, `supervised` rows and sum(len^2) = `squared_lengths`; None with experts."""
        if self.experts:
            return None
        matrices = (4 * self.frozen_matrices + 6 * self.trained_matrices) * tokens
        matrices -= (4 * self.frozen_late + 6 * self.trained_late) * (tokens - supervised)
        head = (6 if self.head_trained else 4) * self.head * supervised
        return matrices + head + 6 * squared_lengths * self.attention_width

    def base_flops(self, tokens: int, supervised: int, squared_lengths: int) -> float:
        """FLOP of the base's forward over so much: without adapters, and without gradients."""
        matrices = 2 * (self.frozen_matrices or self.trained_matrices) * tokens
        matrices -= 2 * (self.frozen_late if self.frozen_matrices else self.trained_late) * (tokens - supervised)
        return matrices + 2 * self.head * supervised + 2 * squared_lengths * self.attention_width


def model_size(model: nn.Module) -> ModelSize:
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    counts, late = matrix_weights(model.modules(), head), matrix_weights(modules_after_attention(model), head)
    weights = list(model.parameters())
    return ModelSize(
        parameters=sum(map(weight_count, weights)), trainable=sum(p.numel() for p in weights if p.requires_grad),
        frozen_matrices=counts[False], trained_matrices=counts[True], head=head.weight.numel(),
        head_trained=head.weight.requires_grad, frozen_late=late[False], trained_late=late[True],
        experts=any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")),
        attention_width=config.num_hidden_layers * config.num_attention_heads * width,
    )


def matrix_weights(modules: Iterable[nn.Module], head: nn.Module) -> dict[bool, int]:
    """Elements of the modules' own matrices but embeddings and the head, by whether they are trained."""
    counts = {True: 0, False: 0}
    for module in modules:
        weight = module._parameters.get("weight")  # of the module itself: a wrapper may show its inner layer's
        if weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding) and module is not head:
            counts[weight.requires_grad] += weight_count(weight)
    return counts


def modules_after_attention(model: nn.Module) -> list[nn.Module]:
    """The modules that only supervised rows pass, the head aside: what follows attention in the last layer, where it takes rows."""
    layer = row_selecting_layer(model)
    return [*layer.self_attn.o_proj.modules(), *layer.mlp.modules()] if layer else []


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that MFU is a share of, and where the figure comes from: the maker's for known GPUs in bf16, else measured here."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, peak in STATED_PEAK.items():
            if part in name:
                return peak, f"{peak / 1e12:.0f} TFLOP/s, stated for dense bf16 on {part}"
    rate = _measured_rate(device, dtype)
    return rate, f"{rate / 1e9:.0f} GFLOP/s, measured on a product of {dtype} matrices here"


def _measured_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 768
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


