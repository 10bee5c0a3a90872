"""The gated MLP with LoRA on any of its three projections, as one autograd node.

    g, u = x W_gᵀ + …, x W_uᵀ + …          each with its adapter, bias, DoRA: the projections of kernels/lora.py
    h    = act(g) ∘ u
    y    = h W_dᵀ + …

    ∂h = the down projection's ∂x of ∂y                 ∂u = ∂h ∘ act(g)         ∂g = ∂h ∘ u ∘ act'(g)
    ∂x = the shared ∂x of gate and up, of ∂g and ∂u

Saved: x, g, u and the narrow S (with DoRA the unscaled V instead of g and u). h, as wide as g, is recomputed in the backward; separate
nodes would keep act(g) and h too. Launches and matmuls of each case are in kernels/README.md.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._autocast import autocast_input, without_autocast
from kernels._lora_reference import Gradients, Needs, Projection
from kernels.glu import ACTIVATIONS, activated, glu_backward, glu_backward_reference, glu_forward
from kernels.lora import (
    adapters_of,
    check_input,
    check_projection,
    flat_gradients,
    flatten,
    fuses,
    input_gradient,
    like_rows_of,
    needs_by_projection,
    output_backward,
    output_of,
    parameter_gradients,
    project,
    project_backward,
    unflatten,
)


def down_backward(grad_y: Tensor, gate: Tensor, up: Tensor, activation: str, S: Tensor | None, value: Tensor | None, norm: Tensor | None,
                  down: Projection, need: Needs, need_h: bool) -> tuple[list[Tensor], list[Gradients]]:
    """Return [∂g, ∂u] (empty unless need_h) and the down projection's gradients, by the Triton passes.

    glu_backward recomputes h beside ∂g and ∂u.
    """
    G, grads = output_backward([grad_y], [value], [norm], [down], [need])
    adapters = adapters_of([down])
    grad_h, D = input_gradient(G, [down], adapters, need_h, [need])
    need_recomputed_h = need.weight or need.A
    if need_h:
        *grads_gate_up, h = glu_backward(grad_h, gate, up, activation, need_recomputed_h)
    else:
        grads_gate_up, h = [], glu_forward(gate, up, activation)
    parameter_gradients(G, h if need_recomputed_h else gate, S, D, [down], adapters, [need], grads)
    return grads_gate_up, grads


def down_backward_reference(grad_y: Tensor, gate: Tensor, up: Tensor, activation: str, S: Tensor | None, value: Tensor | None,
                            norm: Tensor | None, down: Projection, need: Needs, need_h: bool) -> tuple[list[Tensor], list[Gradients]]:
    """Return what `down_backward` returns, in plain torch."""
    act = activated(gate, activation)
    grad_h, grads = project_backward([grad_y], act * up, S, [value], [norm], [down], need_h, [need], False)
    return list(glu_backward_reference(grad_h, gate, up, activation, act)) if need_h else [], grads


class _Mlp(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, x, seed, activation, constants, *tensors):
        *gate_up, down = projections = unflatten(seed, constants, tensors)
        rows = x.reshape(-1, x.shape[-1])
        ctx.activation, ctx.constants, ctx.fused = activation, constants, fuses(rows, projections)
        S, values, norms = project(rows, gate_up, ctx.fused)
        gate, up = map(output_of, values, norms, gate_up)
        S_down, (value_down,), (norm_down,) = project(glu_forward(gate, up, activation), [down], ctx.fused)
        y = output_of(value_down, norm_down, down)

        *_, need_down = needs_by_projection(ctx.needs_input_grad[4:], 3)
        values.append(value_down if need_down.magnitude else None)
        ctx.save_for_backward(x, seed, S, S_down, *values, *norms, norm_down, *tensors)
        return y

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad_y):
        need_x, _, _, _, *flags = ctx.needs_input_grad
        *needs_gate_up, need_down = needs_by_projection(flags, 3)
        x, seed, S, S_down, *rest = ctx.saved_tensors
        values, norms, tensors = rest[:3], rest[3:6], rest[6:]
        *gate_up, down = unflatten(seed, ctx.constants, tensors)

        gate, up = map(output_of, values[:2], norms[:2], gate_up)
        through_down = down_backward if ctx.fused else down_backward_reference
        grads_gate_up_y, grads_down = through_down(
            grad_y, gate, up, ctx.activation, S_down, values[2], norms[2], down, need_down,
            need_x or any(map(any, needs_gate_up)))
        grad_x, grads = None, [Gradients(), Gradients()]
        if grads_gate_up_y:
            grad_x, grads = project_backward(
                grads_gate_up_y, x.reshape(-1, x.shape[-1]), S, values[:2], norms[:2], gate_up, need_x, needs_gate_up, ctx.fused)
        return None if grad_x is None else grad_x.view(x.shape), None, None, None, *flat_gradients(grads + grads_down, len(tensors))


def lora_mlp(x: Tensor, weights, loras, biases=(None, None, None), activation: str = "silu") -> Tensor:
    """Return the gated MLP of x [..., D], [..., D'], with weights (gate [F, D], up [F, D], down [D', F]).

    weights: dense, or `Nf4`, frozen; loras: a `Lora` per weight, or None for no adapter; biases likewise; activation "silu"
    or "gelu_tanh". Dtypes as in `lora_qkv`. Raises ValueError where tensors do not fit or the activation is unknown.
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
    seed, constants, tensors = flatten(x, weights, loras, biases)
    return like_rows_of(_Mlp.apply(autocast_input(x), seed, activation, constants, *tensors), x)
