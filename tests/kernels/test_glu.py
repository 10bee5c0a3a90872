"""Gated linear unit against plain torch, its formula in fp64, and gradcheck."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from kernels.glu import ACTIVATIONS, glu, glu_backward, glu_forward
from tests.helpers.kernels import DEVICE, DTYPES, assert_as_exact_as_torch, given, runs_triton, settings, st, triton_mode


def stock(gate, up, activation):
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def slope(g, activation):
    """act'(g) as the module's docstring derives it."""
    if activation == "silu":
        s = torch.sigmoid(g)
        return s * (1 + g * (1 - s))
    root = math.sqrt(2 / math.pi)
    t = torch.tanh(root * (g + 0.044715 * g**3))
    return 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * root * (1 + 3 * 0.044715 * g * g)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert gradcheck(lambda g, u: glu(g, u, activation), (gate, up))


@settings(max_examples=30, deadline=None)
@given(shape=st.sampled_from([(0, 4), (1,), (7, 1), (3, 31), (2, 3, 33)]), activation=st.sampled_from(ACTIVATIONS),
       scale=st.sampled_from([1e-3, 1.0, 30.0]))
def test_matches_torch_and_the_derived_slope(shape, activation, scale):
    gate, up = (torch.randn(shape, dtype=torch.float64).mul(scale).requires_grad_() for _ in range(2))
    dy = torch.randn(shape, dtype=torch.float64)
    ours, theirs = glu(gate, up, activation), stock(gate, up, activation)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    dgate, dup = torch.autograd.grad(ours, (gate, up), dy)
    torch.testing.assert_close((dgate, dup), torch.autograd.grad(theirs, (gate, up), dy), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(dgate, dy * up * slope(gate, activation), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_torch(activation, dtype):
    gate, up, dy = (torch.randn(50, 130).mul(2).to(dtype).requires_grad_() for _ in range(3))
    doubles = [t.detach().double().requires_grad_() for t in (gate, up)]
    true = stock(*doubles, activation)
    truth = [true, *torch.autograd.grad(true, doubles, dy.double())]

    def errors(y):
        values = [y, *torch.autograd.grad(y, (gate, up), dy)]
        return [(value.double() - t).norm() / t.norm() for value, t in zip(values, truth)]

    ours, theirs = errors(glu(gate, up, activation)), errors(stock(gate, up, activation))
    assert all(mine <= 2 * other + 1e-7 for mine, other in zip(ours, theirs)), (ours, theirs)


def test_saves_gate_and_up_only():
    gate, up = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        glu(gate, up)
    assert [t.data_ptr() for t in saved] == [gate.data_ptr(), up.data_ptr()]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_strided_repeatable_and_inputs_unchanged(activation):
    fused, dy = torch.randn(5, 14, requires_grad=True), torch.randn(5, 7)
    before = fused.detach().clone(), dy.clone()
    gate, up = fused.chunk(2, -1)
    y = glu(gate, up, activation)
    first, second = (torch.autograd.grad(y, fused, dy, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and torch.equal(y, glu(gate, up, activation))
    torch.testing.assert_close(y, stock(gate, up, activation))
    torch.testing.assert_close(first, torch.autograd.grad(stock(gate, up, activation), fused, dy)[0])
    expanded = torch.autograd.grad(glu(gate, up, activation).sum(), fused)[0]
    torch.testing.assert_close(expanded, torch.autograd.grad(stock(gate, up, activation).sum(), fused)[0])
    assert torch.equal(fused, before[0]) and torch.equal(dy, before[1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiles_in_one_graph(activation):
    torch._dynamo.reset()
    gate, up, dy = (torch.randn(4, 8, requires_grad=True) for _ in range(3))
    compiled = torch.compile(lambda g, u: glu(g, u, activation), fullgraph=True, backend="aot_eager")
    ours, theirs = compiled(gate, up), glu(gate, up, activation)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(y, (gate, up), dy) for y in (ours, theirs)))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"glu: expected gate and up of one shape, dtype and device, got .*\(2, 3\) on cpu and .*\(2, 4\)"):
        glu(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"glu: expected activation in \('silu', 'gelu_tanh'\), got 'relu'"):
        glu(torch.zeros(2, 3), torch.zeros(2, 3), "relu")


# ---------------------------------------------------------------- Triton


@runs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 31), (2, 3, 511), (2, 513), (1, 4099)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernels_are_as_exact_as_torch(activation, shape, dtype):
    inputs = [torch.randn(shape, dtype=torch.float64).mul(4).requires_grad_() for _ in range(2)]
    assert_as_exact_as_torch(lambda g, u: glu(g, u, activation), lambda g, u: stock(g, u, activation), inputs, dtype)


@runs_triton
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernels_take_views_and_huge_gates(activation):
    fused = torch.randn(5, 14, device=DEVICE)
    fused[0, :4] = torch.tensor([-3e4, -100.0, 100.0, 3e4])
    gate, up = fused.requires_grad_().chunk(2, -1)
    with triton_mode():
        y = glu(gate, up, activation)
        dfused, = torch.autograd.grad(y.sum(), fused)
    torch.testing.assert_close(y, stock(gate, up, activation))
    torch.testing.assert_close(dfused, torch.autograd.grad(stock(gate, up, activation).sum(), fused)[0])


@runs_triton
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_hands_out_y_again(activation):
    dy, gate, up = (torch.randn(3, 33, device=DEVICE) for _ in range(3))
    with triton_mode():
        again = glu_backward(dy, gate, up, activation, True)[2]
        assert torch.equal(again, glu_forward(gate, up, activation))
        assert glu_backward(dy, gate, up, activation, False)[2].numel() == 0


@runs_triton
def test_kernels_compile_in_one_graph():
    torch._dynamo.reset()
    gate, up, dy = (torch.randn(4, 8, device=DEVICE, requires_grad=True) for _ in range(3))
    with triton_mode():
        ours = torch.compile(glu, fullgraph=True, backend="aot_eager")(gate, up)
        gradients = torch.autograd.grad(ours, (gate, up), dy)
        torch.library.opcheck(glu_forward.node, (gate.detach(), up.detach(), "silu"))
        torch.library.opcheck(glu_backward.node, (dy.detach(), gate.detach(), up.detach(), "silu", True))
    torch.testing.assert_close(ours, stock(gate, up, "silu"))
    torch.testing.assert_close(gradients, torch.autograd.grad(stock(gate, up, "silu"), (gate, up), dy))
