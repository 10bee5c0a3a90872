"""Train data-parallel under `torchrun`: this process's rank, and its collectives.

Every rank derives the same step plan from the same seed and takes every world-size-th pack of a step, so all ranks know the step's
supervised weight without communication. Gradients are sums over packs already divided by that weight, so one all-reduce of the flat
gradient vectors is all the synchronisation a step needs, and a rank may even have no pack in a step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from trainer.errors import UserError, require
from trainer.runtime.lost_ranks import ending_together

PATIENCE = timedelta(hours=12)  # ranks wait while rank 0 tokenizes, saves or merges


@dataclass(frozen=True)
class Distributed:
    """One process of a distributed run; by default, the only one."""

    rank: int = 0
    size: int = 1
    sharded: bool = False  # each rank holds a part of the weights, so all have to run the model equally often

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence) -> tuple[list, int]:
        """Return this rank's items, every size-th, and how many of them only keep it in step with others.

        Those come last. They are copies of the first item, where weights are sharded and other ranks have more items.
        """
        own = list(items[self.rank :: self.size])
        missing = -(-len(items) // self.size) - len(own) if self.sharded else 0
        return own + [items[0]] * missing, missing

    def sum(self, tensors: list[Tensor]) -> None:
        """Sum each tensor over the ranks, in place."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Copy rank 0's values to every rank, in place."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor, src=0)

    def gather(self, value: Any) -> list:
        """Return every rank's value, which may be anything that can be pickled, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def on_main(self, work: Callable[[], object]) -> None:
        """Run `work` on rank 0 while the others wait.

        A UserError raised there is raised on every rank, so that none waits for ever.
        """
        error: str | None = None
        if self.is_main:
            try:
                work()
            except UserError as raised:
                error = str(raised)
        if self.size > 1:
            errors = [error]
            torch.distributed.broadcast_object_list(errors, src=0)
            error = errors[0]
        if error is not None:
            raise UserError(error)


def local_rank() -> int:
    """Return this process's number among those of the run on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _meeting() -> dict:
    """Return where ranks that torchrun has restarted meet.

    It is apart from the addresses that those before them left in its store.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0":
        return {}
    store, rank, size = next(torch.distributed.rendezvous("env://"))
    return {"store": torch.distributed.PrefixStore(f"restart-{restarts}", store), "rank": rank, "world_size": size}


@contextmanager
def process_group(device: torch.device, sharded: bool = False):
    """Yield this process of the group that `torchrun` describes in the environment, or the only process.

    With several processes on GPUs, `device` becomes the current one of this thread, and the one of the group's collectives. Raises
    UserError for `sharded` weights and a single process, and where another process of the group dies.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        require(not sharded, "fsdp.enabled", "several ranks, as torchrun --nproc-per-node 4 -m trainer.run starts them", "one process")
        yield Distributed()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if sharded else "nccl"  # checkpoints of shards gather on the CPU
        torch.distributed.init_process_group(backend, timeout=PATIENCE, device_id=device, **_meeting())
    else:
        torch.distributed.init_process_group("gloo", timeout=PATIENCE, **_meeting())
    rank = int(os.environ["RANK"])
    try:
        with ending_together(rank, size):
            yield Distributed(rank, size, sharded)
    finally:
        torch.distributed.destroy_process_group()
