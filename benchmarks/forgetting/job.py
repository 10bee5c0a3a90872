"""Define one run of a study: an arm with one seed, and the configuration that all arms share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from trainer.config import BatchSize, Config, Data, Lora, Model, Optim, Replay, Retention

LEARNING_RATES = {"lora": 2e-3, "full": 5e-4}
MAX_EPOCHS = 1000  # more than any run has: max_steps ends it


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune: a row of the table."""

    name: str
    replay: str | None = None  # the name of a replay set
    full: bool = False  # every weight is trained, not an adapter
    lr_factor: float = 1.0  # multiplies the learning rate that all arms share
    kl: bool = False  # the KL to the base is part of the objective
    retention: dict[str, Any] = field(default_factory=dict, hash=False)  # options of the arm's own, in place of those that arms share


class TrainingSize(Protocol):
    """Sizes of a study, two of which are those of its training."""

    steps: int
    tokens: int  # a step


@dataclass(frozen=True)
class Job:
    """One arm on one base with one seed, in a folder of its own."""

    base: str
    arm: Arm
    seed: int
    size: TrainingSize
    work: Path

    @property
    def output(self) -> Path:
        return self.work / self.base / f"seed {self.seed}" / self.arm.name.replace("/", " of ")


def configuration(job: Job, model: Path, data: Data, replay: Replay, kl: dict) -> Config:
    """Return the configuration of an arm's run; `kl` has the options of arms with a KL to the base."""
    arm, size = job.arm, job.size
    method = "full" if arm.full else "lora"
    return Config(
        output=str(job.output), model=Model(path=str(model)), method=method, lora=Lora(rank=16, alpha=32.0), data=data, replay=replay,
        retention=Retention(**((kl if arm.kl else {}) | arm.retention)),
        batch=BatchSize(tokens_per_pack=size.tokens, tokens_per_step=size.tokens),
        optim=Optim(lr=LEARNING_RATES[method] * arm.lr_factor), epochs=MAX_EPOCHS, max_steps=size.steps, seed=job.seed)
