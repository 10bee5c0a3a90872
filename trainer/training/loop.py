"""The training loop: a step is packs forward and backward, one sum over ranks, one optimiser pass.

The loss of a step is the weighted sum over its supervised tokens, in all packs and on all ranks, divided by their weight, which
is known on the CPU before anything runs. The host waits for the device only at log, evaluation and checkpoint steps.
"""

from __future__ import annotations

import gc
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kernels import linear_cross_entropy
from trainer.config import Config, profiled_steps
from trainer.data.packing import UNFILLED, Batch, Multiples
from trainer.data.samples import Samples
from trainer.data.step_plan import Plan, hash_seed
from trainer.errors import UserError
from trainer.metrics.log import Log
from trainer.metrics.profiler import profiling
from trainer.metrics.throughput import ModelSize, Phases, peak_flops, peak_memory_gb, synchronize
from trainer.model.loading import HeadSpec, head, supervised_hidden
from trainer.optim.adamw import FlatAdamW, learning_rate
from trainer.retention.kl import Retention
from trainer.retention.monitor import Watch
from trainer.retention.token_weighting import own_probability
from trainer.runtime import checkpoint
from trainer.runtime.distributed import World
from trainer.runtime.interrupts import Interrupts
from trainer.training.loader import Counts, Work, batches, stage, supervised_weight


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


@dataclass
class Meter:
    """Figures since the last log line; those of the device stay there until `report` reads them."""

    phases: Phases
    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    divergences: list[Tensor] = field(default_factory=list)  # from the base, of steps that count it
    works: list[tuple[int, list[str]]] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    started: float = field(default_factory=time.perf_counter)
    aside: float = 0.0  # seconds of the whole run spent on evaluating and saving

    def add(self, work: Work, loss: Tensor, norm: Tensor) -> None:
        self.losses.append(loss)
        self.norms.append(norm)
        if work.divergence is not None:
            self.divergences.append(work.divergence)
        self.works.append((work.step, work.sources))
        self.counts = self.counts + work.counts


@dataclass
class Ending:
    """Why a run ended."""

    reason: str  # finished | max_steps | early stopping | floor | signal
    signal: int | None = None


def fit(job: Job, state: checkpoint.State) -> Ending:
    """Train on from `state`, which is kept up to date, to the end of the plan, or to an early stop or signal."""
    every, plan, last = job.config.logging.every, job.plan, job.plan.total
    totals, begun, received = Counts(), time.perf_counter(), None
    meter = Meter(Phases(job.device))
    if job.heldout and state.step == 0:
        evaluate(job, state, meter)  # what the run has to better
    if job.watch and state.step == 0:
        measure(job, state, meter)
    job.model.train()
    steps = profiled_steps(job.config.logging.profile) if job.world.is_main else None
    with (Interrupts() as interrupts, garbage_at_log_steps(),
          profiling(steps, job.folder, job.device, meter.phases, state.step) as profile):
        for work in stage(plan, job.samples, state.step, job.world, job.device, meter.phases, job.retention, job.multiples):
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
            if state.step < last and (job.world.size == 1 or due(state.step, every)):  # asking the other ranks waits for them
                received = max(job.world.gather(interrupts.received or 0))
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


def train_step(job: Job, work: Work, phases: Phases) -> tuple[Tensor, Tensor]:
    """Forward, backward and update on one step's packs. Returns this rank's share of the loss, and the gradient norm.

    A divergence from the base adds to the gradient, not to the loss that is returned; this rank's share of it goes into `work`.
    """
    torch.manual_seed(hash_seed(job.config.seed, work.step, job.world.rank))  # dropout's draws depend on the step alone
    total = torch.zeros((), device=job.device)
    held = job.retention if work.counted_weight > 0 else None
    work.divergence = torch.zeros((), device=job.device) if held else None
    for batch in work.batches:
        reference = held.look_up(batch, phases) if held else None
        with phases("forward"):
            if reference is None:
                loss = objective = batch_loss(job.model, batch) / work.weight
            else:
                (supervised, counted), out = held.hidden(job.model, batch), head(job.model)
                loss = cross_entropy(out, supervised, batch) / work.weight
                divergence = held.divergence(out, counted, batch, reference) / work.counted_weight
                objective = loss + held.settings.kl * divergence
                work.divergence += divergence.detach()
        with phases("backward"):
            objective.backward()
        total += loss.detach()
    with phases("optimizer"):
        job.world.sum(job.optimizer.gradients)
        norm = job.optimizer.step(learning_rate(work.step, job.plan.total, job.config.optim))
        job.optimizer.zero_grad()
    return total, norm


def batch_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Sum of weight * cross entropy over the supervised tokens of a pack; logits exist for those rows only, chunk by chunk."""
    return cross_entropy(head(model), supervised_hidden(model, batch), batch)


def cross_entropy(out: HeadSpec, hidden: Tensor, batch: Batch) -> Tensor:
    """The same of hidden states [S, D]. Tokens that the batch calls tempered weigh their own probability too."""
    fixed = {"bias": out.bias, "ignore_index": None, "softcap": out.softcap, "logit_scale": out.logit_scale}
    if batch.tempered is None:
        return linear_cross_entropy(hidden, out.weight, batch.targets, token_weight=batch.weights, reduction="sum", **fixed)
    losses = linear_cross_entropy(hidden, out.weight, batch.targets, reduction="none", **fixed)
    return losses.dot((batch.weights * own_probability(losses, batch.tempered)).to(losses.dtype))


@torch.no_grad()
def heldout_loss(job: Job) -> tuple[float, int]:
    """Mean loss over the held-out samples' supervised weight, and the number of their supervised tokens."""
    samples, packs = job.heldout
    job.model.eval()
    total = torch.zeros((), device=job.device)
    for pack in packs[job.world.rank :: job.world.size]:
        total += sum(batch_loss(job.model, batch) for batch in batches(samples, [pack], job.device))
    job.model.train()
    job.world.sum([total])
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


def measure(job: Job, state: checkpoint.State, meter: Meter) -> None:
    """Score general and domain items into the log and `state`, on rank 0, and keep the weights where they are the best so far."""
    synchronize(job.device)
    begun = time.perf_counter()
    loss = heldout_loss(job)[0] if job.heldout and job.watch.wants_loss else None
    job.world.on_main(lambda: job.watch.measure(state, job.optimizer, loss, job.plan.total, job.log))
    state.measured, state.kept, state.missed = job.world.gather((state.measured, state.kept, state.missed))[0]
    spent = time.perf_counter() - begun
    meter.started += spent
    meter.aside += spent


def save(job: Job, state: checkpoint.State, meter: Meter) -> None:
    if meter.losses:
        report(job, state, meter)  # refuses to save what is not finite
    begun = time.perf_counter()
    folder, keep = job.folder / "checkpoints", job.config.checkpoint.keep
    job.world.on_main(lambda: checkpoint.save(folder, state, job.optimizer, keep))
    meter.started = time.perf_counter()
    meter.aside += meter.started - begun


def report(job: Job, state: checkpoint.State, meter: Meter) -> None:
    """Wait for the device, check that the interval was finite, write its figures, start the next one."""
    figures = torch.stack([torch.stack(meter.losses), torch.stack(meter.norms)])
    divergence = torch.stack(meter.divergences).mean() if meter.divergences else None
    job.world.sum([figures[0]] if divergence is None else [figures[0], divergence])
    synchronize(job.device)
    losses, norms = figures.tolist()
    require_finite(job, meter, losses, norms)
    seconds, counts, steps = time.perf_counter() - meter.started, meter.counts, len(losses)
    phases = {name: spent / steps for name, spent in meter.phases.read().items()}
    flops = job.size.flops(counts.tokens, counts.supervised, counts.squared_lengths)
    if flops is not None:
        flops += job.size.base_flops(counts.base_tokens, counts.base_supervised, counts.base_squared_lengths)
    peak, _ = peak_flops(job.device, next(job.model.parameters()).dtype)
    state.loss = float(np.mean(losses))
    if job.log:
        job.log.write({
            "kind": "step", "step": state.step, "epoch": round(job.plan.progress(state.step), 4), "loss": state.loss,
            **({} if divergence is None else {"kl": float(divergence)}),
            "lr": learning_rate(state.step - 1, job.plan.total, job.config.optim), "grad_norm": float(np.mean(norms)),
            "tokens": counts.tokens, "supervised": counts.supervised, "tokens_per_s": counts.tokens / seconds,
            "supervised_per_s": counts.supervised / seconds, "steps_per_s": steps / seconds,
            "mfu": None if flops is None else flops / seconds / (peak * job.world.size),
            "unfilled": 1 - counts.tokens / counts.capacity, "memory_gb": peak_memory_gb(job.device), "seconds": phases,
        })
    meter.losses, meter.norms, meter.divergences, meter.works, meter.counts = [], [], [], [], Counts()
    meter.started = time.perf_counter()


def require_finite(job: Job, meter: Meter, losses: list[float], norms: list[float]) -> None:
    for (step, sources), loss, norm in zip(meter.works, losses, norms):
        if not np.isfinite(loss + norm):
            last = checkpoint.newest(job.folder / "checkpoints")
            raise UserError(f"step {step + 1}: expected a finite loss and gradient, got loss {loss} and gradient norm {norm}; "
                            f"its batch holds samples of {', '.join(sources)}; last good checkpoint: {last or 'none'}; "
                            "lower optim.lr, or look at these sources' longest samples")


def finish(job: Job, state: checkpoint.State, ending: Ending, totals: Counts, seconds: float, aside: float) -> None:
    """The record of the whole run: rates over the seconds that were not spent on evaluating and saving."""
    if job.log:
        training, kept = max(seconds - aside, 1e-9), {"kept": state.kept["step"]} if state.kept else {}
        job.log.write({"kind": "end", "step": state.step, "steps": state.step, "seconds": seconds, "tokens": totals.tokens,
                       "supervised": totals.supervised, "tokens_per_s": totals.tokens / training,
                       "peak_memory_gb": peak_memory_gb(job.device), "reason": ending.reason, **kept})
        job.log.close()


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
