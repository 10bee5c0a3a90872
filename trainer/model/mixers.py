"""Run the modules that carry a state from token to token sample by sample, inside a pack.

Convolutions, gated delta nets and state spaces know no samples: in a pack, one would go on from the state that the one before it left.
Only these modules leave the pack; projections outside them, MLPs, experts, norms, head and attention stay one call. Samples of like
length run as one batch, padded at their end, which a causal module does not see.

Shapes: T tokens of a pack, n samples of a batch, L tokens of the longest of them.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from kernels._attention_gpu import host_bounds, per_pack
from trainer.model.pack_context import run_pack, running_pack

PADDING = 0.25  # a batch has samples of at least (1 - PADDING) times its longest sample's length, or at most SHORT tokens shorter
SHORT = 16


class Batches(NamedTuple):
    """A pack's samples in batches of like length."""

    tokens: list[Tensor]  # int64[n, L] for each batch: the tokens in it; a sample's last one repeats as padding
    places: Tensor  # int64[T], where each token is among the batches' n * L places, end to end


def run_by_sample(mixer: nn.Module) -> None:
    """Let `mixer` run each sample of a pack by itself; patching again is a no-op."""
    mixer.forward = partial(by_sample_forward, mixer)


def runs_by_sample(module: nn.Module) -> bool:
    """Return whether `run_by_sample` was called on this module."""
    return isinstance(module.forward, partial) and module.forward.func is by_sample_forward


@torch.compiler.disable  # the number of batches and their sizes change from pack to pack
def by_sample_forward(mixer: nn.Module, *args, **kwargs):
    """Compute the class's own forward on each sample of the running pack.

    Without a pack each row is one sample. Arguments [1,T,...] are divided, also inside tuples; others are passed on. Outputs [n,L,...]
    are put together again.
    """
    if (pack := running_pack()) is None:
        return type(mixer).forward(mixer, *args, **kwargs)
    batches = per_pack(pack.cu_seqlens, "batches for mixers", lambda: batches_of_like_length(pack.cu_seqlens))
    total = batches.places.shape[0]
    outputs = []
    with run_pack(None):  # now each row is one sample
        for tokens in batches.tokens:
            batch_args, batch_kwargs = tree_map(partial(_take, tokens=tokens, total=total), (args, kwargs))
            outputs.append(tree_flatten(type(mixer).forward(mixer, *batch_args, **batch_kwargs)))
    leaves = [_put_together(parts, batches) for parts in zip(*(leaves for leaves, _ in outputs), strict=True)]
    return tree_unflatten(leaves, outputs[0][1])


def _take(value: object, tokens: Tensor, total: int) -> object:
    """Return a batch [n,L,...] of a tensor [1,T,...], or [k,n,L,...] of [k,1,T,...]; else `value`."""
    if isinstance(value, Tensor) and value.shape[:2] == (1, total):
        return value[0, tokens]
    if isinstance(value, Tensor) and value.ndim > 2 and value.shape[1:3] == (1, total):
        return value[:, 0, tokens]
    return value


def _put_together(parts: tuple, batches: Batches) -> object:
    """Return outputs [n,L,...] of all batches as [1,T,...]; None for anything else."""
    if not isinstance(parts[0], Tensor) or parts[0].shape[:2] != batches.tokens[0].shape:
        return None
    return torch.cat([part.flatten(0, 1) for part in parts]).index_select(0, batches.places)[None]


def batches_of_like_length(cu_seqlens: Tensor) -> Batches:
    """Divide a pack's samples into batches; on a GPU this waits for the device."""
    bounds = torch.tensor(host_bounds(cu_seqlens))
    lengths, order = bounds.diff().sort(descending=True, stable=True)
    places, tokens, begin, filled = torch.empty(int(bounds[-1]), dtype=torch.int64), [], 0, 0
    while begin < len(order) and lengths[begin]:
        longest = int(lengths[begin])
        shortest = longest - max(SHORT, int(PADDING * longest))
        end = begin + int((lengths[begin:] >= max(1, shortest)).sum())
        starts, offset = bounds[order[begin:end], None], torch.arange(longest)
        real = offset < lengths[begin:end, None]
        taken = starts + torch.minimum(offset, lengths[begin:end, None] - 1)
        places[taken[real]] = filled + real.flatten().nonzero()[:, 0]
        tokens.append(taken.to(cu_seqlens.device))
        begin, filled = end, filled + taken.numel()
    return Batches(tokens, places.to(cu_seqlens.device))
