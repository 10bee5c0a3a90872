"""Describe how a run ended, and its exit status."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FLOOR_MISSED = 3  # exit status of a run where no measured state holds the floor


@dataclass
class Ending:
    """Why a run ended."""

    reason: str  # finished | max_steps | early stopping | floor | signal
    signal: int | None = None


@dataclass
class RunResult:
    """Where a run ended and what it left behind."""

    folder: Path
    steps: int
    loss: float | None  # mean training loss of the last log interval
    eval_loss: float | None
    reason: str
    signal: int | None = None
    retention: dict | None = None  # of runs with retention.items: the measurement of what is exported, or of the last state if stopped

    @property
    def status(self) -> int:
        """Return the exit status of the command."""
        if self.signal:
            return 128 + self.signal
        return FLOOR_MISSED if self.retention and not self.retention.get("held", True) else 0
