"""Hold together what the training loop works on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from trainer.config import Config
from trainer.data.step_plan import StepPlan
from trainer.metrics.log import Log
from trainer.metrics.throughput import ModelSize
from trainer.model.router_balance import RouterBalance
from trainer.optim.adamw import FlatAdamW
from trainer.optim.sharded_adamw import ShardedAdamW
from trainer.retention.kl import KlToBase
from trainer.runtime.distributed import Distributed
from trainer.training.loader import StepLoader

if TYPE_CHECKING:  # they read files with `datasets`, which a training step does without
    from trainer.data.prepare import EvalSet
    from trainer.retention.monitor import ForgettingMonitor
    from trainer.training.show_answers import Showing


@dataclass
class TrainingRun:
    """A run that is ready to train; `trainer.training.build.build` makes it."""

    config: Config
    folder: Path
    device: torch.device
    dist: Distributed
    model: nn.Module
    size: ModelSize
    optimizer: FlatAdamW | ShardedAdamW
    plan: StepPlan
    loader: StepLoader
    kl: KlToBase | None = None
    monitor: ForgettingMonitor | None = None
    eval_set: EvalSet | None = None
    log: Log | None = None  # on rank 0
    balance: RouterBalance | None = None
    showing: Showing | None = None  # on rank 0
    whole: nn.Module | None = None  # of a sharded model: its copy without weights, into which they are gathered
