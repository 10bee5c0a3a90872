"""Inputs and oracles for the tests of packed attention."""

import torch
import torch.nn.functional as F

DOUBLE = torch.float64


def pack(lengths, heads=(2, 2), dim=4, dtype=DOUBLE, grad=True):
    """Return q, k, v, cu_seqlens, max_seqlen."""
    tokens = sum(lengths)
    q, k, v = (torch.randn(tokens, h, dim, dtype=DOUBLE).to(dtype).requires_grad_(grad) for h in (*heads, heads[1]))
    return q, k, v, torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32), max(lengths)


def with_sinks(options, heads, dtype=DOUBLE):
    """Return options whose sinks, where there are any, are a random tensor [heads], and that tensor in a list of inputs."""
    if "sinks" not in options:
        return options, []
    sinks = torch.randn(heads, dtype=DOUBLE).to(dtype).requires_grad_()
    return options | {"sinks": sinks}, [sinks]


def eager(q, k, v, cu_seqlens, max_seqlen, scale=None, window=None, softcap=None, mask=None, chunk=None, sinks=None):
    """Return attention one document at a time: repeated key heads, full scores, a dense mask, softmax in fp32 or better."""
    groups, scale, outs = q.shape[1] // k.shape[1], q.shape[2] ** -0.5 if scale is None else scale, []
    for begin, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]):
        repeated = q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        Q, K, V = (t[begin:end].transpose(0, 1) for t in repeated)
        z = Q @ K.transpose(1, 2) * scale
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        i = torch.arange(end - begin)
        gap = i[:, None] - i
        z = z.masked_fill((gap < 0) | (gap >= (window or end)), float("-inf"))
        z = z if chunk is None else z.masked_fill(i[:, None] // chunk != i // chunk, float("-inf"))
        z = z if sinks is None else torch.cat([z, sinks.to(z.dtype)[:, None, None].expand(-1, end - begin, 1)], -1)
        p = z.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)[..., :end - begin]
        outs.append(((p if mask is None else p * mask) @ V).transpose(0, 1))
    return torch.cat(outs)


def sdpa(q, k, v, cu_seqlens, max_seqlen):
    bounds = cu_seqlens.tolist()
    return torch.cat([
        F.scaled_dot_product_attention(
            *(t[b:e].transpose(0, 1)[None] for t in (q, k, v)), is_causal=True, enable_gqa=True)[0].transpose(0, 1)
        for b, e in zip(bounds, bounds[1:])])


def assert_same(ours, theirs, inputs, tolerance=1e-10):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    upstream = torch.randn_like(ours)
    for mine, other in zip(*(torch.autograd.grad(y, inputs, upstream) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
