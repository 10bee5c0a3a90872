"""Count the experts that tokens pass through, and compute experts with adapters.

transformers keeps the experts of a layer in 3-D parameters [experts, rows, columns]; a router sends each token to some of them, and shared
experts see every token. It computes them by torch's grouped product, which on a CPU is as fast as any loop we tried.

An adapter on expert weights is PEFT's ParamWrapper, one around another for each parameter. PEFT adds s B A to the weights of all experts at
each call; here the adapter is computed on the rows of each expert (kernels/grouped_lora.py), and PEFT's forward runs where that does not
apply.

Shapes: T tokens, C experts chosen for each, S = T C rows, E experts, W model width.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedConfig, PreTrainedModel

from kernels.grouped_lora import grouped_lora_linear
from trainer.model.forward import unwrap_peft
from trainer.model.linear_layers import base_modules
from trainer.model.lora import adapted_weights
from trainer.model.mixtures import find_mixtures

logger = logging.getLogger(__name__)

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # names in configs: how many there are
CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")  # and how many of them a token passes through
WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")  # the parameters of transformers' experts that a row is multiplied by


# ---------------------------------------------------------------- counting


class ExpertCounts(NamedTuple):
    """How many experts a layer has, and how many of them a token passes through."""

    there: int
    chosen: float  # a mean, where layers differ


def expert_counts(config: PreTrainedConfig) -> ExpertCounts | None:
    """Read the counts of experts; None where the text config does not tell."""
    for part in (config, getattr(config, "ffn_config", None)):  # DBRX has its own part for them
        there, chosen = (next((value for name in names if (value := getattr(part, name, None))), None) for names in (EXPERTS, CHOSEN))
        if there and chosen:
            return ExpertCounts(there, sum(chosen) / len(chosen) if isinstance(chosen, list) else chosen)
    return None


def expert_share(config: PreTrainedConfig) -> float | None:
    """Return the share of a layer's experts that a token passes through, or None."""
    counts = expert_counts(config)
    return counts.chosen / counts.there if counts else None


def routed_weights(base: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights of routed experts by their names.

    A stack of fewer experts than the config tells is one of shared experts.
    """
    found, counts = find_mixtures(base), expert_counts(base.config.get_text_config())
    stacks = {name: weight for name, weight in found.weights.items() if counts is None or weight.shape[0] >= counts.there}
    return stacks | {f"{name}.weight": layer.weight for name, layer in found.layers.items()}


def expert_weights(model: nn.Module) -> set[Tensor]:
    """Return the weights of routed experts, with those of adapters on them."""
    base = unwrap_peft(model)
    routed = routed_weights(base)
    adapters = [layer for name, layer in adapted_weights(base).items() if name in routed]
    return {*routed.values(), *(p for layer in adapters for matrix in (layer.lora_A, layer.lora_B) for p in matrix.parameters())}


def _computes_as_configured(module: nn.Module) -> bool:
    """Return whether transformers' `experts_implementation` decides how these experts are computed."""
    return hasattr(module, "_is_expert_parallel")


# ---------------------------------------------------------------- adapters


class ExpertAdapter(NamedTuple):
    """Adapters of one parameter: A [E, R, in], B [E, out, R], and the scaling."""

    A: Tensor
    B: Tensor
    scaling: float


def fuse_adapters(model: nn.Module) -> int:
    """Give experts with adapters our forward; return how many modules have it now."""
    inner = {module.base_layer for module in model.modules() if isinstance(module, ParamWrapper)}
    fused = [module for module in model.modules() if isinstance(module, ParamWrapper) and module not in inner and not why_not_fused(module)]
    for module in fused:
        module.forward = partial(adapted_forward, module)
    return len(fused)


def why_not_fused(outermost: ParamWrapper) -> str | None:
    """Return why experts with adapters must run PEFT's forward now, or None."""
    experts, wrappers = outermost.get_base_layer(), _wrappers(outermost)
    if not _computes_as_configured(experts):
        return "the experts' code is their own"
    if experts._is_expert_parallel:
        return "the experts are spread over devices"
    for wrapper in wrappers:
        active = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
        if wrapper.parameter_name not in WEIGHTS:
            return f"an adapter is on {wrapper.parameter_name}"
        if wrapper.merged or len(active) != 1:
            return "the adapter is merged" if wrapper.merged else f"expected one active adapter, found {', '.join(active) or 'none'}"
        if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in (wrapper, experts)):
            return "hooks on experts"
    return None


def _wrappers(outermost: ParamWrapper) -> list[ParamWrapper]:
    """Return the wrappers around one module of experts, each of which adapts one parameter."""
    found = [outermost]
    while isinstance(found[-1].base_layer, ParamWrapper):
        found.append(found[-1].base_layer)
    return found


def adapted_forward(outermost: ParamWrapper, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute experts with adapters: of hidden_states [T,W], return [T,W].

    `top_k_index` and `top_k_weights` [T,C] are the experts chosen and their weights. PEFT's own forward runs where `why_not_fused` gives
    a reason.
    """
    if reason := why_not_fused(outermost):
        _warn_not_fused(reason)
        return type(outermost).forward(outermost, hidden_states, top_k_index, top_k_weights)
    experts = outermost.get_base_layer()
    if outermost.disable_adapters:
        return experts(hidden_states, top_k_index, top_k_weights)
    adapters = {wrapper.parameter_name: _adapter(wrapper) for wrapper in _wrappers(outermost)}
    expert_of_row, order = top_k_index.flatten().sort(stable=True)
    ends = torch.searchsorted(expert_of_row, torch.arange(experts.num_experts, device=order.device), right=True).int()
    token, place = order // top_k_index.shape[1], order.argsort().view_as(top_k_index)

    def product(name: str, x: Tensor) -> Tensor:
        weight = getattr(experts, name)
        weight = weight.transpose(1, 2) if experts.is_transposed else weight
        if name in adapters:
            y = grouped_lora_linear(x, weight, *adapters[name], ends)
        else:
            y = F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
        return y + getattr(experts, f"{name}_bias").index_select(0, expert_of_row) if experts.has_bias else y

    x = _ToExperts.apply(hidden_states.to(experts.down_proj.dtype), token, place)
    inner = experts._apply_gate(product("gate_up_proj", x)) if experts.has_gate else experts.act_fn(product("up_proj", x))
    weighted = product("down_proj", inner) * top_k_weights.flatten().index_select(0, order)[:, None]
    return _ToTokens.apply(weighted, token, place).to(hidden_states.dtype)


@functools.cache  # once per reason, however many layers and steps
def _warn_not_fused(reason: str) -> None:
    logger.warning("experts with adapters run unfused, by PEFT's forward: %s", reason)


def _adapter(wrapper: ParamWrapper) -> ExpertAdapter:
    """Read the active adapter.

    In PEFT's layout A has the ranks of one expert after another, B those of all experts for each rank.
    """
    name = next(name for name in wrapper.active_adapters if name in wrapper.lora_A)
    A, B, experts = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight, wrapper.num_experts
    return ExpertAdapter(A.unflatten(0, (experts, -1)), B.unflatten(1, (-1, experts)).permute(2, 0, 1), wrapper.scaling[name])


class _ToExperts(torch.autograd.Function):
    """Copies tokens [T,W] to the rows [S,W] of their experts.

    Row s is token[s], and place [T,C] are the rows of each token. Its gradient is _ToTokens, which adds in the same order each time, and
    the other way round.
    """

    @staticmethod
    def forward(ctx, x, token, place):
        ctx.save_for_backward(token, place)
        return x.index_select(0, token)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        _, place = ctx.saved_tensors
        return _sum_of_rows(dy, place), None, None


class _ToTokens(torch.autograd.Function):
    """Sums the rows [S,W] of each token [T,W]."""

    @staticmethod
    def forward(ctx, y, token, place):
        ctx.save_for_backward(token, place)
        return _sum_of_rows(y, place)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx):
        token, _ = ctx.saved_tensors
        return dx.index_select(0, token), None, None


def _sum_of_rows(rows: Tensor, place: Tensor) -> Tensor:
    return rows.index_select(0, place.flatten()).unflatten(0, place.shape).sum(1)


# ---------------------------------------------------------------- the start summary


def describe(base: PreTrainedModel) -> dict[str, str]:
    """Return how experts are computed, as {name: text} of the startup report.

    It is empty without experts whose weights are 3-D.
    """
    modules = base_modules(base)
    outermost = {module.get_base_layer(): module for module in reversed(list(base.modules())) if isinstance(module, ParamWrapper)}
    stacks = {modules[name.rpartition(".")[0]]: None for name, weight in routed_weights(base).items() if weight.ndim == 3}
    ways = Counter(_way(stack, outermost.get(stack)) for stack in stacks)
    return {"expert products": ", ".join(f"{way} x {count}" for way, count in ways.items())} if ways else {}


def _way(experts: nn.Module, wrapper: ParamWrapper | None) -> str:
    """Return how one module of experts is computed."""
    if wrapper is not None:
        return "grouped, adapters by row" if isinstance(wrapper.forward, partial) else "PEFT, adapters added to all weights"
    implementation = experts.config._experts_implementation if _computes_as_configured(experts) else "own code"
    return {"eager": "loop by expert", "grouped_mm": "grouped"}.get(implementation, implementation)
