"""Attention's backends on a GPU: exactness, waits, determinism, compiling, capture and memory."""

import pytest
import torch
import torch.nn.functional as F

from kernels._attention_gpu import INSTALLED, backend
from kernels.attention import packed_attention
from tests.helpers.attention_cases import DOUBLE, eager, pack, sdpa, with_sinks
from tests.helpers.kernels import DEVICE, error

needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")


def gpu_pack(lengths, heads=(4, 2), dim=64, dtype=torch.bfloat16):
    q, k, v, cu_seqlens, longest = pack(lengths, heads, dim, dtype, grad=False)
    return *(t.to(DEVICE).requires_grad_() for t in (q, k, v)), cu_seqlens.to(DEVICE), longest


def with_gpu_sinks(options, heads=4):
    options, sinks = with_sinks(options, heads, torch.float32)
    sinks = [t.detach().to(DEVICE).requires_grad_() for t in sinks]
    return options | ({"sinks": sinks[0]} if sinks else {}), sinks


def backends_here(options: dict) -> list[str]:
    names = ["flex_attention"] if "softcap" in options else ["varlen_attn", "flex_attention"]
    if "sinks" in options:
        return names
    return names + [f"flash_attn {n}" for n, module in ((2, "flash_attn"), (3, "flash_attn_interface")) if INSTALLED[module]]


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [
    {}, {"scale": 0.3}, {"window": 50}, {"softcap": 2.0}, {"softcap": 2.0, "window": 50}, {"chunk": 40}, {"sinks": ...},
    {"sinks": ..., "window": 50, "chunk": 100}, {"sinks": ..., "softcap": 2.0}])
@pytest.mark.parametrize(("heads", "dim"), [((4, 4), 64), ((4, 1), 128), ((4, 2), 20), ((2, 1), 256)])
def test_a_gpu_is_as_exact_as_torch(heads, dim, options, dtype, served_by):
    """Judged by the error of eager attention in the same dtype, value and gradients, on packs with empty and one-token documents."""
    torch._dynamo.reset()  # FlexAttention compiles a few kinds of layer, not all that are tried here
    q, k, v, cu_seqlens, longest = gpu_pack([60, 0, 197, 1, 131], heads, dim, dtype)
    upstream = torch.randn_like(q)
    _, sinks = with_sinks(options, heads[0], dtype)

    def run(op, cast, device):
        leaves = [t.detach().to(device, cast).requires_grad_() for t in (q, k, v, *sinks)]
        drawn = options | {"sinks": leaves[3]} if sinks else options
        y = op(*leaves[:3], cu_seqlens.to(device), longest, **drawn)
        return y, *torch.autograd.grad(y, leaves, upstream.to(device, cast))

    truth, stock = run(eager, DOUBLE, "cpu"), run(eager, dtype, "cpu")
    for name in backends_here(options):
        served_by(name)
        for mine, other, true in zip(run(packed_attention, dtype, DEVICE), stock, truth, strict=True):
            assert error(mine, true) <= 2 * error(other, true) + 1e-6, name


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_serve_fp32_and_dropout_on_a_gpu_and_wait_once_a_pack(dtype):
    q, k, v, *rest = gpu_pack([60, 197, 3], dtype=dtype)
    dropout = 0.0 if dtype == torch.float32 else 0.2
    assert backend(DEVICE, dtype, None, dropout) in ("tiles", "flash_attn 2")
    packed_attention(q, k, v, *rest, dropout=dropout)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = packed_attention(q, k, v, *rest, dropout=dropout)
        torch.autograd.grad(y.sum(), (q, k, v))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if not dropout:
        torch.testing.assert_close(y, sdpa(q, k, v, *rest), rtol=1e-4, atol=1e-4)


@needs_gpu
@pytest.mark.parametrize("options", [{"window": 100}, {"window": 100, "chunk": 150, "sinks": ...}])
@pytest.mark.parametrize("name", ["varlen_attn", "flex_attention"])
def test_nothing_is_read_back(name, options, served_by):
    served_by(name)
    options, sinks = with_gpu_sinks(options)
    for attempt in range(3):  # the first two may compile, which waits
        q, k, v, *rest = gpu_pack([60, 197 + attempt, 3])
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if attempt == 2 else "default")
        try:
            torch.autograd.grad(packed_attention(q, k, v, *rest, **options).sum(), (q, k, v, *sinks))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("options", [{}, {"chunk": 300, "sinks": ...}])
@pytest.mark.parametrize("name", ["varlen_attn", "flex_attention"])
def test_deterministic_algorithms_give_the_same_bits_twice(name, options, served_by):
    served_by(name)
    options, sinks = with_gpu_sinks(options, 8)
    q, k, v, *rest = gpu_pack([600, 1000, 400], (8, 2))
    torch.use_deterministic_algorithms(True)
    try:
        first, second = ([y, *torch.autograd.grad(y, (q, k, v, *sinks), torch.ones_like(y))]
                         for y in (packed_attention(q, k, v, *rest, **options) for _ in range(2)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_gpu
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"sinks": ..., "chunk": 100}, {"sinks": ..., "softcap": 2.0}])
def test_compiles_on_a_gpu(options):
    torch._dynamo.reset()
    options, sinks = with_gpu_sinks(options)
    compiled = torch.compile(packed_attention, fullgraph=True)
    for lengths in ([60, 197, 3], [300]):
        q, k, v, *rest = gpu_pack(lengths)
        ours, plain = (op(q, k, v, *rest, **options) for op in (compiled, packed_attention))
        torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2)
        grads = [torch.autograd.grad(y.float().square().mean(), (q, k, v, *sinks)) for y in (ours, plain)]
        for mine, other in zip(*grads, strict=True):
            assert F.cosine_similarity(mine.flatten().float(), other.flatten().float(), dim=0) > 0.99


@needs_gpu
@pytest.mark.parametrize("chunk", [None, 90])
@pytest.mark.parametrize("name", ["varlen_attn", "flex_attention"])
def test_a_captured_graph_follows_the_pack(name, chunk, served_by):
    """Replays with other contents of the same cu_seqlens: nothing that was derived from the captured ones may be used."""
    served_by(name)
    q, k, v, cu_seqlens, _ = gpu_pack([100, 200, 84])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        packed_attention(q, k, v, cu_seqlens, 384, chunk=chunk)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        captured = packed_attention(q, k, v, cu_seqlens, 384, chunk=chunk)
    cu_seqlens.copy_(torch.tensor([0, 50, 100, 384], dtype=torch.int32))
    graph.replay()
    with torch.no_grad():
        torch.testing.assert_close(captured, packed_attention(q, k, v, cu_seqlens, 384, chunk=chunk), rtol=2e-2, atol=2e-2)


@needs_gpu
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_memory_on_a_gpu_is_linear_in_a_long_document(softcap):
    def peak(tokens):
        q, k, v, *rest = gpu_pack([tokens], (4, 4))
        torch.autograd.grad(packed_attention(q, k, v, *rest, softcap=softcap).sum(), (q, k, v))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(packed_attention(q, k, v, *rest, softcap=softcap).sum(), (q, k, v))
        return torch.cuda.max_memory_allocated() - before

    assert peak(16384) <= 6 * peak(4096)
