"""Collect the figures of a log interval, and write them as records."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.metrics.throughput import peak_flops
from trainer.metrics.timers import Phases, peak_memory_gb, synchronize
from trainer.optim.schedule import learning_rate
from trainer.runtime import checkpoint
from trainer.runtime.result import Ending
from trainer.training.job import Job
from trainer.training.loader import StepWork, TokenCounts


@dataclass
class Meter:
    """Figures since the last log line; those of the device stay there until `report` reads them."""

    phases: Phases
    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    divergences: list[Tensor] = field(default_factory=list)  # from the base, of steps that count it
    works: list[tuple[int, list[str]]] = field(default_factory=list)
    counts: TokenCounts = field(default_factory=TokenCounts)
    started: float = field(default_factory=time.perf_counter)
    aside: float = 0.0  # seconds of the whole run spent on evaluating and saving

    def add(self, work: StepWork, loss: Tensor, norm: Tensor) -> None:
        self.losses.append(loss)
        self.norms.append(norm)
        if work.divergence is not None:
            self.divergences.append(work.divergence)
        self.works.append((work.step, work.sources))
        self.counts = self.counts + work.counts


def report(job: Job, state: checkpoint.State, meter: Meter) -> None:
    """Wait for the device, check that the interval was finite, write its figures, start the next one."""
    figures = torch.stack([torch.stack(meter.losses), torch.stack(meter.norms)])
    divergence = torch.stack(meter.divergences).mean() if meter.divergences else None
    job.dist.sum([figures[0]] if divergence is None else [figures[0], divergence])
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
            "mfu": None if flops is None else flops / seconds / (peak * job.dist.size),
            "unfilled": 1 - counts.tokens / counts.capacity, "memory_gb": peak_memory_gb(job.device), "seconds": phases,
        })
    meter.losses, meter.norms, meter.divergences, meter.works, meter.counts = [], [], [], [], TokenCounts()
    meter.started = time.perf_counter()


def require_finite(job: Job, meter: Meter, losses: list[float], norms: list[float]) -> None:
    for (step, sources), loss, norm in zip(meter.works, losses, norms):
        if not np.isfinite(loss + norm):
            last = checkpoint.newest(job.folder / "checkpoints")
            raise UserError(f"step {step + 1}: expected a finite loss and gradient, got loss {loss} and gradient norm {norm}; "
                            f"its batch holds samples of {', '.join(sources)}; last good checkpoint: {last or 'none'}; "
                            "lower optim.lr, or look at these sources' longest samples")


def finish(job: Job, state: checkpoint.State, ending: Ending, totals: TokenCounts, seconds: float, aside: float) -> None:
    """The record of the whole run: rates over the seconds that were not spent on evaluating and saving."""
    if job.log:
        training, kept = max(seconds - aside, 1e-9), {"kept": state.kept["step"]} if state.kept else {}
        job.log.write({"kind": "end", "step": state.step, "steps": state.step, "seconds": seconds, "tokens": totals.tokens,
                       "supervised": totals.supervised, "tokens_per_s": totals.tokens / training,
                       "peak_memory_gb": peak_memory_gb(job.device), "reason": ending.reason, **kept})
        job.log.close()
