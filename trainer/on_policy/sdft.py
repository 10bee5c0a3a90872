"""Train by self-distillation (SDFT): the base, shown an example, teaches the model's own answers.

    y ~ model(· | x)          loss = Σ_t KL( base(· | x, y*, y_<t) ‖ model(· | x, y_<t) ) / T

for a chat of prompt x and answer y*, over the T tokens of the answers of a step (Shenfeld et al., arXiv 2601.19897; the authors' code uses
this direction of the KL). The teacher is the base, frozen. The model learns from an example only what the base can make of it in its
prompt, and its answers stay near what it says anyway.

Answers are given anew every `on_policy.every` steps, to the prompts that these steps train on, and kept in a file of the run folder. The
steps are planned beforehand, as all runs' are, with room for the longest answer. So a resumed run has the same steps, and reads the answers
of those that it was interrupted in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from trainer.config import Config, Retention
from trainer.data.demonstrations import Demonstrations
from trainer.data.samples import Piece, Samples
from trainer.on_policy.answers import Answered, as_samples


def retention_of(config: Config) -> Retention:
    """Return the options of the KL to the base that a run has: those of `retention`, or SDFT's."""
    if config.on_policy.method == "none":
        return config.retention
    return replace(config.retention, kl_weight=1.0, kl_sources="domain", kl_direction="forward", kl_only=True)


def with_answers(samples: Samples, indices: np.ndarray, answered: Sequence[Answered]) -> Samples:
    """Return all samples, with answers in those at `indices` [n], which had room for them."""
    place = np.arange(len(samples))
    place[indices] = len(samples) + np.arange(len(indices))
    kept = {name: getattr(samples, name) for name in ("names", "length_report", "sources", "weights", "records")}
    return replace(samples.beside(as_samples("answers", answered)).select(place), **kept)


def shown_to_teacher(piece: Piece, demonstrations: Demonstrations) -> Piece:
    """Return a domain sample as the teacher reads it: its answer after the prompt with the example."""
    shown, length = demonstrations.shown[piece.index], len(demonstrations.prompts[piece.index])
    answer = piece.input_ids[length:]
    ids = np.array([*shown, *answer], dtype=np.int32)
    return piece._replace(input_ids=ids, supervised=np.arange(len(ids)) >= len(shown))
