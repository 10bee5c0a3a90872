"""Causal attention over packed documents: a token attends to its own document only.

For a document's rows i, keys j of its own with j <= i, and i - j < window where there is one:

    z_ij = softcap·tanh(s·q_iᵀk_j / softcap)       (no softcap: z_ij = s·q_iᵀk_j)        s = head_dim^-½ by default
    P_ij = exp(z_ij) / (Σ_j exp(z_ij) + exp(sink))          (no sink: P_i = softmax_j(z_ij))
    o_i  = Σ_j m_ij P_ij v_j      m_ij: inverted dropout, 1 without it
    ∂P_ij = m_ij ∂o_iᵀ v_j        ∂z_ij = P_ij (∂P_ij − Σ_j P_ij ∂P_ij)         ∂s_ij = ∂z_ij (1 − (z_ij/softcap)²)
    ∂q_i = s Σ_j ∂s_ij k_j        ∂k_j  = s Σ_i ∂s_ij q_i                       ∂v_j = Σ_i m_ij P_ij ∂o_i
    ∂sink = −Σ_i p_i Σ_j P_ij ∂P_ij                p_i = 1 − Σ_j P_ij, the probability that the sink takes

A head's sink is one more logit of every softmax, and what goes to it is dropped: the column beside the keys has z = sink and ∂P = 0.
With `chunk`, a token attends to its own chunk of its document only (i // chunk == j // chunk, counted inside the document), so each chunk
is a document of its own, and nothing else knows of chunks.

On a CPU the whole pack is one autograd node. It walks tiles of at most BLOCK query rows of one document, each with all the keys they
attend to, so a softmax row is never split. Query heads that share a key head are rows of one matmul: k and v are never repeated.
Probabilities are saved for the backward while they are few (KEEP times q's elements); otherwise each tile is recomputed, so memory stays
linear in the tokens. Scores and softmax are fp32 (fp64 for fp64 inputs) whatever the dtype.

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

# Rows in a tile.
BLOCK = 128
# On a CPU, rows of a 16-bit tile are padded to a multiple of this: oneDNN compiles a matmul per shape, so there are only eight heights.
ROW_MULTIPLE = 16
# Probabilities saved, in multiples of q's size: those of documents of up to about 400 tokens at a head width of 64.
KEEP = 4


class AttentionOptions(NamedTuple):
    """Options of attention; `bounds`: cu_seqlens as a list, cut into chunks; `seed`: None without dropout."""

    bounds: list[int]
    scale: float
    window: int | None
    softcap: float | None
    dropout: float
    seed: int | None


class Tile(NamedTuple):
    """Query rows [start, stop) of a padded pack and the keys [first, stop) that they attend to.

    The first `rows` query rows are tokens, from token `token` on; the others are padding.
    """

    first: int
    start: int
    stop: int
    token: int
    rows: int


class PaddedLayout(NamedTuple):
    """Documents end to end, each padded with zeros to a multiple of `multiple` rows."""

    bounds: list[int]  # the token at which each document begins; last, the number of tokens
    row_starts: list[int]  # the row at which each document begins; last, the number of rows
    multiple: int
    token_index: Tensor | None  # int64 [rows], the token of each row; None without padding
    pad_rows: Tensor | None  # int64, the rows that are padding


# The torch reference. Heads lead and the group of query heads that share a key head lies inside the rows:
# q [Hk, T*G, D] with row t*G + g, k and v [Hk, T, D]; a tile's scores are [Hk, rows*G, keys].


def row_multiple(dtype: torch.dtype, device: torch.device) -> int:
    """Return the multiple to which a tile's rows are padded: above 1 only where matmuls are compiled."""
    return ROW_MULTIPLE if device.type == "cpu" and dtype.itemsize == 2 else 1


def round_up(rows: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `rows`."""
    return -(-rows // multiple) * multiple


def padded_layout(bounds: list[int], dtype: torch.dtype, device: torch.device) -> PaddedLayout:
    """Return the padded layout of a pack of these documents for matmuls of `dtype`."""
    multiple = row_multiple(dtype, device)
    if multiple == 1:
        return PaddedLayout(bounds, bounds, 1, None, None)
    starts = torch.tensor(bounds, device=device)
    sizes = starts.diff().add_(multiple - 1).div_(multiple, rounding_mode="floor").mul_(multiple)
    row_starts = F.pad(sizes.cumsum(0), (1, 0))
    token_index = torch.arange(row_starts[-1], device=device) + (starts - row_starts)[:-1].repeat_interleave(sizes)
    pad_rows = (token_index >= starts[1:].repeat_interleave(sizes)).nonzero()[:, 0]
    return PaddedLayout(bounds, row_starts.tolist(), multiple, token_index.clamp_(max=bounds[-1] - 1), pad_rows)


def tiles(layout: PaddedLayout, window: int | None) -> Iterator[Tile]:
    """Yield tiles of near-equal numbers of rows, at most BLOCK each, document by document."""
    for begin, end, row_start in zip(layout.bounds, layout.bounds[1:], layout.row_starts):
        step = round_up(math.ceil((end - begin) / max(1, math.ceil((end - begin) / BLOCK))), layout.multiple)
        for token in range(begin, end, max(1, step)):
            rows, start = min(step, end - token), row_start + token - begin
            first = row_start if window is None else max(row_start, start - window + 1)
            yield Tile(first, start, start + round_up(rows, layout.multiple), token, rows)


def heads_first(t: Tensor, groups: int, layout: PaddedLayout, dtype: torch.dtype | None = None) -> Tensor:
    """Return t [T, Hk*groups, D] as a contiguous [Hk, rows*groups, D], padded."""
    _, heads, dim = t.shape
    if layout.token_index is not None:
        t = t.index_select(0, layout.token_index).index_fill_(0, layout.pad_rows, 0)
    split = t.reshape(-1, heads // groups, groups * dim).transpose(0, 1)
    return split.to(dtype or t.dtype).reshape(heads // groups, -1, dim).contiguous()


def tile_scores(q: Tensor, k: Tensor, sinks: Tensor | None, tile: Tile, groups: int, options: AttentionOptions) -> Tensor:
    """Return z [Hk, rows*G, keys] of scaled queries, sinks as one more column; masked pairs are -inf."""
    rows, keys = tile.stop - tile.start, tile.stop - tile.first
    z = torch.bmm(q[:, tile.start * groups:tile.stop * groups], k[:, tile.first:tile.stop].transpose(1, 2))
    if options.softcap is not None:
        z.div_(options.softcap).tanh_().mul_(options.softcap)
    by_row, mask = z.view(-1, rows, groups, keys), z.new_full((rows, rows), -math.inf)
    # only the last `rows` keys can be ahead of a row, and only the first `rows` outside its window
    by_row[..., keys - rows:].add_(mask.triu(1)[:, None])
    if options.window is not None:
        by_row[..., :rows].add_(mask.tril_(tile.start - tile.first - options.window)[:, None])
    if sinks is None:
        return z
    column = sinks.to(z.dtype).view(-1, 1, groups, 1).expand(-1, rows, -1, -1)
    return torch.cat([z, column.reshape(-1, rows * groups, 1)], -1)


def tile_dropout(p: Tensor, options: AttentionOptions, generator: torch.Generator | None) -> Tensor | None:
    """Return m for one tile's probabilities, None without dropout.

    The backward walks the tiles in the same order, so it draws the same masks.
    """
    if generator is None:
        return None
    return dropout_mask(p.shape, options.dropout, p.dtype, generator).div_(kept_fraction(options.dropout))


def mask_generator(options: AttentionOptions, device: torch.device) -> torch.Generator | None:
    """Return the generator of the dropout masks, None without dropout."""
    return None if options.seed is None else torch.Generator(device).manual_seed(options.seed)


def keeps_probabilities(options: AttentionOptions, layout: PaddedLayout, tokens: int, head_dim: int) -> bool:
    """Return whether the forward's probabilities are few enough to save.

    Never with a softcap, whose derivative needs the scores anyway.
    """
    pairs = sum((tile.stop - tile.start) * (tile.stop - tile.first) for tile in tiles(layout, options.window))
    return options.softcap is None and pairs <= KEEP * tokens * head_dim


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, options: AttentionOptions, layout: PaddedLayout, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return o [T, Hq, D], and each tile's P [Hk, rows*G, keys], the sinks' column included, if `keep`."""
    (tokens, heads, dim), kv_heads = q.shape, k.shape[1]
    groups, fp32 = heads // kv_heads, torch.promote_types(q.dtype, torch.float32)
    Q, K, V = heads_first(q, groups, layout, fp32) * options.scale, heads_first(k, 1, layout, fp32), heads_first(v, 1, layout)
    out, kept = q.new_empty(tokens, kv_heads, groups * dim), []
    generator = mask_generator(options, q.device)
    for tile in tiles(layout, options.window):
        p = tile_scores(Q, K, sinks, tile, groups, options).softmax(-1).to(q.dtype)
        if keep:
            kept.append(p)
        p = p[..., :tile.stop - tile.first]
        mask = tile_dropout(p, options, generator)
        o = torch.bmm(p if mask is None else p * mask, V[:, tile.first:tile.stop])
        out[tile.token:tile.token + tile.rows] = o.view(kv_heads, -1, groups * dim)[:, :tile.rows].transpose(0, 1)
    return out.view(q.shape), kept


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, kept: list[Tensor], options: AttentionOptions, layout: PaddedLayout
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return ∂q, ∂k, ∂v, ∂sinks for ∂o = grad [T, Hq, D]; sums over tiles are fp32 and rounded once."""
    (tokens, heads, dim), kv_heads = q.shape, k.shape[1]
    groups, fp32 = heads // kv_heads, torch.promote_types(q.dtype, torch.float32)
    Q, K, V, G = (heads_first(t, n, layout) for t, n in ((q, groups), (k, 1), (v, 1), (grad, groups)))
    if not kept:
        Q_scaled, K_scores = Q.to(fp32) * options.scale, K.to(fp32)
    grad_q = q.new_empty(tokens, kv_heads, groups * dim)
    grad_k, grad_v = torch.zeros_like(K, dtype=fp32), torch.zeros_like(V, dtype=fp32)
    grad_sinks = None if sinks is None else q.new_zeros(kv_heads, groups, dtype=fp32)
    generator = mask_generator(options, q.device)
    for i, tile in enumerate(tiles(layout, options.window)):
        rows, keys, width = slice(tile.start * groups, tile.stop * groups), slice(tile.first, tile.stop), tile.stop - tile.first
        if not kept:
            z = tile_scores(Q_scaled, K_scores, sinks, tile, groups, options)
        softmax = kept[i] if kept else z.softmax(-1).to(q.dtype)
        p = softmax[..., :width]
        mask = tile_dropout(p, options, generator)
        grad_v[:, keys].add_(torch.bmm((p if mask is None else p * mask).transpose(1, 2), G[:, rows]))
        grad_p = torch.bmm(G[:, rows], V[:, keys].transpose(1, 2))
        if mask is not None:
            grad_p.mul_(mask)
        if sinks is not None:
            grad_p = F.pad(grad_p, (0, 1))
        grad_z = torch.ops.aten._softmax_backward_data(grad_p, softmax, -1, p.dtype)
        if sinks is not None:
            grad_sinks.add_(grad_z[..., -1].view(kv_heads, -1, groups).sum(1, dtype=fp32))
            grad_z = grad_z[..., :width]
        if options.softcap is not None:
            # masked scores are -inf: clamped, their factor is 0 rather than 0 times infinity
            grad_z.mul_(1 - z[..., :width].clamp_(min=-options.softcap).div_(options.softcap).square_())
        grad_rows = torch.bmm(grad_z, K[:, keys]).view(kv_heads, -1, groups * dim)[:, :tile.rows]
        grad_q[tile.token:tile.token + tile.rows] = grad_rows.transpose(0, 1)
        grad_k[:, keys].add_(torch.bmm(grad_z.transpose(1, 2), Q[:, rows]))
    grad_k, grad_v = (tokens_first(t.to(q.dtype), layout) for t in (grad_k.mul_(options.scale), grad_v))
    grad_sinks = None if sinks is None else grad_sinks.view(-1).to(sinks.dtype)
    return grad_q.mul_(options.scale).view(q.shape), grad_k, grad_v, grad_sinks


def tokens_first(t: Tensor, layout: PaddedLayout) -> Tensor:
    """Return t [Hk, rows, D] as [T, Hk, D], without padding."""
    if layout.token_index is not None:
        documents = zip(layout.row_starts, layout.bounds, layout.bounds[1:])
        t = torch.cat([t[:, row_start:row_start + end - begin] for row_start, begin, end in documents], 1)
    return t.transpose(0, 1)


class _Tiles(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, q, k, v, sinks, options):
        layout = padded_layout(options.bounds, q.dtype, q.device)
        out, kept = attention_forward(q, k, v, sinks, options, layout, keeps_probabilities(options, layout, q.shape[0], q.shape[2]))
        ctx.save_for_backward(q, k, v, sinks, *kept)
        ctx.options, ctx.layout = options, layout
        return out

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad):
        q, k, v, sinks, *kept = ctx.saved_tensors
        return *attention_backward(grad, q, k, v, sinks, kept, ctx.options, ctx.layout), None


# Under torch.compile the tiles are one opaque node each way, since their number depends on the pack. No probabilities are saved.


def _options(q: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None, chunk: int | None, softcap: float | None,
             dropout: float, seed: Tensor | None) -> AttentionOptions:
    """Return the options; raise ValueError where cu_seqlens does not fit."""
    bounds = host_bounds(cu_seqlens)
    lengths = [end - begin for begin, end in zip(bounds, bounds[1:])]
    if bounds[0] != 0 or bounds[-1] != q.shape[0] or min(lengths) < 0:
        raise ValueError(f"packed_attention: expected cu_seqlens to rise from 0 to {q.shape[0]}, got {bounds}")
    if max(lengths) > max_seqlen:
        raise ValueError(f"packed_attention: expected documents of max_seqlen {max_seqlen} or less, got {max(lengths)}")
    if chunk is not None:
        bounds = [edge for begin, end in zip(bounds, bounds[1:]) for edge in range(begin, end, chunk)] + bounds[-1:]
    return AttentionOptions(bounds, scale, window, softcap, dropout, None if seed is None else int(seed))


@operator(lambda q, *rest: torch.empty_like(q, memory_format=torch.contiguous_format))
def attention_tiles(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None,
    chunk: int | None, softcap: float | None, dropout: float, seed: Tensor | None,
) -> Tensor:
    """Return o [T, Hq, D]; seed: int64 on the CPU, for dropout."""
    options = _options(q, cu_seqlens, max_seqlen, scale, window, chunk, softcap, dropout, seed)
    return attention_forward(q, k, v, sinks, options, padded_layout(options.bounds, q.dtype, q.device), False)[0]


def _fake_gradients(grad, q, k, v, sinks, *rest):
    dk, dv = (t.new_empty(t.transpose(0, 1).shape).transpose(0, 1) for t in (k, v))
    return torch.empty_like(q, memory_format=torch.contiguous_format), dk, dv, q.new_empty(0) if sinks is None else torch.empty_like(sinks)


@operator(_fake_gradients)
def attention_tiles_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    window: int | None, chunk: int | None, softcap: float | None, dropout: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ∂q, ∂k, ∂v, ∂sinks from recomputed probabilities; without sinks, their gradient is empty."""
    options = _options(q, cu_seqlens, max_seqlen, scale, window, chunk, softcap, dropout, seed)
    *grads, grad_sinks = attention_backward(grad, q, k, v, sinks, [], options, padded_layout(options.bounds, q.dtype, q.device))
    return *grads, q.new_empty(0) if sinks is None else grad_sinks


def _save_inputs(ctx, inputs, output):
    q, k, v, sinks, cu_seqlens, *ctx.options, seed = inputs
    ctx.save_for_backward(q, k, v, sinks, cu_seqlens, seed)


def _node_backward(ctx, grad):
    q, k, v, sinks, cu_seqlens, seed = ctx.saved_tensors
    *grads, grad_sinks = attention_tiles_backward.node(grad, q, k, v, sinks, cu_seqlens, *ctx.options, seed)
    return *grads, None if sinks is None else grad_sinks, *[None] * 8


attention_tiles.node.register_autograd(_node_backward, setup_context=_save_inputs)


def _tiles(q, k, v, sinks, cu_seqlens, max_seqlen, scale, window, chunk, softcap, dropout) -> Tensor:
    # from the global CPU generator, so that activation checkpointing and resuming draw the same masks; the host needs its value
    seed = torch.randint(2**62, (), device="cpu") if dropout else None
    if torch.compiler.is_compiling():
        return attention_tiles(q, k, v, sinks, cu_seqlens, max_seqlen, scale, window, chunk, softcap, dropout, seed)
    return _Tiles.apply(q, k, v, sinks, _options(q, cu_seqlens, max_seqlen, scale, window, chunk, softcap, dropout, seed))


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, scale: float | None = None,
    window: int | None = None, chunk: int | None = None, softcap: float | None = None, sinks: Tensor | None = None, dropout: float = 0.0,
) -> Tensor:
    """Return causal attention within each document [T, Hq, D], of q [T, Hq, D] and k, v [T, Hk, D].

    Hk divides Hq. cu_seqlens: int32 [n+1], document i is tokens cu_seqlens[i] to cu_seqlens[i+1]; max_seqlen: the length of the longest.
    scale: D^-½ by default; window: tokens that a token attends to, itself included; chunk: tokens of a chunk, beyond which a token sees
    nothing; softcap: on the scaled scores; sinks [Hq]: a logit per head in each softmax's denominator, of any floating dtype; dropout: on
    the probabilities, 0 outside training. q, k, v may be strided views. Raises ValueError for shapes or options that do not fit.
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
    if chunk is not None and chunk < 1:
        raise ValueError(f"packed_attention: expected chunk >= 1, got {chunk}")
    if sinks is not None and (sinks.shape != q.shape[1:2] or not sinks.is_floating_point()):
        raise ValueError(f"packed_attention: expected floating sinks [{q.shape[1]}], got {sinks.dtype} {tuple(sinks.shape)}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"packed_attention: expected softcap > 0, got {softcap}")
    if not 0 <= dropout < 1:
        raise ValueError(f"packed_attention: expected dropout in [0, 1), got {dropout}")
    tensors = [t for t in (q, k, v, cu_seqlens, sinks) if t is not None]
    if any(t.device != q.device for t in tensors):
        got = ", ".join(str(t.device) for t in tensors)
        raise ValueError(f"packed_attention: expected q, k, v, cu_seqlens and sinks on one device, got them on {got}")
    q, k, v = map(autocast_input, (q, k, v))
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"packed_attention: expected q, k, v of one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    scale = q.shape[2] ** -0.5 if scale is None else scale
    # a chunk or window that spans the longest document masks nothing
    chunk, window = (None if size is not None and size >= max_seqlen else size for size in (chunk, window))
    name = backend(q.device, q.dtype, softcap, dropout, sinks is not None)
    if name == "tiles" or not q.shape[0] or not HEAD_DIMS[0] <= q.shape[2] <= HEAD_DIMS[1]:
        return _tiles(q, k, v, sinks, cu_seqlens, max_seqlen, scale, window, chunk, softcap, dropout)
    return gpu_attention(name, q, k, v, sinks, cu_seqlens, max_seqlen, scale, window, chunk, softcap, dropout)
