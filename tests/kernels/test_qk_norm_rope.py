"""qk_norm_rope against the two operations, transformers' modules in fp64, and gradcheck."""

import importlib

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from kernels import _launch
from kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_backward, qk_norm_rope_forward
from kernels.rms_norm import rms_norm
from kernels.rope import apply_rope
from tests.helpers.kernels import DEVICE, DTYPES, assert_as_exact_as_torch, given, runs_triton, settings, st, to, triton_mode

EPS = 1e-3
MODULE = importlib.import_module("kernels.qk_norm_rope")


def inputs(lead=(7,), query_heads=4, key_heads=2, width=8, rotary=8):
    """q, k, their weights, cos and sin in fp64."""
    q, k = (torch.randn(*lead, heads, width, dtype=torch.float64).requires_grad_() for heads in (query_heads, key_heads))
    weights = [torch.randn(width, dtype=torch.float64).requires_grad_() for _ in range(2)]
    angle = torch.rand(*lead, rotary // 2, dtype=torch.float64) * 6.3
    return [q, k, *weights, *(torch.cat((half, half), -1) for half in (angle.cos(), angle.sin()))]


def separate(q, k, q_weight, k_weight, cos, sin, offset=0.0):
    return apply_rope(rms_norm(q, q_weight, EPS, offset=offset), rms_norm(k, k_weight, EPS, offset=offset), cos, sin)


def stock(q, k, q_weight, k_weight, cos, sin, offset=0.0):
    """Op by op as Qwen3 has it, or Gemma 3 where there is an offset."""
    exact, rotary = torch.promote_types(q.dtype, torch.float32), cos.shape[-1]

    def one(x, weight):
        normed = x.to(exact) * torch.rsqrt(x.to(exact).pow(2).mean(-1, keepdim=True) + EPS)
        normed = (normed * (weight.to(exact) + offset)).to(x.dtype) if offset else weight * normed.to(x.dtype)
        turning, rest = normed.split((rotary, x.shape[-1] - rotary), -1)
        a, b = turning.chunk(2, -1)
        return torch.cat((turning * cos.unsqueeze(-2) + torch.cat((-b, a), -1) * sin.unsqueeze(-2), rest), -1)

    return one(q, q_weight), one(k, k_weight)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("lead, rotary", [((3,), 6), ((2, 3), 6), ((3,), 2)])
def test_gradcheck(lead, rotary, offset):
    q, k, q_weight, k_weight, cos, sin = inputs(lead, 2, 1, 6, rotary)
    assert gradcheck(lambda *leaves: qk_norm_rope(*leaves, cos, sin, EPS, offset=offset), (q, k, q_weight, k_weight))
    frozen = q_weight.detach(), k_weight.detach()
    assert gradcheck(lambda q, k: qk_norm_rope(q, k, *frozen, cos, sin, EPS, offset=offset), (q, k))


@settings(max_examples=30, deadline=None)
@given(tokens=st.sampled_from([0, 1, 5, 16]), heads=st.sampled_from([(1, 1), (4, 2), (3, 3)]),
       widths=st.sampled_from([(2, 2), (6, 6), (16, 16), (12, 4), (10, 2)]), offset=st.sampled_from([0.0, 1.0]))
def test_matches_the_formula(tokens, heads, widths, offset):
    q, k, q_weight, k_weight, cos, sin = inputs((tokens,), *heads, *widths)
    leaves = q, k, q_weight, k_weight
    ours = qk_norm_rope(*leaves, cos, sin, EPS, offset=offset)
    theirs = stock(*leaves, cos, sin, offset)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    upstream = [torch.randn_like(x) for x in ours]
    torch.testing.assert_close(*(torch.autograd.grad(y, leaves, upstream) for y in (ours, theirs)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("module, offset", [(Qwen3RMSNorm, 0.0), (Gemma3RMSNorm, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_bit_for_bit_the_two_operations_and_as_exact_as_transformers(module, offset, dtype):
    q, k, q_weight, k_weight, cos, sin = rounded = to(inputs((60,), 4, 2, 32, 32), dtype, "cpu")
    ours = qk_norm_rope(*rounded, EPS, offset=offset)
    assert all(map(torch.equal, ours, separate(*rounded, offset)))
    upstream = [torch.randn_like(x) for x in ours]
    leaves = q, k, q_weight, k_weight
    gradients = [torch.autograd.grad(y, leaves, upstream) for y in (ours, separate(*rounded, offset))]
    assert all(map(torch.equal, *gradients))
    norms = [module(32, EPS).to(dtype) for _ in range(2)]
    for norm, weight in zip(norms, (q_weight, k_weight)):
        norm.weight.data.copy_(weight)
    theirs = apply_rotary_pos_emb(*(norm(x).transpose(0, 1)[None] for norm, x in zip(norms, (q, k))), cos[None], sin[None])
    for mine, other, true in zip(ours, theirs, stock(*(t.double() for t in rounded), offset)):
        other = other[0].transpose(0, 1)
        assert (mine - true).norm() <= 2 * (other - true).norm() + 1e-7 * true.norm()


def test_saves_q_and_k_themselves_and_one_number_a_head():
    q, k, q_weight, k_weight, cos, sin = leaves = inputs()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        qk_norm_rope(*leaves, EPS)
    given_in = {t.data_ptr() for t in leaves}
    assert {t.data_ptr() for t in saved} >= given_in
    assert sorted(t.numel() for t in saved if t.data_ptr() not in given_in) == [7 * 2, 7 * 4]


def test_weights_get_gradients_only_where_they_are_trained():
    q, k, q_weight, k_weight, cos, sin = inputs()
    full = torch.autograd.grad([y.square().sum() for y in qk_norm_rope(q, k, q_weight, k_weight, cos, sin, EPS)], (q, k, k_weight))
    half = qk_norm_rope(q, k, q_weight.detach(), k_weight, cos, sin, EPS)
    assert all(map(torch.equal, torch.autograd.grad([y.square().sum() for y in half], (q, k, k_weight)), full))


def test_strided_repeatable_and_inputs_unchanged():
    fused = torch.randn(7, 8, 8, requires_grad=True)
    q_weight, k_weight, cos, sin = to(inputs()[2:], torch.float32, "cpu")
    before = [t.detach().clone() for t in (fused, q_weight, cos, sin)]
    q, k = fused[:, :4], fused[:, 4:6]
    first, second = (qk_norm_rope(q, k, q_weight, k_weight, cos, sin, EPS) for _ in range(2))
    assert all(map(torch.equal, first, second))
    (gradient,) = torch.autograd.grad([x.sum() for x in first], fused)
    dense = separate(q.contiguous(), k.contiguous(), q_weight, k_weight, cos, sin)
    torch.testing.assert_close(first, dense)
    torch.testing.assert_close(gradient, torch.autograd.grad([x.sum() for x in dense], fused)[0])
    assert (gradient[:, 6:] == 0).all()
    assert all(torch.equal(t, old) for t, old in zip((fused, q_weight, cos, sin), before))


def test_compiles_in_one_graph():
    torch._dynamo.reset()
    *leaves, cos, sin = to(inputs(), torch.float32, "cpu")
    compiled = torch.compile(lambda *leaves: qk_norm_rope(*leaves, cos, sin, EPS), fullgraph=True, backend="aot_eager")
    ours, theirs = compiled(*leaves), qk_norm_rope(*leaves, cos, sin, EPS)
    torch.testing.assert_close(ours, theirs)
    upstream = [torch.randn_like(x) for x in ours]
    torch.testing.assert_close(*(torch.autograd.grad(y, leaves, upstream) for y in (ours, theirs)))


def test_results_are_dense_as_the_compiler_is_told():
    """Also those of permuted heads."""
    q, k, q_weight, k_weight, cos, sin = (t.detach().float() for t in inputs())
    q, k = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k))
    results = qk_norm_rope_forward(q, k, q_weight, k_weight, cos, sin, EPS, 0.0)
    arguments = q, k, q, k, q_weight, k_weight, *results[2:], cos, sin, 0.0, True
    assert all(x.is_contiguous() for x in (*results, *qk_norm_rope_backward(*arguments)))
    torch.library.opcheck(qk_norm_rope_forward.node, (q, k, q_weight, k_weight, cos, sin, EPS, 0.0))
    torch.library.opcheck(qk_norm_rope_backward.node, arguments)


def test_mistakes_are_named():
    q, k, q_weight, k_weight, cos, sin = inputs()
    with pytest.raises(ValueError, match=r"qk_norm_rope: expected q \[..., T, H, Dh\] .*got \(7, 4, 8\) and \(5, 8\)"):
        qk_norm_rope(q, k, q_weight, k_weight, cos[:5], sin[:5], EPS)
    with pytest.raises(ValueError, match=r"qk_norm_rope: expected floating q_weight of shape \(8,\) on cpu, got .* \(32,\) on cpu"):
        qk_norm_rope(q, k, torch.ones(32), k_weight, cos, sin, EPS)
    with pytest.raises(ValueError, match=r"qk_norm_rope: expected floating k_weight of shape \(8,\) on cpu, got .* on meta"):
        qk_norm_rope(q, k, q_weight, k_weight.to("meta"), cos, sin, EPS)
    with pytest.raises(ValueError, match="qk_norm_rope: expected q and k to differ in their number of heads only"):
        qk_norm_rope(q, k[None], q_weight, k_weight, cos, sin, EPS)


# ---------------------------------------------------------------- Triton


@runs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, heads, width, rotary", [
    (0, (2, 1), 4, 4), (1, (1, 1), 2, 2), (7, (4, 2), 16, 16), (33, (3, 1), 12, 8), (5, (7, 7), 10, 2), (9, (2, 1), 130, 66),
    (3, (2, 1), 256, 256), (2, (1, 2), 260, 64),
])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_kernels_are_as_exact_as_torch(offset, tokens, heads, width, rotary, dtype):
    assert_as_exact_as_torch(lambda *leaves: qk_norm_rope(*leaves, EPS, offset=offset), lambda *leaves: stock(*leaves, offset),
                             inputs((tokens,), *heads, width, rotary), dtype)


@runs_triton
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_kernels_round_where_the_reference_rounds(offset):
    """Unturned (θ = 0), the results are the norm's, whose bits tell where it was rounded."""
    q, k, q_weight, k_weight, cos, sin = to(inputs((40,), 4, 2, 64, 64), torch.bfloat16)
    arguments = q, k, q_weight, k_weight, torch.ones_like(cos), torch.zeros_like(sin), EPS
    with triton_mode():
        ours = qk_norm_rope(*arguments, offset=offset)
    for mine, other in zip(ours, qk_norm_rope(*arguments, offset=offset)):
        assert (mine != other).float().mean() < 1e-3


@runs_triton
@pytest.mark.parametrize("programs", [1, 3, 5])
def test_few_programs_share_trained_weights(programs, monkeypatch):
    monkeypatch.setattr(MODULE, "PROGRAMS", programs)
    assert_as_exact_as_torch(lambda *leaves: qk_norm_rope(*leaves, EPS), stock, inputs((23,), 6, 2, 34, 18), torch.float32)


@runs_triton
def test_kernels_take_leading_dims_shared_angles_and_views():
    q, k, q_weight, k_weight, cos, sin = inputs((3, 5))
    for angles in ((cos[:1], sin[:1]), (cos[1], sin[1]), (cos, torch.cat((sin, sin), -1)[..., :8]), (cos.mT.contiguous().mT, sin)):
        assert_as_exact_as_torch(lambda *leaves: qk_norm_rope(*leaves, EPS), stock, [q, k, q_weight, k_weight, *angles], torch.float32)
    fused = torch.randn(7, 8, 8, device=DEVICE).requires_grad_()
    weights_and_angles = to(inputs()[2:], torch.float32)
    for q, k in ((fused[:, :4], fused[:, 4:6]), (fused.transpose(0, 1)[:7, :3], fused.transpose(0, 1)[:7, 3:])):
        with triton_mode():
            ours = qk_norm_rope(q, k, *weights_and_angles, EPS)
            gradient, = torch.autograd.grad([x.sum() for x in ours], fused)
        theirs = stock(q, k, *weights_and_angles)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(gradient, torch.autograd.grad([x.sum() for x in theirs], fused)[0])


@runs_triton
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_kernels_take_fp32_weights_and_angles_beside_bf16(offset):
    def widened(op):
        def call(q, k, *others):
            results = op(q, k, *(t if t.dtype == torch.float64 else t.float() for t in others))
            assert {x.dtype for x in results} <= {torch.float64, torch.bfloat16 if offset else torch.float32}
            return [x.to(q.dtype) for x in results]
        return call

    assert_as_exact_as_torch(widened(lambda *leaves: qk_norm_rope(*leaves, EPS, offset=offset)), widened(
        lambda q, k, qw, kw, cos, sin: stock(q, k, qw, kw, *((cos.to(q.dtype), sin.to(q.dtype)) if offset else (cos, sin)), offset)),
        inputs(), torch.bfloat16)


@pytest.mark.skipif(_launch.triton is None, reason="needs Triton")
def test_one_launch_each_way():
    q, k = (torch.empty(64, heads, 128, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
    cos, weight = torch.empty(64, 128, dtype=torch.bfloat16, device="meta"), torch.empty(128, dtype=torch.bfloat16, device="meta")
    with _launch.recording("sm_90") as launches:
        _, _, *rstd = qk_norm_rope_forward(q, k, weight, weight, cos, cos, EPS, 0.0)
        *_, dqw, dkw = qk_norm_rope_backward(q, k, q, k, weight, weight, *rstd, cos, cos, 0.0, False)
    assert len(launches) == 2 and dqw.numel() == dkw.numel() == 0


@runs_triton
def test_kernels_under_checkpointing():
    *leaves, cos, sin = to(inputs(), torch.float32)
    with triton_mode():
        expected = torch.autograd.grad([x.square().sum() for x in qk_norm_rope(*leaves, cos, sin, EPS)], leaves)
        again = checkpoint(lambda *leaves: qk_norm_rope(*leaves, cos, sin, EPS), *leaves, use_reentrant=False)
        assert all(map(torch.equal, torch.autograd.grad([x.square().sum() for x in again], leaves), expected))


@runs_triton
def test_kernels_compile_in_one_graph():
    torch._dynamo.reset()
    *leaves, cos, sin = to(inputs(rotary=4), torch.float32)
    with triton_mode():
        ours = torch.compile(lambda *leaves: qk_norm_rope(*leaves, cos, sin, EPS), fullgraph=True, backend="aot_eager")(*leaves)
        theirs = qk_norm_rope(*leaves, cos, sin, EPS)
        torch.testing.assert_close(ours, theirs)
        upstream = [torch.randn_like(x) for x in ours]
        torch.testing.assert_close(*(torch.autograd.grad(y, leaves, upstream) for y in (ours, theirs)))
        q, k, q_weight, k_weight = (t.detach() for t in leaves)
        torch.library.opcheck(qk_norm_rope_forward.node, (q, k, q_weight, k_weight, cos, sin, EPS, 0.0))
        _, _, *rstd = qk_norm_rope_forward(q, k, q_weight, k_weight, cos, sin, EPS, 0.0)
        for wanted in (False, True):
            torch.library.opcheck(qk_norm_rope_backward.node, (q, k, q, k, q_weight, k_weight, *rstd, cos, sin, 0.0, wanted))
