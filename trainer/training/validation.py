"""Measure the loss on held-out samples during training."""

from __future__ import annotations

import time

import numpy as np
import torch

from trainer.data.batch import batches
from trainer.errors import UserError
from trainer.metrics.timers import synchronize
from trainer.runtime import checkpoint
from trainer.training.job import Job
from trainer.training.loader import supervised_weight
from trainer.training.loss import batch_loss
from trainer.training.meter import Meter


@torch.no_grad()
def heldout_loss(job: Job) -> tuple[float, int]:
    """Mean loss over the held-out samples' supervised weight, and the number of their supervised tokens."""
    samples, packs = job.heldout
    job.model.eval()
    total = torch.zeros((), device=job.device)
    for pack in packs[job.dist.rank :: job.dist.size]:
        total += sum(batch_loss(job.model, batch) for batch in batches(samples, [pack], job.device))
    job.model.train()
    job.dist.sum([total])
    indices = np.concatenate(packs)
    return float(total) / supervised_weight(samples, indices), int(samples.supervised[indices].sum())


def evaluate(job: Job, state: checkpoint.State, meter: Meter) -> None:
    """Held-out loss into the log and `state`, with a count of evaluations since the best one. Raises UserError if it is not finite."""
    synchronize(job.device)  # steps still under way are not evaluation's time
    begun = time.perf_counter()
    loss, tokens = heldout_loss(job)
    if not np.isfinite(loss):
        raise UserError(f"step {state.step}: expected a finite held-out loss, got {loss}; lower optim.lr, or look at the held-out samples")
    state.heldout_loss = loss
    if state.best is None or loss < state.best:
        state.best, state.stale = loss, 0
    else:
        state.stale += 1
    if job.log:
        job.log.write({"kind": "eval", "step": state.step, "loss": loss, "tokens": tokens})
    spent = time.perf_counter() - begun
    meter.started += spent  # no part of the training rates
    meter.aside += spent
