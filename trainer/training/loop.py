"""Run the training loop. A step: packs forward and backward, a sum over ranks, an optimizer update.

The loss of a step is the weighted mean over the supervised tokens of all its packs, on all ranks; the sum of weights is known on the
CPU before anything runs. The host waits for the device only at log, evaluation and checkpoint steps.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from trainer.config_rules import profiled_steps
from trainer.data.step_plan import hash_seed
from trainer.metrics.profiler import profiling
from trainer.metrics.timers import Phases
from trainer.model.sharding import keep_head_gathered
from trainer.optim.schedule import learning_rate
from trainer.runtime import checkpoint
from trainer.runtime.interrupts import Interrupts
from trainer.runtime.result import Ending
from trainer.training.loader import StepWork, TokenCounts
from trainer.training.loss import pack_loss
from trainer.training.meter import Meter, NotFinite, StepMetrics, log_end, log_interval
from trainer.training.training_run import TrainingRun
from trainer.training.validation import evaluate, measure_forgetting


def fit(run: TrainingRun, state: checkpoint.State, interrupts: Interrupts) -> Ending:
    """Train from `state`, which is kept up to date, to the end of the plan, an early stop or a signal.

    An error leaves a checkpoint of the last whole step, unless the weights are no good.
    """
    if state.ended:
        return Ending(state.ended)
    meter = Meter(run.device, Phases(run.device))
    try:
        return _fit(run, state, interrupts, meter)
    except NotFinite:
        raise
    except Exception:
        rescue(run, state, meter)
        raise


def _fit(run: TrainingRun, state: checkpoint.State, interrupts: Interrupts, meter: Meter) -> Ending:
    config, last = run.config, run.plan.total
    totals, begun, received = TokenCounts(), time.perf_counter(), None
    if run.eval_set and state.step == 0:
        evaluate(run, state, meter)  # the loss that training has to improve on
    if run.monitor and state.step in (0, last) and (state.last_measurement or {}).get("step") != state.step:
        measure_forgetting(run, state, meter)  # the base, or the last step of a run that an error ended there
    run.model.train()
    steps = profiled_steps(config.logging.profile_steps) if run.dist.is_main else None
    with (garbage_at_log_steps(),
          profiling(steps, run.folder, run.device, meter.phases, state.step) as profile):
        for work in run.loader.prefetch(state.step, meter.phases):
            if received or out_of_patience(run, state):
                break
            metrics = train_step(run, work, meter.phases)
            state.step = work.step + 1
            meter.add(work, metrics)
            totals = totals + work.counts
            if run.log:
                run.log.advance()
            if due(state.step, config.logging.every) or state.step == last:
                log_interval(run, state, meter)
                gc.collect(1)
            if run.eval_set and (due(state.step, config.eval.every) or state.step == last):
                evaluate(run, state, meter)
            if run.monitor and (due(state.step, config.forgetting.every) or state.step == last or out_of_patience(run, state)):
                measure_forgetting(run, state, meter)
            if state.step < last and (run.dist.size == 1 or due(state.step, config.logging.every)):  # with several ranks this waits
                received = max(run.dist.gather(interrupts.received or 0))
            if due(state.step, config.checkpoint.every) or received:
                save(run, state, meter)
            profile(state.step)
    if meter.steps:
        log_interval(run, state, meter)  # an early stop comes between log steps
    ending = ended(run, state, received)
    state.ended = None if ending.signal else ending.reason
    if state.ended:
        run.optimizer.keep_average()
    log_end(run, state, ending, totals, time.perf_counter() - begun, meter)
    return ending


def train_step(run: TrainingRun, work: StepWork, phases: Phases) -> StepMetrics:
    """Train on one step: forward and backward of this rank's packs, the sum over ranks, the update.

    Reads of `run`: model, kl, balance, optimizer, plan.total, dist, device, config.seed and config.optim. `work` comes from `run.loader`.
    Nothing waits for the device.
    """
    torch.manual_seed(hash_seed(run.config.seed, work.step, run.dist.rank))  # dropout depends on nothing but the step
    loss = torch.zeros((), device=run.device)
    kl = torch.zeros((), device=run.device) if work.has_kl else None
    router_aux_loss = torch.zeros((), device=run.device) if run.balance else None
    for i, batch in enumerate(work.batches):
        pack = pack_loss(run.model, batch, work, run.kl, phases, run.balance)
        if i >= len(work.batches) - work.only_in_step:
            pack = pack.without_value()
        if run.dist.sharded:
            keep_head_gathered(run.model, i + 1 < len(work.batches))
        with phases("backward"):
            pack.objective.backward()
            run.optimizer.collect()
        loss += pack.loss.detach()
        if pack.kl is not None:
            kl += pack.kl.detach()
        if router_aux_loss is not None:
            router_aux_loss += pack.router_aux_loss.detach()
    with phases("optimizer"):
        run.optimizer.sum_gradients(run.dist)
        grad_norm = run.optimizer.step(learning_rate(work.step, run.plan.total, run.config.optim))
        run.optimizer.zero_grad()
    return StepMetrics(loss, grad_norm, kl, router_aux_loss)


def out_of_patience(run: TrainingRun, state: checkpoint.State) -> bool:
    """Return whether the eval loss or the general accuracy has gone too long without improving."""
    patience = run.config.eval.patience
    return (patience > 0 and state.evals_since_best >= patience) or floor_given_up(run, state)


def floor_given_up(run: TrainingRun, state: checkpoint.State) -> bool:
    return run.monitor is not None and run.monitor.given_up(state)


def ended(run: TrainingRun, state: checkpoint.State, received: int | None) -> Ending:
    """Return why the loop ended, with the number of the signal that was received, if any."""
    if received:
        return Ending("signal", received)
    if state.step < run.plan.total:
        return Ending("floor" if floor_given_up(run, state) else "early stopping")
    return Ending("finished" if run.plan.total == run.plan.starts[-1] else "max_steps")


def save(run: TrainingRun, state: checkpoint.State, meter: Meter) -> None:
    """Write a checkpoint, unless a loss or gradient since the last log line was not finite."""
    if meter.steps:
        log_interval(run, state, meter)
    with meter.paused():
        write_checkpoint(run, state)


def write_checkpoint(run: TrainingRun, state: checkpoint.State) -> Path:
    """Write a checkpoint, from all ranks, and return its folder. Raises UserError."""
    folder, keep = run.folder / "checkpoints", run.config.checkpoint.keep
    if run.dist.sharded:
        return checkpoint.save_sharded(folder, state, run.optimizer, keep, run.dist)
    run.dist.on_main(lambda: checkpoint.save(folder, state, run.optimizer, keep))
    return checkpoint.place(folder, state.step)


def rescue(run: TrainingRun, state: checkpoint.State, meter: Meter) -> None:
    """Write a checkpoint of the last whole step after an error, and say where.

    Rank 0 does it alone, as others may be gone, so not where it has a part of the weights.
    """
    folder = run.folder / "checkpoints"
    wanted = run.dist.is_main and not run.dist.sharded and state.step and not checkpoint.place(folder, state.step).exists()
    with contextlib.suppress(Exception):  # the error before is the one to report
        if wanted and run.optimizer.whole and meter.is_finite():
            path = checkpoint.save(folder, state, run.optimizer, run.config.checkpoint.keep)
            print(f"step {state.step} is saved in {path}; continue with the same command and --resume auto", file=sys.stderr)


@contextmanager
def garbage_at_log_steps():
    """Collect garbage at log steps only, and never walk the objects that existed before training."""
    frozen_before = gc.get_freeze_count()  # by the program around: these stay frozen
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        if not frozen_before:
            gc.unfreeze()


def due(step: int, every: int) -> bool:
    """Return whether something that is done every so many steps (0: never) is done after this one."""
    return every > 0 and step % every == 0
