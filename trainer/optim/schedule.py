"""Learning rate schedules."""

from __future__ import annotations

import math

from trainer.config import Optim


def learning_rate(step: int, total: int, settings: Optim) -> float:
    """Learning rate of step 0 <= step < total: linear warm-up, then the schedule, which ends at lr * min_lr_ratio."""
    warmup = _steps(settings.warmup_ratio, settings.warmup_steps, total)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    if settings.lr_scheduler == "constant":
        return settings.lr
    start = max(warmup, total - _steps(settings.decay_ratio, settings.decay_steps, total)) if settings.lr_scheduler == "wsd" else warmup
    progress = min(1.0, max(0.0, (step + 1 - start) / max(1, total - start)))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if settings.lr_scheduler == "cosine" else 1 - progress
    return settings.lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * remaining)


def _steps(ratio: float, steps: int, total: int) -> int:
    """Return `steps` if above 0, else the share `ratio` of a run of `total` steps."""
    return steps if steps > 0 else round(ratio * total)
