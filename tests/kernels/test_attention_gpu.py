"""Attention's GPU backends: which one serves, and what each is given, by stand-ins with the same arguments."""

import gc
import sys
import types
from functools import partial

import pytest
import torch

from kernels import _dispatch
from kernels._attention_gpu import (
    FLEX_BLOCK,
    _packs,
    assert_bounds,
    backend,
    block_mask,
    check_backward_offsets,
    chunk_bounds,
    host_bounds,
    per_pack,
)
from kernels.attention import packed_attention
from tests.helpers.attention_cases import DOUBLE, assert_same, eager, pack, with_sinks
from tests.helpers.kernels import DEVICE, given, settings, st

ATTENTION, GPU = sys.modules["kernels.attention"], sys.modules["kernels._attention_gpu"]
needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
PACKS = [[1], [300], [127, 1, 128, 129, 13], [0, 5, 0, 131], [384], [129]]


# ---------------------------------------------------------------- which one serves


def test_backend_names(monkeypatch):
    cuda, cpu, bf16 = torch.device("cuda"), torch.device("cpu"), torch.bfloat16
    installed, capability = dict.fromkeys(("flash_attn", "flash_attn_interface"), False), [(9, 0)]
    monkeypatch.setattr(GPU, "INSTALLED", installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    assert backend(cpu, bf16) == backend(cuda, torch.float32) == backend(cuda, bf16, 50.0, 0.1) == "tiles"
    assert backend(cuda, bf16) == "varlen_attn"
    assert backend(cuda, bf16, 50.0) == "flex_attention"
    assert backend(cuda, bf16, None, 0.1) == "tiles"
    with_sinks_before = [backend(cuda, bf16, softcap, dropout, True) for softcap, dropout in ((None, 0.0), (50.0, 0.0), (None, 0.1))]
    assert with_sinks_before == ["varlen_attn", "flex_attention", "tiles"]
    installed["flash_attn"] = True
    assert backend(cuda, bf16) == backend(cuda, bf16, 50.0) == backend(cuda, bf16, None, 0.1) == "flash_attn 2"
    installed["flash_attn_interface"] = True
    assert backend(cuda, bf16) == backend(cuda, bf16, 50.0) == "flash_attn 3"
    assert backend(cuda, bf16, None, 0.1) == "flash_attn 2"
    assert backend(cuda, bf16, sinks=True) == "varlen_attn", "flash-attn's packages take no sinks"
    capability[0] = (8, 0)
    assert backend(cuda, bf16) == "flash_attn 2"
    with _dispatch.backend_mode("reference"):
        assert backend(cuda, bf16) == "tiles"
    capability[0] = (7, 5)
    assert backend(cuda, torch.float16) == "tiles"


def test_the_choice_is_made_while_a_graph_is_traced(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(GPU, "INSTALLED", dict.fromkeys(GPU.INSTALLED, False))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))

    @torch.compile(fullgraph=True, backend="eager")
    def chosen(x, device):
        return x + len(backend(device, torch.bfloat16)), backend(device, torch.bfloat16, 2.0)

    value, name = chosen(torch.zeros(1), torch.device("cuda"))
    assert (value.item(), name) == (len("varlen_attn"), "flex_attention")


def test_offsets_of_the_varlen_backward():
    check_backward_offsets(tokens=2**19 - 129, documents=1, heads=32, head_dim=128)
    with pytest.raises(ValueError, match=r"2\*\*31, got 2147483648 .*pack fewer tokens"):
        check_backward_offsets(tokens=2**19 - 128, documents=1, heads=32, head_dim=100)


# ---------------------------------------------------------------- once per pack


def test_made_once_for_each_contents_of_a_tensor():
    cu_seqlens, calls = torch.tensor([0, 3, 5], dtype=torch.int32, device=DEVICE), []

    def bounds():
        return per_pack(cu_seqlens, "bounds", lambda: calls.append(0) or cu_seqlens.tolist())

    assert bounds() == bounds() == [0, 3, 5] and len(calls) == 1
    assert per_pack(cu_seqlens, "other", lambda: 7) == 7
    cu_seqlens[1] = 4
    assert bounds() == bounds() == [0, 4, 5] and len(calls) == 2
    equal = cu_seqlens.clone()
    assert per_pack(equal, "bounds", lambda: "its own") == "its own" and bounds() == [0, 4, 5]


def test_what_was_made_goes_with_its_tensor():
    gc.collect()
    before, cu_seqlens = len(_packs), torch.tensor([0, 200], dtype=torch.int32, device=DEVICE)
    per_pack(cu_seqlens, "blocks", partial(block_mask, cu_seqlens, 200, None))
    assert len(_packs) == before + 1
    del cu_seqlens
    gc.collect()
    assert len(_packs) == before


def test_inference_tensors_are_served_without_memory():
    with torch.inference_mode():
        cu_seqlens, calls = torch.tensor([0, 2], dtype=torch.int32, device=DEVICE), iter([1, 2])
        assert [per_pack(cu_seqlens, "n", lambda: next(calls)) for _ in range(2)] == [1, 2]


def test_bounds_on_the_host():
    assert host_bounds(torch.tensor([0, 3, 9], dtype=torch.int32, device=DEVICE)) == [0, 3, 9]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a failed assertion on a GPU ends the process")
@pytest.mark.parametrize("bounds", [[1, 8], [0, 7], [0, 5, 3, 8], [0, 6, 8]])
def test_the_device_checks_cu_seqlens(bounds):
    with pytest.raises(RuntimeError, match="packed_attention: expected cu_seqlens to rise from 0 to 8 by 5 or less a document"):
        assert_bounds(torch.tensor(bounds, dtype=torch.int32), 8, 5)
    assert_bounds(torch.tensor([0, 3, 8], dtype=torch.int32), 8, 5)


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8), chunk=st.integers(1, 50))
@settings(max_examples=100, deadline=None)
def test_bounds_of_chunks(lengths, chunk):
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32, device=DEVICE).cumsum(0, dtype=torch.int32)
    bounds, tokens = chunk_bounds(cu_seqlens, sum(lengths), chunk), sum(lengths)
    edges = [edge for begin, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]) for edge in range(begin, end, chunk)]
    assert bounds.dtype == torch.int32 and bounds.tolist() == edges + [tokens] * (len(bounds) - len(edges)) and bounds[-1] == tokens


def test_bounds_of_chunks_are_found_without_looking():
    with torch._subclasses.FakeTensorMode():  # which cannot give a value to the host
        assert chunk_bounds(torch.zeros(4, dtype=torch.int32), 100, 7).shape == (1 + (100 + 3 * 6) // 7,)


# ---------------------------------------------------------------- stand-ins


def flash(q, k, v, cu_seqlens, longest, scale, window_size, softcap=None):
    """Compute what a variable-length flash kernel does, and assert what such kernels require."""
    assert all(t.stride(2) == 1 and t.shape[2] % 8 == t.stride(0) % 8 == t.stride(1) % 8 == t.storage_offset() % 8 == 0 for t in (q, k, v))
    left, right = window_size
    assert right == 0 and isinstance(window_size, tuple)
    return eager(q, k, v, cu_seqlens, longest, scale, None if left < 0 else left + 1, softcap)


def flash_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
            window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None):
    assert causal and not dropout_p and deterministic == torch.are_deterministic_algorithms_enabled()
    return flash(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, window_size, softcap or None)


def flash_3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None,
            causal=False, qv=None, window_size=(-1, -1), softcap=0.0, deterministic=False):
    out = flash_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale, causal, window_size, softcap,
                  None, deterministic)
    return out, None


def flash_scores(q, k, begin, end, scale, left):
    """Return the scores [H, n, n] of one document, pairs out of sight -inf."""
    Q, K = (t[begin:end].transpose(0, 1) for t in (q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)))
    gap = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
    return (Q @ K.transpose(1, 2) * scale).masked_fill((gap < 0) | (gap > (left if left >= 0 else end)), float("-inf"))


def aten_flash_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale, window_size_left, window_size_right):
    assert cu_q is cu_k and dropout == 0 and causal == (window_size_left < 0) and window_size_right == 0 and not debug
    bounds, lse = cu_q.tolist(), q.new_empty(q.shape[1], q.shape[0])
    assert max_q == max_k >= cu_q.diff().max()
    for begin, end in zip(bounds, bounds[1:]):
        lse[:, begin:end] = flash_scores(q, k, begin, end, scale, window_size_left).logsumexp(-1)
    out = flash(q, k, v, cu_q, max_q, scale, (window_size_left, window_size_right))
    return out, lse, torch.tensor(1), torch.tensor(2), q.new_empty(0)


def aten_flash_backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, random, unused, *, scale, window_size_left,
                        window_size_right):
    assert (int(random), int(unused)) == (1, 2) and causal == (window_size_left < 0)
    grads, bounds = [torch.zeros_like(t) for t in (q, k, v)], cu_q.tolist()
    repeated = q, *(t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v)), grad, out
    for begin, end in zip(bounds, bounds[1:]):
        p = (flash_scores(q, k, begin, end, scale, window_size_left) - lse[:, begin:end, None]).exp()
        Q, K, V, G, out_rows = (t[begin:end].transpose(0, 1) for t in repeated)
        s = p * (G @ V.transpose(1, 2) - (G * out_rows).sum(-1, keepdim=True)) * scale
        for whole, part in zip(grads, (s @ K, s.transpose(1, 2) @ Q, p.transpose(1, 2) @ G), strict=True):
            whole[begin:end] = part.unflatten(0, (whole.shape[1], -1)).sum(1).transpose(0, 1)
    return tuple(grads)


@pytest.fixture
def aten_flash(served_by):
    """torch's FlashAttention, which has no CPU form, by its definition."""
    served_by("varlen_attn")
    with torch.library._scoped_library("aten", "IMPL", "CPU") as library:
        library.impl("_flash_attention_forward", aten_flash_forward)
        library.impl("_flash_attention_backward", aten_flash_backward)
        yield


STAND_INS = {
    "flash-attn 2": ("flash_attn 2", "flash_attn", "flash_attn_varlen_func", flash_2),
    "flash-attn 3": ("flash_attn 3", "flash_attn_interface", "flash_attn_varlen_func", flash_3),
}


@pytest.fixture(params=STAND_INS)
def stand_in(request, monkeypatch, served_by):
    name, module, attribute, function = STAND_INS[request.param]
    served_by(name)
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{attribute: function}))
    return name


@pytest.mark.skipif(DEVICE.type == "cuda", reason="stand-ins are for machines without a GPU")
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"window": 3}, {"window": 10**6}, {"softcap": 2.0}, {"chunk": 4}, {"chunk": 9}])
@pytest.mark.parametrize(("heads", "dim"), [((2, 2), 16), ((6, 2), 20)])
def test_each_is_told_what_it_needs(stand_in, heads, dim, options):
    for lengths in ([5], [3, 0, 9, 1]):
        q, k, v, *rest = pack(lengths, heads, dim)
        assert_same(packed_attention(q, k, v, *rest, **options), eager(q, k, v, *rest, **options), [q, k, v])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="stand-ins are for machines without a GPU")
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"window": 3}, {"window": 2, "chunk": 4}])
@pytest.mark.parametrize(("heads", "dim"), [((2, 2), 16), ((6, 2), 20)])
def test_torch_is_told_what_it_needs(aten_flash, heads, dim, options):
    for lengths in ([5], [3, 0, 9, 1]):
        q, k, v, *rest = pack(lengths, heads, dim)
        assert_same(packed_attention(q, k, v, *rest, **options), eager(q, k, v, *rest, **options), [q, k, v])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="stand-ins are for machines without a GPU")
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"window": 3}, {"window": 2, "chunk": 4}])
@pytest.mark.parametrize(("heads", "dim"), [((2, 2), 16), ((6, 2), 20)])
def test_torch_is_given_what_sinks_make_of_its_output(aten_flash, heads, dim, options):
    options, sinks = with_sinks(options | {"sinks": ...}, heads[0])
    for lengths in ([5], [3, 0, 9, 1]):
        q, k, v, *rest = pack(lengths, heads, dim)
        assert_same(packed_attention(q, k, v, *rest, **options), eager(q, k, v, *rest, **options), [q, k, v, *sinks])
        frozen = options | {"sinks": sinks[0].detach()}
        assert_same(packed_attention(q, k, v, *rest, **frozen), eager(q, k, v, *rest, **frozen), [q, k, v])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="stand-ins are for machines without a GPU")
def test_all_layers_share_the_bounds_of_their_chunks(stand_in, monkeypatch):
    made = []
    monkeypatch.setattr(GPU, "chunk_bounds", lambda *inputs: made.append(inputs) or chunk_bounds(*inputs))
    q, k, v, *rest = pack([9, 5], dim=16)
    for chunk in (4, 4, 3, None, 4):
        packed_attention(q, k, v, *rest, chunk=chunk)
    assert [chunk for *_, chunk in made] == [4, 3]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="stand-ins are for machines without a GPU")
def test_views_that_wide_loads_cannot_read_are_copied(stand_in):
    _, _, _, *rest = pack([4, 3])
    fused = torch.randn(7, 3, 2, 17, dtype=DOUBLE, requires_grad=True)
    q, k, v = fused[..., 1:].unbind(1)
    assert_same(packed_attention(q, k, v, *rest), eager(q, k, v, *rest), [fused])
    turned = torch.randn(3, 16, 2, 7, dtype=DOUBLE, requires_grad=True)
    q, k, v = turned.permute(0, 3, 2, 1).unbind(0)
    assert_same(packed_attention(q, k, v, *rest), eager(q, k, v, *rest), [turned])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="stand-ins are for machines without a GPU")
@pytest.mark.parametrize(("lengths", "dim"), [([0], 16), ([3, 2], 8), ([3, 2], 264)])
def test_empty_packs_and_odd_widths_get_the_tiles(stand_in, lengths, dim, monkeypatch):
    monkeypatch.setattr(ATTENTION, "gpu_attention", lambda *_: pytest.fail("served by a flash kernel"))
    q, k, v, *rest = pack(lengths, (2, 2), dim)
    y = packed_attention(q, k, v, *rest)
    grads = torch.autograd.grad(y.sum(), (q, k, v))
    if sum(lengths):
        torch.testing.assert_close(y, eager(q, k, v, *rest))
    assert y.shape == q.shape and [g.shape for g in grads] == [t.shape for t in (q, k, v)]


# ---------------------------------------------------------------- FlexAttention


@pytest.mark.parametrize("window", [None, 1, 2, 100, 128, 129, 200])
@pytest.mark.parametrize("lengths", PACKS + [[256, 128], [60] * 9, [500, 3, 3, 400]])
def test_block_mask_is_that_of_every_pair(lengths, window):
    from torch.nn.attention.flex_attention import create_block_mask

    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0, dtype=torch.int32)
    tokens = sum(lengths)
    ours = block_mask(cu_seqlens, tokens, window)
    assert ours.BLOCK_SIZE == (FLEX_BLOCK, FLEX_BLOCK)
    theirs = create_block_mask(ours.mask_mod, None, None, tokens, tokens, device=cu_seqlens.device)
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, expected = (getattr(mask, f"{kind}_num_blocks") for mask in (ours, theirs))
        assert torch.equal(counts, expected), kind
        indices, others = (getattr(mask, f"{kind}_indices") for mask in (ours, theirs))
        for row, n in enumerate(counts.flatten().tolist()):
            assert indices[0, 0, row, :n].tolist() == others[0, 0, row, :n].tolist(), (kind, row)


def test_block_mask_does_not_look_at_every_pair():
    """Nor does it sort or sum pairs of blocks: inductor cannot compile that for a GPU where their number is a symbol."""
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        seen, called = 0, set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.called.add(function.overloadpacket.__name__)
            self.seen = max([self.seen, *(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))])
            return out

    with Largest() as mode:
        block_mask(torch.tensor([0, 10_000, 65_536], dtype=torch.int32, device=DEVICE), 65_536, None)
    assert mode.seen <= 4 * (65_536 // FLEX_BLOCK) ** 2
    assert not mode.called & {"sort", "argsort", "sum"}


@pytest.fixture
def traced_flex(served_by, monkeypatch):
    """FlexAttention serves: traced as on a GPU, gradients included, and then run operation by operation.

    torch refuses gradients on a CPU because its compiled form has none there. Untraced, it would warn and materialise the scores.
    """
    from torch.nn.attention import flex_attention as module

    torch._dynamo.reset()
    monkeypatch.setattr(module, "_validate_device", lambda *_: None)
    traced = torch.compile(module.flex_attention, dynamic=True, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(GPU, "_compiled_flex_attention", lambda: traced)
    served_by("flex_attention")


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="has its own test on a GPU")
@pytest.mark.parametrize("options", [
    {"window": 9}, {"softcap": 2.0, "scale": 0.25}, {"sinks": ...}, {"sinks": ..., "softcap": 2.0, "window": 9, "chunk": 50}])
def test_flex_attention_sees_what_the_tiles_see(options, traced_flex):
    options, sinks = with_sinks(options, 4, torch.float32)
    for lengths in ([60, 1, 140], [9, 130]):  # the second with shapes that are symbols
        q, k, v, *rest = pack(lengths, (4, 2), 20, torch.float32)
        assert_same(packed_attention(q, k, v, *rest, **options), eager(q, k, v, *rest, **options), [q, k, v, *sinks], 1e-4)


@pytest.mark.slow
def test_flex_attention_is_not_compiled_again_for_each_pack_or_layer(served_by, monkeypatch):
    """Nor for another softcap."""
    from torch._dynamo.testing import CompileCounter
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(flex_attention, dynamic=True, backend=counter)
    monkeypatch.setattr(GPU, "_compiled_flex_attention", lambda: compiled)
    served_by("flex_attention")
    counts = []
    for lengths in ([130, 200, 7], [9, 300], [64] * 5, [40, 300, 200]):
        q, k, v, *rest = pack(lengths, (4, 2), 16, torch.float32, grad=False)
        for window in (150, None, 150):
            packed_attention(q, k, v, *rest, window=window, softcap=2.0 + len(counts))
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 4 and counts[0] <= 2, "one for each kind of window"


# ---------------------------------------------------------------- torch.compile


def shapes_only(graphs: list):
    """Return a compiler whose code returns zeros of the right shapes, and which records the graph.

    Tracing then needs no device that could run the graph.
    """

    def compiler(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]

        def run(inputs):
            values = [o.meta["val"] if isinstance(o, torch.fx.Node) else o for o in outputs]
            return [torch.zeros(v.shape, dtype=v.dtype) if isinstance(v, torch.Tensor) else v for v in values]

        run._boxed_call = True
        return run

    return compiler


@pytest.mark.skipif(DEVICE.type == "cuda", reason="has its own test on a GPU")
@pytest.mark.parametrize(("heads", "dim", "options"), [((2, 2), 16, {}), ((4, 2), 20, {"window": 3})])
def test_varlen_attention_is_traced_whole_both_ways(heads, dim, options, served_by):
    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    served_by("varlen_attn")
    graphs = []
    q, k, v, *rest = pack([5, 7], heads, dim, torch.bfloat16)
    tracer = aot_autograd(fw_compiler=shapes_only(graphs), bw_compiler=shapes_only(graphs))
    y = torch.compile(packed_attention, fullgraph=True, backend=tracer, dynamic=False)(q, k, v, *rest, **options)
    y.sum().backward()
    assert len(graphs) == 2, "a forward and a backward"
    assert graphs[0].count("aten._flash_attention_forward.default") == graphs[1].count("aten._flash_attention_backward.default") == 1


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="has its own test on a GPU")
def test_sinks_are_traced_whole_both_ways(aten_flash):
    torch._dynamo.reset()
    compiled = torch.compile(packed_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([5, 7], [9, 3, 14]):
        q, k, v, *rest = pack(lengths, (4, 2), 16, torch.float32)
        options, sinks = with_sinks({"sinks": ..., "window": 3, "chunk": 5}, 4, torch.float32)
        assert_same(compiled(q, k, v, *rest, **options), eager(q, k, v, *rest, **options), [q, k, v, *sinks], 1e-5)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="has its own test on a GPU")
def test_flex_attention_compiles_inside_a_larger_graph(traced_flex):
    compiled = torch.compile(packed_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([130, 207], [7, 9, 20, 300, 5]):
        q, k, v, *rest = pack(lengths, (4, 2), 16, torch.float32)
        options, sinks = with_sinks({"softcap": 2.0, "window": 150, "chunk": 180, "sinks": ...}, 4, torch.float32)
        assert_same(compiled(q, k, v, *rest, **options), eager(q, k, v, *rest, **options), [q, k, v, *sinks], 1e-4)
