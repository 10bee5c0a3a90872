"""Make Steadfast a contender: the trainer's own step, loss, optimizer and loader on its own packs.

It is made from a configuration, as `python -m trainer.run` makes it, or from a model and samples that are in memory. Collating and
copying a batch is part of a step, as it is for the baselines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness.timing import AGREEMENT, StepResult, TokenSamples, relative, step_result
from trainer.config import BatchSize, Config, Optim
from trainer.data.batch import PackedBatch, collate, pad_batch
from trainer.data.mixture import Mixture, MixtureSource
from trainer.data.samples import Piece, Samples
from trainer.data.step_plan import StepPlan
from trainer.metrics.throughput import model_size
from trainer.metrics.timers import Phases
from trainer.model.forward import padding_for, unwrap_peft
from trainer.model.loading import use_packed_attention
from trainer.model.patch import patch
from trainer.optim.adamw import FlatAdamW
from trainer.runtime.distributed import Distributed
from trainer.training.loader import StepLoader, StepWork, TokenCounts
from trainer.training.loop import train_step
from trainer.training.loss import sft_loss
from trainer.training.meter import StepMetrics
from trainer.training.training_run import TrainingRun

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CPU = torch.device("cpu")
STEPS = 512  # that an in-memory contender plans


class Trained(Protocol):
    """A contender that trains a model: it draws its own batches, and says which samples a batch holds."""

    model: nn.Module
    device: torch.device

    def step(self) -> StepResult: ...

    def next_batch(self) -> Any: ...

    def samples_of(self, batch: Any) -> TokenSamples: ...

    def step_on(self, batch: Any) -> StepResult: ...


class Steadfast:
    """A training run whose steps are called one at a time."""

    def __init__(self, run: TrainingRun):
        self.run, self.phases = run, Phases(run.device)
        run.model.train()
        self.works: Iterator[StepWork] = run.loader.prefetch(0, self.phases)

    @property
    def model(self) -> nn.Module:
        return self.run.model

    @property
    def device(self) -> torch.device:
        return self.run.device

    @property
    def samples(self) -> Samples:
        return self.run.loader.samples

    def step(self) -> StepResult:
        """Do the run's next step: load, forward, backward, clip, update."""
        work = next(self.works)
        loss = self.train(work).loss
        done = work.counts
        flops = self.run.size.flops(done.tokens, done.supervised, done.squared_lengths)
        padding = sum(len(batch.input_ids) for batch in work.batches) - done.tokens
        return StepResult(loss, done.tokens, done.supervised, padding, flops)

    def train(self, work: StepWork) -> StepMetrics:
        """Do the trainer's step on `work`; its metrics are scalars on the device."""
        return train_step(self.run, work, self.phases)

    def step_on(self, samples: TokenSamples) -> StepResult:
        """Do a step on these samples in one pack, instead of the next pack of the plan."""
        batch = self.pack(samples)
        loss = self.train(StepWork(0, [batch], batch.weight_sum, TokenCounts(), [])).loss
        return step_result(samples, loss, batch.tokens, self.run.size)

    @torch.no_grad()
    def loss_on(self, samples: TokenSamples) -> Tensor:
        """Return the mean loss of these samples, without a step."""
        batch = self.pack(samples)
        return sft_loss(self.model, batch) / batch.weight_sum

    def pack(self, samples: TokenSamples) -> PackedBatch:
        batch = collate([Piece(ids, supervised) for ids, supervised in samples])
        return pad_batch(batch, self.run.loader.pad_to, self.run.config.batch.tokens_per_pack).to(self.run.device)

    def use(self, samples: TokenSamples, tokens_per_step: int) -> None:
        """Train on these samples from now on."""
        self.run.config.batch = BatchSize(tokens_per_pack=tokens_per_step, tokens_per_step=tokens_per_step)
        self.run.loader = loader_of(samples, self.run.config, self.model, self.run.device)
        self.run.plan = self.run.loader.plan
        self.works = self.run.loader.prefetch(0, self.phases)

    def use_learning_rate(self, lr: float) -> None:
        self.run.config.optim.lr = lr

    def drop_batches(self) -> None:
        """Give back the batches that are loaded ahead, and gradients of a step that failed."""
        self.works = iter(())
        self.run.optimizer.zero_grad()

    def state_tensors(self) -> list[Tensor]:
        """Return what is held between steps: weights, buffers, the flat gradients and the optimizer's states."""
        optimizer = self.run.optimizer
        return [*self.model.parameters(), *self.model.buffers(), *optimizer.gradients, *optimizer.state().values()]


# ---------------------------------------------------------------- from a configuration


def from_config(config: Config, tokenizer: PreTrainedTokenizerBase, device: torch.device = CPU) -> Steadfast:
    """Make the run that `python -m trainer.run` makes of a configuration."""
    from trainer.data.prepare import prepare_data
    from trainer.training.build import build

    with redirect_stdout(StringIO()):
        run, _ = build(config, prepare_data(config, tokenizer), device, Distributed(), (), tokenizer)
    return Steadfast(run)


# ---------------------------------------------------------------- from memory


def in_memory(model: nn.Module, samples: TokenSamples, tokens_per_step: int, lr: float,
              device: torch.device = CPU) -> Steadfast:
    """Make a run that trains a stock model, with or without PEFT's adapter, on samples in memory.

    A step is one pack of at most `tokens_per_step`.
    """
    config = Config(
        batch=BatchSize(tokens_per_pack=tokens_per_step, tokens_per_step=tokens_per_step),
        optim=Optim(lr=lr, lr_scheduler="constant", warmup_ratio=0.0), device=device.type)
    size = model_size(fused(model))
    optimizer = FlatAdamW(model.parameters(), config.optim)
    optimizer.publish()
    loader = loader_of(samples, config, model, device)
    return Steadfast(TrainingRun(
        config=config, folder=Path(), device=device, dist=Distributed(), model=model, size=size, optimizer=optimizer, plan=loader.plan,
        loader=loader))


def fused(model: nn.Module) -> nn.Module:
    """Give a stock model packed attention and fused kernels, as the trainer does."""
    use_packed_attention(unwrap_peft(model))
    patch(model)
    return model


def loader_of(samples: TokenSamples, config: Config, model: nn.Module, device: torch.device) -> StepLoader:
    """Return the trainer's loader over samples in memory, which are taken again and again."""
    kept = samples_in_memory(samples)
    mixture = Mixture(kept.lengths, kept.sources, [MixtureSource(kept.names[0], "domain")], seed=config.seed)
    plan = StepPlan(kept.lengths, mixture, config.batch, epochs=STEPS, max_steps=STEPS, seed=config.seed)
    return StepLoader(plan, kept, Distributed(), device, pad_to=padding_for(model))


def samples_in_memory(samples: TokenSamples) -> Samples:
    """Return samples in the trainer's form, from one source, each of weight 1."""
    lengths = np.array([len(ids) for ids, _ in samples], dtype=np.int64)
    ids = np.concatenate([ids for ids, _ in samples]).astype(np.int32)
    flags = np.concatenate([supervised for _, supervised in samples]).astype(np.uint8)
    count, targets = len(samples), np.array([int(supervised[1:].sum()) for _, supervised in samples])
    return Samples(
        ["benchmark"], {}, lengths, targets, np.ones(count, np.float32), targets.astype(np.float64), np.zeros(count, np.int16),
        np.arange(count), [(ids, flags, np.zeros(0, np.float32))], np.zeros(count, np.int32), np.cumsum(lengths) - lengths,
        np.full(count, -1))


# ---------------------------------------------------------------- agreement


def agreement(ours: Steadfast, other: Trained, steps: int, dtype: str, name: str) -> float:
    """Return the largest relative difference of losses over steps on equal samples.

    Both contenders begin with equal weights. Raises AssertionError where it is more than rounding in `dtype` explains.
    """
    losses, others = [], []
    for _ in range(steps):
        batch = other.next_batch()
        losses.append(float(ours.step_on(other.samples_of(batch)).loss))
        others.append(float(other.step_on(batch).loss))
    return require_agreement(losses, others, dtype, name)


def require_agreement(ours: Sequence[float], others: Sequence[float], dtype: str, name: str) -> float:
    """Return the largest relative difference of Steadfast's losses from another's.

    Raises AssertionError where they do not agree.
    """
    worst = max(relative(a, b) for a, b in zip(ours, others, strict=True))
    if not worst <= AGREEMENT[dtype]:  # NaN too
        raise AssertionError(f"losses of Steadfast and {name} differ by {worst:.1e} in {dtype}, more than {AGREEMENT[dtype]:.0e}: "
                             f"{ours} and {others}")
    return worst
