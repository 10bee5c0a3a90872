"""Everything that the training loop works on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from trainer.config import Config
from trainer.data.batch import UNFILLED, Multiples
from trainer.data.samples import Samples
from trainer.data.step_plan import Plan
from trainer.metrics.log import Log
from trainer.metrics.throughput import ModelSize
from trainer.optim.adamw import FlatAdamW
from trainer.retention.kl import Retention
from trainer.retention.monitor import Watch
from trainer.runtime.distributed import World


@dataclass
class Job:
    """Everything a loop works on."""

    config: Config
    folder: Path
    model: nn.Module
    size: ModelSize
    optimizer: FlatAdamW
    samples: Samples
    plan: Plan
    heldout: tuple[Samples, list[np.ndarray]] | None  # samples, and the packs of their indices
    device: torch.device
    world: World
    log: Log | None  # rank 0's
    retention: Retention | None = None
    watch: Watch | None = None
    multiples: Multiples = UNFILLED  # that packs are filled up to
