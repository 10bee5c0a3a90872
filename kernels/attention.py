"""Causal attention over packed documents: tokens of one document see each other and nothing else.

For a document's rows i, keys j of its own with j <= i, and i - j < window where there is one:

    z_ij = softcap·tanh(s·q_iᵀk_j / softcap)       (no softcap: z_ij = s·q_iᵀk_j)        s = head_dim^-½ by default
    P_i  = softmax_j(z_ij)        o_i = Σ_j m_ij P_ij v_j       m_ij: inverted dropout, 1 without it
    ∂P_ij = m_ij ∂o_iᵀ v_j        ∂z_ij = P_ij (∂P_ij − Σ_j P_ij ∂P_ij)         ∂s_ij = ∂z_ij (1 − (z_ij/softcap)²)
    ∂q_i = s Σ_j ∂s_ij k_j        ∂k_j  = s Σ_i ∂s_ij q_i                       ∂v_j = Σ_i m_ij P_ij ∂o_i

On the CPU the whole pack is one autograd node that walks tiles of at most BLOCK query rows of one document, each with
all the keys it can see: a softmax row is never split, nothing above the diagonal is computed outside the tile's square,
and a window costs what it sees. Query heads that share a key head are rows of one product: k and v are never repeated.
Probabilities are kept for the backward while they are few (KEEP times q's elements); beyond that each tile is computed
again, so memory stays linear in the tokens. Scores and softmax are fp32 (fp64 for fp64 inputs) whatever the dtype.
Measured on one Zen 5 core against one F.scaled_dot_product_attention call per document, 4 heads of 64, forward +
backward, time over SDPA's (below 1 is faster):

    documents of a pack     8 of 60-197    30 of 15-60    2 of 500    1 of 2000
    fp32                       0.75            0.6           0.8          1.1
    bf16                       0.4             0.4           0.6          0.8-1.0

One SDPA call on unequal documents padded to a common length takes 1.2 to 2 times as long as a call per document.

On a GPU a variable-length flash kernel does it in one launch: `backend` says which. Where none fits, the tiles serve.
"""

import functools
import importlib.util
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._autocast import autocast_input, without_autocast
from kernels._dropout import draw_seed, dropout_mask, kept_fraction

# Rows in a tile: 64 and 192 are within 10% either way, 512 up to a third slower on short documents.
BLOCK = 128
# Probabilities saved, in multiples of q's size: to about 400 tokens a document at 64 a head. Recomputing costs 20%.
KEEP = 4
INSTALLED = {name: importlib.util.find_spec(name) is not None for name in ("flash_attn", "flash_attn_interface")}


class Settings(NamedTuple):
    """What attention takes beside q, k, v; `bounds` is cu_seqlens as a list, `seed` is None without dropout."""

    bounds: list[int]
    scale: float
    window: int | None
    softcap: float | None
    dropout: float
    seed: int | None


class Tile(NamedTuple):
    """Query rows [start, stop) and the keys [first, stop) that they can see."""

    first: int
    start: int
    stop: int


# The torch reference. Heads lead and the group of query heads that share a key head lies inside the rows:
# q [Hk, T*G, D] with row t*G + g, k and v [Hk, T, D]; a tile's scores are [Hk, rows*G, keys].


def tiles(bounds: list[int], window: int | None) -> Iterator[Tile]:
    """Near-equal blocks of rows, at most BLOCK each, document by document."""
    for begin, end in zip(bounds, bounds[1:]):
        step = math.ceil((end - begin) / max(1, math.ceil((end - begin) / BLOCK)))
        for start in range(begin, end, max(1, step)):
            yield Tile(begin if window is None else max(begin, start - window + 1), start, min(start + step, end))


def heads_first(t: Tensor, groups: int, dtype: torch.dtype | None = None) -> Tensor:
    """[T, Hk*groups, D] -> a contiguous [Hk, T*groups, D]."""
    tokens, heads, dim = t.shape
    split = t.reshape(tokens, heads // groups, groups * dim).transpose(0, 1)
    return split.to(dtype or t.dtype).reshape(heads // groups, tokens * groups, dim).contiguous()


def tile_scores(q: Tensor, k: Tensor, tile: Tile, groups: int, settings: Settings) -> Tensor:
    """z [Hk, rows*G, keys] of scaled queries, hidden pairs at -inf."""
    rows, keys = tile.stop - tile.start, tile.stop - tile.first
    z = q[:, tile.start * groups:tile.stop * groups] @ k[:, tile.first:tile.stop].transpose(1, 2)
    if settings.softcap is not None:
        z.div_(settings.softcap).tanh_().mul_(settings.softcap)
    by_row, hidden = z.view(-1, rows, groups, keys), z.new_full((rows, rows), -math.inf)
    # only the last `rows` keys can lie ahead of a row, and only the first `rows` can have left its window
    by_row[..., keys - rows:] += hidden.triu(1)[:, None]
    if settings.window is not None:
        by_row[..., :rows] += hidden.tril(tile.start - tile.first - settings.window)[:, None]
    return z


def tile_dropout(p: Tensor, settings: Settings, generator: torch.Generator | None) -> Tensor | None:
    """m for one tile's probabilities; the backward walks the tiles in the same order and so draws the same masks."""
    if generator is None:
        return None
    return dropout_mask(p.shape, settings.dropout, p.dtype, generator).div_(kept_fraction(settings.dropout))


def mask_generator(settings: Settings, device: torch.device) -> torch.Generator | None:
    return None if settings.seed is None else torch.Generator(device).manual_seed(settings.seed)


def keeps_probabilities(settings: Settings, tokens: int, head_dim: int) -> bool:
    """Whether the forward's probabilities are few enough to save; a softcap's derivative needs the scores anyway."""
    pairs = sum((tile.stop - tile.start) * (tile.stop - tile.first) for tile in tiles(settings.bounds, settings.window))
    return settings.softcap is None and pairs <= KEEP * tokens * head_dim


def attention_forward(q: Tensor, k: Tensor, v: Tensor, settings: Settings, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """o [T, Hq, D], and each tile's P [Hk, rows*G, keys] if `keep`."""
    (tokens, heads, dim), kv_heads = q.shape, k.shape[1]
    groups, fp32 = heads // kv_heads, torch.promote_types(q.dtype, torch.float32)
    Q, K, V = heads_first(q, groups, fp32) * settings.scale, heads_first(k, 1, fp32), heads_first(v, 1)
    out, kept = q.new_empty(tokens, kv_heads, groups * dim), []
    generator = mask_generator(settings, q.device)
    for tile in tiles(settings.bounds, settings.window):
        p = tile_scores(Q, K, tile, groups, settings).softmax(-1).to(q.dtype)
        if keep:
            kept.append(p)
        mask = tile_dropout(p, settings, generator)
        o = (p if mask is None else p * mask) @ V[:, tile.first:tile.stop]
        out[tile.start:tile.stop] = o.view(kv_heads, -1, groups * dim).transpose(0, 1)
    return out.view(q.shape), kept


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: list[Tensor], settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """∂q, ∂k, ∂v for ∂o = grad [T, Hq, D]; sums over tiles are fp32 and rounded once."""
    (tokens, heads, dim), kv_heads = q.shape, k.shape[1]
    groups, fp32 = heads // kv_heads, torch.promote_types(q.dtype, torch.float32)
    Q, K, V, G = heads_first(q, groups), heads_first(k, 1), heads_first(v, 1), heads_first(grad, groups)
    if not kept:
        Q_scaled, K_scores = Q.to(fp32) * settings.scale, K.to(fp32)
    grad_q = q.new_empty(tokens, kv_heads, groups * dim)
    grad_k, grad_v = torch.zeros_like(K, dtype=fp32), torch.zeros_like(V, dtype=fp32)
    generator = mask_generator(settings, q.device)
    for i, tile in enumerate(tiles(settings.bounds, settings.window)):
        rows, keys = slice(tile.start * groups, tile.stop * groups), slice(tile.first, tile.stop)
        if not kept:
            z = tile_scores(Q_scaled, K_scores, tile, groups, settings)
        p = kept[i] if kept else z.softmax(-1).to(q.dtype)
        mask = tile_dropout(p, settings, generator)
        grad_v[:, keys] += (p if mask is None else p * mask).transpose(1, 2) @ G[:, rows]
        grad_p = G[:, rows] @ V[:, keys].transpose(1, 2)
        if mask is not None:
            grad_p.mul_(mask)
        grad_z = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
        if settings.softcap is not None:
            # hidden scores are -inf: clamped, their factor is 0 rather than 0 times infinity
            grad_z.mul_(1 - z.clamp_(min=-settings.softcap).div_(settings.softcap).square_())
        grad_q[tile.start:tile.stop] = (grad_z @ K[:, keys]).view(kv_heads, -1, groups * dim).transpose(0, 1)
        grad_k[:, keys] += grad_z.transpose(1, 2) @ Q[:, rows]
    grad_k, grad_v = grad_k.mul_(settings.scale).to(k.dtype), grad_v.to(v.dtype)
    return grad_q.mul_(settings.scale).view(q.shape), grad_k.transpose(0, 1), grad_v.transpose(0, 1)


class _Tiles(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, q, k, v, settings):
        out, kept = attention_forward(q, k, v, settings, keeps_probabilities(settings, q.shape[0], q.shape[2]))
        ctx.save_for_backward(q, k, v, *kept)
        ctx.settings = settings
        return out

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad):
        q, k, v, *kept = ctx.saved_tensors
        return *attention_backward(grad, q, k, v, kept, ctx.settings), None


@torch.compiler.disable  # tracing would unroll the loop over documents, anew for every pack
def _tiles(q, k, v, cu_seqlens, max_seqlen, scale, window, softcap, dropout) -> Tensor:
    bounds = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in zip(bounds, bounds[1:])]
    if bounds[0] != 0 or bounds[-1] != q.shape[0] or min(lengths) < 0:
        raise ValueError(f"packed_attention: expected cu_seqlens to rise from 0 to {q.shape[0]}, got {bounds}")
    if max(lengths) > max_seqlen:
        raise ValueError(f"packed_attention: expected documents of max_seqlen {max_seqlen} or less, got {max(lengths)}")
    return _Tiles.apply(q, k, v, Settings(bounds, scale, window, softcap, dropout, draw_seed(dropout)))


# GPU backends: one launch each, no host synchronisation.


def _varlen_attn(q, k, v, cu_seqlens, max_seqlen, scale, window, softcap, dropout) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale,
        window_size=(-1 if window is None else window - 1, 0), enable_gqa=q.shape[1] != k.shape[1])


def _flash_attn_2(q, k, v, cu_seqlens, max_seqlen, scale, window, softcap, dropout) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p=dropout, softmax_scale=scale, causal=True,
        window_size=(-1 if window is None else window - 1, 0), softcap=softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled())


def _flash_attn_3(q, k, v, cu_seqlens, max_seqlen, scale, window, softcap, dropout) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func

    out = flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, softmax_scale=scale, causal=True,
        window_size=(-1 if window is None else window - 1, 0), softcap=softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled())
    return out[0] if isinstance(out, tuple) else out  # early releases return (out, lse)


@functools.lru_cache(maxsize=2)
def _flex_block_mask(cu_seqlens: Tensor, tokens: int, window: int | None):
    """Which blocks a pack needs: made once per pack and kind of layer, since layers get the same cu_seqlens object."""
    from torch.nn.attention.flex_attention import create_block_mask

    positions = torch.arange(tokens, device=cu_seqlens.device, dtype=torch.int32)
    document = torch.searchsorted(cu_seqlens, positions, right=True)

    def visible(b, h, i, j):
        near = (i >= j) if window is None else (i >= j) & (i - j < window)
        return near & (document[i] == document[j])

    return create_block_mask(visible, None, None, tokens, tokens, device=cu_seqlens.device)


@functools.cache
def _compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex_attention(q, k, v, cu_seqlens, max_seqlen, scale, window, softcap, dropout) -> Tensor:
    def capped(score, b, h, i, j):
        return softcap * torch.tanh(score / softcap)

    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    blocks = _flex_block_mask(cu_seqlens, q.shape[2], window)
    out = _compiled_flex_attention()(
        q, k, v, score_mod=None if softcap is None else capped, block_mask=blocks, scale=scale,
        enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


BACKENDS = {
    "tiles": _tiles, "varlen_attn": _varlen_attn, "flash_attn 2": _flash_attn_2, "flash_attn 3": _flash_attn_3,
    "flex_attention": _flex_attention,
}


def backend(device: torch.device, dtype: torch.dtype, softcap: float | None = None, dropout: float = 0.0) -> str:
    """Which of BACKENDS serves: flash kernels want CUDA and 16 bits, a softcap wants flash-attn or FlexAttention,
    dropout flash-attn 2, both together the tiles."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or (softcap is not None and dropout):
        return "tiles"
    generation = torch.cuda.get_device_capability(device)[0]
    if generation < 8:  # flash kernels begin with Ampere
        return "tiles"
    if generation == 9 and not dropout and INSTALLED["flash_attn_interface"]:
        return "flash_attn 3"
    if INSTALLED["flash_attn"]:
        return "flash_attn 2"
    if dropout:
        return "tiles"
    return "varlen_attn" if softcap is None else "flex_attention"


def check_backward_offsets(tokens: int, documents: int, heads: int, head_dim: int) -> None:
    """ValueError where flash-attn 2's varlen backward (torch's varlen_attn too) would overflow its 32-bit offsets."""
    size = (tokens + 128 * documents) * heads * (-(-head_dim // 32) * 32)
    if size >= 2**31:
        raise ValueError(
            f"packed_attention: expected (tokens + 128 * documents) * heads * head_dim < 2**31, got {size} "
            f"({tokens} tokens, {documents} documents, {heads} heads of {head_dim}); pack fewer tokens or documents")


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, scale: float | None = None,
    window: int | None = None, softcap: float | None = None, dropout: float = 0.0,
) -> Tensor:
    """q [T, Hq, D], k and v [T, Hk, D], Hk dividing Hq -> [T, Hq, D]: causal attention within each document.

    cu_seqlens: int32 [n+1], document i is tokens cu_seqlens[i] to cu_seqlens[i+1]; max_seqlen: the longest of them.
    scale: D^-½ by default; window: tokens a row sees, itself included; softcap: on the scaled scores; dropout: on the
    probabilities, 0 outside training. q, k, v may be strided views. ValueError on shapes or settings that do not fit.
    """
    if q.dim() != 3 or k.dim() != 3 or k.shape[::2] != q.shape[::2] or q.shape[1] % max(k.shape[1], 1):
        raise ValueError(
            f"packed_attention: expected k [T, Hk, D] to fit q {tuple(q.shape)}, Hk dividing Hq, got {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"packed_attention: expected v of k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or len(cu_seqlens) < 2:
        got = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        raise ValueError(f"packed_attention: expected cu_seqlens int32 [n+1], got {got}")
    if window is not None and window < 1:
        raise ValueError(f"packed_attention: expected window >= 1, got {window}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"packed_attention: expected softcap > 0, got {softcap}")
    if not 0 <= dropout < 1:
        raise ValueError(f"packed_attention: expected dropout in [0, 1), got {dropout}")
    q, k, v = map(autocast_input, (q, k, v))
    name = backend(q.device, q.dtype, softcap, dropout)
    if name in ("varlen_attn", "flash_attn 2") and torch.is_grad_enabled():
        check_backward_offsets(q.shape[0], len(cu_seqlens) - 1, q.shape[1], q.shape[2])
    scale = q.shape[2] ** -0.5 if scale is None else scale
    # a window that spans the longest document hides nothing
    window = None if window is not None and window >= max_seqlen else window
    return BACKENDS[name](q, k, v, cu_seqlens, max_seqlen, scale, window, softcap, dropout)
