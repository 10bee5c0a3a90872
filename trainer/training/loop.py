"""The training loop: a step is packs forward and backward, one sum over ranks, one optimiser pass.

The loss of a step is the weighted sum over its supervised tokens, in all packs and on all ranks, divided by their weight, which
is known on the CPU before anything runs. The host waits for the device only at log, evaluation and checkpoint steps.
"""

from __future__ import annotations

import gc
import time
from contextlib import contextmanager

import torch
from torch import Tensor

from trainer.config import profiled_steps
from trainer.data.step_plan import hash_seed
from trainer.metrics.profiler import profiling
from trainer.metrics.timers import Phases, synchronize
from trainer.model.forward import lm_head
from trainer.optim.schedule import learning_rate
from trainer.runtime import checkpoint
from trainer.runtime.interrupts import Interrupts
from trainer.runtime.result import Ending
from trainer.training.job import Job
from trainer.training.loader import StepWork, TokenCounts, prefetch_steps
from trainer.training.loss import batch_loss, cross_entropy
from trainer.training.meter import Meter, finish, report
from trainer.training.validation import evaluate, heldout_loss


def fit(job: Job, state: checkpoint.State) -> Ending:
    """Train on from `state`, which is kept up to date, to the end of the plan, or to an early stop or signal."""
    every, plan, last = job.config.logging.every, job.plan, job.plan.total
    totals, begun, received = TokenCounts(), time.perf_counter(), None
    meter = Meter(Phases(job.device))
    if job.heldout and state.step == 0:
        evaluate(job, state, meter)  # what the run has to better
    if job.watch and state.step == 0:
        measure(job, state, meter)
    job.model.train()
    steps = profiled_steps(job.config.logging.profile) if job.dist.is_main else None
    with (Interrupts() as interrupts, garbage_at_log_steps(),
          profiling(steps, job.folder, job.device, meter.phases, state.step) as profile):
        for work in prefetch_steps(plan, job.samples, state.step, job.dist, job.device, meter.phases, job.retention, job.multiples):
            if received or out_of_patience(job, state):
                break
            meter.add(work, *train_step(job, work, meter.phases))
            totals = totals + work.counts
            state.step = work.step + 1
            if job.log:
                job.log.advance()
            if due(state.step, every) or state.step == last:
                report(job, state, meter)
                gc.collect(1)
            if job.heldout and (due(state.step, job.config.evaluation.every) or state.step == last):
                evaluate(job, state, meter)
            if job.watch and (due(state.step, job.config.retention.every) or state.step == last or out_of_patience(job, state)):
                measure(job, state, meter)
            if state.step < last and (job.dist.size == 1 or due(state.step, every)):  # asking the other ranks waits for them
                received = max(job.dist.gather(interrupts.received or 0))
            if due(state.step, job.config.checkpoint.every) or received:
                save(job, state, meter)
            profile(state.step)
    if meter.losses:
        report(job, state, meter)  # an early stop comes between log steps
    ending = ended(job, state, received)
    finish(job, state, ending, totals, time.perf_counter() - begun, meter.aside)
    return ending


def out_of_patience(job: Job, state: checkpoint.State) -> bool:
    patience = job.config.evaluation.patience
    return (patience > 0 and state.stale >= patience) or floor_given_up(job, state)


def floor_given_up(job: Job, state: checkpoint.State) -> bool:
    return job.watch is not None and job.watch.given_up(state)


def ended(job: Job, state: checkpoint.State, received: int | None) -> Ending:
    if received:
        return Ending("signal", received)
    if state.step < job.plan.total:
        return Ending("floor" if floor_given_up(job, state) else "early stopping")
    return Ending("finished" if job.plan.total == job.plan.starts[-1] else "max_steps")


@contextmanager
def garbage_at_log_steps():
    """Keep the collector from walking the model's objects in the middle of steps."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def train_step(job: Job, work: StepWork, phases: Phases) -> tuple[Tensor, Tensor]:
    """Forward, backward and update on one step's packs. Returns this rank's share of the loss, and the gradient norm.

    A divergence from the base adds to the gradient, not to the loss that is returned; this rank's share of it goes into `work`.
    """
    torch.manual_seed(hash_seed(job.config.seed, work.step, job.dist.rank))  # dropout's draws depend on the step alone
    total = torch.zeros((), device=job.device)
    held = job.retention if work.kl_weight_sum > 0 else None
    work.divergence = torch.zeros((), device=job.device) if held else None
    for batch in work.batches:
        reference = held.look_up(batch, phases) if held else None
        with phases("forward"):
            if reference is None:
                loss = objective = batch_loss(job.model, batch) / work.weight
            else:
                (supervised, counted), out = held.hidden(job.model, batch), lm_head(job.model)
                loss = cross_entropy(out, supervised, batch) / work.weight
                divergence = held.divergence(out, counted, batch, reference) / work.kl_weight_sum
                objective = loss + held.settings.kl * divergence
                work.divergence += divergence.detach()
        with phases("backward"):
            objective.backward()
        total += loss.detach()
    with phases("optimizer"):
        job.dist.sum(job.optimizer.gradients)
        norm = job.optimizer.step(learning_rate(work.step, job.plan.total, job.config.optim))
        job.optimizer.zero_grad()
    return total, norm


def measure(job: Job, state: checkpoint.State, meter: Meter) -> None:
    """Score general and domain items into the log and `state`, on rank 0, and keep the weights where they are the best so far."""
    synchronize(job.device)
    begun = time.perf_counter()
    loss = heldout_loss(job)[0] if job.heldout and job.watch.wants_loss else None
    job.dist.on_main(lambda: job.watch.measure(state, job.optimizer, loss, job.plan.total, job.log))
    state.measured, state.kept, state.missed = job.dist.gather((state.measured, state.kept, state.missed))[0]
    spent = time.perf_counter() - begun
    meter.started += spent
    meter.aside += spent


def save(job: Job, state: checkpoint.State, meter: Meter) -> None:
    if meter.losses:
        report(job, state, meter)  # refuses to save what is not finite
    begun = time.perf_counter()
    folder, keep = job.folder / "checkpoints", job.config.checkpoint.keep
    job.dist.on_main(lambda: checkpoint.save(folder, state, job.optimizer, keep))
    meter.started = time.perf_counter()
    meter.aside += meter.started - begun


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
