"""Give the training loop its steps round by round, each on answers given as the round began.

To the loop the rounds are one run of `rounds * steps` steps. The work of a round is made when its first step is asked for, after the last
step of the round before: then the model answers. A run that resumes within a round finds its answers in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from trainer.config import BatchSize
from trainer.data.samples import Samples
from trainer.metrics.timers import Phases
from trainer.recovery.goal import Goal
from trainer.runtime import checkpoint
from trainer.training.loader import StepLoader, StepWork


@dataclass(frozen=True)
class RoundPlan:
    """The steps of all rounds, as the loop and its log read them from a plan."""

    rounds: int
    steps: int  # of a round
    batch_size: BatchSize

    @property
    def total(self) -> int:
        """Return the number of steps."""
        return self.rounds * self.steps

    @property
    def starts(self) -> list[int]:
        """Return the first step of each round, then the end."""
        return [round_ * self.steps for round_ in range(self.rounds + 1)]

    def progress(self, done: int) -> float:
        """Return the number of rounds, with its fraction, that the first `done` steps complete."""
        return done / self.steps


@dataclass
class RoundLoader:
    """Makes the work of each step from the samples of its round."""

    plan: RoundPlan
    samples: Samples  # of the domain, which are those of every round
    open_round: Callable[[int], StepLoader]  # from its number, counted from 0: the loader of its steps, on the model's answers
    state: checkpoint.State  # of the run, as the loop keeps it
    goal: Goal

    def prefetch(self, first: int, phases: Phases) -> Iterator[StepWork]:
        """Yield the work of steps first .. total - 1, or up to the end of a round that reaches the goal."""
        for round_ in range(first // self.plan.steps, self.plan.rounds):
            begin = round_ * self.plan.steps
            if self.goal.reached(self.state.last_measurement):
                return
            with phases("answers"):
                loader = self.open_round(round_)
            for work in loader.prefetch(max(first - begin, 0), phases):
                yield replace(work, step=begin + work.step)
