"""Collect the figures of a log interval, and write them as records."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.metrics.throughput import peak_flops
from trainer.metrics.timers import Phases, peak_memory_gb, synchronize
from trainer.optim.schedule import learning_rate
from trainer.runtime import checkpoint
from trainer.runtime.device import compute_dtype
from trainer.runtime.result import Ending
from trainer.training.loader import StepWork, TokenCounts
from trainer.training.training_run import TrainingRun


class NotFinite(UserError):
    """A loss or a gradient that is no number: the weights behind it are no good."""


class StepMetrics(NamedTuple):
    """Figures of one step, on the device.

    Loss, KL and load-balancing loss are this rank's shares, and add up over ranks; the norm is the whole step's.
    """

    loss: Tensor
    grad_norm: Tensor
    kl: Tensor | None  # None where the step has no KL rows
    router_aux_loss: Tensor | None  # None where the run has no load-balancing loss


@dataclass
class Meter:
    """Figures since the last log line. Those of the device stay there until `log_interval` reads them."""

    device: torch.device
    phases: Phases
    steps: list[StepMetrics] = field(default_factory=list)
    sources: list[tuple[int, list[str]]] = field(default_factory=list)  # of each step: its number, and the sources of its samples
    counts: TokenCounts = field(default_factory=TokenCounts)
    started: float = field(default_factory=time.perf_counter)
    paused_seconds: float = 0.0  # of the whole run, spent on evaluating and saving

    def add(self, work: StepWork, metrics: StepMetrics) -> None:
        self.steps.append(metrics)
        self.sources.append((work.step, work.sources))
        self.counts = self.counts + work.counts

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent inside out of the training rates. Waits for the steps that are still under way."""
        synchronize(self.device)
        begun = time.perf_counter()
        yield
        spent = time.perf_counter() - begun
        self.started += spent
        self.paused_seconds += spent

    def is_finite(self) -> bool:
        """Return whether all losses and norms since the last log line are finite on this rank."""
        return all(bool(torch.isfinite(step.loss + step.grad_norm)) for step in self.steps)

    def restart(self) -> None:
        """Begin the next interval."""
        self.steps, self.sources, self.counts = [], [], TokenCounts()
        self.phases.read()  # on ranks that write no record
        self.started = time.perf_counter()


def log_interval(run: TrainingRun, state: checkpoint.State, meter: Meter) -> None:
    """Wait for the device, check that the interval was finite, write its record, begin the next one.

    Raises NotFinite if it was not.
    """
    figures = torch.stack([torch.stack([step.loss for step in meter.steps]), torch.stack([step.grad_norm for step in meter.steps])])
    terms = {}
    for name in ("kl", "router_aux_loss"):
        if values := [value for step in meter.steps if (value := getattr(step, name)) is not None]:
            terms[name] = torch.stack(values).mean()
    run.dist.sum([figures[0], *terms.values()])
    synchronize(run.device)
    losses, norms = figures.tolist()
    require_finite(run, meter, losses, norms)
    state.loss = float(np.mean(losses))
    if run.log:
        run.log.write(interval_record(run, state, meter, float(np.mean(norms)), {name: float(term) for name, term in terms.items()}))
    meter.restart()


def interval_record(run: TrainingRun, state: checkpoint.State, meter: Meter, grad_norm: float, terms: dict[str, float]) -> dict:
    """Return the record of an interval whose steps the device has finished.

    `terms` are those of the objective beside the loss.
    """
    seconds, counts, steps = time.perf_counter() - meter.started, meter.counts, len(meter.steps)
    flops = run.size.flops(counts.tokens, counts.supervised, counts.squared_lengths)
    if flops is not None:
        flops += run.size.base_flops(counts.base_tokens, counts.base_supervised, counts.base_squared_lengths)
    peak, _ = peak_flops(run.device, compute_dtype(run.config.precision, run.device))
    return {
        "kind": "step", "step": state.step, "epoch": round(run.plan.progress(state.step), 4), "loss": state.loss,
        **terms,
        "lr": learning_rate(state.step - 1, run.plan.total, run.config.optim), "grad_norm": grad_norm,
        "tokens": counts.tokens, "supervised": counts.supervised, "tokens_per_s": counts.tokens / seconds,
        "supervised_per_s": counts.supervised / seconds, "steps_per_s": steps / seconds,
        "mfu": None if flops is None else flops / seconds / (peak * run.dist.size),
        "unfilled": 1 - counts.tokens / counts.capacity, "memory_gb": peak_memory_gb(run.device),
        "seconds": {name: spent / steps for name, spent in meter.phases.read().items()},
    }


def require_finite(run: TrainingRun, meter: Meter, losses: list[float], norms: list[float]) -> None:
    """Raise NotFinite at the first step whose loss or gradient norm is not finite."""
    for (step, sources), loss, norm in zip(meter.sources, losses, norms):
        if not np.isfinite(loss + norm):
            last = checkpoint.newest(run.folder / "checkpoints")
            raise NotFinite(f"step {step + 1}: expected a finite loss and gradient, got loss {loss} and gradient norm {norm}; "
                            f"its batch holds samples of {', '.join(sources)}; last good checkpoint: {last or 'none'}; "
                            "lower optim.lr, or look at these sources' longest samples")


def log_end(run: TrainingRun, state: checkpoint.State, ending: Ending, totals: TokenCounts, seconds: float, meter: Meter) -> None:
    """Write the record of the whole run; its rates leave out the time of evaluating and saving."""
    if run.log:
        training_seconds = max(seconds - meter.paused_seconds, 1e-9)
        kept = {"kept": state.kept_measurement["step"]} if state.kept_measurement else {}
        run.log.write({"kind": "end", "step": state.step, "steps": state.step, "seconds": seconds, "tokens": totals.tokens,
                       "supervised": totals.supervised, "tokens_per_s": totals.tokens / training_seconds,
                       "peak_memory_gb": peak_memory_gb(run.device), "reason": ending.reason, **kept})
        run.log.close()
