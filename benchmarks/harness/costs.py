"""Count the memory that a step adds, and the operations that it consists of.

Memory is what torch's allocator hands out, counted by its profiler: exact and repeatable, without what is held before the step (weights,
the optimizer's moments) or what libraries allocate for themselves. Operations are ATen's, without views and allocations. On a GPU each is
a launch or more; on a CPU each is a call's overhead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch.utils._python_dispatch import TorchDispatchMode

STEPS = 8  # of different batches
ALLOCATIONS = ("empty", "new_empty", "_unsafe_view")  # and a view that does not say so


@dataclass(frozen=True)
class Costs:
    """Memory and operations of a contender's steps: the highest peak, and the median number."""

    mib: float
    operations: float | None


def step_costs(step: Callable[[], object], countable: bool = True, steps: int = STEPS) -> Costs:
    """Measure `steps` calls of `step`.

    `countable`: whether its operations pass through the dispatcher one by one; compiled ones do not.
    """
    operations = []
    run = (lambda: operations.append(counted_operations(step))) if countable else step
    heights = [height_mib(run) for _ in range(steps)]
    return Costs(max(heights), median(operations) if countable else None)


def height_mib(run: Callable[[], object]) -> float:
    """Return the peak memory that one call adds to what was held before it, in MiB of CPU memory."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]" and e.device_type().name == "CPU"]
    held = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest / 2**20


class _Operations(TorchDispatchMode):
    """Counts what computes."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not (func.is_view or func.overloadpacket.__name__.startswith(ALLOCATIONS))
        return func(*args, **(kwargs or {}))


def counted_operations(run: Callable[[], object]) -> int:
    """ATen operations of one call, forward and backward."""
    with _Operations() as operations:
        run()
    return operations.count
