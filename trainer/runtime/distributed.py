"""Data parallelism under `torchrun`: who we are, and the one collective of a step.

Every rank derives the same plan of steps from the same seed and takes every world-size-th pack of a step, so the step's
supervised weight is known to all without asking. Gradients are sums over packs already divided by that weight: adding the
flat gradient vectors of all ranks is the whole of synchronisation, and a rank may even have no pack in a step.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from trainer.errors import UserError

PATIENCE = timedelta(hours=12)  # ranks wait while rank 0 tokenizes, saves or merges


@dataclass(frozen=True)
class Distributed:
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
                torch.distributed.all_reduce(tensor)

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Give every rank rank 0's values, in place."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor, src=0)

    def gather(self, value: Any) -> list:
        """Every rank's number, or anything else that can be pickled, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def on_main(self, work: Callable[[], object]) -> None:
        """Run `work` on rank 0 while the others wait. A UserError there is raised on every rank, so that none waits for ever."""
        error: str | None = None
        if self.is_main:
            try:
                work()
            except UserError as raised:
                error = str(raised)
        if self.size > 1:
            box = [error]
            torch.distributed.broadcast_object_list(box, src=0)
            error = box[0]
        if error is not None:
            raise UserError(error)


@contextmanager
def process_group(device_type: str):
    """The process group that `torchrun` describes in the environment, or a world of one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Distributed()
        return
    here = Distributed(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    if device_type == "cuda":
        torch.cuda.set_device(here.local_rank)
    torch.distributed.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield here
    finally:
        torch.distributed.destroy_process_group()
