"""Everything that the training loop works on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from trainer.config import Config
from trainer.data.batch import NO_PADDING, PadTo
from trainer.data.samples import Samples
from trainer.data.step_plan import StepPlan
from trainer.metrics.log import Log
from trainer.metrics.throughput import ModelSize
from trainer.optim.adamw import FlatAdamW
from trainer.retention.kl import KlToBase
from trainer.retention.monitor import ForgettingMonitor
from trainer.runtime.distributed import Distributed


@dataclass
class Job:
    """Everything a loop works on."""

    config: Config
    folder: Path
    model: nn.Module
    size: ModelSize
    optimizer: FlatAdamW
    samples: Samples
    plan: StepPlan
    heldout: tuple[Samples, list[np.ndarray]] | None  # samples, and the packs of their indices
    device: torch.device
    dist: Distributed
    log: Log | None  # rank 0's
    retention: KlToBase | None = None
    watch: ForgettingMonitor | None = None
    multiples: PadTo = NO_PADDING  # that packs are filled up to
