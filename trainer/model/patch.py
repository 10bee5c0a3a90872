"""Give a model's modules fused forwards, and report which backend serves each operation.

`patch(model)` sets `forward` on instances, never on classes: RMSNorm, attention, gated MLP, decoder layers, and linear layers with
adapters. Weights, names and classes stay, so state dicts, saving, hooks, activation checkpointing (which wraps a layer's forward in its
class's `__call__`) and code that inspects the model work as before. A forward is a functools.partial of a function of fused_layers.py,
lora.py or experts.py, which pickles and copies with its module.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from kernels import serving
from kernels.attention import backend
from trainer.errors import UserError
from trainer.model import experts, lora
from trainer.model.families import ACTIVATIONS, Family, family_of
from trainer.model.fused_layers import (
    LayerNorms,
    attention_forward,
    attention_traits,
    decoder_layers,
    fused_mlp_forward,
    is_fused,
    layer_forward,
    mlp_forward,
    norm_forward,
    why_not_fused_attention,
)
from trainer.model.fusion_check import fusion_fault
from trainer.model.mixers import runs_by_sample
from trainer.model.packed_attention import decoder, is_packed

logger = logging.getLogger(__name__)


@dataclass
class PatchReport:
    """Backend of each operation of a model, and how many modules use it; printed when a run starts."""

    family: str
    backends: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join([f"model family: {self.family}", *(f"  {op}: {backend}" for op, backend in self.backends.items())])


def patch(model: nn.Module, enabled: bool = True, device: torch.device | None = None) -> PatchReport:
    """Give the modules of `model` their fused forwards; patching again is a no-op.

    The model may have an adapter. In a family that is not in FAMILIES, or whose fused layers are shown to differ from its own code, only
    linear layers and experts with adapters are fused. With `enabled=False` nothing changes. The report says so, and which backends serve
    on `device`, by default the model's. Raises UserError if KERNELS_BACKEND names a backend that is not available.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    family, device = family_of(base) if enabled else None, device or base.device
    try:
        kernel_backend = serving(device, base.dtype)
    except ValueError as error:
        raise UserError(str(error)) from None
    if not enabled:
        return _report(base, device, None, "model.fused_kernels is off", kernel_backend, Counter())
    counts = _patch_modules(base, family)
    experts.fuse_adapters(base)
    if family is None:
        return _report(base, device, None, "unknown family", kernel_backend, counts)
    if fault := fusion_fault(base):
        logger.warning("%s runs with stock layers, since fused ones differ from its own code: %s", base.config.model_type, fault)
        for module in filter(is_fused, base.modules()):
            del module.forward
        return _report(base, device, None, "fused ones differ from its code", kernel_backend, Counter(adapter=counts["adapter"]))
    return _report(base, device, family, None, kernel_backend, counts)


def _patch_modules(base: PreTrainedModel, family: Family | None) -> Counter[str]:
    """Fuse the language model's modules, and adapted layers elsewhere.

    Returns how many fused operations of each kind serve the model.
    """
    counts: Counter[str] = Counter()
    last, language = next(reversed(decoder_layers(base)), None), set(decoder(base).modules())
    for name, module in base.named_modules():
        counts.update(_patch_module(module, name.rsplit(".", 1)[-1], family if module in language else None, module is last))
    return counts


def _patch_module(module: nn.Module, name: str, family: Family | None, last: bool) -> dict[str, int]:
    """Fuse one module, recognised by its class and name.

    Returns how many fused operations of each kind that adds to the model or, negative, replaces.
    """
    if lora.is_adapted(module):
        module.forward = partial(lora.linear_forward, module)
        return {} if lora.why_not_fused(module) else {"adapter": 1}
    if family is None:
        return {}
    if _is_rms_norm(module):
        module.forward = partial(norm_forward, module, getattr(module, family.norm_eps), family.norm_offset)
        return {"rms_norm": 1}
    if name == "self_attn" and family.attention and not why_not_fused_attention(module):
        traits = attention_traits(module, family)
        module.forward = partial(attention_forward, module, traits)
        rotates = traits.rope and traits.own_rope is None
        if rotates and traits.norm == "head" and _is_rms_norm(module.q_norm):
            return {"qk_norm_rope": 1, "rms_norm": -2}
        return {"rope": int(rotates)}
    if activation := _gate_of(module, family):
        module.forward = partial(fused_mlp_forward if hasattr(module, "gate_up_proj") else mlp_forward, module, activation)
        return {"glu": 1}
    if isinstance(module, GradientCheckpointingLayer) and _adds_attention_as_is(module, family):
        norms = LayerNorms(family.stream_norm, family.attention_norm, family.mlp_norm)
        module.forward = partial(layer_forward, module, norms, last)
        return {"add_rms_norm": 1, "rms_norm": -1}
    return {}


def _is_rms_norm(module: nn.Module) -> bool:
    """Return whether this is an RMSNorm with a weight."""
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "weight")


def _gate_of(module: nn.Module, family: Family) -> str | None:
    """Return our name of the activation of a gated MLP; None for other modules and activations."""
    projections = {name for name, child in module.named_children() if name != family.activation}
    gated = family.mlp and projections in ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"})
    return ACTIVATIONS.get(type(getattr(module, family.activation, None))) if gated else None


def _adds_attention_as_is(layer: nn.Module, family: Family) -> bool:
    """Return whether a layer adds its attention to the residual stream without scale or dropout.

    Phi-3 has a dropout there, which is off in every checkpoint we know. Layers with another mixer than attention add that.
    """
    dropped = getattr(getattr(layer, "resid_attn_dropout", None), "p", 0.0)
    return family.stream_norm is not None and hasattr(layer, "self_attn") and not dropped


def _report(base: PreTrainedModel, device: torch.device, family: Family | None, why_stock: str | None, kernel_backend: str,
            counts: Counter[str]) -> PatchReport:
    config = base.config.get_text_config()
    report = PatchReport(config.model_type if family else f"{config.model_type} ({why_stock}: stock layers)")
    softcap = config.attn_logit_softcapping if family and family.softcap else None
    sinks = any(name.endswith(".sinks") for name, _ in base.named_parameters())
    attention = backend(device, base.dtype, softcap, getattr(config, "attention_dropout", 0.0), sinks)
    report.backends["attention"] = f"packed ({attention})" if is_packed(base) else "stock, one sample at a time (slow)"
    if mixers := sum(map(runs_by_sample, base.modules())):
        report.backends["mixers"] = f"stock x {mixers}, each sample by itself"
    if family:
        for op in ("rms_norm", "add_rms_norm", "qk_norm_rope", "rope", "glu"):
            if counts[op]:
                report.backends[op] = f"{kernel_backend} x {counts[op]}"
        report.backends.setdefault("glu", "stock")
    report.backends |= experts.describe(base)
    if adapted := sum(lora.is_adapted(module) for module in base.modules()):
        stock = adapted - counts["adapter"]
        report.backends["adapter"] = f"{kernel_backend} x {counts['adapter']}" + (f", PEFT x {stock}" if stock else "")
    report.backends["linear cross entropy"] = kernel_backend
    return report
