"""Measure during training: the loss of the eval set, and what the forgetting monitor scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from trainer.data.batch import batches
from trainer.runtime import checkpoint
from trainer.runtime.distributed import Distributed
from trainer.training.loader import supervised_weight
from trainer.training.loss import sft_loss
from trainer.training.meter import Meter, NotFinite
from trainer.training.training_run import TrainingRun

if TYPE_CHECKING:  # it reads files with `datasets`, which a training step does without
    from trainer.data.prepare import EvalSet


@torch.no_grad()
def eval_loss(model: nn.Module, eval_set: EvalSet, device: torch.device, dist: Distributed) -> tuple[float, int]:
    """Return the weighted mean loss of the eval set's supervised tokens in nats, and their number.

    Each rank runs its packs.
    """
    samples, packs = eval_set.samples, eval_set.packs
    model.eval()
    total = torch.zeros((), device=device)
    own, only_in_step = dist.share(packs)
    for i, pack in enumerate(own):
        loss = sum(sft_loss(model, batch) for batch in batches(samples, [pack], device))
        if i < len(own) - only_in_step:
            total += loss
    model.train()
    dist.sum([total])
    indices = np.concatenate(packs)
    return float(total) / supervised_weight(samples, indices), int(samples.supervised[indices].sum())


def evaluate(run: TrainingRun, state: checkpoint.State, meter: Meter) -> None:
    """Write the eval loss into the log and `state`, with the number of evaluations since the best.

    Raises NotFinite if it is not finite.
    """
    with meter.paused():
        with run.optimizer.averaged():
            loss, tokens = eval_loss(run.model, run.eval_set, run.device, run.dist)
        if not np.isfinite(loss):
            raise NotFinite(f"step {state.step}: expected a finite eval loss, got {loss}; lower optim.lr, or look at "
                            "the samples of data.eval")
        state.eval_loss = loss
        if state.best_eval_loss is None or loss < state.best_eval_loss:
            state.best_eval_loss, state.evals_since_best = loss, 0
        else:
            state.evals_since_best += 1
        if run.log:
            run.log.write({"kind": "eval", "step": state.step, "loss": loss, "tokens": tokens})


def measure_forgetting(run: TrainingRun, state: checkpoint.State, meter: Meter) -> None:
    """Score general and domain items into the log and `state`; keep the best weights so far."""
    with meter.paused(), run.optimizer.averaged():
        needs_loss = run.eval_set and run.monitor.needs_eval_loss
        loss = eval_loss(run.model, run.eval_set, run.device, run.dist)[0] if needs_loss else None
        run.dist.on_main(lambda: run.monitor.measure(state, run.optimizer, loss, run.plan.total, run.log))
        scored = (state.last_measurement, state.kept_measurement, state.floor_misses)
        state.last_measurement, state.kept_measurement, state.floor_misses = run.dist.gather(scored)[0]
