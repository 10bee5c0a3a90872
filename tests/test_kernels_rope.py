"""Rotary embedding against transformers' apply_rotary_pos_emb, a rotation by complex numbers, and gradcheck."""

import pytest
import torch
from torch.autograd import gradcheck
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partial_rotary_pos_emb

from kernels.rope import apply_rope
from tests.kernels import given, settings, st


def inputs(lead=(7,), query_heads=4, key_heads=2, width=8, rotary=8, dtype=torch.float64):
    q, k = (torch.randn(*lead, heads, width).to(dtype).requires_grad_() for heads in (query_heads, key_heads))
    angle = torch.rand(*lead, rotary // 2, dtype=torch.float64) * 6.3
    cos, sin = (torch.cat((half, half), -1).to(dtype) for half in (angle.cos(), angle.sin()))
    return q, k, cos, sin, angle


def stock(q, k, cos, sin, apply=apply_partial_rotary_pos_emb):
    """transformers wants [B, H, T, Dh] and cos [B, T, Dr]."""
    turned = apply(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    return tuple(x[0].transpose(0, 1) for x in turned)


@settings(max_examples=30, deadline=None)
@given(tokens=st.sampled_from([0, 1, 5, 16]), heads=st.sampled_from([(1, 1), (4, 2), (3, 3)]),
       widths=st.sampled_from([(2, 2), (6, 6), (16, 16), (12, 4), (10, 2)]))
def test_matches_transformers(tokens, heads, widths):
    q, k, cos, sin, _ = inputs((tokens,), *heads, *widths)
    ours, theirs = apply_rope(q, k, cos, sin), stock(q, k, cos, sin)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    upstream = [torch.randn_like(x) for x in ours]
    torch.testing.assert_close(*(torch.autograd.grad(turned, (q, k), upstream) for turned in (ours, theirs)),
                               rtol=1e-12, atol=1e-12)


def test_is_a_complex_rotation():
    q, k, cos, sin, angle = inputs()
    turned, _ = apply_rope(q, k, cos, sin)
    z = torch.complex(q[..., :4], q[..., 4:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    torch.testing.assert_close(turned, torch.cat((z.real, z.imag), -1))


def test_backward_undoes_forward():
    q, k, cos, sin, _ = inputs()
    turned = apply_rope(q, k, cos, sin)
    back = torch.autograd.grad(turned, (q, k), [x.detach() for x in turned])
    torch.testing.assert_close(back, (q.detach(), k.detach()))


@pytest.mark.parametrize("rotary", [8, 4])
@pytest.mark.parametrize("lead", [(3,), (2, 3)])
def test_gradcheck(rotary, lead):
    q, k, cos, sin, _ = inputs(lead, 2, 1, 8, rotary)
    assert gradcheck(lambda q, k: apply_rope(q, k, cos, sin), (q, k))


def test_leading_dims_and_shared_angles():
    q, k, cos, sin, _ = inputs((3, 5))
    batched = apply_rope(q, k, cos, sin)
    for i in range(3):
        torch.testing.assert_close(tuple(x[i] for x in batched), apply_rope(q[i], k[i], cos[i], sin[i]))
    shared = apply_rope(q, k, cos[:1], sin[:1])
    torch.testing.assert_close(shared[0][2], apply_rope(q[2], k[2], cos[0], sin[0])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_transformers(dtype):
    q, k, cos, sin, _ = inputs((200,), 4, 2, 32, 32, dtype)
    exact = stock(q.double(), k.double(), cos.double(), sin.double())
    for mine, other, true in zip(apply_rope(q, k, cos, sin), stock(q, k, cos, sin, apply_rotary_pos_emb), exact):
        assert (mine - true).norm() <= 2 * (other - true).norm() + 1e-7 * true.norm()


def test_fp32_angles_beside_bf16_heads():
    q, k, cos, sin, _ = inputs(dtype=torch.bfloat16)
    turned = apply_rope(q, k, cos.float(), sin.float())
    for mine, true in zip(turned, stock(q.double(), k.double(), cos.double(), sin.double())):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.double(), true, rtol=2**-8, atol=1e-6)
    assert torch.autograd.grad([x.sum() for x in turned], (q, k))[0].dtype == torch.bfloat16


def test_saves_only_the_angles():
    q, k, cos, sin, _ = inputs()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        apply_rope(q, k, cos, sin)
    assert {t.data_ptr() for t in saved} == {cos.data_ptr(), sin.data_ptr()}


def test_strided_repeatable_and_inputs_unchanged():
    fused = torch.randn(7, 8, 8, requires_grad=True)
    _, _, cos, sin, _ = inputs(dtype=torch.float32)
    before = [t.detach().clone() for t in (fused, cos, sin)]
    q, k = fused[:, :4], fused[:, 4:6]
    first, second = (apply_rope(q, k, cos, sin) for _ in range(2))
    dense = apply_rope(q.contiguous(), k.contiguous(), cos, sin)
    assert all(map(torch.equal, first, second))
    torch.testing.assert_close(first, dense)
    (gradient,) = torch.autograd.grad([x.sum() for x in first], fused)
    torch.testing.assert_close(gradient[:, :4], torch.autograd.grad(dense[0].sum(), fused)[0][:, :4])
    assert (gradient[:, 6:] == 0).all()
    assert all(torch.equal(t, old) for t, old in zip((fused, cos, sin), before))


@pytest.mark.parametrize("rotary", [8, 4])
def test_compiles_in_one_graph(rotary):
    torch._dynamo.reset()
    q, k, cos, sin, _ = inputs(rotary=rotary, dtype=torch.float32)
    compiled = torch.compile(apply_rope, fullgraph=True, backend="aot_eager")
    ours, theirs = compiled(q, k, cos, sin), apply_rope(q, k, cos, sin)
    torch.testing.assert_close(ours, theirs)
    upstream = [torch.randn_like(x) for x in ours]
    torch.testing.assert_close(*(torch.autograd.grad(turned, (q, k), upstream) for turned in (ours, theirs)))


def test_wrong_shapes_are_named():
    q, k, cos, sin, _ = inputs()
    with pytest.raises(ValueError, match=r"apply_rope: expected q \[..., T, H, Dh\] .*got \(7, 4, 8\) and \(5, 8\)"):
        apply_rope(q, k, cos[:5], sin[:5])
    with pytest.raises(ValueError, match="apply_rope: expected cos and sin of one shape"):
        apply_rope(q, k, cos, sin[..., :4])
    with pytest.raises(ValueError, match="even Dr <= Dh"):
        apply_rope(q, k, cos.repeat(1, 2), sin.repeat(1, 2))
