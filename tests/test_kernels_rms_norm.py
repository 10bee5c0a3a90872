"""RMS norm against transformers' own modules, torch's rms_norm in fp64 and gradcheck."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kernels.rms_norm import rms_norm
from tests.kernels import given, settings, st

EPS = 1e-5


def exact(x, weight, offset):
    return F.rms_norm(x.double(), x.shape[-1:], weight.double() + offset, EPS)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
def test_gradcheck(offset, shape):
    x, weight = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in (shape, 5))
    assert gradcheck(lambda x, w: rms_norm(x, w, EPS, offset=offset), (x, weight))
    assert gradcheck(lambda x: rms_norm(x, weight.detach(), EPS, offset=offset), (x,))


@settings(max_examples=40, deadline=None)
@given(rows=st.sampled_from([0, 1, 3, 17]), width=st.sampled_from([1, 2, 31, 64, 65]),
       offset=st.sampled_from([0.0, 1.0]))
def test_matches_torch_in_fp64(rows, width, offset):
    x, weight = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((rows, width), width))
    dy = torch.randn(rows, width, dtype=torch.float64)
    ours, theirs = rms_norm(x, weight, EPS, offset=offset), exact(x, weight, offset)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(ours, (x, weight), dy), torch.autograd.grad(theirs, (x, weight), dy),
                               rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("module, offset", [(LlamaRMSNorm, 0.0), (GemmaRMSNorm, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_error_is_at_most_twice_that_of_transformers(module, offset, dtype, scale):
    norm = module(130, EPS).to(dtype)
    norm.weight.data.copy_(torch.randn(130))
    x = (torch.randn(50, 130) * scale).to(dtype).requires_grad_()
    dy = torch.randn(50, 130).to(dtype)
    leaves = (x, norm.weight)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    true = exact(*doubles, offset)
    truth = [true, *torch.autograd.grad(true, doubles, dy.double())]

    def errors(y):
        values = [y, *torch.autograd.grad(y, leaves, dy)]
        return [(value.double() - t).norm() / t.norm() for value, t in zip(values, truth)]

    ours, theirs = errors(rms_norm(x, norm.weight, EPS, offset=offset)), errors(norm(x))
    assert all(mine <= 2 * other + 1e-7 for mine, other in zip(ours, theirs)), (ours, theirs)


@pytest.mark.parametrize("module, offset", [(LlamaRMSNorm, 0.0), (GemmaRMSNorm, 1.0)])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_rounds_where_transformers_rounds(module, offset, weight_dtype):
    """In bf16 the order of cast and product decides the last bit of many results, so agreement shows the order."""
    norm = module(512, EPS).to(weight_dtype)
    norm.weight.data.copy_(torch.randn(512))
    x = torch.randn(64, 512).bfloat16()
    ours, theirs = rms_norm(x, norm.weight, EPS, offset=offset), norm(x)
    assert ours.dtype == theirs.dtype
    assert (ours != theirs).float().mean() < 1e-3
    other = rms_norm(x, norm.weight - (1 - 2 * offset), EPS, offset=1 - offset)
    assert weight_dtype == torch.float32 or (ours != other).float().mean() > 0.1


def test_frozen_weight_costs_no_gradient(monkeypatch):
    """The backward is asked for ∂w only when w is trained, and then alone makes it."""
    made = []
    module = importlib.import_module("kernels.rms_norm")
    backward = module.rms_norm_backward_reference

    def watched(*args):
        dx, dweight = backward(*args)
        made.append(dweight is not None)
        return dx, dweight

    monkeypatch.setattr(module, "rms_norm_backward_reference", watched)
    x = torch.randn(3, 8, requires_grad=True)
    for trained in (False, True):
        rms_norm(x, torch.ones(8, requires_grad=trained), EPS).sum().backward()
    assert made == [False, True]


def test_saves_x_itself_and_one_number_a_row():
    saved = []
    x, weight = torch.randn(6, 32, requires_grad=True), torch.ones(32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(x, weight, EPS)
    assert {t.data_ptr() for t in saved} >= {x.data_ptr(), weight.data_ptr()}
    assert [t.numel() for t in saved if t.data_ptr() not in (x.data_ptr(), weight.data_ptr())] == [6]


def test_strided_inputs_and_upstream():
    """Heads sliced out of one fused projection, and the expanded upstream that a sum makes."""
    qkv, weight = torch.randn(7, 5, 24, dtype=torch.float64, requires_grad=True), torch.rand(8, dtype=torch.float64)
    weight.requires_grad_()
    heads = qkv.transpose(0, 1)[..., 8:16]
    ours, theirs = rms_norm(heads, weight, EPS), exact(heads, weight, 0.0)
    torch.testing.assert_close(ours, theirs)
    leaves = qkv, weight
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), leaves, retain_graph=True) for y in (ours, theirs)))


def test_bitwise_repeatable_and_inputs_unchanged():
    x, weight, dy = torch.randn(9, 33, requires_grad=True), torch.randn(33, requires_grad=True), torch.randn(9, 33)
    before = [t.detach().clone() for t in (x, weight, dy)]
    y = rms_norm(x, weight, EPS)
    first, second = (torch.autograd.grad(y, (x, weight), dy, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second)) and torch.equal(y, rms_norm(x, weight, EPS))
    assert all(torch.equal(t, old) for t, old in zip((x, weight, dy), before))


def test_compiles_in_one_graph():
    torch._dynamo.reset()
    x, weight, dy = torch.randn(9, 32, requires_grad=True), torch.randn(32, requires_grad=True), torch.randn(9, 32)
    for offset in (0.0, 1.0):
        def norm(x, weight, offset=offset):
            return rms_norm(x, weight, EPS, offset=offset)
        compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, weight), norm(x, weight))
        torch.testing.assert_close(*(torch.autograd.grad(f(x, weight), (x, weight), dy) for f in (compiled, norm)))


def test_wrong_weight_is_named():
    with pytest.raises(ValueError, match=r"rms_norm: expected weight of shape \(8,\) .*, got \(4,\)"):
        rms_norm(torch.zeros(2, 8), torch.zeros(4), EPS)
