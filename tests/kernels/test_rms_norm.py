"""RMS norm, also of a residual sum, against transformers, torch's rms_norm in fp64 and gradcheck."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kernels._launch import recording
from kernels.rms_norm import WIDEST, add_rms_norm, heads_of, rms_norm, rms_norm_backward, rms_norm_forward, rms_norm_reference
from tests.helpers.kernels import DEVICE, DTYPES, assert_as_exact_as_torch, given, poisoned, runs_triton, settings, st, triton_mode

EPS = 1e-5
MODULE = importlib.import_module("kernels.rms_norm")


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
    """The backward computes ∂w only when w is trained."""
    made = []
    backward = MODULE.rms_norm_backward_reference

    def watched(*args):
        dx, dweight = backward(*args)
        made.append(dweight is not None)
        return dx, dweight

    monkeypatch.setattr(MODULE, "rms_norm_backward_reference", watched)
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


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_results_are_dense_as_the_compiler_is_told(offset):
    """Also those of permuted rows."""
    x, weight = torch.randn(5, 3, 8).transpose(0, 1), torch.randn(8)
    for z in (None, x):
        results = rms_norm_forward(x, z, weight, EPS, offset)
        arguments = x, z, x, weight, results[2], offset, True
        assert all(t.is_contiguous() for t in (*results, *rms_norm_backward(*arguments)))
        torch.library.opcheck(rms_norm_forward.node, (x, z, weight, EPS, offset))
        torch.library.opcheck(rms_norm_backward.node, arguments)


# ---------------------------------------------------------------- sum + norm


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_sum_gradcheck(offset):
    x, residual, weight = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((3, 4, 5), (3, 4, 5), 5))
    assert gradcheck(lambda x, z, w: add_rms_norm(x, z, w, EPS, offset=offset), (x, residual, weight))
    assert gradcheck(lambda x, z: add_rms_norm(x, z, weight.detach(), EPS, offset=offset), (x, residual))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_is_bit_for_bit_the_two_operations(offset, dtype):
    x, residual, dy, dh = (torch.randn(9, 33).to(dtype) for _ in range(4))
    weight = torch.randn(33).to(dtype).requires_grad_()
    leaves = x.requires_grad_(), residual.requires_grad_(), weight
    y, h = add_rms_norm(*leaves, EPS, offset=offset)
    total = x + residual
    assert torch.equal(h, total) and torch.equal(y, rms_norm(total, weight, EPS, offset=offset))
    found = torch.autograd.grad((y, h), leaves, (dy, dh))
    expected = torch.autograd.grad((rms_norm(total, weight, EPS, offset=offset), total), leaves, (dy, dh))
    assert all(map(torch.equal, found, expected))


def test_sum_with_one_result_unused_and_saving_the_sum_alone():
    x, residual, weight = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True), torch.rand(8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y, h = add_rms_norm(x, residual, weight, EPS)
    assert sorted(t.numel() for t in saved) == [6, 8, 48] and any(torch.equal(t, h) for t in saved)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), (x, residual), retain_graph=True),
                               torch.autograd.grad(rms_norm(x + residual, weight, EPS).sum(), (x, residual)))
    assert all((g == 1).all() for g in torch.autograd.grad(h.sum(), (x, residual)))


def test_sum_of_two_dtypes_has_the_wider_one():
    x, residual, weight = torch.randn(3, 8).bfloat16().requires_grad_(), torch.randn(3, 8, requires_grad=True), torch.rand(8)
    y, h = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(h, x + residual) and torch.equal(y, rms_norm(h, weight, EPS))
    assert [g.dtype for g in torch.autograd.grad((y + h).sum(), (x, residual))] == [torch.bfloat16, torch.float32]


def test_mistakes_are_named():
    x, weight = torch.zeros(2, 8), torch.zeros(8)
    with pytest.raises(ValueError, match=r"rms_norm: expected weight of shape \(8,\) .*, got \(4,\)"):
        rms_norm(x, torch.zeros(4), EPS)
    with pytest.raises(ValueError, match="rms_norm: expected floating x and weight on one device, got .*float32 on cpu and .*int64 on cpu"):
        rms_norm(x, weight.long(), EPS)
    with pytest.raises(ValueError, match="rms_norm: expected floating x and weight on one device, got .* on meta and .* on cpu"):
        rms_norm(x.to("meta"), weight, EPS)
    with pytest.raises(ValueError, match=r"add_rms_norm: expected weight of shape \(8,\)"):
        add_rms_norm(x, x, torch.zeros(4), EPS)
    with pytest.raises(ValueError, match=r"add_rms_norm: expected x and residual of one shape and device, got \(2, 8\) .* and \(1, 8\)"):
        add_rms_norm(x, x[:1], weight, EPS)


# ---------------------------------------------------------------- Triton


def stock(x, weight, offset, eps):
    """transformers' LlamaRMSNorm, or GemmaRMSNorm where there is an offset, in fp64 too."""
    exact = torch.promote_types(x.dtype, torch.float32)
    normed = x.to(exact) * torch.rsqrt(x.to(exact).pow(2).mean(-1, keepdim=True) + eps)
    return (normed * (weight.to(exact) + offset)).to(x.dtype) if offset else weight * normed.to(x.dtype)


def stock_sum(x, residual, weight, offset, eps):
    h = x + residual
    return stock(h, weight, offset, eps), h


SHAPES = [(0, 4), (7,), (1, 1), (3, 31), (2, 3, 130), (33, 8), (2, 2, 2, 257), (2, 1030), (1, 4097)]


def leaves(*shapes, scale=1.0):
    return [torch.randn(shape, dtype=torch.float64).mul(scale).requires_grad_() for shape in shapes]


@runs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_kernels_are_as_exact_as_torch(offset, shape, dtype):
    eps = 0.1 if shape[-1] == 1 else EPS  # a gradient that is not all cancellation
    assert_as_exact_as_torch(lambda x, w: rms_norm(x, w, eps, offset=offset), lambda x, w: stock(x, w, offset, eps),
                             leaves(shape, shape[-1:]), dtype)
    assert_as_exact_as_torch(lambda x, z, w: add_rms_norm(x, z, w, eps, offset=offset),
                             lambda x, z, w: stock_sum(x, z, w, offset, eps), leaves(shape, shape, shape[-1:]), dtype)


@runs_triton
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("x_dtype, weight_dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_kernels_take_weights_of_another_dtype(offset, x_dtype, weight_dtype):
    def cast(op):
        return lambda x, w: op(x.to(x_dtype) if x.dtype != torch.float64 else x, w.to(weight_dtype) if w.dtype != torch.float64 else w)

    assert_as_exact_as_torch(cast(lambda x, w: rms_norm(x, w, EPS, offset=offset)), cast(lambda x, w: stock(x, w, offset, EPS)),
                             leaves((5, 33), 33), torch.bfloat16)
    with triton_mode():
        y = rms_norm(torch.ones(2, 4, dtype=x_dtype, device=DEVICE), torch.ones(4, dtype=weight_dtype, device=DEVICE), EPS, offset=offset)
    assert y.dtype == (x_dtype if offset else torch.float32)


@runs_triton
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_kernels_round_where_the_reference_rounds(offset):
    x, weight = torch.randn(32, 256, device=DEVICE).bfloat16(), torch.randn(256, device=DEVICE).bfloat16()
    expected, _ = rms_norm_reference(x, weight, EPS, offset)
    with triton_mode():
        assert (rms_norm(x, weight, EPS, offset=offset) != expected).float().mean() < 1e-3


@runs_triton
@pytest.mark.parametrize("scale", [1e-4, 1e15])
def test_kernels_take_zero_tiny_and_huge_rows(scale):
    x, weight = leaves((4, 130), 130, scale=scale)
    x.data[1] = 0
    assert_as_exact_as_torch(lambda x, w: rms_norm(x, w, EPS), lambda x, w: stock(x, w, 0.0, EPS), [x, weight], torch.float32)


@runs_triton
def test_kernels_take_views_without_copying_them():
    """Heads of one fused projection, rows of a wider matrix, a transposed batch, and the expanded upstream that a sum makes."""
    fused, weight = torch.randn(7, 5, 24, device=DEVICE, requires_grad=True), torch.rand(8, device=DEVICE, requires_grad=True)
    for view in (fused[..., 8:16], fused.transpose(0, 1)[..., 8:16], fused[:, 1, 4:12], fused[::2, ::2, :8], fused[None, :, :, :8]):
        assert heads_of(view).data_ptr() == view.data_ptr()
        with triton_mode():
            y = rms_norm(view, weight, EPS)
            found = torch.autograd.grad(y.sum(), (fused, weight))
            both = add_rms_norm(view, view * 2, weight, EPS)
            sums = torch.autograd.grad([r.sum() for r in both], (fused, weight))
        torch.testing.assert_close(y, stock(view, weight, 0.0, EPS))
        torch.testing.assert_close(found, torch.autograd.grad(stock(view, weight, 0.0, EPS).sum(), (fused, weight)))
        expected = torch.autograd.grad([r.sum() for r in stock_sum(view, view * 2, weight, 0.0, EPS)], (fused, weight))
        torch.testing.assert_close(sums, expected)
    columns = torch.randn(8, 5, device=DEVICE).t()
    with triton_mode():
        torch.testing.assert_close(rms_norm(columns, weight, EPS), stock(columns, weight, 0.0, EPS))


@runs_triton
@pytest.mark.parametrize("programs, shape", [(1, (33, 8)), (3, (50, 8)), (4, (7, 600))])
def test_few_programs_share_a_trained_weight(programs, shape, monkeypatch):
    """Blocks of rows that do not divide among the programs, the last of which run past the end."""
    monkeypatch.setattr(MODULE, "PROGRAMS", programs)
    assert_as_exact_as_torch(lambda x, w: rms_norm(x, w, EPS), lambda x, w: stock(x, w, 0.0, EPS), leaves(shape, shape[-1:]), torch.float32)


@runs_triton
def test_wide_rows(monkeypatch):
    """Torch makes the weight's gradient beyond WIDEST_TRAINED, and the reference all of it beyond WIDEST."""
    monkeypatch.setattr(MODULE, "WIDEST_TRAINED", 8)
    for dtype in (torch.float32, torch.bfloat16):
        assert_as_exact_as_torch(lambda x, z, w: add_rms_norm(x, z, w, EPS), lambda x, z, w: stock_sum(x, z, w, 0.0, EPS),
                                 leaves((5, 33), (5, 33), 33), dtype)
    x, weight = torch.randn(2, WIDEST + 1, device=DEVICE, requires_grad=True), torch.randn(WIDEST + 1, device=DEVICE)
    with triton_mode():
        found = rms_norm(x, weight, EPS)
        gradient, = torch.autograd.grad(found.sum(), x)
    expected = rms_norm(x, weight, EPS)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), x)[0])


@runs_triton
def test_frozen_weight_gets_no_buffer_and_no_second_pass():
    x, weight = torch.randn(5, 16, device=DEVICE), torch.rand(16, device=DEVICE)
    with triton_mode(), poisoned():
        y, none, rstd = rms_norm_forward(x, None, weight, EPS, 0.0)
        dx, dweight = rms_norm_backward(y, None, x, weight, rstd, 0.0, False)
        trained, wanted = rms_norm_backward(y, None, x, weight, rstd, 0.0, True)
    assert none.numel() == dweight.numel() == 0 and wanted.shape == weight.shape and torch.equal(dx, trained)


@pytest.mark.skipif(MODULE.tl is None, reason="needs Triton")
@pytest.mark.parametrize("residual", [False, True])
def test_one_launch_each_way(residual):
    x, weight = torch.empty(64, 4096, dtype=torch.bfloat16, device="meta"), torch.empty(4096, dtype=torch.bfloat16, device="meta")
    z = x if residual else None
    with recording("sm_90") as launches:
        _, _, rstd = rms_norm_forward(x, z, weight, EPS, 0.0)
        rms_norm_backward(x, z, x, weight, rstd, 0.0, False)
    assert [launch.kernel.__name__ for launch in launches] == ["_rms_norm_kernel", "_rms_norm_backward_kernel"]


@runs_triton
def test_kernels_under_checkpointing():
    x, z, weight = (torch.randn(size, device=DEVICE, requires_grad=True) for size in ((5, 16), (5, 16), 16))
    with triton_mode():
        expected = torch.autograd.grad([r.sum() for r in add_rms_norm(x, z, weight, EPS)], (x, z, weight))
        again = checkpoint(lambda x, z: add_rms_norm(x, z, weight, EPS), x, z, use_reentrant=False)
        assert all(map(torch.equal, torch.autograd.grad([r.sum() for r in again], (x, z, weight)), expected))


@runs_triton
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_kernels_compile_in_one_graph(offset):
    torch._dynamo.reset()
    x, z, weight, dy = (torch.randn(size, device=DEVICE, requires_grad=True) for size in ((4, 8), (4, 8), 8, (4, 8)))

    def both(x, z, weight):
        y, h = add_rms_norm(x, z, weight, EPS, offset=offset)
        return rms_norm(y, weight, EPS, offset=offset) + h

    with triton_mode():
        ours, eager = torch.compile(both, fullgraph=True, backend="aot_eager")(x, z, weight), both(x, z, weight)
        torch.testing.assert_close(ours, eager)
        torch.testing.assert_close(*(torch.autograd.grad(y, (x, z, weight), dy) for y in (ours, eager)))
        for residual in (None, z.detach()):
            _, _, rstd = rms_norm_forward(x, residual, weight, EPS, offset)
            torch.library.opcheck(rms_norm_forward.node, (x.detach(), residual, weight.detach(), EPS, offset))
            for wanted in (False, True):
                arguments = dy.detach(), residual, x.detach(), weight.detach(), rstd.detach(), offset, wanted
                torch.library.opcheck(rms_norm_backward.node, arguments)
