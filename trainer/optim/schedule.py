"""Learning rate schedules."""

from __future__ import annotations

import math

from trainer.config import Optim


def learning_rate(step: int, total: int, settings: Optim) -> float:
    """Learning rate of step 0 <= step < total: linear warm-up, then the schedule, which ends at lr * min_lr_ratio."""
    warmup = _steps(settings.warmup, total)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.lr
    start = max(warmup, total - _steps(settings.decay, total)) if settings.schedule == "wsd" else warmup
    progress = min(1.0, max(0.0, (step + 1 - start) / max(1, total - start)))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if settings.schedule == "cosine" else 1 - progress
    return settings.lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * remaining)


def _steps(amount: float, total: int) -> int:
    """A share of the run (below 1) or a number of steps, as a number of steps."""
    return round(amount * total) if amount < 1 else round(amount)
