"""Packed attention on a GPU, by the flash kernels of other packages.

Each makes one launch each way and reads nothing back:

    varlen_attn      torch's own build of FlashAttention 2: the default, and sinks; neither softcap nor dropout
    flash_attn 2, 3  where those packages are installed (3 on Hopper): softcap; dropout in 2 only; no sinks
    flex_attention   compiled by torch for softcap, where neither is installed, and for softcap with sinks

fp32, dropout without flash-attn 2, dropout with a softcap or sinks, heads wider than 256, and GPUs before Ampere use the tiles of
`kernels.attention`, with many launches per document: a last resort. FlashAttention sums ∂q in a varying order, and in a fixed one
(more slowly) under `torch.use_deterministic_algorithms(True)`.

Sinks. With l_i = log Σ_j exp(z_ij), which a flash kernel returns, and l'_i = log(exp(l_i) + exp(sink)), attention with the sink is
o'_i = o_i exp(l_i − l'_i). A flash backward computes P_ij = exp(z_ij − l_i) and ∂z_ij = P_ij (∂o_iᵀv_j − ∂o_iᵀo_i) from the output and l
that it is given, so given o' and l' it is exact for the softmax with the sink, whose own gradient is −Σ_i exp(sink − l'_i) ∂o_iᵀo'_i.
torch's kernels can be called so. FlexAttention's l has a gradient, so o' is computed from it and autograd does the rest. The public
functions of flash-attn give l no gradient and hide the backward.

Chunks of documents are documents: `chunk_bounds`. Values that depend on the pack but not on the layer are computed once per pack and
cached with its cu_seqlens: `per_pack`.

Shapes: T tokens, n documents, H query heads, Hk key heads, D head width.
"""

import functools
import importlib.util
from collections.abc import Callable, Hashable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kernels import _dispatch

INSTALLED = {name: importlib.util.find_spec(name) is not None for name in ("flash_attn", "flash_attn_interface")}
HEAD_DIMS = 16, 256  # of the flash kernels, first and last
FLEX_BLOCK = 128  # rows and columns of FlexAttention's blocks
_packs = WeakTensorKeyDictionary()  # cu_seqlens -> the version of its contents, and the values cached for them


@torch.compiler.assume_constant_result
def _generation(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def backend(device: torch.device, dtype: torch.dtype, softcap: float | None = None, dropout: float = 0.0, sinks: bool = False) -> str:
    """Return the backend of attention: "tiles" or one of BACKENDS.

    Flash kernels need 16-bit dtypes and Ampere or later.
    """
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or (dropout and (sinks or softcap is not None)):
        return "tiles"
    generation = _generation(device)
    if generation < 8 or _dispatch.mode() == "reference":
        return "tiles"
    if sinks:
        return "varlen_attn" if softcap is None else "flex_attention"
    if generation == 9 and not dropout and INSTALLED["flash_attn_interface"]:
        return "flash_attn 3"
    if INSTALLED["flash_attn"]:
        return "flash_attn 2"
    if dropout:
        return "tiles"
    return "varlen_attn" if softcap is None else "flex_attention"


def check_backward_offsets(tokens: int, documents: int, heads: int, head_dim: int) -> None:
    """Raise ValueError where flash-attn 2's varlen backward (and torch's) would overflow 32-bit offsets."""
    size = (tokens + 128 * documents) * heads * (-(-head_dim // 32) * 32)
    if size >= 2**31:
        raise ValueError(
            f"packed_attention: expected (tokens + 128 * documents) * heads * head_dim < 2**31, got {size} "
            f"({tokens} tokens, {documents} documents, {heads} heads of {head_dim}); pack fewer tokens or documents")


# ---------------------------------------------------------------- once per pack


def per_pack(cu_seqlens: Tensor, key: Hashable, compute: Callable[[], object]):
    """Return compute(), cached under `key` for this tensor and its contents.

    All layers of a model share one cu_seqlens.
    """
    # no state in a graph; no version counter; other contents in each replay
    if torch.compiler.is_compiling() or cu_seqlens.is_inference() or _capturing(cu_seqlens):
        return compute()
    version, cached = _packs.get(cu_seqlens, (None, {}))
    if version != cu_seqlens._version:
        cached = {}
        _packs[cu_seqlens] = cu_seqlens._version, cached
    if key not in cached:
        cached[key] = compute()
    return cached[key]


def _capturing(t: Tensor) -> bool:
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def host_bounds(cu_seqlens: Tensor) -> list[int]:
    """Return cu_seqlens as a list; on a GPU this waits for the device once per pack."""
    return cu_seqlens.tolist() if cu_seqlens.device.type == "cpu" else per_pack(cu_seqlens, "bounds", cu_seqlens.tolist)


def chunk_bounds(cu_seqlens: Tensor, tokens: int, chunk: int) -> Tensor:
    """Return cu_seqlens with every document cut into chunks, without waiting for the device.

    n documents have at most (tokens + n (chunk - 1)) // chunk chunks; empty ones at the end make up for those that there are not.
    """
    documents = len(cu_seqlens) - 1
    chunks = cu_seqlens.diff().add_(chunk - 1).div_(chunk, rounding_mode="floor")
    last = chunks.cumsum(0)
    index = torch.arange((tokens + documents * (chunk - 1)) // chunk + 1, device=cu_seqlens.device)
    document = torch.searchsorted(last, index, right=True).clamp_(max=documents - 1)
    edge = cu_seqlens[document] + (index - (last - chunks)[document]) * chunk
    return torch.minimum(edge, cu_seqlens[document + 1]).int()


def assert_bounds(cu_seqlens: Tensor, tokens: int, max_seqlen: int) -> None:
    """Check cu_seqlens on the device; the host sees an error the next time it waits.

    Kernels would read out of bounds with a wrong one.
    """
    lengths = cu_seqlens.diff()
    rises = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens) & ((lengths >= 0) & (lengths <= max_seqlen)).all()
    torch._assert_async(rises, f"packed_attention: expected cu_seqlens to rise from 0 to {tokens} by {max_seqlen} or less a document")


# ---------------------------------------------------------------- the backends


def _flash_window(window: int | None) -> tuple[int, int]:
    """Return how many tokens to the left and to the right of a token it attends to; -1: all."""
    return (-1 if window is None else window - 1, 0)


class _Varlen(torch.autograd.Function):
    """torch's FlashAttention; its backward gets what the sinks make of its output and its log-sum-exp.

    torch's own `varlen_attn` is a custom operator in Python, whose dispatch takes the host several times as long.
    """

    @staticmethod
    def forward(ctx, q, k, v, sinks, cu_seqlens, max_seqlen, scale, window):
        left, right = _flash_window(window)
        ctx.bounds = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, window is None  # no dropout; causal
        ctx.options = {"scale": scale, "window_size_left": left, "window_size_right": right}
        out, lse, *random, _ = torch.ops.aten._flash_attention_forward(q, k, v, *ctx.bounds, False, **ctx.options)
        if sinks is not None:
            lse, without = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None]), lse  # [H, T]
            out.mul_((without - lse).exp_().t()[..., None])
        ctx.save_for_backward(q, k, v, sinks, out, lse, *random)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, sinks, out, lse, *random = ctx.saved_tensors
        grads = torch.ops.aten._flash_attention_backward(grad, q, k, v, out, lse, *ctx.bounds, *random, **ctx.options)
        grad_sinks = None
        if ctx.needs_input_grad[3]:
            p = (sinks.to(lse.dtype)[:, None] - lse).exp_()
            grad_sinks = -(p.t() * (grad.to(p.dtype) * out).sum(-1)).sum(0).to(sinks.dtype)
        return *grads, grad_sinks, None, None, None, None


def _varlen_attn(q, k, v, sinks, cu_seqlens, max_seqlen, scale, window, softcap, dropout) -> Tensor:
    return _Varlen.apply(q, k, v, sinks, cu_seqlens, max_seqlen, scale, window)


def _flash_attn_2(q, k, v, sinks, cu_seqlens, max_seqlen, scale, window, softcap, dropout) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p=dropout, softmax_scale=scale, causal=True,
        window_size=_flash_window(window), softcap=softcap or 0.0, deterministic=torch.are_deterministic_algorithms_enabled())


def _flash_attn_3(q, k, v, sinks, cu_seqlens, max_seqlen, scale, window, softcap, dropout) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func

    out = flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, softmax_scale=scale, causal=True,
        window_size=_flash_window(window), softcap=softcap or 0.0, deterministic=torch.are_deterministic_algorithms_enabled())
    return out[0] if isinstance(out, tuple) else out  # early releases return (out, lse)


def block_mask(cu_seqlens: Tensor, tokens: int, window: int | None):
    """Return FlexAttention's BlockMask of a pack without testing its T² pairs.

    The keys that a token sees end with itself, and the first of them never falls from a token to the next. So a row of blocks has a visible
    pair in the blocks from `seen` to the diagonal, and only visible pairs in those from `full` to before it. Both never fall either, so the
    rows that see a column of blocks are those from the diagonal until `seen` (for all of their pairs: `full`) passes the column.
    """
    from torch.nn.attention.flex_attention import BlockMask

    positions = torch.arange(tokens, device=cu_seqlens.device, dtype=torch.int32)
    document = torch.searchsorted(cu_seqlens, positions, right=True, out_int32=True)

    def visible(b, h, i, j):
        near = (i >= j) if window is None else (i >= j) & (i - j < window)
        return near & (document[i] == document[j])

    def first_key(rows: Tensor) -> Tensor:
        begin = cu_seqlens[document[rows] - 1]
        return begin if window is None else torch.maximum(begin, rows - (window - 1))

    first = positions[::FLEX_BLOCK]
    last, block = (first + FLEX_BLOCK - 1).clamp(max=tokens - 1), first // FLEX_BLOCK
    seen = first_key(first) // FLEX_BLOCK
    full = torch.minimum((first_key(last) + FLEX_BLOCK - 1) // FLEX_BLOCK, block)
    full = torch.where(first + FLEX_BLOCK <= tokens, full, block)  # a last block of fewer rows is never full
    seen_until, full_until = (torch.searchsorted(t, block, right=True, out_int32=True) for t in (seen, full))

    def table(count: Tensor, indices: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return how many blocks each row has, and which: what is beyond the count is not read."""
        return count[None, None], indices(block).clamp(max=len(block) - 1)[None, None]

    seen_from, full_from, diagonal, passed = (t[:, None] for t in (seen, full, block, full_until))
    kv = table(full - seen + 1, lambda n: torch.where(n < full_from - seen_from, seen_from + n, diagonal))
    full_kv = table(block - full, lambda n: full_from + n)
    q = table(seen_until - full_until + 1, lambda n: torch.where(n == 0, diagonal, passed + n - 1))
    full_q = table(full_until - block - 1, lambda n: diagonal + 1 + n)
    return BlockMask((tokens, tokens), *kv, *full_kv, *q, *full_q, BLOCK_SIZE=(FLEX_BLOCK, FLEX_BLOCK), mask_mod=visible)


def _softcap_mod(softcap: float, device: torch.device):
    """Return a score_mod that applies the softcap.

    It is a tensor there: with dynamic shapes a captured float is symbolic, and FlexAttention's backward cannot trace one.
    """
    cap = torch.full((), softcap, device=device)

    def score_mod(score, b, h, i, j):
        return cap * torch.tanh(score / cap)

    return score_mod


@functools.cache
def _compiled_flex_attention():
    """Return the compiled flex_attention.

    With fullgraph, too many kinds of layer are an error; uncompiled, FlexAttention would silently materialise T² scores.
    """
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _flex_attention(q, k, v, sinks, cu_seqlens, max_seqlen, scale, window, softcap, dropout) -> Tensor:
    from torch.nn.attention.flex_attention import AuxRequest

    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # (1, heads, T, D)
    if torch.compiler.is_compiling():
        from torch.nn.attention.flex_attention import flex_attention as attend
    else:
        attend = _compiled_flex_attention()
    blocks = per_pack(cu_seqlens, ("blocks", window), partial(block_mask, cu_seqlens, q.shape[2], window))
    score_mod = None if softcap is None else _softcap_mod(softcap, q.device)
    attend = partial(attend, q, k, v, score_mod=score_mod, block_mask=blocks, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    if sinks is None:
        return attend()[0].transpose(0, 1)
    out, aux = attend(return_aux=AuxRequest(lse=True))
    kept = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[:, None])
    return (out * kept[..., None]).to(q.dtype)[0].transpose(0, 1)


BACKENDS = {"varlen_attn": _varlen_attn, "flash_attn 2": _flash_attn_2, "flash_attn 3": _flash_attn_3, "flex_attention": _flex_attention}


def _aligned(t: Tensor) -> Tensor:
    """Return t, or a copy whose heads 16-byte loads can read."""
    fits = t.stride(2) == 1 and t.stride(0) % 8 == t.stride(1) % 8 == 0
    # under torch.compile the compiler chooses the offsets
    return t if fits and (torch.compiler.is_compiling() or t.storage_offset() % 8 == 0) else t.contiguous()


def gpu_attention(
    name: str, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    window: int | None, chunk: int | None, softcap: float | None, dropout: float,
) -> Tensor:
    """Return o [T, H, D] from BACKENDS[name], for D within HEAD_DIMS.

    Heads whose D is no multiple of 8 are padded with zeros.
    """
    tokens, heads, dim = q.shape
    if not (torch.compiler.is_compiling() or _capturing(cu_seqlens)):
        per_pack(cu_seqlens, ("checked", tokens, max_seqlen), lambda: assert_bounds(cu_seqlens, tokens, max_seqlen))
    if chunk is not None:
        cu_seqlens, max_seqlen = per_pack(cu_seqlens, ("chunks", chunk), partial(chunk_bounds, cu_seqlens, tokens, chunk)), chunk
    if name in ("varlen_attn", "flash_attn 2") and torch.is_grad_enabled():
        check_backward_offsets(tokens, len(cu_seqlens) - 1, heads, dim)
    if dim % 8:
        q, k, v = (F.pad(t, (0, -dim % 8)) for t in (q, k, v))
    q, k, v = map(_aligned, (q, k, v))
    out = BACKENDS[name](q, k, v, sinks, cu_seqlens, max_seqlen, scale, window, softcap, dropout)
    return out[..., :dim] if dim % 8 else out
