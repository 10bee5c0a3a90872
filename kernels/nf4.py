"""Dequantise NF4, the 4-bit weights of QLoRA, in bitsandbytes' layout.

NF4 is defined in section 3 of Dettmers et al., https://arxiv.org/abs/2305.14314. A weight W [N, K] is divided, row after row, into
blocks of 64 elements (the last may be shorter). An element of block b with code c is

    W = q[c] · m(b)        q: 16 quantiles of a normal distribution, in [−1, 1]        m(b): the block's largest magnitude

With double quantisation m takes one byte a(b) per block, an index into a table t of 256 values, a scale s per 256 blocks, and an offset o:

    m(b) = t[a(b)] · s(b div 256) + o

Every product and sum is rounded to fp32 and the result once more to the wanted dtype: bit-identical to bitsandbytes on a CPU. (Where K is
even but rows do not end with a block, bitsandbytes 0.50.2 pairs elements with the magnitudes of other blocks, on a CPU with AVX-512.)
One pass dequantises m and the weight; bitsandbytes first writes m in fp32. Quantising is left to bitsandbytes, once per run.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kernels._dispatch import operator, serving
from kernels._launch import ANY, Launch, cdiv, constexpr, jit, launch, pick, tl

GROUP = 256  # blocks that share one scale of their doubly quantised magnitudes
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# q of bitsandbytes: fp32, with the digits that give exactly its bits.
QUANTILES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


class Nf4(NamedTuple):
    """A frozen [N, K] weight in bitsandbytes' NF4 layout."""

    codes: Tensor  # uint8, ceil(N·K / 2) of any shape: two codes a byte, the first in the high four bits
    absmax: Tensor  # m, fp32 [blocks]; doubly quantised: a, uint8 [blocks]
    nested_code: Tensor | None  # t, fp32 [256]
    nested_absmax: Tensor | None  # s, fp32 [ceil(blocks / 256)]
    offset: Tensor | None  # o, an fp32 scalar
    shape: tuple[int, int]  # N, K
    dtype: torch.dtype  # of the weight before it was quantised, and by default of the dequantised weight
    blocksize: int

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.codes, self.absmax, self.nested_code, self.nested_absmax, self.offset) if t is not None)


@cache
def _quantiles(device: torch.device) -> Tensor:
    return torch.tensor(QUANTILES, device=device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """Return the two fp32 values of every byte as one int64 each, so that one lookup gets both."""
    byte = torch.arange(256, device=device)
    return _quantiles(device)[torch.stack([byte >> 4, byte & 15], dim=1)].view(torch.int64).flatten()


def dequantize_nf4_reference(weight: Nf4, dtype: torch.dtype) -> Tensor:
    """Return the dense weight [N, K], looking up pairs of values."""
    rows, columns = weight.shape
    total, size = rows * columns, weight.blocksize
    if not total:
        return torch.empty(weight.shape, dtype=dtype, device=weight.device)
    values = torch.index_select(_pairs(weight.device), 0, weight.codes.flatten().int()).view(torch.float32)[:total]
    whole = total - total % size
    magnitudes = _magnitudes(weight)
    values[:whole].view(-1, size).mul_(magnitudes[: whole // size, None])
    values[whole:].mul_(magnitudes[-1])
    return values.view(rows, columns).to(dtype)


def _magnitudes(weight: Nf4) -> Tensor:
    """Return m, fp32 [blocks]."""
    if weight.nested_code is None:
        return weight.absmax
    scales = weight.nested_absmax.repeat_interleave(GROUP)[: weight.absmax.numel()]
    return weight.nested_code[weight.absmax.int()] * scales + weight.offset


# ---------------------------------------------------------------- Triton


@jit
def _magnitude(absmax, nested_code, nested_absmax, offset, block, inside, GROUP: constexpr):
    if nested_code is None:
        m = tl.load(absmax + block, mask=inside, other=0.0)
    else:
        index = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        product = tl.load(nested_code + index) * tl.load(nested_absmax + block // GROUP, mask=inside, other=0.0)
        lowest: constexpr = -3.4028234663852886e38  # below it there is nothing: this keeps product + offset from becoming one fma
        m = tl.maximum(product, lowest, propagate_nan=tl.PropagateNan.ALL) + tl.load(offset)
    return m


@jit
def _dequantize_nf4_kernel(codes, absmax, nested_code, nested_absmax, offset, quantiles, out, words, GROUP: constexpr, BLOCKSIZE: constexpr,
                           NIBBLES: constexpr, BLOCK: constexpr):
    """Write out [words · NIBBLES]: one program per BLOCK times four words of codes.

    A word is an int32 of 8 codes or a byte of 2. Four words never straddle two blocks, so m is computed once for them; a thread loads 16
    bytes of codes and stores 16 at a time. q is looked up in shared memory, where 32 lanes read 16 words without bank conflicts: fewer
    machine instructions than global loads, shuffles or selects.
    """
    four = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word = four[:, None] * 4 + tl.arange(0, 4)[None, :]  # (BLOCK, 4)
    inside = word < words

    packed = tl.load(codes + word, mask=inside, other=0)
    m = _magnitude(absmax, nested_code, nested_absmax, offset, four * (4 * NIBBLES) // BLOCKSIZE, four * 4 < words, GROUP)

    nibble = tl.arange(0, NIBBLES)  # of a little-endian word, in the order of the elements: high before low
    code = (packed[:, :, None] >> ((nibble ^ 1) * 4)[None, None, :]) & 15
    q = tl.gather(tl.load(quantiles + tl.arange(0, 16)), tl.reshape(code.to(tl.int32), (BLOCK * 4 * NIBBLES,)), 0)
    values = tl.reshape(q, (BLOCK, 4, NIBBLES)) * m[:, None, None]

    at = word[:, :, None] * NIBBLES + nibble[None, None, :]
    tl.store(out + at, values.to(out.dtype.element_ty), mask=inside[:, :, None])


LAUNCH = {(ANY, None): Launch({"BLOCK": 128}, 4)}


def _fake(codes, absmax, nested_code, nested_absmax, offset, rows, columns, blocksize, dtype):
    return codes.new_empty(rows, columns, dtype=dtype)


@operator(_fake)
def dequantize_nf4_forward(codes: Tensor, absmax: Tensor, nested_code: Tensor | None, nested_absmax: Tensor | None, offset: Tensor | None,
                           rows: int, columns: int, blocksize: int, dtype: torch.dtype) -> Tensor:
    """Return W [rows, columns], dense, from the backend that serves the codes' device: one launch."""
    weight = Nf4(codes, absmax, nested_code, nested_absmax, offset, (rows, columns), dtype, blocksize)
    if serving(codes.device, dtype) != "triton":
        return dequantize_nf4_reference(weight, dtype)
    total = rows * columns
    # with an odd number of elements, the second code of the last byte is written beyond the last of them
    out = torch.empty(total + total % 2, dtype=dtype, device=codes.device)
    wide = codes.numel() % 4 == 0 and codes.data_ptr() % 16 == 0
    words, nibbles = (codes.flatten().view(torch.int32), 8) if wide else (codes, 2)
    settings = pick(LAUNCH, total, codes.device)
    grid = cdiv(words.numel(), 4 * settings.blocks["BLOCK"]),
    launch(_dequantize_nf4_kernel, grid, settings, words, absmax, nested_code, nested_absmax, offset, _quantiles(codes.device), out,
           words.numel(), GROUP=GROUP, BLOCKSIZE=blocksize, NIBBLES=nibbles)
    return out[:total].view(rows, columns)


def _check(weight: Nf4, dtype: torch.dtype) -> None:
    """Raise ValueError where the tensors do not fit each other; their values are not checked."""
    if len(weight.shape) != 2:
        raise ValueError(f"dequantize_nf4: expected a shape of two sizes, got {tuple(weight.shape)}")
    if weight.blocksize not in BLOCKSIZES:
        raise ValueError(f"dequantize_nf4: expected a blocksize in {BLOCKSIZES}, got {weight.blocksize}")
    if not dtype.is_floating_point:
        raise ValueError(f"dequantize_nf4: expected a floating dtype, got {dtype}")
    nested = (weight.nested_code, weight.nested_absmax, weight.offset)
    if any(t is None for t in nested) != all(t is None for t in nested):
        raise ValueError("dequantize_nf4: expected all of nested_code, nested_absmax and offset, or none, got some")
    total = weight.shape[0] * weight.shape[1]
    blocks = cdiv(total, weight.blocksize)
    tensors = {"codes": (weight.codes, torch.uint8, cdiv(total, 2))}
    if nested[0] is None:
        tensors["absmax"] = weight.absmax, torch.float32, blocks
    else:
        tensors["absmax"] = weight.absmax, torch.uint8, blocks
        tensors["nested_code"] = weight.nested_code, torch.float32, 256
        tensors["nested_absmax"] = weight.nested_absmax, torch.float32, cdiv(blocks, GROUP)
        tensors["offset"] = weight.offset, torch.float32, 1
    for name, (t, expected, size) in tensors.items():
        if t.dtype != expected or t.numel() != size or t.device != weight.device or not t.is_contiguous():
            raise ValueError(f"dequantize_nf4: expected {name} of {size} contiguous {expected} on {weight.device} for a weight of "
                             f"{tuple(weight.shape)} in blocks of {weight.blocksize}, got {tuple(t.shape)} {t.dtype} on {t.device}")


def dequantize_nf4(weight: Nf4, dtype: torch.dtype | None = None) -> Tensor:
    """Return the dense weight [N, K], a new tensor in `dtype` (default: weight.dtype), without a gradient.

    Raises ValueError where the tensors of `weight` do not fit each other.
    """
    dtype = weight.dtype if dtype is None else dtype
    _check(weight, dtype)
    codes, absmax, nested_code, nested_absmax, offset, (rows, columns), _, blocksize = weight
    return dequantize_nf4_forward(codes, absmax, nested_code, nested_absmax, offset, rows, columns, blocksize, dtype)


def _aot() -> None:
    rows, columns = 14336, 4096
    blocks = rows * columns // 64
    codes, absmax = (torch.empty(n, dtype=torch.uint8, device="meta") for n in (rows * columns // 2, blocks))
    nested_code, nested_absmax, offset = (torch.empty(s, device="meta") for s in ((256,), (blocks // GROUP,), ()))
    dequantize_nf4(Nf4(codes, absmax, nested_code, nested_absmax, offset, (rows, columns), torch.bfloat16, 64))


AOT = {"nf4": _aot}
