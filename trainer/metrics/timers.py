"""Time phases of a step, and read peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext

import torch


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work; a no-op on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory in 10^9 bytes: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Phases:
    """Seconds by named phase; on a GPU from events on its stream, so that only reading them waits."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.label = nullcontext  # torch.profiler.record_function while a trace is taken
        self.spans: list[tuple[str, object, object]] = []

    @contextmanager
    def __call__(self, name: str):
        start = self._now()
        with self.label(name):
            yield
        self.spans.append((name, start, self._now()))

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Return the seconds per phase since the last reading; call `synchronize` before."""
        seconds: dict[str, float] = defaultdict(float)
        for name, start, end in self.spans:
            seconds[name] += start.elapsed_time(end) / 1e3 if self.cuda else end - start
        self.spans.clear()
        return dict(seconds)
