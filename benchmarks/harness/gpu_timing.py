"""Time calls on a device in interleaved rounds, measure their peak memory, and the device's own rates.

Before each call the L2 cache is emptied and the device sleeps for a millisecond, so that the host is ahead and its time does not show.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

FEWEST = 7  # rounds, however long they take
AHEAD = 2_000_000  # clock cycles, about a millisecond


class Clock:
    """Device milliseconds (on a CPU: wall) and host milliseconds of a call."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        if self.cuda:
            cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
            self.flush = torch.empty(max(4 * cache, 256 << 20), dtype=torch.int8, device=device)

    def __call__(self, run: Callable) -> Callable[[], tuple[float, float]]:
        """Starts the call; what is returned reads the clock, once the device is done."""
        if not self.cuda:
            begun = time.perf_counter()
            run()
            spent = 1e3 * (time.perf_counter() - begun)
            return lambda: (spent, spent)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(AHEAD)
        begin.record()
        begun = time.perf_counter()
        run()
        host = 1e3 * (time.perf_counter() - begun)
        end.record()
        return lambda: (begin.elapsed_time(end), host)


def rounds_of(contenders: dict[str, Callable], clock: Clock, seconds: float, most: int,
              seed: int = 0) -> dict[str, list[tuple[float, float]]]:
    """Return (device ms, host ms) of every contender in every round; contenders in a shuffled order."""
    order, names, begun = np.random.default_rng(seed), list(contenders), time.perf_counter()
    samples: dict[str, list] = {name: [] for name in names}
    for done in range(most):
        if done >= FEWEST and time.perf_counter() - begun > seconds:
            break
        readings = {names[i]: clock(contenders[names[i]]) for i in order.permutation(len(names))}
        synchronize()
        for name, read in readings.items():
            samples[name].append(read())
    return samples


def peak_mib(run: Callable) -> float | None:
    """Return the peak memory that a call adds on a GPU, results included; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measured_rates(device: torch.device, clock: Clock) -> dict[str, float]:
    """Return the FLOP/s of a large matmul and the bytes/s of a large copy: medians on this device."""
    size, copied = (8192, 1 << 30) if device.type == "cuda" else (256, 1 << 20)
    a, b = torch.randn(2, size, size, device=device).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    source, target = torch.zeros(2, copied, dtype=torch.int8, device=device)
    contenders = {"product": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)}
    for run in contenders.values():
        run()
    ms = {name: float(np.median([device_ms for device_ms, _ in own])) for name, own in rounds_of(contenders, clock, 1.0, 30).items()}
    return {"product_flops": 2e3 * size**3 / ms["product"], "copy_bytes": 2e3 * copied / ms["copy"]}


# ---------------------------------------------------------------- contenders that may fail


def distance(value: Tensor, other: Tensor) -> float:
    """Return ‖value − other‖ / ‖other‖ in fp32, computed piece by piece."""
    if value.shape != other.shape:
        return float("nan")
    pieces = list(zip(value.reshape(-1).split(1 << 26), other.reshape(-1).split(1 << 26)))
    apart, size = (sum(part.square().sum() for part in parts) for parts in (
        (a.float() - b.float() for a, b in pieces), (b.float() for _, b in pieces)))
    return float((apart / size).sqrt())


def reason(error: Exception) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return f"failed: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:160]}"


def tried(run: Callable) -> tuple[list[Tensor] | None, str | None]:
    """Return the results of a call, or the reason why it failed.

    Any exception of another library is an outcome, not the end of the benchmark.
    """
    results, why = None, None
    try:
        results = run()
        synchronize()
    except Exception as error:
        why = reason(error)
    if why:
        free()
    return results, why


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    """Return a GPU's cached memory, for the next contender to have all of it."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
