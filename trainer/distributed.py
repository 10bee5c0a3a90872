"""Data parallelism under `torchrun`: who we are, and the one collective of a step.

Every rank derives the same plan of steps from the same seed and takes every world-size-th pack of a step, so the step's
supervised weight is known to all without asking. Gradients are sums over packs already divided by that weight: adding the
flat gradient vectors of all ranks is the whole of synchronisation, and a rank may even have no pack in a step.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensors: list[Tensor]) -> None:
        """Add up each tensor over the ranks, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Give every rank rank 0's values, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def any(self, flag: bool) -> bool:
        """True where any rank's flag is."""
        if self.size == 1:
            return flag
        votes: list[bool] = [False] * self.size
        dist.all_gather_object(votes, flag)
        return any(votes)

    @contextmanager
    def main_first(self):
        """Rank 0 goes through the block before the others, which then find its caches."""
        if self.size > 1 and not self.is_main:
            dist.barrier()
        yield
        if self.size > 1 and self.is_main:
            dist.barrier()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextmanager
def world(device_type: str):
    """The process group that `torchrun` describes in the environment, or a world of one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    here = World(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    if device_type == "cuda":
        torch.cuda.set_device(here.local_rank)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    try:
        yield here
    finally:
        dist.destroy_process_group()
