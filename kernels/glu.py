"""Gated linear unit, y = act(g) ⊙ u, which saves only g and u.

    silu:       act(g) = g·σ(g)                 act'(g) = σ(g)·(1 + g·(1 − σ(g)))
    gelu_tanh:  act(g) = ½·g·(1 + t)            act'(g) = ½·(1 + t) + ½·g·(1 − t²)·√(2/π)·(1 + 3·0.044715·g²)
                t = tanh(√(2/π)·(g + 0.044715·g³))
    ∂u = ∂y ⊙ act(g)        ∂g = ∂y ⊙ u ⊙ act'(g)

gelu_tanh's ½·(1 + t) is σ(2√(2/π)·(g + 0.044715·g³)), so both activations are g·σ(z(g)), and

    act'(g) = σ(z) + g·σ(z)·(1 − σ(z))·z'(g)    silu: z = g    gelu_tanh: z = 2√(2/π)·(g + 0.044715·g³)

Eager saves act(g) beside g and u, a third more activations of the widest layer; here the backward recomputes it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._dispatch import operator, triton_serves
from kernels._launch import ANY, Launch, cdiv, constexpr, jit, launch, pick, rows_of, tl

ACTIVATIONS = ("silu", "gelu_tanh")


def glu_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return y."""
    return activated(gate, activation).mul_(up)


def glu_backward_reference(dy: Tensor, gate: Tensor, up: Tensor, activation: str, act: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return ∂g and ∂u; `act`, which is act(g), is recomputed unless given, and overwritten."""
    dup = (activated(gate, activation) if act is None else act).mul_(dy)
    dgate = dy * up
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
    else:
        torch.ops.aten.gelu_backward.grad_input(dgate, gate, approximate="tanh", grad_input=dgate)
    return dgate, dup


def activated(gate: Tensor, activation: str) -> Tensor:
    """Return act(g)."""
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


# ---------------------------------------------------------------- Triton


@jit
def _slope_sigmoid(g, SILU: constexpr):
    """Return σ(z) and z'(g)."""
    if SILU:
        s, slope = tl.sigmoid(g), tl.full(g.shape, 1.0, tl.float32)
    else:
        root: constexpr = 1.5957691216057308  # 2·√(2/π)
        square = g * g
        s, slope = tl.sigmoid(root * g * (1.0 + 0.044715 * square)), root * (1.0 + 0.134145 * square)
    return s, slope


@jit
def _glu_kernel(gate, up, y, gate_stride, up_stride, N, SILU: constexpr, BLOCK: constexpr):
    """Write y [rows, N] of gate and up [rows, N]: one program per row and block of columns."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N

    g = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)

    s, _ = _slope_sigmoid(g, SILU)
    tl.store(y + row * N + columns, g * s * u, mask=inside)


@jit
def _glu_backward_kernel(dy, gate, up, dgate, dup, y, dy_stride, gate_stride, up_stride, N, SILU: constexpr, WITH_Y: constexpr,
                         BLOCK: constexpr):
    """Write ∂g and ∂u [rows, N], and y where WITH_Y."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N

    d = tl.load(dy + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)

    s, slope = _slope_sigmoid(g, SILU)
    act = g * s
    tl.store(dup + row * N + columns, d * act, mask=inside)
    tl.store(dgate + row * N + columns, d * u * (s + act * (1.0 - s) * slope), mask=inside)
    if WITH_Y:
        tl.store(y + row * N + columns, act * u, mask=inside)


LAUNCH = {(ANY, 512): Launch({"BLOCK": 512}, 2), (ANY, None): Launch({"BLOCK": 2048}, 8)}


def _grid(rows: int, N: int, settings: Launch) -> tuple[int, int]:
    return rows, cdiv(N, settings.blocks["BLOCK"])


@operator(lambda gate, up, activation: torch.empty_like(gate, memory_format=torch.contiguous_format))
def glu_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return y, dense, in gate's dtype, from the backend that serves gate."""
    if not triton_serves(gate):
        return glu_reference(gate, up, activation).contiguous()  # permuted inputs give permuted results
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    g, u = rows_of(gate), rows_of(up)
    settings = pick(LAUNCH, g.shape[1], gate.device)
    launch(_glu_kernel, _grid(*g.shape, settings), settings, g, u, y, g.stride(0), u.stride(0), g.shape[1], SILU=activation == "silu")
    return y


def _fake_backward(dy, gate, up, activation, with_y):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape), gate.new_empty(gate.shape if with_y else 0)


@operator(_fake_backward)
def glu_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str, with_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return ∂g, ∂u and the recomputed y (empty unless with_y), from the backend that serves gate."""
    if not triton_serves(gate):
        y = glu_reference(gate, up, activation) if with_y else gate.new_empty(0)
        return *(t.contiguous() for t in (*glu_backward_reference(dy, gate, up, activation), y)),
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    y = torch.empty(gate.shape if with_y else 0, dtype=gate.dtype, device=gate.device)
    d, g, u = rows_of(dy), rows_of(gate), rows_of(up)
    settings = pick(LAUNCH, g.shape[1], gate.device)
    launch(_glu_backward_kernel, _grid(*g.shape, settings), settings, d, g, u, dgate, dup, y, d.stride(0), g.stride(0), u.stride(0),
           g.shape[1], SILU=activation == "silu", WITH_Y=with_y)
    return dgate, dup, y


# ---------------------------------------------------------------- autograd


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return glu_forward(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dgate, dup, _ = glu_backward(dy, *ctx.saved_tensors, ctx.activation, False)
        return dgate, dup, None


def glu(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """Return act(gate) ⊙ up for gate and up [..., N] of one dtype; activation is "silu" or "gelu_tanh".

    Raises ValueError where gate and up do not fit each other or the activation is unknown.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device or not gate.dim():
        raise ValueError(f"glu: expected gate and up of one shape, dtype and device, got {gate.dtype} {tuple(gate.shape)} on "
                         f"{gate.device} and {up.dtype} {tuple(up.shape)} on {up.device}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"glu: expected activation in {ACTIVATIONS}, got {activation!r}")
    return _Glu.apply(gate, up, activation)


def _aot(activation: str):
    gate, up, dy = (torch.empty(8192, 14336, dtype=torch.bfloat16, device="meta") for _ in range(3))
    glu_forward(gate, up, activation)
    glu_backward(dy, gate, up, activation, True)


AOT = {f"glu {activation}": lambda activation=activation: _aot(activation) for activation in ACTIVATIONS}
