"""Count the FLOP of a training step, and find the peak rate for model FLOP utilisation (MFU).

FLOP convention (a step of T real tokens, S supervised rows): matrices of frozen weights 4 P T (forward, and the gradient of
the input), trained ones 6 P T; the head 4 V D S frozen, 6 V D S trained; causal softmax attention 6 * sum(len^2) * heads * (width of keys
+ width of values) / 2 a layer that has it, windows ignored. Of routed experts a token's share counts, experts chosen / experts there
are, of shared ones all, as torchtitan counts them (`get_moe_model_nparams_and_flops` in torchtitan/models/utils.py). Of state-space,
linear-attention and convolution mixers the projections count, what lies between them, which is linear in T, does not.

Only useful work counts: not padding, not recomputation, not unsupervised rows through the head, nor, in families whose last layer
skips them, through what follows its attention. Where the base runs beside the model (retention/kl.py), its forward counts a third of a
full training step over the samples that it reads, head included; the model's own logits, which the KL recomputes, count once.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from trainer.metrics.timers import synchronize
from trainer.model.attention_shapes import attention_shapes
from trainer.model.experts import expert_share, expert_weights
from trainer.model.forward import unwrap_peft
from trainer.model.fused_layers import row_selecting_layer
from trainer.model.quantization import weight_count
from trainer.model.text_part import head_layer
from trainer.model.vocabulary import without_wrapper

# Dense bf16 matmul rates stated by the makers, FLOP/s.
STATED_PEAK = {
    "H200": 989e12, "H100": 989e12, "H800": 989e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12,
    "L40S": 362e12, "RTX 4090": 165e12, "RTX 5090": 210e12, "MI300X": 1307e12,
}


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model that the FLOP convention needs."""

    parameters: int
    trainable: int
    frozen_matrices: float  # weights of frozen matrices that a token passes through, without the head
    trained_matrices: float
    head: int  # V * D
    head_trained: bool
    attention_width: float  # sum over layers with softmax attention of heads * (key width + value width) / 2
    frozen_late: float = 0.0  # part of frozen_matrices that only supervised rows pass through
    trained_late: float = 0.0  # part of trained_matrices, likewise
    routing_known: bool = True  # there are no experts, or we find them and the config tells how many of them a token passes through

    def flops(self, tokens: int, supervised: int, squared_lengths: int) -> float | None:
        """Return the FLOP of a training step; None if the experts that a token passes through are not known.

        The step has `tokens` real tokens, `supervised` rows and sum(len^2) = `squared_lengths`.
        """
        if not self.routing_known:
            return None
        matrices = (4 * self.frozen_matrices + 6 * self.trained_matrices) * tokens
        matrices -= (4 * self.frozen_late + 6 * self.trained_late) * (tokens - supervised)
        head = (6 if self.head_trained else 4) * self.head * supervised
        return matrices + head + 6 * squared_lengths * self.attention_width

    def base_flops(self, tokens: int, supervised: int, squared_lengths: int) -> float:
        """Return the FLOP of the base's forward, without adapters and gradients; arguments as in `flops`."""
        matrices = 2 * (self.frozen_matrices or self.trained_matrices) * tokens
        matrices -= 2 * (self.frozen_late if self.frozen_matrices else self.trained_late) * (tokens - supervised)
        return matrices + 2 * self.head * supervised + 2 * squared_lengths * self.attention_width


def model_size(model: nn.Module) -> ModelSize:
    """Measure a model, which may have an adapter or 4-bit layers."""
    config, head, weights = model.config.get_text_config(), head_layer(unwrap_peft(model)), list(model.parameters())
    share = expert_share(config)
    routed = dict.fromkeys(expert_weights(model), share or 0.0)
    plain = without_wrapper(head)
    counts, late = matrix_weights(model.modules(), plain, routed), matrix_weights(modules_after_attention(model), plain, routed)
    return ModelSize(
        parameters=sum(map(weight_count, weights)), trainable=sum(p.numel() for p in weights if p.requires_grad),
        frozen_matrices=counts[False], trained_matrices=counts[True], head=head.weight.numel(),
        head_trained=head.weight.requires_grad, frozen_late=late[False], trained_late=late[True],
        attention_width=sum(s.heads * (s.key_width + s.value_width) / 2 for s in attention_shapes(config) if s),
        routing_known=bool(routed) == (share is not None),
    )


def matrix_weights(modules: Iterable[nn.Module], head: nn.Module, routed: Mapping[nn.Parameter, float]) -> dict[bool, float]:
    """Count the weights of the modules' matrices that a token passes through, by whether they train.

    Embeddings and head do not count; `routed` has the weights of experts, and the share of them that a token is sent to.
    """
    counts = {True: 0.0, False: 0.0}
    for module in modules:
        if isinstance(module, (nn.Embedding, _ConvNd)) or module is head:
            continue
        for name, weight in module._parameters.items():  # its own: a wrapper's attribute may be its inner layer's weight
            if weight in routed:
                counts[weight.requires_grad] += routed[weight] * weight_count(weight)
            elif weight is not None and (weight.ndim == 3 or (weight.ndim == 2 and name == "weight")):
                counts[weight.requires_grad] += weight_count(weight)
    return counts


def modules_after_attention(model: nn.Module) -> list[nn.Module]:
    """Return the modules after the last layer's attention, if only supervised rows pass through them."""
    layer = row_selecting_layer(model)
    return [*layer.self_attn.o_proj.modules(), *layer.mlp.modules()] if layer else []


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return the peak FLOP/s for MFU, and the source of the figure as text.

    It is the maker's for known GPUs in bf16, else measured here.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for gpu, peak in STATED_PEAK.items():
            if gpu in name:
                return peak, f"{peak / 1e12:.0f} TFLOP/s, stated for dense bf16 on {gpu}"
    rate = _measured_rate(device, dtype)
    return rate, f"{rate / 1e9:.0f} GFLOP/s, measured here on a {dtype} matmul"


def _measured_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a large square matmul, best of eight."""
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
