"""Give the training loop steps on answers that the model gives as it trains, anew every so many steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from trainer.data.demonstrations import Demonstrations
from trainer.data.samples import Samples
from trainer.errors import UserError
from trainer.metrics.timers import Phases
from trainer.on_policy import answers
from trainer.on_policy.responder import Responder
from trainer.on_policy.sdft import shown_to_teacher, with_answers
from trainer.training.loader import StepLoader, StepWork


@dataclass
class OnPolicyLoader:
    """Makes the work of each step from answers of the model as it was at most `every` steps before."""

    loader: StepLoader  # of samples that have room in place of their answers
    demonstrations: Demonstrations
    responder: Responder
    every: int

    @property
    def samples(self) -> Samples:
        """Return the samples, with room in place of answers."""
        return self.loader.samples

    def prefetch(self, first: int, phases: Phases) -> Iterator[StepWork]:
        """Yield the work of steps first .. total - 1.

        Raises UserError where the answers of an interrupted step are gone.
        """
        interrupted = first - first % self.every
        forget_after(self.responder.folder, interrupted)
        for begin in range(interrupted, self.loader.plan.total, self.every):
            with phases("answers"):
                loader = self.answered(begin, begun=first > begin)
            yield from loader.prefetch(max(first, begin), phases, begin + self.every)

    def answered(self, begin: int, begun: bool) -> StepLoader:
        """Return a loader of the steps from `begin` on, up to the next answers.

        With `begun` the first of these steps are done, so that the model is no longer the one that answered.
        """
        plan, samples, name = self.loader.plan, self.loader.samples, name_of(begin)
        steps = [plan[step] for step in range(begin, min(begin + self.every, plan.total))]
        indices = np.unique(np.concatenate([pack for packs in steps for pack in packs]))
        indices = indices[indices < len(self.demonstrations.prompts)]  # the domain's come first
        if begun and answers.read(self.responder.path(name)) is None:
            raise UserError(f"resume: expected the answers of the steps that were interrupted in {self.responder.path(name)}, found none "
                            "that are whole; set resume=never, or remove the checkpoints after step " + str(begin))
        if len(indices):
            room = (samples.lengths[indices] - [len(self.demonstrations.prompts[i]) for i in indices]).tolist()
            drawn = self.responder.answer(name, [self.demonstrations.prompts[i] for i in indices], begin, room)
            samples = with_answers(samples, indices, drawn)
        kl = replace(self.loader.kl, base_reads=partial(shown_to_teacher, demonstrations=self.demonstrations))
        return replace(self.loader, samples=samples, kl=kl)


def name_of(begin: int) -> str:
    """Return the name of the answers of the steps from `begin` on."""
    return f"step-{begin + 1:07d}"


def forget_after(folder: Path, begin: int) -> None:
    """Remove the answers of steps after `begin` and those that follow it, whose weights are gone."""
    for path in folder.glob("step-*"):
        if path.name.partition(".")[0] > name_of(begin):
            path.unlink()
