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
Products in 16 bits are compiled for every shape they meet, so there documents are laid out with zeros up to few heights.
Measured on one Zen 5 core against one F.scaled_dot_product_attention call per document, 4 heads of 64, forward +
backward, time over SDPA's (below 1 is faster):

    documents of a pack     8 of 60-197    30 of 15-60    2 of 500    1 of 2000
    fp32                       0.75            0.6           0.8          1.1
    bf16                       0.4             0.4           0.6          0.8-1.0

One SDPA call on unequal documents padded to a common length takes 1.2 to 2 times as long as a call per document. Tiles of documents
of one length computed together are slower in fp32, since every group wants copies of its own, and hardly faster in bf16.

On a GPU a variable-length flash kernel does it in one launch: `_attention_gpu.backend` says which. Where none fits, the tiles serve.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._attention_gpu import HEAD_DIMS, backend, gpu_attention, host_bounds
from kernels._autocast import autocast_input, without_autocast
from kernels._dispatch import operator
from kernels._dropout import dropout_mask, kept_fraction

# Rows in a tile: 64 and 192 are within 10% either way, 512 up to a third slower on short documents.
BLOCK = 128
# Rows that a 16-bit tile is rounded up to: eight heights of tiles, whose products are soon compiled.
ROUNDED = 16
# Probabilities saved, in multiples of q's size: to about 400 tokens a document at 64 a head. Recomputing costs 20%.
KEEP = 4


class Settings(NamedTuple):
    """What attention takes beside q, k, v; `bounds` is cu_seqlens as a list, `seed` is None without dropout."""

    bounds: list[int]
    scale: float
    window: int | None
    softcap: float | None
    dropout: float
    seed: int | None


class Tile(NamedTuple):
    """Query rows [start, stop) of a laid-out pack, and the keys [first, stop) that they can see; the first `rows` of these query rows are
    the pack's, from token `token` on."""

    first: int
    start: int
    stop: int
    token: int
    rows: int


class Layout(NamedTuple):
    """Documents one after the other, each followed by zeros up to a multiple of `multiple` rows."""

    bounds: list[int]  # in tokens, and in rows where each document begins; the last entries are their numbers
    places: list[int]
    multiple: int
    token_of: Tensor | None  # int64 [rows], None where rows are tokens
    zeros: Tensor | None  # int64, the rows that are none


# The torch reference. Heads lead and the group of query heads that share a key head lies inside the rows:
# q [Hk, T*G, D] with row t*G + g, k and v [Hk, T, D]; a tile's scores are [Hk, rows*G, keys].


def rounding(dtype: torch.dtype, device: torch.device) -> int:
    """What the rows of a tile are a multiple of: on a CPU a 16-bit product of a shape not seen before is first compiled, for 0.1-0.3 ms."""
    return ROUNDED if device.type == "cpu" and dtype.itemsize == 2 else 1


def rounded(rows: int, multiple: int) -> int:
    return -(-rows // multiple) * multiple


def layout(bounds: list[int], dtype: torch.dtype, device: torch.device) -> Layout:
    """How a pack of these documents is laid out for products of `dtype`."""
    multiple = rounding(dtype, device)
    if multiple == 1:
        return Layout(bounds, bounds, 1, None, None)
    starts = torch.tensor(bounds, device=device)
    sizes = starts.diff().add_(multiple - 1).div_(multiple, rounding_mode="floor").mul_(multiple)
    places = F.pad(sizes.cumsum(0), (1, 0))
    token_of = torch.arange(places[-1], device=device) + (starts - places)[:-1].repeat_interleave(sizes)
    zeros = (token_of >= starts[1:].repeat_interleave(sizes)).nonzero()[:, 0]
    return Layout(bounds, places.tolist(), multiple, token_of.clamp_(max=bounds[-1] - 1), zeros)


def tiles(laid: Layout, window: int | None) -> Iterator[Tile]:
    """Near-equal blocks of rows, at most BLOCK each, document by document."""
    for begin, end, place in zip(laid.bounds, laid.bounds[1:], laid.places):
        step = rounded(math.ceil((end - begin) / max(1, math.ceil((end - begin) / BLOCK))), laid.multiple)
        for token in range(begin, end, max(1, step)):
            rows, start = min(step, end - token), place + token - begin
            first = place if window is None else max(place, start - window + 1)
            yield Tile(first, start, start + rounded(rows, laid.multiple), token, rows)


def heads_first(t: Tensor, groups: int, laid: Layout, dtype: torch.dtype | None = None) -> Tensor:
    """[T, Hk*groups, D] -> a contiguous [Hk, rows*groups, D], laid out."""
    _, heads, dim = t.shape
    if laid.token_of is not None:
        t = t.index_select(0, laid.token_of).index_fill_(0, laid.zeros, 0)
    split = t.reshape(-1, heads // groups, groups * dim).transpose(0, 1)
    return split.to(dtype or t.dtype).reshape(heads // groups, -1, dim).contiguous()


def tile_scores(q: Tensor, k: Tensor, tile: Tile, groups: int, settings: Settings) -> Tensor:
    """z [Hk, rows*G, keys] of scaled queries, hidden pairs at -inf."""
    rows, keys = tile.stop - tile.start, tile.stop - tile.first
    z = torch.bmm(q[:, tile.start * groups:tile.stop * groups], k[:, tile.first:tile.stop].transpose(1, 2))
    if settings.softcap is not None:
        z.div_(settings.softcap).tanh_().mul_(settings.softcap)
    by_row, hidden = z.view(-1, rows, groups, keys), z.new_full((rows, rows), -math.inf)
    # only the last `rows` keys can lie ahead of a row, and only the first `rows` can have left its window
    by_row[..., keys - rows:].add_(hidden.triu(1)[:, None])
    if settings.window is not None:
        by_row[..., :rows].add_(hidden.tril_(tile.start - tile.first - settings.window)[:, None])
    return z


def tile_dropout(p: Tensor, settings: Settings, generator: torch.Generator | None) -> Tensor | None:
    """m for one tile's probabilities; the backward walks the tiles in the same order and so draws the same masks."""
    if generator is None:
        return None
    return dropout_mask(p.shape, settings.dropout, p.dtype, generator).div_(kept_fraction(settings.dropout))


def mask_generator(settings: Settings, device: torch.device) -> torch.Generator | None:
    return None if settings.seed is None else torch.Generator(device).manual_seed(settings.seed)


def keeps_probabilities(settings: Settings, laid: Layout, tokens: int, head_dim: int) -> bool:
    """Whether the forward's probabilities are few enough to save; a softcap's derivative needs the scores anyway."""
    pairs = sum((tile.stop - tile.start) * (tile.stop - tile.first) for tile in tiles(laid, settings.window))
    return settings.softcap is None and pairs <= KEEP * tokens * head_dim


def attention_forward(q: Tensor, k: Tensor, v: Tensor, settings: Settings, laid: Layout, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """o [T, Hq, D], and each tile's P [Hk, rows*G, keys] if `keep`."""
    (tokens, heads, dim), kv_heads = q.shape, k.shape[1]
    groups, fp32 = heads // kv_heads, torch.promote_types(q.dtype, torch.float32)
    Q, K, V = heads_first(q, groups, laid, fp32) * settings.scale, heads_first(k, 1, laid, fp32), heads_first(v, 1, laid)
    out, kept = q.new_empty(tokens, kv_heads, groups * dim), []
    generator = mask_generator(settings, q.device)
    for tile in tiles(laid, settings.window):
        p = tile_scores(Q, K, tile, groups, settings).softmax(-1).to(q.dtype)
        if keep:
            kept.append(p)
        mask = tile_dropout(p, settings, generator)
        o = torch.bmm(p if mask is None else p * mask, V[:, tile.first:tile.stop])
        out[tile.token:tile.token + tile.rows] = o.view(kv_heads, -1, groups * dim)[:, :tile.rows].transpose(0, 1)
    return out.view(q.shape), kept


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: list[Tensor], settings: Settings, laid: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """∂q, ∂k, ∂v for ∂o = grad [T, Hq, D]; sums over tiles are fp32 and rounded once."""
    (tokens, heads, dim), kv_heads = q.shape, k.shape[1]
    groups, fp32 = heads // kv_heads, torch.promote_types(q.dtype, torch.float32)
    Q, K, V, G = (heads_first(t, n, laid) for t, n in ((q, groups), (k, 1), (v, 1), (grad, groups)))
    if not kept:
        Q_scaled, K_scores = Q.to(fp32) * settings.scale, K.to(fp32)
    grad_q = q.new_empty(tokens, kv_heads, groups * dim)
    grad_k, grad_v = torch.zeros_like(K, dtype=fp32), torch.zeros_like(V, dtype=fp32)
    generator = mask_generator(settings, q.device)
    for i, tile in enumerate(tiles(laid, settings.window)):
        rows, keys = slice(tile.start * groups, tile.stop * groups), slice(tile.first, tile.stop)
        if not kept:
            z = tile_scores(Q_scaled, K_scores, tile, groups, settings)
        p = kept[i] if kept else z.softmax(-1).to(q.dtype)
        mask = tile_dropout(p, settings, generator)
        grad_v[:, keys].add_(torch.bmm((p if mask is None else p * mask).transpose(1, 2), G[:, rows]))
        grad_p = torch.bmm(G[:, rows], V[:, keys].transpose(1, 2))
        if mask is not None:
            grad_p.mul_(mask)
        grad_z = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
        if settings.softcap is not None:
            # hidden scores are -inf: clamped, their factor is 0 rather than 0 times infinity
            grad_z.mul_(1 - z.clamp_(min=-settings.softcap).div_(settings.softcap).square_())
        seen = torch.bmm(grad_z, K[:, keys]).view(kv_heads, -1, groups * dim)[:, :tile.rows]
        grad_q[tile.token:tile.token + tile.rows] = seen.transpose(0, 1)
        grad_k[:, keys].add_(torch.bmm(grad_z.transpose(1, 2), Q[:, rows]))
    grad_k, grad_v = (tokens_first(t.to(q.dtype), laid) for t in (grad_k.mul_(settings.scale), grad_v))
    return grad_q.mul_(settings.scale).view(q.shape), grad_k, grad_v


def tokens_first(t: Tensor, laid: Layout) -> Tensor:
    """[Hk, rows, D] -> [T, Hk, D], without the rows that are no token."""
    if laid.token_of is not None:
        t = torch.cat([t[:, place:place + end - begin] for begin, end, place in zip(laid.bounds, laid.bounds[1:], laid.places)], 1)
    return t.transpose(0, 1)


class _Tiles(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, q, k, v, settings):
        laid = layout(settings.bounds, q.dtype, q.device)
        out, kept = attention_forward(q, k, v, settings, laid, keeps_probabilities(settings, laid, q.shape[0], q.shape[2]))
        ctx.save_for_backward(q, k, v, *kept)
        ctx.settings, ctx.laid = settings, laid
        return out

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad):
        q, k, v, *kept = ctx.saved_tensors
        return *attention_backward(grad, q, k, v, kept, ctx.settings, ctx.laid), None


# Under torch.compile the tiles are one opaque node each way, since their number depends on the pack. Nothing is kept for the backward.


def _settings(q: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None, softcap: float | None, dropout: float,
              seed: Tensor | None) -> Settings:
    """ValueError where cu_seqlens does not fit."""
    bounds = host_bounds(cu_seqlens)
    lengths = [end - begin for begin, end in zip(bounds, bounds[1:])]
    if bounds[0] != 0 or bounds[-1] != q.shape[0] or min(lengths) < 0:
        raise ValueError(f"packed_attention: expected cu_seqlens to rise from 0 to {q.shape[0]}, got {bounds}")
    if max(lengths) > max_seqlen:
        raise ValueError(f"packed_attention: expected documents of max_seqlen {max_seqlen} or less, got {max(lengths)}")
    return Settings(bounds, scale, window, softcap, dropout, None if seed is None else int(seed))


@operator(lambda q, *rest: torch.empty_like(q, memory_format=torch.contiguous_format))
def attention_tiles(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None, softcap: float | None,
    dropout: float, seed: Tensor | None,
) -> Tensor:
    """o [T, Hq, D]; seed: int64 on the CPU, for dropout."""
    settings = _settings(q, cu_seqlens, max_seqlen, scale, window, softcap, dropout, seed)
    return attention_forward(q, k, v, settings, layout(settings.bounds, q.dtype, q.device), False)[0]


def _fake_gradients(grad, q, k, v, *rest):
    dk, dv = (t.new_empty(t.transpose(0, 1).shape).transpose(0, 1) for t in (k, v))
    return torch.empty_like(q, memory_format=torch.contiguous_format), dk, dv


@operator(_fake_gradients)
def attention_tiles_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None,
    softcap: float | None, dropout: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """∂q, ∂k, ∂v, from probabilities computed again."""
    settings = _settings(q, cu_seqlens, max_seqlen, scale, window, softcap, dropout, seed)
    return attention_backward(grad, q, k, v, [], settings, layout(settings.bounds, q.dtype, q.device))


def _keep_inputs(ctx, inputs, output):
    q, k, v, cu_seqlens, *ctx.options, seed = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, seed)


def _node_backward(ctx, grad):
    q, k, v, cu_seqlens, seed = ctx.saved_tensors
    return *attention_tiles_backward.node(grad, q, k, v, cu_seqlens, *ctx.options, seed), *[None] * 7


attention_tiles.node.register_autograd(_node_backward, setup_context=_keep_inputs)


def _tiles(q, k, v, cu_seqlens, max_seqlen, scale, window, softcap, dropout) -> Tensor:
    # from the global CPU generator, so that activation checkpointing and resuming draw the same masks; the host needs its value
    seed = torch.randint(2**62, (), device="cpu") if dropout else None
    if torch.compiler.is_compiling():
        return attention_tiles(q, k, v, cu_seqlens, max_seqlen, scale, window, softcap, dropout, seed)
    return _Tiles.apply(q, k, v, _settings(q, cu_seqlens, max_seqlen, scale, window, softcap, dropout, seed))


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
    if not q.device == k.device == v.device == cu_seqlens.device:
        got = ", ".join(str(t.device) for t in (q, k, v, cu_seqlens))
        raise ValueError(f"packed_attention: expected q, k, v and cu_seqlens on one device, got them on {got}")
    q, k, v = map(autocast_input, (q, k, v))
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"packed_attention: expected q, k, v of one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    scale = q.shape[2] ** -0.5 if scale is None else scale
    # a window that spans the longest document hides nothing
    window = None if window is not None and window >= max_seqlen else window
    name = backend(q.device, q.dtype, softcap, dropout)
    if name == "tiles" or not q.shape[0] or q.shape[2] not in HEAD_DIMS:
        return _tiles(q, k, v, cu_seqlens, max_seqlen, scale, window, softcap, dropout)
    return gpu_attention(name, q, k, v, cu_seqlens, max_seqlen, scale, window, softcap, dropout)
