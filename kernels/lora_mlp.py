"""The gated MLP with LoRA on any of its three projections, as one autograd node.

    g, u = x W_gᵀ + …, x W_uᵀ + …          each with its adapter, bias, DoRA: the projections of kernels/lora.py
    h    = act(g) ∘ u
    y    = h W_dᵀ + …

    ∂h = the down projection's ∂x of ∂y                 ∂u = ∂h ∘ act(g)         ∂g = ∂h ∘ u ∘ act'(g)
    ∂x = the shared ∂x of gate and up, of ∂g and ∂u

Products without dropout: forward 3 base + 5 small (the stacked S_g, S_u; S_g B_gᵀ, S_u B_uᵀ; S_d, S_d B_dᵀ), backward
3 base + 10 small (down: D_d, D_d A_d, ∂A_d, ∂B_d; gate and up: D_g, D_u, one Σ D_i A_i, one stacked ∂A, ∂B_g, ∂B_u).

Saved: x, g, u and the narrow S (with DoRA the unscaled V in the place of g and u). h, as wide as g, is made again in
the backward; separate nodes keep act(g) and h beside them. Measured on one Zen 5 core, T=1000, 256 -> 688 -> 256, R=16,
fp32, forward + backward, as a multiple of the bare base products (PEFT's modules in brackets): plain 1.26 (1.41),
dropout 0.1 1.44 (1.70), DoRA 1.37 (1.65).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._autocast import autocast_input, without_autocast
from kernels.glu import ACTIVATIONS, glu_backward_reference, glu_reference
from kernels.lora import (
    by_projection,
    check_projection,
    finish,
    flatten,
    project,
    project_backward,
    projections,
)


class _Mlp(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, x, activation, settings, *tensors):
        *entry, down = projections(settings, tensors)
        S, values, norms = project(x.reshape(-1, x.shape[-1]), entry)
        gate, up = map(finish, values, norms, entry)
        S_down, (value_down,), (norm_down,) = project(glu_reference(gate, up, activation), [down])
        y = finish(value_down, norm_down, down)

        need_magnitude = by_projection(ctx.needs_input_grad[3:])[2][4]
        values.append(value_down if need_magnitude else None)
        ctx.save_for_backward(x, S, S_down, *values, *norms, norm_down, *tensors)
        ctx.activation, ctx.settings = activation, settings
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad_y):
        need_x, _, _, *flags = ctx.needs_input_grad
        *need_entry, need_down = by_projection(flags)
        x, S, S_down, *rest = ctx.saved_tensors
        values, norms, tensors = rest[:3], rest[3:6], rest[6:]
        *entry, down = projections(ctx.settings, tensors)

        gate, up = map(finish, values[:2], norms[:2], entry)
        h = glu_reference(gate, up, ctx.activation)
        grad_h, grads_down = project_backward(
            [grad_y.reshape(-1, grad_y.shape[-1])], h, S_down, values[2:], norms[2:], [down], True, [need_down])
        grads_entry_y = glu_backward_reference(grad_h, gate, up, ctx.activation)
        grad_x, grads = project_backward(
            grads_entry_y, x.reshape(-1, x.shape[-1]), S, values[:2], norms[:2], entry, need_x, need_entry)
        flat = [g for grad in grads + grads_down for g in grad]
        return None if grad_x is None else grad_x.view(x.shape), None, None, *flat


def lora_mlp(x: Tensor, weights, loras, biases=(None, None, None), activation: str = "silu") -> Tensor:
    """x [..., D] -> [..., D'], with weights (gate [F, D], up [F, D], down [D', F]).

    loras: a `Lora` per weight, or None for no adapter; biases likewise; activation "silu" or "gelu_tanh". Dtypes as in
    `lora_qkv`. ValueError where shapes do not fit or the activation is unknown.
    """
    if not len(weights) == len(loras) == len(biases) == 3:
        raise ValueError(
            f"lora_mlp: expected three weights, loras and biases, got {len(weights)}, {len(loras)} and {len(biases)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"lora_mlp: expected activation in {ACTIVATIONS}, got {activation!r}")
    gate, up, _ = weights
    if gate.shape != up.shape:
        raise ValueError(f"lora_mlp: expected gate and up of one shape, got {tuple(gate.shape)} and {tuple(up.shape)}")
    widths = (x.shape[-1], x.shape[-1], gate.shape[0])
    for weight, lora, bias, width in zip(weights, loras, biases, widths, strict=True):
        check_projection("lora_mlp", width, weight, lora, bias)
    settings, tensors = flatten(weights, loras, biases)
    return _Mlp.apply(autocast_input(x), activation, settings, *tensors)
