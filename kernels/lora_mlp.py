"""The gated MLP with LoRA on any of its three projections, as one autograd node.

    g, u = x W_gᵀ + …, x W_uᵀ + …          each with its adapter, bias, DoRA: the projections of kernels/lora.py
    h    = act(g) ∘ u
    y    = h W_dᵀ + …

    ∂h = the down projection's ∂x of ∂y                 ∂u = ∂h ∘ act(g)         ∂g = ∂h ∘ u ∘ act'(g)
    ∂x = the shared ∂x of gate and up, of ∂g and ∂u

On a GPU (kernels/_lora_passes.py): forward 3 base products and 3 launches (the adapters of gate and up, h, the adapter of
down); backward 3 base products and 7 launches (down's D and half of ∂h; ∂g, ∂u and h again; ∂A_d and ∂B_d; D_g, D_u and half
of ∂x; the ∂A and ∂B of both; and two that sum slices). Predicted at the shapes of Llama-3.1-8B: 7.0% over the base
products, by the count in kernels/lora.py.

In plain torch, without dropout: forward 3 base + 5 small products (the stacked S_g, S_u; S_g B_gᵀ, S_u B_uᵀ; S_d, S_d B_dᵀ),
backward 3 base + 10 small (down: D_d, D_d A_d, ∂A_d, ∂B_d; gate and up: D_g, D_u, one Σ D_i A_i, one stacked ∂A, ∂B_g, ∂B_u).

Saved: x, g, u and the narrow S (with DoRA the unscaled V in the place of g and u). h, as wide as g, is made again in
the backward; separate nodes keep act(g) and h beside them. Measured on one Zen 5 core, T=1000, 256 -> 688 -> 256, R=16,
fp32, forward + backward, as a multiple of the bare base products (PEFT's modules in brackets): plain 1.26 (1.41),
dropout 0.1 1.44 (1.70), DoRA 1.37 (1.65).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._autocast import autocast_input, without_autocast
from kernels.glu import ACTIVATIONS, activated, glu_backward, glu_backward_reference, glu_forward
from kernels.lora import (
    N_TENSORS,
    by_projection,
    check_input,
    check_projection,
    finished,
    finished_backward,
    flat_gradients,
    flatten,
    fuses,
    input_gradient,
    parameter_gradients,
    project,
    project_backward,
    projections,
)


def down_backward(grad_y, gate, up, activation, S, value, norm, part, need, need_h):
    """[∂g, ∂u] (empty unless need_h) and the gradients of the down projection's five tensors, by the passes: h comes with ∂g and ∂u."""
    G, grads = finished_backward([grad_y], [value], [norm], [part], [need])
    grad_h, D = input_gradient(G, [part], need_h, [need])
    need_again = need[0] or need[2]
    if need_h:
        *entry, h = glu_backward(grad_h, gate, up, activation, need_again)
    else:
        entry, h = [], glu_forward(gate, up, activation)
    parameter_gradients(G, h if need_again else gate, S, D, [part], [need], grads)
    return entry, grads


def down_backward_reference(grad_y, gate, up, activation, S, value, norm, part, need, need_h):
    act = activated(gate, activation)
    grad_h, grads = project_backward([grad_y], act * up, S, [value], [norm], [part], need_h, [need], False)
    return list(glu_backward_reference(grad_h, gate, up, activation, act)) if need_h else [], grads


class _Mlp(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, x, seed, activation, settings, *tensors):
        *entry, down = parts = projections(seed, settings, tensors)
        rows = x.reshape(-1, x.shape[-1])
        ctx.activation, ctx.settings, ctx.fused = activation, settings, fuses(rows, parts)
        S, values, norms = project(rows, entry, ctx.fused)
        gate, up = map(finished, values, norms, entry)
        S_down, (value_down,), (norm_down,) = project(glu_forward(gate, up, activation), [down], ctx.fused)
        y = finished(value_down, norm_down, down)

        need_magnitude = by_projection(ctx.needs_input_grad[4:], 3)[2][4]
        values.append(value_down if need_magnitude else None)
        ctx.save_for_backward(x, seed, S, S_down, *values, *norms, norm_down, *tensors)
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad_y):
        need_x, _, _, _, *flags = ctx.needs_input_grad
        *need_entry, need_down = by_projection(flags, 3)
        x, seed, S, S_down, *rest = ctx.saved_tensors
        values, norms, tensors = rest[:3], rest[3:6], rest[6:]
        *entry, down = projections(seed, ctx.settings, tensors)

        gate, up = map(finished, values[:2], norms[:2], entry)
        through_down = down_backward if ctx.fused else down_backward_reference
        grads_entry_y, grads_down = through_down(
            grad_y.reshape(-1, grad_y.shape[-1]), gate, up, ctx.activation, S_down, values[2], norms[2], down, need_down,
            need_x or any(map(any, need_entry)))
        grad_x, grads = None, [[None] * N_TENSORS] * 2
        if grads_entry_y:
            grad_x, grads = project_backward(
                grads_entry_y, x.reshape(-1, x.shape[-1]), S, values[:2], norms[:2], entry, need_x, need_entry, ctx.fused)
        return None if grad_x is None else grad_x.view(x.shape), None, None, None, *flat_gradients(grads + grads_down, len(tensors))


def lora_mlp(x: Tensor, weights, loras, biases=(None, None, None), activation: str = "silu") -> Tensor:
    """x [..., D] -> [..., D'], with weights (gate [F, D], up [F, D], down [D', F]).

    weights: dense, or `Nf4`, frozen; loras: a `Lora` per weight, or None for no adapter; biases likewise; activation "silu"
    or "gelu_tanh". Dtypes as in `lora_qkv`. ValueError where tensors do not fit or the activation is unknown.
    """
    if not len(weights) == len(loras) == len(biases) == 3:
        raise ValueError(
            f"lora_mlp: expected three weights, loras and biases, got {len(weights)}, {len(loras)} and {len(biases)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"lora_mlp: expected activation in {ACTIVATIONS}, got {activation!r}")
    check_input("lora_mlp", x)
    gate, up, _ = weights
    if gate.shape != up.shape:
        raise ValueError(f"lora_mlp: expected gate and up of one shape, got {tuple(gate.shape)} and {tuple(up.shape)}")
    widths = (x.shape[-1], x.shape[-1], gate.shape[0])
    for weight, lora, bias, width in zip(weights, loras, biases, widths, strict=True):
        check_projection("lora_mlp", x, width, weight, lora, bias)
    seed, settings, tensors = flatten(x, weights, loras, biases)
    return _Mlp.apply(autocast_input(x), seed, activation, settings, *tensors)
