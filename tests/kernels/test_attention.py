"""packed_attention against eager attention, one document at a time, in fp64."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kernels._dropout import dropout_mask, kept_fraction
from kernels.attention import attention_tiles, attention_tiles_backward, packed_attention
from tests.helpers.attention_cases import DOUBLE, assert_same, eager, pack, sdpa, with_sinks
from tests.helpers.kernels import given, settings, st

MODULE = sys.modules["kernels.attention"]


@pytest.fixture(params=["kept", "recomputed"])
def probabilities(request, monkeypatch):
    """Run both backward paths: with probabilities saved by the forward, and recomputed."""
    monkeypatch.setattr(MODULE, "KEEP", 10**9 if request.param == "kept" else 0)
    return request.param


OPTIONS = [
    {}, {"scale": 0.3}, {"window": 3}, {"window": 1}, {"softcap": 2.0}, {"window": 2, "softcap": 1.5, "scale": 0.7}, {"chunk": 2},
    {"sinks": ...}, {"sinks": ..., "chunk": 3, "window": 2, "softcap": 1.5, "scale": 0.7}]
DROPPING = [{"dropout": 0.3}, {"dropout": 0.3, "window": 3, "softcap": 2.0}, {"dropout": 0.3, "sinks": ..., "chunk": 3, "softcap": 2.0}]


@pytest.mark.parametrize("options", [*OPTIONS, *DROPPING])
def test_gradcheck(options, probabilities, monkeypatch):
    monkeypatch.setattr(MODULE, "BLOCK", 2)
    monkeypatch.setattr(MODULE, "row_multiple", lambda dtype, device: 4)
    q, k, v, *rest = pack([3, 1, 4], (4, 2), dim=2)
    options, sinks = with_sinks(options, 4)

    def op(*_):
        torch.manual_seed(1)
        return packed_attention(q, k, v, *rest, **options)

    assert torch.autograd.gradcheck(op, [q, k, v, *sinks])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [300], [127, 1, 128, 129, 13], [2, 257]])
def test_equals_eager_document_by_document(options, heads, lengths, probabilities):
    q, k, v, *rest = pack(lengths, heads)
    if max(lengths) > 128:
        wider = {"window": 150, "chunk": 200}  # than a tile, narrower than a document
        options = {name: wider.get(name, value) if value == 3 else value for name, value in options.items()}
    options, sinks = with_sinks(options, heads[0])
    assert_same(packed_attention(q, k, v, *rest, **options), eager(q, k, v, *rest, **options), [q, k, v, *sinks])


@pytest.mark.slow
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8), groups=st.sampled_from([1, 2, 3]),
    kv_heads=st.sampled_from([1, 2]), dim=st.sampled_from([1, 3, 8]), window=st.sampled_from([None, 1, 2, 5, 16, 39, 50]),
    chunk=st.sampled_from([None, 1, 2, 3, 7, 16, 31, 50]), sinks=st.sampled_from([{}, {"sinks": ...}]),
    softcap=st.sampled_from([None, 3.0]), block=st.sampled_from([1, 7, 16, 128]),
    keep=st.sampled_from([0, 2, 10**9]), multiple=st.sampled_from([1, 3, 16]),
)
@settings(max_examples=80, deadline=None)
def test_any_packing_equals_eager(lengths, groups, kv_heads, dim, window, chunk, sinks, softcap, block, keep, multiple):
    q, k, v, *rest = pack(lengths, (kv_heads * groups, kv_heads), dim)
    options, sinks = with_sinks({"window": window, "chunk": chunk, "softcap": softcap, **sinks}, kv_heads * groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "BLOCK", block)
        patch.setattr(MODULE, "KEEP", keep)
        patch.setattr(MODULE, "row_multiple", lambda dtype, device: multiple)
        assert_same(packed_attention(q, k, v, *rest, **options), eager(q, k, v, *rest, **options), [q, k, v, *sinks])


def test_packed_equals_separate():
    q, k, v, cu_seqlens, longest = pack([5, 131, 1, 64, 17], (4, 2), 16)
    upstream = torch.randn_like(q)
    together = packed_attention(q, k, v, cu_seqlens, longest)
    grads = torch.autograd.grad(together, (q, k, v), upstream)
    for begin, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]):
        inputs = [t[begin:end].detach().requires_grad_() for t in (q, k, v)]
        one = packed_attention(*inputs, torch.tensor([0, end - begin], dtype=torch.int32), end - begin)
        torch.testing.assert_close(one, together[begin:end], rtol=1e-12, atol=1e-12)
        for mine, other in zip(torch.autograd.grad(one, inputs, upstream[begin:end]), grads, strict=True):
            torch.testing.assert_close(mine, other[begin:end], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("tokens", [1, 2, 7, 31, 32, 33])
def test_sinks_are_those_of_gpt_oss(tokens, window, probabilities):
    masks = pytest.importorskip("transformers.masking_utils")
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    q, k, v, *rest = pack([tokens], (4, 2))
    options, (sinks,) = with_sinks({"sinks": ..., "window": window}, 4)
    visible = masks.sdpa_mask(batch_size=1, q_length=tokens, kv_length=tokens, allow_is_causal_skip=False,
                              mask_function=masks.sliding_window_causal_mask_function(window or tokens))
    mask = torch.zeros(tokens, tokens, dtype=DOUBLE).masked_fill(~visible, -math.inf)
    module = SimpleNamespace(sinks=sinks, num_key_value_groups=2, training=False)
    theirs = gpt_oss.eager_attention_forward(module, *(t.transpose(0, 1)[None] for t in (q, k, v)), mask, scaling=0.5)[0][0]
    assert_same(packed_attention(q, k, v, *rest, **options), theirs, [q, k, v, sinks])


@pytest.mark.parametrize("chunk", [1, 2, 5, 16, 17, 40])
@pytest.mark.parametrize("tokens", [1, 2, 7, 31, 32, 33])
def test_chunks_are_those_of_llama_4(tokens, chunk, probabilities):
    masks, llama4 = (pytest.importorskip(f"transformers.{name}") for name in ("masking_utils", "models.llama4.modeling_llama4"))
    q, k, v, *rest = pack([tokens], (4, 2))
    config = llama4.Llama4TextConfig(attention_chunk_size=chunk, attn_implementation="eager")
    mask = masks.create_chunked_causal_mask(config, torch.zeros(1, tokens, 1, dtype=DOUBLE), None, None, torch.arange(tokens)[None])
    module = SimpleNamespace(num_key_value_groups=2, training=False)
    theirs = llama4.eager_attention_forward(module, *(t.transpose(0, 1)[None] for t in (q, k, v)), mask, scaling=0.5)[0][0]
    assert_same(packed_attention(q, k, v, *rest, chunk=chunk), theirs, [q, k, v])


@pytest.mark.parametrize(("sink", "share"), [(-1e4, 1.0), (1e4, 0.0)])
def test_a_sink_takes_nothing_or_all(sink, share, probabilities):
    q, k, v, *rest = pack([5, 140], (2, 1), dtype=torch.float32)
    sinks = torch.full((2,), sink, requires_grad=True)
    y = packed_attention(q, k, v, *rest, sinks=sinks)
    torch.testing.assert_close(y, share * packed_attention(q, k, v, *rest), rtol=1e-6, atol=0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), (q, k, v, sinks)))


def product_shapes(lengths):
    """Return the shapes of all batched matmuls, forward and backward, of a bf16 pack."""
    q, k, v, *rest = pack(lengths, (4, 2), 16, torch.bfloat16)
    found = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.bmm.default and args[0].dtype == torch.bfloat16:
                found.add((*args[0].shape, args[1].shape[2]))
            return func(*args, **(kwargs or {}))

    with Products():
        packed_attention(q, k, v, *rest).sum().backward()
    return found


def test_16_bit_products_have_few_shapes():
    """oneDNN compiles a matmul for each new shape."""
    assert product_shapes(list(range(33, 49))) == product_shapes([48])
    assert len(product_shapes([48])) == 3


def test_rows_beyond_a_tile_change_nothing_in_bf16(probabilities):
    """Rows beyond a document's last tile are padding, not the next document, which may hold infinities."""
    q, k, v, cu_seqlens, longest = pack([37, 20], (4, 2), 16, torch.bfloat16, grad=False)
    others = [t.clone() for t in (q, k, v)]
    for t in others:
        t[37:] = math.inf
    outs = []
    for tensors in ((q, k, v), others):
        for t in tensors:
            t.requires_grad_()
        out = packed_attention(*tensors, cu_seqlens, longest)
        outs.append((out[:37], *(g[:37] for g in torch.autograd.grad(out[:37].sum(), tensors))))
    for mine, other in zip(*outs, strict=True):
        assert torch.equal(mine, other)


def test_later_tokens_do_not_matter():
    q, k, v, *rest = pack([9, 7], grad=False)
    before = packed_attention(q, k, v, *rest)
    for t in (q, k, v):
        t[4:9] = torch.randn_like(t[4:9])
    after = packed_attention(q, k, v, *rest)
    assert torch.equal(before[:4], after[:4]) and torch.equal(before[9:], after[9:])
    assert not torch.equal(before[4:9], after[4:9])


def test_dropout_masks_probabilities(probabilities):
    q, k, v, *rest = pack([7], (2, 1))
    torch.manual_seed(3)
    seed = int(torch.randint(2**62, ()))
    # one tile, whose rows are (token, query head of the group)
    mask = dropout_mask(torch.Size((1, 14, 7)), 0.4, DOUBLE, torch.Generator().manual_seed(seed)) / kept_fraction(0.4)
    torch.manual_seed(3)
    ours = packed_attention(q, k, v, *rest, dropout=0.4)
    assert_same(ours, eager(q, k, v, *rest, mask=mask.view(7, 2, 7).transpose(0, 1)), [q, k, v])


def test_checkpoint_replays_dropout(probabilities):
    q, k, v, *rest = pack([70, 150])
    runs = []
    for call in (packed_attention, lambda *a, **o: checkpoint(packed_attention, *a, use_reentrant=False, **o)):
        torch.manual_seed(5)
        y = call(q, k, v, *rest, dropout=0.3)
        torch.randn(3)
        runs.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_views_of_a_fused_projection_and_shared_inputs(probabilities):
    fused = torch.randn(12, 3, 2, 4, dtype=DOUBLE, requires_grad=True)
    _, _, _, *rest = pack([5, 7])
    ours, theirs = (op(*fused.unbind(1), *rest) for op in (packed_attention, eager))
    assert_same(ours, theirs, [fused])
    x = torch.randn(12, 2, 4, dtype=DOUBLE, requires_grad=True)
    assert_same(packed_attention(x, x, x, *rest), eager(x, x, x, *rest), [x])
    backwards = x.transpose(0, 1).flip(2).transpose(0, 1)
    assert_same(packed_attention(backwards, x, x, *rest), eager(backwards, x, x, *rest), [x])
    both = torch.randn(2, 2, dtype=DOUBLE, requires_grad=True)
    ours, theirs = (op(x, x, x, *rest, sinks=both[:, 1], chunk=3) for op in (packed_attention, eager))
    assert_same(ours, theirs, [x, both])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"sinks": ..., "chunk": 40}])
@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (4, 4)])
def test_repeatable_and_inputs_unchanged(heads, options, dtype, probabilities):
    q, k, v, *rest = pack([30, 150, 1], heads, 8, dtype)
    options, sinks = with_sinks(options, heads[0], dtype)
    inputs, upstream = [q, k, v, *sinks], torch.randn_like(q)
    before = [t.detach().clone() for t in (*inputs, upstream)]
    runs = []
    for _ in range(2):
        torch.manual_seed(2)
        y = packed_attention(q, k, v, *rest, dropout=0.1, **options)
        runs.append((y, *torch.autograd.grad(y, inputs, upstream)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (*inputs, upstream), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_with_sinks_beside_eager(dtype, probabilities):
    q, k, v, *rest = pack([60, 197, 3, 131], (4, 2), 32, dtype)
    _, (sinks,) = with_sinks({"sinks": ...}, 4, dtype)
    upstream = torch.randn(q.shape).to(dtype)

    def run(op, cast):
        leaves = [t.detach().to(cast).requires_grad_() for t in (q, k, v, sinks)]
        y = op(*leaves[:3], *rest, sinks=leaves[3], chunk=90)
        return [t.detach().double() for t in (y, *torch.autograd.grad(y, leaves, upstream.to(cast)))]

    exact, stock, ours = run(eager, DOUBLE), run(eager, dtype), run(packed_attention, dtype)
    for mine, other, truth in zip(ours, stock, exact, strict=True):
        assert (mine - truth).norm() <= 2 * (other - truth).norm() + 1e-6 * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 2.5])
def test_error_beside_sdpa(dtype, size, probabilities):
    q, k, v, *rest = pack([60, 197, 3, 131], (4, 2), 32, dtype)
    q = (q.detach() * size).requires_grad_()
    upstream = torch.randn(q.shape).to(dtype)

    def run(op, cast):
        leaves = [t.detach().to(cast).requires_grad_() for t in (q, k, v)]
        y = op(*leaves, *rest)
        return [t.detach().double() for t in (y, *torch.autograd.grad(y, leaves, upstream.to(cast)))]

    exact, stock, ours = run(eager, DOUBLE), run(sdpa, dtype), run(packed_attention, dtype)
    for mine, other, truth in zip(ours, stock, exact, strict=True):
        assert (mine - truth).norm() <= 2 * (other - truth).norm() + 1e-6 * truth.norm()


def test_large_scores_stay_finite():
    q, k, v, *rest = pack([140], dtype=torch.float32)
    y = packed_attention(q * 1e4, k * 1e4, v, *rest)
    assert y.isfinite().all() and all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), (q, k, v)))


def test_autocast_matches_bf16_inputs():
    q, k, v, *rest = pack([30, 11], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = packed_attention(q, k, v, *rest)
        grads = torch.autograd.grad(inside.float().square().sum(), (q, k, v))
    outside = packed_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), *rest)
    assert inside.dtype == torch.bfloat16 and torch.equal(inside, outside)
    expected = torch.autograd.grad(outside.float().square().sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_memory_is_linear_in_a_long_document():
    q, k, v, *rest = pack([1500], (2, 2), 4, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        packed_attention(q, k, v, *rest)
    assert sum(saved) <= 3 * q.numel()


# ---------------------------------------------------------------- torch.compile


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"window": 3, "softcap": 2.0, "scale": 0.4}, {"sinks": ..., "chunk": 50, "window": 30}])
def test_compiles_in_one_graph_for_packs_of_any_kind(options):
    torch._dynamo.reset()
    compiled = torch.compile(packed_attention, fullgraph=True, backend="aot_eager")
    for lengths in ([5, 7], [9, 3, 140], [1], [64] * 4):
        q, k, v, *rest = pack(lengths, (4, 2), 8)
        drawn, sinks = with_sinks(options, 4)
        assert_same(compiled(q, k, v, *rest, **drawn), eager(q, k, v, *rest, **drawn), [q, k, v, *sinks])


def test_a_compiled_pack_draws_masks_from_the_generator_and_again_in_the_backward():
    torch._dynamo.reset()
    compiled = torch.compile(packed_attention, fullgraph=True, backend="aot_eager")
    q, k, v, *rest = pack([70, 9], (2, 1))
    outcomes = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        y = compiled(q, k, v, *rest, dropout=0.4)
        outcomes.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes[:2], strict=True)) and not torch.equal(outcomes[1][0], outcomes[2][0])
    torch.manual_seed(3)
    y = packed_attention(q, k, v, *rest, dropout=0.4)
    for mine, other in zip(outcomes[0], (y, *torch.autograd.grad(y.square().sum(), (q, k, v))), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(("sink", "options"), [(False, (None, None, None, 0.0, None)), (True, (3, 50, 2.0, 0.4, torch.tensor(7)))])
def test_the_nodes_are_what_they_claim_to_be(sink, options):
    q, k, v, cu_seqlens, longest = pack([5, 0, 130], (4, 2))
    sinks = torch.randn(4, dtype=DOUBLE, requires_grad=True) if sink else None
    torch.library.opcheck(attention_tiles.node, (q, k, v, sinks, cu_seqlens, longest, 0.3, *options))
    q, k, v, sinks = (t if t is None else t.detach() for t in (q, k, v, sinks))
    torch.library.opcheck(attention_tiles_backward.node, (torch.randn_like(q), q, k, v, sinks, cu_seqlens, longest, 0.3, *options))


@pytest.mark.parametrize("change, words", [
    (dict(k=(8, 3, 4)), r"k \[T, Hk, D\] to fit q \(8, 4, 4\), Hk dividing Hq, got \(8, 3, 4\)"),
    (dict(k=(7, 2, 4)), r"k \[T, Hk, D\] to fit .*got \(7, 2, 4\)"),
    (dict(v=(8, 1, 4)), r"v of k's shape \(8, 2, 4\), got \(8, 1, 4\)"),
    (dict(cu_seqlens=[0, 5]), r"cu_seqlens to rise from 0 to 8, got \[0, 5\]"),
    (dict(cu_seqlens=[0, 9, 8]), "cu_seqlens to rise from 0 to 8"),
    (dict(max_seqlen=4), "documents of max_seqlen 4 or less, got 5"),
    (dict(dtype=torch.int64), r"cu_seqlens int32 \[n\+1\], got torch.int64"),
    (dict(window=0), "window >= 1, got 0"),
    (dict(chunk=0), "chunk >= 1, got 0"),
    (dict(sinks=torch.zeros(2)), r"floating sinks \[4\], got torch.float32 \(2,\)"),
    (dict(sinks=torch.zeros(4, dtype=torch.int64)), r"floating sinks \[4\], got torch.int64 \(4,\)"),
    (dict(sinks=torch.zeros(4, device="meta")), "q, k, v, cu_seqlens and sinks on one device, got them on cpu, cpu, cpu, cpu, meta"),
    (dict(softcap=0.0), "softcap > 0, got 0.0"),
    (dict(dropout=1.0), r"dropout in \[0, 1\), got 1.0"),
    (dict(qkv_dtypes=(torch.float32, torch.bfloat16, torch.bfloat16)), "q, k, v of one floating dtype, got torch.float32, torch.bfloat16"),
    (dict(qkv_dtypes=[torch.int64] * 3), "q, k, v of one floating dtype, got torch.int64"),
    (dict(kv_device="meta"), "q, k, v, cu_seqlens and sinks on one device, got them on cpu, meta, meta, cpu"),
])
def test_misfits_are_named(change, words):
    made = dict(q=(8, 4, 4), k=(8, 2, 4), v=(8, 2, 4), cu_seqlens=[0, 3, 8], max_seqlen=5, dtype=torch.int32) | change
    dtypes, elsewhere = made.pop("qkv_dtypes", [torch.float32] * 3), made.pop("kv_device", "cpu")
    q, k, v = (torch.zeros(made.pop(name), dtype=dtype, device=device)
               for name, dtype, device in zip("qkv", dtypes, ("cpu", elsewhere, elsewhere)))
    cu_seqlens = torch.tensor(made.pop("cu_seqlens"), dtype=made.pop("dtype"))
    with pytest.raises(ValueError, match="packed_attention: expected " + words):
        packed_attention(q, k, v, cu_seqlens, made.pop("max_seqlen"), **made)
