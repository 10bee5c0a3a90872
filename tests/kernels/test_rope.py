"""Rotary embedding against transformers, a rotation by complex numbers, and gradcheck."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partial_rotary_pos_emb

from kernels import _launch
from kernels.rope import apply_rope, rope
from tests.helpers.kernels import DEVICE, DTYPES, assert_as_exact_as_torch, given, runs_triton, settings, st, to, triton_mode


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


def test_results_are_dense_as_the_compiler_is_told():
    """Also those of permuted heads, such as attention's gradients."""
    q, k, cos, sin, _ = inputs(dtype=torch.float32)
    q, k = (x.detach().transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k))
    for inverse in (False, True):
        assert all(x.is_contiguous() for x in rope(q, k, cos, sin, None, inverse))
        torch.library.opcheck(rope.node, (q, k, cos, sin, None, inverse))


def test_positions_choose_rows_of_a_cache():
    """Samples of 3 and 4 tokens in one pack, each with positions from 0; the cache has more rows than are used."""
    q, k, cos, sin, _ = inputs()
    positions = torch.tensor([0, 1, 2, 0, 1, 2, 3])
    for index in (positions, positions.int()):
        ours, theirs = apply_rope(q, k, cos, sin, index), apply_rope(q, k, cos[positions], sin[positions])
        assert all(map(torch.equal, ours, theirs))
        upstream = [torch.randn_like(x) for x in ours]
        assert all(map(torch.equal, *(torch.autograd.grad(turned, (q, k), upstream) for turned in (ours, theirs))))
    none = torch.zeros(0, dtype=torch.long)
    assert apply_rope(q[:0], k[:0], cos, sin, none)[0].shape == (0, 4, 8)


def test_mistakes_are_named():
    q, k, cos, sin, _ = inputs()
    with pytest.raises(ValueError, match=r"apply_rope: expected q \[..., T, H, Dh\] .*got \(7, 4, 8\) and \(5, 8\)"):
        apply_rope(q, k, cos[:5], sin[:5])
    with pytest.raises(ValueError, match="apply_rope: expected cos and sin of one shape"):
        apply_rope(q, k, cos, sin[..., :4])
    with pytest.raises(ValueError, match="even Dr <= Dh"):
        apply_rope(q, k, cos.repeat(1, 2), sin.repeat(1, 2))
    with pytest.raises(ValueError, match="expected q and k to differ in their number of heads only"):
        apply_rope(q[None], k, cos, sin)
    with pytest.raises(ValueError, match="expected floating q, k, cos and sin on one device, got .*float64 on cpu, .* on meta"):
        apply_rope(q, k.to("meta"), cos, sin)
    with pytest.raises(ValueError, match="expected floating q, k, cos and sin on one device, got .*int64 on cpu"):
        apply_rope(q, k, cos.long(), sin)


def test_mistaken_positions_are_named():
    q, k, cos, sin, _ = inputs()
    positions = torch.arange(7)
    with pytest.raises(ValueError, match=r"apply_rope: expected position_ids in \[0, 5\), the rows of cos, got 0 to 6"):
        apply_rope(q, k, cos[:5], sin[:5], positions)
    with pytest.raises(ValueError, match="got -1 to 5"):
        apply_rope(q, k, cos, sin, positions - 1)
    with pytest.raises(ValueError, match=r"expected int position_ids \[T\] on cpu .* got torch.float32 on cpu"):
        apply_rope(q, k, cos, sin, positions.float())
    with pytest.raises(ValueError, match=r"expected int position_ids \[T\] on cpu .* got torch.int64 on meta"):
        apply_rope(q, k, cos, sin, positions.to("meta"))
    with pytest.raises(ValueError, match=r"expected q \[..., T, H, Dh\]"):
        apply_rope(q, k, cos, sin, positions[:5])


# ---------------------------------------------------------------- Triton


def stock_heads(q, k, cos, sin):
    """Return the rotation for [..., T, H, Dh], op by op as in transformers."""
    rotary = cos.shape[-1]

    def one(x):
        turning, rest = x.split((rotary, x.shape[-1] - rotary), -1)
        a, b = turning.chunk(2, -1)
        return torch.cat((turning * cos.unsqueeze(-2) + torch.cat((-b, a), -1) * sin.unsqueeze(-2), rest), -1)

    return one(q), one(k)


@runs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, heads, width, rotary", [
    (0, (2, 1), 4, 4), (1, (1, 1), 2, 2), (7, (4, 2), 16, 16), (33, (3, 1), 12, 8), (5, (7, 7), 10, 2), (9, (2, 1), 130, 66),
    (3, (2, 1), 256, 256), (2, (1, 2), 260, 64),
])
def test_kernels_are_as_exact_as_torch(tokens, heads, width, rotary, dtype):
    assert_as_exact_as_torch(apply_rope, stock_heads, list(inputs((tokens,), *heads, width, rotary)[:4]), dtype)


@runs_triton
def test_kernels_take_leading_dims_shared_angles_and_huge_heads():
    q, k, cos, sin, _ = inputs((3, 5))
    q.data[0, 0] *= 1e30
    apart = torch.cat((sin, sin), -1)[..., :8]  # rows further apart than those of cos
    for angles in ((cos, sin), (cos[:1], sin[:1]), (cos[1], sin[1]), (cos, apart), (cos.mT.contiguous().mT, sin)):
        assert_as_exact_as_torch(apply_rope, stock_heads, [q, k, *angles], torch.float32)


@runs_triton
@pytest.mark.parametrize("rotary", [8, 4])
def test_kernels_take_views_and_fp32_angles_beside_bf16(rotary):
    """Heads of one fused projection, of a transposed batch, and the expanded upstream that a sum makes."""
    fused = torch.randn(7, 8, 8, device=DEVICE).bfloat16().requires_grad_()
    _, _, cos, sin, _ = to(inputs(rotary=rotary), torch.float32)
    for q, k in ((fused[:, :4], fused[:, 4:6]), (fused.transpose(0, 1)[:7, :3], fused.transpose(0, 1)[:7, 3:]),
                 (fused.transpose(1, 2)[..., :4, :], fused.transpose(1, 2)[..., 4:, :])):
        with triton_mode():
            ours = apply_rope(q, k, cos, sin)
            gradient, = torch.autograd.grad([x.sum() for x in ours], fused)
        theirs = apply_rope(q, k, cos, sin)
        assert [x.dtype for x in ours] == [torch.bfloat16] * 2
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(gradient, torch.autograd.grad([x.sum() for x in theirs], fused)[0])


@runs_triton
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_kernels_take_positions(dtype):
    q, k, cos, sin, _ = to(inputs(), torch.float32)
    positions = torch.tensor([0, 1, 2, 0, 1, 6, 3], dtype=dtype, device=DEVICE)
    with triton_mode():
        ours = apply_rope(q, k, cos, sin, positions)
        found = torch.autograd.grad([x.square().sum() for x in ours], (q, k))
    theirs = stock_heads(q, k, cos[positions.long()], sin[positions.long()])
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(found, torch.autograd.grad([x.square().sum() for x in theirs], (q, k)))


@runs_triton
def test_kernels_refuse_or_mark_positions_that_are_not_there():
    q, k, cos, sin, _ = to(inputs(), torch.float32)
    positions = torch.tensor([0, 1, 7, 0, 1, -1, 3], device=DEVICE)
    with triton_mode():
        if DEVICE.type == "cpu":
            with pytest.raises(ValueError, match="got -1 to 7"):
                apply_rope(q, k, cos, sin, positions)
        else:
            for x in apply_rope(q, k, cos, sin, positions):
                assert torch.equal(x.isnan().all(-1).all(-1), (positions < 0) | (positions > 6))


@pytest.mark.skipif(_launch.triton is None, reason="needs Triton")
def test_one_launch_each_way():
    q, k = (torch.empty(64, heads, 128, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
    cos = torch.empty(64, 128, dtype=torch.bfloat16, device="meta")
    for inverse in (False, True):
        with _launch.recording("sm_90") as launches:
            rope(q, k, cos, cos, None, inverse)
        assert len(launches) == 1


@runs_triton
def test_kernels_under_checkpointing():
    q, k, cos, sin, _ = to(inputs(), torch.float32)
    with triton_mode():
        expected = torch.autograd.grad([x.square().sum() for x in apply_rope(q, k, cos, sin)], (q, k))
        again = checkpoint(apply_rope, q, k, cos, sin, use_reentrant=False)
        assert all(map(torch.equal, torch.autograd.grad([x.square().sum() for x in again], (q, k)), expected))


@runs_triton
@pytest.mark.parametrize("cached", [False, True])
def test_kernels_compile_in_one_graph(cached):
    torch._dynamo.reset()
    q, k, cos, sin, _ = to(inputs(rotary=4), torch.float32)
    positions = torch.arange(7, device=DEVICE).flip(0) if cached else None
    with triton_mode():
        ours = torch.compile(apply_rope, fullgraph=True, backend="aot_eager")(q, k, cos, sin, positions)
        theirs = apply_rope(q, k, cos, sin, positions)
        torch.testing.assert_close(ours, theirs)
        upstream = [torch.randn_like(x) for x in ours]
        torch.testing.assert_close(*(torch.autograd.grad(turned, (q, k), upstream) for turned in (ours, theirs)))
        for inverse in (False, True):
            torch.library.opcheck(rope.node, (q.detach(), k.detach(), cos, sin, positions, inverse))
