"""Draw dropout masks from a seed, so that the backward recomputes them instead of saving them.

The seed comes from torch's default generator. The torch form seeds a generator with it. The Triton form has no state: element
(row, column) of mask number `stream` is

    lane column % 8 of Philox4x32(key = seed, counter = (column // 8, row's high half, row's low half, stream)) < 2¹⁶ · fraction kept

so any kernel, whatever its tiles, can compute any part of a mask. Philox with 7 rounds passes BigCrush (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC11, table 2); its four 32-bit words are eight lanes of 16 bits. A thread that loads eight
neighbouring columns computes the draw that decides them, so no value changes threads; the first two rounds multiply per row and per
column, not per element.
"""

import functools

import torch
from torch import Tensor

from kernels._dispatch import operator, triton_serves
from kernels._launch import ANY, Launch, cdiv, constexpr, jit, launch, pick, tl

RESOLUTION = 1 << 16  # of the fraction kept
OFFSETS = 4  # of a generator's stream that one seed takes, the least step that torch allows
SEEDS = 256  # drawn in one launch
SALT = 0x5EED  # sets the draws of seeds apart from a generator's others


def draw_seed(device: torch.device) -> Tensor:
    """Return a seed, int64 [] on `device`, from its default generator.

    The seed stays on the device: torch.compile traces the draw, a captured graph draws a new one in every replay, and activation
    checkpointing, which restores the generator, draws the same one again. Otherwise a GPU draws SEEDS of them in one launch: which one it
    is follows from the generator's state alone.
    """
    if device.type != "cuda" or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return torch.randint(2**62, (), device=device)
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    offset = generator.get_offset()
    generator.set_offset(offset + OFFSETS)
    block, place = divmod(offset // OFFSETS, SEEDS)
    return _seeds(index, generator.initial_seed(), block)[place]


@functools.lru_cache(maxsize=16)
def _seeds(index: int, seed: int, block: int) -> Tensor:
    """Draw block number `block` of a generator's seeds, int64 [SEEDS] on the GPU of this index.

    The draw is no other generator's: a step's backward may come back to it, when activation checkpointing recomputes a layer.
    """
    generator = torch.Generator(torch.device("cuda", index))
    generator.manual_seed((seed ^ SALT) % 2**63)
    generator.set_offset(block * OFFSETS * SEEDS)
    return torch.randint(2**62, (SEEDS,), device=generator.device, generator=generator)


def lanes_kept(dropout: float) -> int:
    """Return how many of the 2¹⁶ values of a lane keep their element: 2¹⁶ only where nothing is dropped."""
    return min(max(round((1 - dropout) * RESOLUTION), 1), RESOLUTION - 1) if dropout else RESOLUTION


def kept_fraction(dropout: float) -> float:
    """Return 1 - dropout, rounded to 2⁻¹⁶, the resolution of the masks."""
    return lanes_kept(dropout) / RESOLUTION


def dropout_mask(shape: torch.Size, dropout: float, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return a mask of ones, with probability `kept_fraction(dropout)`, and zeros.

    The four 16-bit lanes of one 64-bit draw decide four elements, which is faster than bernoulli_.
    """
    n = shape.numel()
    draws = torch.empty(-(-n // 4), dtype=torch.int64, device=generator.device)
    draws.random_(-(2**63), None, generator=generator)
    threshold = lanes_kept(dropout) - RESOLUTION // 2
    # compared straight into x's dtype: multiplying with a bool mask is slower
    return torch.lt(draws.view(torch.int16)[:n].view(shape), threshold, out=draws.new_empty(shape, dtype=dtype))


# ---------------------------------------------------------------- Triton


@jit
def philox(key, c0, c1, c2, c3):
    """Return four uint32 words of Philox4x32-7 for a 64-bit key and uint32 counters that broadcast.

    One 64-bit multiplication gives both halves that a round needs, where tl.philox multiplies twice.
    """
    k0, k1 = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    for _ in tl.static_range(7):
        p0, p2 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1, c2, c3 = (p2 >> 32).to(tl.uint32) ^ c1 ^ k0, p2.to(tl.uint32), (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@jit
def kept(key, stream, rows, column, lanes, BLOCK: constexpr):
    """Return whether columns [column, column + BLOCK) of the int64 `rows` are kept, [rows, BLOCK].

    column and BLOCK are multiples of 8.
    """
    octets = (column // 8 + tl.arange(0, BLOCK // 8)).to(tl.uint32)[None, :]
    low, high = rows.to(tl.uint32)[:, None], (rows >> 32).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = philox(key, octets, high, low, stream)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [rows.shape[0], BLOCK]) < lanes


@jit
def _mask_kernel(mask, seed, stream, lanes, T, K, BLOCK_M: constexpr, BLOCK_K: constexpr):
    """Write mask [T, K] of ones and zeros."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_K
    columns = first + tl.arange(0, BLOCK_K)
    keep = kept(tl.load(seed), stream, rows, first, lanes, BLOCK_K)
    tl.store(mask + rows[:, None] * K + columns[None, :], keep.to(tl.float32), mask=(rows < T)[:, None] & (columns < K)[None, :])


MASK = {(ANY, None): Launch({"BLOCK_M": 16, "BLOCK_K": 256}, 4)}


@operator(lambda x, seed, stream, dropout: x.new_empty(x.shape))
def draw_mask(x: Tensor, seed: Tensor, stream: int, dropout: float) -> Tensor:
    """Return mask number `stream` of a seed, ones and zeros in x's dtype, for x [T, K].

    It is the mask that the backend of x applies everywhere. The torch form reads the seed, so on a GPU (fp64,
    KERNELS_BACKEND=reference) it waits for the device.
    """
    if not triton_serves(x):
        return dropout_mask(x.shape, dropout, x.dtype, torch.Generator(x.device).manual_seed(int(seed) + stream))
    mask = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (T, K), settings = x.shape, pick(MASK, x.shape[1], x.device)
    grid = cdiv(T, settings.blocks["BLOCK_M"]), cdiv(K, settings.blocks["BLOCK_K"])
    launch(_mask_kernel, grid, settings, mask, seed, stream, lanes_kept(dropout), T, K)
    return mask


AOT = {"dropout mask": lambda: draw_mask(torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta"),
                                         torch.empty((), dtype=torch.int64, device="meta"), 0, 0.05)}
