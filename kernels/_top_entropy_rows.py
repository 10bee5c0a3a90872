"""Compute EAFT's weights of rows of logits, normalised entropies, for `linear_cross_entropy`.

For the raw logits y of a row, their z (kernels/_cross_entropy_rows.py) and the K = 20 largest z, or all V if there are fewer:

    q = softmax of these K alone            weight = −Σ q log q / log K, between 0 (one token has it all) and 1 (all K are alike)

It is that of EAFT (Diao et al., arXiv 2601.02151), whose authors' code divides by 3 instead of by log 20 = 2.996. The entropy of the whole
vocabulary is no substitute: it is larger wherever the K hold less than all of the probability, and has no bound that fits it.

One program per row. It reads the row once for the largest logit of each of some groups of columns, and then takes the largest of these K
times: each time the group that had it is read again for its next one, and equal ones are taken together.
"""

import math

import torch
from torch import Tensor

from kernels._cross_entropy_rows import ALIGNED, Loss, _transformed, new_logits, statistics_dtype, transform_factors
from kernels._dispatch import triton_serves
from kernels._launch import ANY, Launch, cdiv, constexpr, jit, launch, next_power_of_2, pick, tl

K = 20


def top_entropy_rows_reference(logits: Tensor, loss: Loss) -> Tensor:
    """Return the entropies [n], in nats, of the K largest of logits [n, V], in the statistics dtype."""
    z = logits.topk(min(K, logits.shape[1]), 1, largest=loss.logit_scale >= 0, sorted=False).values.to(statistics_dtype(logits))
    z = z * loss.logit_scale
    if loss.softcap is not None:
        z = torch.tanh(z / loss.softcap) * loss.softcap
    return torch.special.entr(torch.softmax(z / loss.temperature, 1)).sum(1)


# ---------------------------------------------------------------- Triton


@jit
def _top_entropy_kernel(logits, entropies, stride, V, sign, inner, outer, SOFTCAP: constexpr, TOP: constexpr, CHUNKS: constexpr,
                        BLOCK: constexpr, GROUP: constexpr, ALIGNED: constexpr):
    """Write the entropy of the TOP largest z of row i of logits [n, V].

    sign is that of the logit scale, so that sign·y orders as z does.
    """
    i = tl.program_id(0).to(tl.int64)
    logits += i * stride
    width = (V + ALIGNED - 1) // ALIGNED * ALIGNED
    group = tl.arange(0, BLOCK // GROUP)
    lane = tl.arange(0, GROUP)[None, :]
    top = tl.full([BLOCK // GROUP], float("-inf"), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + GROUP * group[:, None] + lane
        y = sign * tl.load(logits + column, mask=column < width, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.max(tl.where(column < V, y, float("-inf")), 1))

    peak = _transformed(sign * tl.max(top, 0), inner, outer, SOFTCAP)[0]
    left = TOP
    mass = 0.0
    moment = 0.0
    for _ in range(0, TOP):
        largest, best = tl.max(top, 0, return_indices=True)
        column = BLOCK * tl.arange(0, CHUNKS)[:, None] + GROUP * best + lane
        y = sign * tl.load(logits + column, mask=column < width, other=0.0).to(tl.float32)
        y = tl.where(column < V, y, float("-inf"))
        taken = tl.where(largest > float("-inf"), tl.minimum(tl.sum((y == largest).to(tl.int32)), left), 0)
        left -= taken
        distance = tl.maximum(_transformed(sign * largest, inner, outer, SOFTCAP)[0] - peak, -1e30)
        e = taken * tl.exp(distance)
        mass += e
        moment += e * distance
        top = tl.where(group == best, tl.max(tl.where(y < largest, y, float("-inf"))), top)
    tl.store(entropies + i, tl.log(mass) - moment / mass)


# The loop waits for reductions and loads of a group: narrow programs, so that others run meanwhile.
LAUNCH = {(ANY, 512): Launch({"BLOCK": 512}, 1), (ANY, 4096): Launch({"BLOCK": 2048}, 2), (ANY, None): Launch({"BLOCK": 8192}, 8)}


def top_entropy_weights(logits: Tensor, loss: Loss) -> Tensor:
    """Return the weights [n], in the statistics dtype, of rows of logits [n, V] from `new_logits`."""
    n, V = logits.shape
    if V == 1:
        return logits.new_zeros(n, dtype=statistics_dtype(logits))
    if not triton_serves(logits):
        return top_entropy_rows_reference(logits, loss).div_(math.log(min(K, V)))
    entropies = torch.empty(n, dtype=torch.float32, device=logits.device)
    settings = pick(LAUNCH, V, logits.device)
    launch(_top_entropy_kernel, (n,), settings, logits, entropies, logits.stride(0), V, math.copysign(1.0, loss.logit_scale),
           *transform_factors(loss), SOFTCAP=loss.softcap is not None, TOP=K, CHUNKS=next_power_of_2(cdiv(V, settings.blocks["BLOCK"])),
           GROUP=16 // logits.itemsize, ALIGNED=ALIGNED)
    return entropies.div_(math.log(min(K, V)))


def _aot(vocabulary: int, loss: Loss):
    top_entropy_weights(new_logits(2048, vocabulary, torch.empty(0, dtype=torch.bfloat16, device="meta")), loss)


AOT = {
    "top entropy rows": lambda: _aot(128256, Loss()),
    "top entropy rows, every option": lambda: _aot(262145, Loss(0.1, 1e-4, 30.0, 1.0, 0.7)),
}
