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
    """Outcome of a run: its last step and losses, why it ended, and the folder it wrote."""

    folder: Path
    steps: int
    loss: float | None  # mean training loss of the last log interval
    eval_loss: float | None
    reason: str
    signal: int | None = None
    forgetting: dict | None = None  # with forgetting.general: the measurement of the exported state, or of the last one if stopped

    @property
    def status(self) -> int:
        """Return the exit status of the command."""
        if self.signal:
            return 128 + self.signal
        return FLOOR_MISSED if self.forgetting and not self.forgetting.get("holds_floor", True) else 0
