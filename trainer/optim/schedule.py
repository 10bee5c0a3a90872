"""Compute the learning rate of each step."""

from __future__ import annotations

import math

from trainer.config import Optim


def learning_rate(step: int, total: int, optim: Optim) -> float:
    """Return the learning rate of step 0 <= step < total.

    A linear warm-up is followed by the schedule, which ends at lr * min_lr_ratio.
    """
    warmup = _steps(optim.warmup_ratio, optim.warmup_steps, total)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.lr_scheduler == "constant":
        return optim.lr
    start = max(warmup, total - _steps(optim.decay_ratio, optim.decay_steps, total)) if optim.lr_scheduler == "wsd" else warmup
    progress = min(1.0, max(0.0, (step + 1 - start) / max(1, total - start)))
    if optim.lr_scheduler == "cosine_with_restarts":
        progress = progress * optim.num_cycles % 1.0 if progress < 1 else 1.0
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if optim.lr_scheduler.startswith("cosine") else 1 - progress
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * remaining)


def _steps(ratio: float, steps: int, total: int) -> int:
    """Return `steps` if above 0, else the share `ratio` of a run of `total` steps."""
    return steps if steps > 0 else round(ratio * total)
